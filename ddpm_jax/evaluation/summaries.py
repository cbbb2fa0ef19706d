"""What is kept of a set of images to judge it by, put together batch by batch and shard by shard."""

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
    """A set of images as metrics see it.

    Attributes:
      features: the name of the network; "" if a file does not say.
      moments: of "pool" and, if the network has it, "spatial".
      rows: float32 [N, ...], "pool" and, if the network has it, "logits"; empty: moments alone.
      count: how many images; None if a file does not say.
      source: what images they are, as JSON values.
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
    """The summary of images, which are read once and held a batch at a time.

    Args:
      features: what judges.
      images: uint8 [N, H, W, C] in any portions.
      mesh, batch_size: where features are computed, and how many images at a time; see `Features.batches`.
      keep: the features of each image too, which all but Frechet distances need.
      source: what images they are.
      progress: told how many are done.

    Raises:
      UserError: as `Features.batches`.
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
    """np.concatenate(parts), which lets go of each part as it is copied."""
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
    """Features kept of a shard with this hash; None if there are none, or they are damaged or of another one."""
    try:
        with np.load(path) as file:
            if str(file["shard"]) == shard:
                return {name: file[name] for name in file.files if name != "shard"}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logging.warning("%s cannot be read (%s) and is made again", path, type(error).__name__)
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
    """Computes the features of a folder's shards that are not kept yet, each shard's whole or not at all, so that work
    that was stopped goes on where it was.

    Args:
      folder: of the shards; features go to a folder in it that is named after the network.
      features, batch_size: what judges, and how many images at a time.
      mesh: this process's own, where several share the work.
      part: (i, n), only every n-th shard from the i-th on; several machines or processes share the work so.
      progress: told (shards done, shards in all) of this part.

    Raises:
      UserError: no shards there, one that cannot be read, or a part that is none.
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
    """`shard_features` of all shards, shared among the processes of this job, which see the same folder; all must call
    it, and it returns when all are done."""
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
    """The summary of a folder's shards from the features that `shard_features` has kept, shard by shard.

    Args:
      folder, features: as in `shard_features`.
      count: only of the first images, by their numbers; None: of all.
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
                raise UserError(f"{str(shard)!r} has no features of {features.name} yet; a part is not done")
            yield {name: values[:left] for name, values in found.items()}
            left = None if left is None else max(left - len(found["pool"]), 0)
        if left:
            raise UserError(f"{str(folder)!r} holds {count - left} images of the {count} to judge")  # type: ignore[operator]

    source = {"source": "shards", "path": str(folder)}
    return _summary(features.name, batches(), keep, source)
