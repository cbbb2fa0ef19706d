"""Workdirs made of other projects' weights, and weights for other projects made of workdirs."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ddpm_jax.data.dataset import training_images
from ddpm_jax.interop import plain, transformers
from ddpm_jax.interop.diffusers import autoencoder as autoencoder_lib
from ddpm_jax.interop.diffusers import folder as diffusers_folder
from ddpm_jax.interop.diffusers import stable_diffusion
from ddpm_jax.run import Run
from ddpm_jax.runtime import workdir
from ddpm_jax.runtime.checkpoints import Checkpoints
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import new_folder
from ddpm_jax.sampling.decoder import Pixels
from ddpm_jax.training import autoencoders

Tell = Callable[[str], None]


def _silent(sentence: str) -> None:
    pass


def import_weights(source: str, path: str | Path, tell: Tell = _silent) -> Path:
    """Makes a workdir, to sample from, to evaluate and to start training from with --init_from.

    Args:
      source: a diffusers folder or its name on the Hugging Face hub, or a .safetensors file of `export_weights`.
      path: the workdir; must not be there, or be empty.
      tell: given each sentence about what the run samples otherwise than the source's program.

    Returns:
      The workdir, whole; nothing is left of one that could not be made.

    Raises:
      UserError: a source that is missing, broken or asks for something that is not supported, or a workdir in use.
    """
    if jax.process_count() > 1:
        raise UserError("weights are imported by one process, not by a job of several")
    notes: list[str] = []
    write_parts: Callable[[Path], None] = lambda folder: None  # noqa: E731
    if source.endswith(".safetensors"):
        config, dataset, step, params = plain.read(os.path.expanduser(source))
    elif stable_diffusion.is_pipeline(folder := diffusers_folder.locate(source)):
        pipeline = stable_diffusion.read(folder, source)
        config, step, params, notes = pipeline.config, 0, pipeline.params, pipeline.notes
        dataset = _description(source, config, params, 0) | {"diffusers": dataclasses.asdict(pipeline.layout)}
        dataset |= {"tokenizer": pipeline.tokenizer.to_json(), "shown_captions": [""]}
        write_parts = partial(_write_parts, pipeline)
    else:
        described, params = diffusers_folder.read(folder)
        config, step, notes = described.config, 0, described.notes
        dataset = _description(source, config, params, described.num_classes)
    for note in notes:
        tell(note)
    with new_folder(path, "--workdir", workdir.LOCK) as temporary, workdir.locked(path, "import"):
        write_parts(temporary)
        workdir.record(temporary, config, {**dataset, "imported": source})
        checkpoints = Checkpoints(temporary)
        checkpoints.save_weights(step, jax.tree.map(jnp.asarray, params))
        checkpoints.close()
    return Path(path).expanduser()


def _write_parts(pipeline: stable_diffusion.Pipeline, folder: Path) -> None:
    """The frozen parts of a pipeline, to the places in a workdir where `workdir.read_dataset` finds them."""
    transformers.write(folder / workdir.TEXT_ENCODER, *pipeline.text_encoder)
    autoencoder_lib.write(folder / workdir.AUTOENCODER, *pipeline.autoencoder)


def _description(source: str, config: ConfigDict, params: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """What stands for the images that these weights learned from, which are not known here."""
    digest = hashlib.sha256()
    for name, value in sorted(flatten_dict(params, sep=".").items()):
        digest.update(name.encode() + value.tobytes())
    data = config.data
    return {
        "source": "import",
        "name": source,
        "num_images": 0,
        "shape": [data.height, data.width, data.channels],
        "class_names": [str(number) for number in range(num_classes)],
        "fingerprint": digest.hexdigest(),
    }


def export_weights(run: Run, out: str | Path, tell: Tell = _silent) -> Path:
    """Writes a run's weights: a folder for diffusers, or where `out` ends in .safetensors a file of our own names.

    Args:
      run: of `ddpm_jax.load`; one that takes prompts must be a Stable Diffusion.
      out: must not be there, or as a folder be empty.
      tell: given each sentence about what diffusers samples otherwise than the run.

    Raises:
      UserError: `out` is there already, or the run has something that diffusers does not have.
    """
    if jax.process_count() > 1:
        raise UserError("weights are exported by one process, not by a job of several")
    params = jax.device_get(run.params)
    if str(out).endswith(".safetensors"):
        return plain.write(out, run.config, run.dataset, run.step, params)
    if run.condition.reads.keys() - {"label"}:
        notes = stable_diffusion.write(out, run.config, run.dataset, run.model, params)
    elif not isinstance(run.model.decoder, Pixels):
        raise UserError(
            "this run diffuses an autoencoder's latents without prompts, for which diffusers has no pipeline of such an "
            "autoencoder; accepted: --out of a .safetensors file"
        )
    else:
        notes = diffusers_folder.write(out, run.config, run.net, params)
    for note in notes:
        tell(note)
    return Path(out).expanduser()


def export_autoencoder(path: str | Path, out: str | Path) -> Path:
    """Writes the autoencoder that a run trained as a folder of diffusers' `AutoencoderKL`.

    The scaling factor of its latents is the config's, or else measured on the images that it learned from.

    Args:
      path: a workdir with train.objective "autoencoder".
      out: must not be there, or be empty.

    Raises:
      UserError: no autoencoder there, `out` is there already, or the images that it learned from are not.
    """
    config, dataset = workdir.read_config(path), workdir.read_dataset(path)
    net, params, _ = autoencoders.load_autoencoder(path)
    factor = config.autoencoder.scaling_factor
    if not factor:
        factor = autoencoders.measured_scaling(net, params, training_images(config, dataset or {}))
    autoencoder_lib.write(out, net, jax.device_get(params), factor)
    return Path(out).expanduser()
