"""Summaries of sets of images for evaluation, computed batch by batch and shard by shard."""

import dataclasses
import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from ddpm_jax.evaluation.features import Features
from ddpm_jax.evaluation.image_sets import read_array
from ddpm_jax.evaluation.metrics import Accumulator, Moments
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import atomic_path
from ddpm_jax.sampling import shards

_SUMMED, _KEPT = ("pool", "spatial"), ("pool", "logits")
_CACHE_FORMAT = 1  # of the features beside shards
Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Summary:
    """The features of a set of images, from which metrics are computed.

    Attributes:
      features: the name of the network; "" if a file does not give it.
      moments: of "pool" and, if the network has it, "spatial".
      rows: float32 [N, ...], "pool" and, if the network has it, "logits"; empty: only moments.
      count: number of images; None if a file does not give it.
      source: where the images come from, as JSON values.
      halves: the Frechet distance between two halves of the images, if it is known and `rows` is empty.
    """

    features: str
    moments: Mapping[str, Moments]
    rows: Mapping[str, np.ndarray]
    count: int | None
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    halves: float | None = None


def summarize(
    features: Features,
    images: Iterable[np.ndarray],
    mesh: Mesh,
    *,
    batch_size: int = 64,
    keep: bool = True,
    source: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Summarises images, which are read once, with one batch in memory at a time.

    Args:
      features: the feature network.
      images: uint8 [N, H, W, C] in any portions.
      mesh, batch_size: the devices, and the number of images at a time; see `Features.batches`.
      keep: whether to keep the features of each image, which all metrics but Frechet distances need.
      source: where the images come from.
      progress: called with the number of images done.

    Raises:
      UserError: as for `Features.batches`.
    """
    return _summary(features.name, features.batches(images, mesh, batch_size), keep, source, progress)


def _summary(
    name: str,
    batches: Iterable[Mapping[str, np.ndarray]],
    keep: bool,
    source: Mapping[str, Any] | None,
    progress: Progress | None = None,
) -> Summary:
    sums: dict[str, Accumulator] = {}
    kept: dict[str, list[np.ndarray]] = {}
    count = 0
    for batch in batches:
        for what, values in batch.items():
            if what in _SUMMED:
                sums.setdefault(what, Accumulator()).add(values)
            if keep and what in _KEPT:
                kept.setdefault(what, []).append(values)
        count += len(batch["pool"])
        if progress:
            progress(count)
    moments = {what: total.moments() for what, total in sums.items()}
    rows = {what: _joined(kept.pop(what)) for what in list(kept)}
    return Summary(name, moments, rows, count, dict(source or {}))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """np.concatenate(parts), but frees each part after copying it."""
    whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    first, parts[:] = len(whole), parts
    while parts:
        part = parts.pop()
        whole[first - len(part) : first] = part
        first -= len(part)
    return whole


# Shards, whose features are kept beside them.


def _cache_path(shard: Path, features: Features) -> Path:
    return shard.parent / f"features_{features.digest}" / shard.name


def _read_cached(path: Path, shard: str) -> dict[str, np.ndarray] | None:
    """The stored features of the shard with this hash; None if they are missing, damaged or of another shard."""
    try:
        with np.load(path) as file:
            if str(file["shard"]) == shard:
                return {name: file[name] for name in file.files if name != "shard"}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logging.warning("%s cannot be read (%s); it will be computed again", path, type(error).__name__)
    return None


def _shard_hash(path: Path) -> str:
    with path.open("rb") as file:
        return f"{_CACHE_FORMAT} {hashlib.file_digest(file, 'sha256').hexdigest()}"


def shard_features(
    folder: str | Path,
    features: Features,
    mesh: Mesh,
    *,
    batch_size: int = 64,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Computes and stores the features of a folder's shards that have none yet, each file atomically, so that
    interrupted work can be resumed.

    Args:
      folder: of the shards; features go to a sub-folder named after the network.
      features, batch_size: the feature network, and the number of images at a time.
      mesh: this process's own, if several processes share the work.
      part: (i, n): only every n-th shard from the i-th on, so that several machines or processes can share the work.
      progress: called with (shards done, all shards) of this part.

    Raises:
      UserError: no shards there, one that cannot be read, or an invalid part.
    """
    shards.check_part(part)
    index, parts = part
    mine = _shards_of(folder)[index::parts]
    for done, shard in enumerate(mine):
        if progress:
            progress(done, len(mine))
        path, name = _cache_path(shard, features), _shard_hash(shard)
        if _read_cached(path, name) is None:
            found = features.of(read_array(shard), mesh, batch_size)
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez(file, shard=name, **found)  # type: ignore[arg-type]
    if progress:
        progress(len(mine), len(mine))


def local_mesh() -> Mesh:
    """This process's own devices, for images that it alone has."""
    return Mesh(np.array(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,))


def share_features(folder: str | Path, features: Features, mesh: Mesh, **options: Any) -> None:
    """Runs `shard_features` for all shards, shared among the processes of this job, which see the same folder. All
    processes must call it, and it returns when all are done."""
    if jax.process_count() == 1:
        shard_features(folder, features, mesh, **options)
        return
    shard_features(folder, features, local_mesh(), part=(jax.process_index(), jax.process_count()), **options)
    multihost_utils.sync_global_devices("features of shards")


def _shards_of(folder: str | Path) -> list[Path]:
    found = [path for path, _, _ in shards.files(folder)]
    if not found:
        raise UserError(f"{str(folder)!r} holds no shards, images_000000000-000000999.npz and so on")
    return found


def shard_summary(folder: str | Path, features: Features, *, count: int | None = None, keep: bool = True) -> Summary:
    """Summarises a folder's shards from the features stored by `shard_features`, shard by shard.

    Args:
      folder, features: as in `shard_features`.
      count: only the first images, by index; None: all.
      keep: as in `summarize`.

    Raises:
      UserError: a shard without its features, or fewer images than `count`.
    """

    def batches() -> Iterator[dict[str, np.ndarray]]:
        left = count
        for shard in _shards_of(folder):
            if left == 0:
                return
            found = _read_cached(_cache_path(shard, features), _shard_hash(shard))
            if found is None:
                raise UserError(f"{str(shard)!r} has no features of {features.name} yet: not all parts are done")
            yield {name: values[:left] for name, values in found.items()}
            left = None if left is None else max(left - len(found["pool"]), 0)
        if left:
            raise UserError(f"{str(folder)!r} has {count - left} images, fewer than {count}")  # type: ignore[operator]

    source = {"source": "shards", "path": str(folder)}
    return _summary(features.name, batches(), keep, source)
