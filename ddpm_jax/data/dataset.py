"""A run's data set: opened from its config, and reopened later from the description in its workdir."""

from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from ddpm_jax.data.files import FolderSource
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import open_source
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.progress import ProgressBar


def source_arguments(config: ConfigDict) -> dict[str, Any]:
    """The keyword arguments of `open_source` that the config determines, except for the kind."""
    data = config.data
    names = ("name", "split", "path", "height", "width", "channels", "num_digits", "held_out", "caption")
    return {
        **{name: data[name] for name in names},
        "data_dir": data.data_dir or None,
        "labels": config.model.class_conditional,
        "captions": bool(config.text.encoder),
    }


def open_dataset(config: ConfigDict, known: dict[str, Any] | None = None) -> Source:
    """Opens the config's source. For a folder, all images are decoded once to find broken ones.

    Args:
      config: of the run.
      known: the description from an earlier start of the run; its folder is not checked again.

    Raises:
      UserError: a broken image, unless config.data.skip_broken.
    """
    data, arguments = config.data, source_arguments(config)
    if known is not None:
        return open_source(data.source, skipped=known.get("skipped", ()), **arguments)
    source = open_source(data.source, **arguments)
    if isinstance(source, FolderSource):
        with ProgressBar("checking images", len(source), enabled=jax.process_index() == 0) as bar:
            broken = source.find_broken(bar.update)
        if broken:
            first, error = next(iter(broken.items()))
            if not data.skip_broken:
                raise UserError(
                    f"{len(broken)} of {len(source)} images in {data.path!r} cannot be read, the first {first!r}: "
                    f"{error}; remove them, or skip them with --config.data.skip_broken"
                )
            logging.warning("Skipping %d of %d images that cannot be read:", len(broken), len(source))
            for name, error in broken.items():
                logging.warning("  %s: %s", name, error)
            source = open_source(data.source, skipped=sorted(broken), **arguments)
    return source


def training_images(config: ConfigDict, description: dict[str, Any]) -> Source:
    """Reopens a run's training set.

    Args:
      config: of the run.
      description: the run's description of its training set.

    Raises:
      UserError: the training set is missing or has changed.
    """
    if "imported" in description:
        raise UserError("this run was imported, so its training set is not known")
    source = open_dataset(config, description)
    if source.describe()["fingerprint"] != description["fingerprint"]:
        raise UserError("this run's training set has changed: the names, sizes or contents of its images differ")
    return source
