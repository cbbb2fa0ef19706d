"""Reference statistics to compare samples with: made from any images, or read from published files.

Files are .npz. pytorch-fid's contain `mu` [D] and `sigma` [D, D]; guided-diffusion's contain images, `arr_0` uint8
[N, H, W, 3], and optionally `mu`, `sigma`, `mu_s`, `sigma_s` of a larger set of images, the last two for sFID. Files
written here contain the moments under the same names, so both projects can read them, and also `count`, `features`,
`source` (JSON) and `halves`, the Frechet distance between two halves of the images.
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ddpm_jax.evaluation.features import Features
from ddpm_jax.evaluation.image_sets import Shape, open_images
from ddpm_jax.evaluation.metrics import Moments, split_distance
from ddpm_jax.evaluation.summaries import Summary, shard_summary, share_features, summarize
from ddpm_jax.runtime.errors import UserError, first_line
from ddpm_jax.runtime.files import atomic_path
from ddpm_jax.sampling import shards

_NAMES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_UNKNOWN_COUNT = 2  # if a file does not give the count; the covariance does not depend on it


def write_reference(path: str | Path, summary: Summary) -> None:
    """Writes the moments of a summary, and their origin, as .npz.

    Raises:
      UserError: it cannot be written.
    """
    arrays: dict[str, Any] = {"features": summary.features, "source": json.dumps(dict(summary.source))}
    for name, (mu, sigma) in _NAMES.items():
        if name in summary.moments:
            arrays |= {mu: summary.moments[name].mean, sigma: summary.moments[name].covariance}
    if summary.count is not None:
        arrays["count"] = summary.count
    halves = halves_of(summary)
    if halves is not None:
        arrays["halves"] = halves
    try:
        with atomic_path(Path(path).expanduser()) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error}") from None


def halves_of(summary: Summary) -> float | None:
    """The Frechet distance between two halves of the images, if it is known or can be computed."""
    rows = summary.rows.get("pool")
    if summary.halves is not None or rows is None or len(rows) < 4:
        return summary.halves
    return split_distance(rows, len(rows) // 2)


def read_reference(path: str | Path) -> Summary:
    """Reads the moments in a .npz, ignoring any images in it.

    Raises:
      UserError: a file that is missing or broken, or has no moments.
    """
    path = Path(path).expanduser()
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files if name not in ("arr_0", "arr_1")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"the reference {str(path)!r} cannot be read: {first_line(error)}") from None
    count = int(arrays["count"]) if "count" in arrays else None
    moments = {}
    for name, (mu, sigma) in _NAMES.items():
        if mu in arrays and sigma in arrays:
            mean, covariance = np.atleast_1d(arrays[mu]), np.atleast_2d(arrays[sigma])
            if mean.ndim != 1 or covariance.shape != (len(mean),) * 2:
                raise UserError(f"the reference {str(path)!r} has {mu} {mean.shape} and {sigma} {covariance.shape}")
            if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
                raise UserError(f"the reference {str(path)!r} has numbers in {mu} or {sigma} that are not finite")
            moments[name] = Moments.from_covariance(mean, covariance, count or _UNKNOWN_COUNT)
    if "pool" not in moments:
        raise UserError(f"the reference {str(path)!r} has the arrays {sorted(arrays)}; mu and sigma are needed")
    source: Mapping[str, Any] = {"source": "reference", "path": str(path)}
    if "source" in arrays:
        source = {**json.loads(str(arrays["source"])), "reference": str(path)}
    halves = float(arrays["halves"]) if "halves" in arrays else None
    return Summary(str(arrays.get("features", "")), moments, {}, count, source, halves)


def open_summary(
    path: str | Path,
    features: Features,
    mesh: Mesh,
    *,
    shape: Shape | None = None,
    batch_size: int = 64,
    keep: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Opens the summary of a reference file, a folder of shards or pictures, or an array of images.

    No model is needed: `compare` works on the summaries of two folders. Features of shards are kept beside them, see
    `share_features`. For a file with images and moments, Frechet distances use the moments and everything else the
    images, as in guided-diffusion's evaluation.

    Args:
      path: of the folder or file.
      features, mesh, batch_size, keep: as in `summarize`.
      shape: as in `open_images`; None: that of the features, if they have one.
      progress: called with (images done, all images), or with numbers of shards for a folder of shards.

    Raises:
      UserError: nothing there, or something that cannot be evaluated.
    """
    path = Path(path).expanduser()
    if path.is_dir() and shards.files(path):
        share_features(path, features, mesh, batch_size=batch_size, progress=progress)
        return shard_summary(path, features, keep=keep)
    names = _names_in(path)
    reference = read_reference(path) if {"mu", "sigma"} <= names else None
    if reference and "arr_0" not in names:
        return reference
    images = open_images(path, shape or features.shape)
    tell = (lambda done: progress(done, images.count)) if progress else None
    source = images.source
    found = summarize(features, images, mesh, batch_size=batch_size, keep=keep, source=source, progress=tell)
    if reference is None:
        return found
    source = {**images.source, "moments": "of the file"}
    return Summary(features.name, {**found.moments, **reference.moments}, found.rows, reference.count, source)


def _names_in(path: Path) -> set[str]:
    if path.suffix != ".npz" or not path.is_file():
        return set()
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{str(path)!r} cannot be read: {first_line(error)}") from None
