"""Assigns images to training steps and loads their batches.

The images of step k are a pure function of (seed, k): the epochs' shuffled orders are concatenated, and step k takes
positions k B to (k + 1) B of that sequence. So every image occurs once per epoch, the global batch is the same for any
number of processes and devices, and resuming needs only the step number.
"""

import functools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from absl import flags

from ddpm_jax.data.source import Example, Source

Batch = dict[str, Any]
T = TypeVar("T")


@functools.lru_cache(maxsize=3)
def epoch_permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order of the images in an epoch, int64 [num_images].

    They are sorted by the raw output of a counter-based generator, whose stream NumPy keeps stable across versions
    (which it does not promise for `Generator.permutation`).
    """
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_images)
    return np.argsort(keys, kind="stable")


def batch_indices(seed: int, step: int, batch_size: int, num_images: int) -> np.ndarray:
    """The images of step `step`, int64 [batch_size]."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, num_images)
    indices = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = epoch_permutation(seed, int(epoch), num_images)[offsets[here]]
    return indices


def batch_draws(seed: int, step: int, batch_size: int) -> np.ndarray:
    """A random number for each row of step `step`, uint64 [batch_size]; NumPy keeps this stream stable as well."""
    return np.random.Philox(np.random.SeedSequence([seed, step, 1])).random_raw(batch_size)


def stacked(examples: Iterable[Example], count: int) -> Batch:
    """Stacks `count` examples to a batch: arrays [count, ...] by the names of their entries."""
    batch: Batch = {}
    for row, example in enumerate(examples):
        batch = batch or _room(example, count)
        for name, value in example.items():  # copied while it is in the processor's cache
            batch[name][row] = value
    return batch


def _room(example: Example, count: int) -> Batch:
    """Empty arrays for `count` examples like this one; integers become int32."""
    values = {name: np.asarray(value) for name, value in example.items()}
    return {
        name: np.empty((count, *value.shape), np.int32 if value.dtype == np.int64 else value.dtype)
        for name, value in values.items()
    }


class _Kept:
    """Caches the examples of a source in memory; each is decoded when it is first used.

    So training starts immediately, whatever the size of the data set, and a process decodes only what it trains on.
    """

    def __init__(self, source: Source):
        self._source, self._is_there = source, np.zeros(len(source), bool)
        self._examples: Batch = {}

    def batches(self, many: Iterable[np.ndarray]) -> Iterator[Batch]:
        """Yields one batch for each array of indices."""
        with ThreadPoolExecutor() as pool:
            for indices in many:
                missing = np.unique(indices[~self._is_there[indices]]).tolist()
                if missing:
                    for index, example in zip(missing, pool.map(self._source.__getitem__, missing), strict=True):
                        self._examples = self._examples or _room(example, len(self._source))
                        for name, value in example.items():
                            self._examples[name][index] = value
                    self._is_there[missing] = True
                yield {name: values[indices] for name, values in self._examples.items()} | {"index": indices}


class _StepBatches:
    """The batches of consecutive steps as a random-access source for grain, with this process's rows only."""

    def __init__(
        self, source: Source, seed: int, batch_size: int, rows: slice | np.ndarray, first_step: int, last_step: int
    ):
        self.source, self.seed, self.batch_size, self.rows = source, seed, batch_size, rows
        self.first_step, self.last_step = first_step, last_step

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __getitem__(self, index: int) -> Batch:
        indices = batch_indices(self.seed, self.first_step + int(index), self.batch_size, len(self.source))
        numbers = indices[self.rows].tolist()
        return stacked(map(self.source.__getitem__, numbers), len(numbers)) | {"index": np.array(numbers)}


def host_batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    first_step: int,
    last_step: int,
    rows: slice | np.ndarray = slice(None),
    cache_bytes: int = 2 << 30,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """This process's share of the batches of steps first_step .. last_step - 1.

    Args:
      source: the images.
      seed: of the shuffling.
      batch_size: of the global batch.
      first_step, last_step: the range of steps.
      rows: this process's rows of each batch; see `ddpm_jax.runtime.parallel.local_rows`.
      cache_bytes: if the decoded data set fits into this many bytes, every image is decoded once, when it is first
        needed, and kept; otherwise grain decodes images whenever they are needed.
      num_workers: number of processes that decode a larger data set; 0: threads of this process.

    Yields:
      The examples' entries as arrays [rows, ...]: {"image": uint8 [rows, H, W, C], "label": int32 [rows], ...}, and
      their indices in the source, {"index": int64 [rows]}.
    """
    if len(source) * int(np.prod(source.shape)) <= cache_bytes:
        steps = range(first_step, last_step)
        yield from _Kept(source).batches(batch_indices(seed, step, batch_size, len(source))[rows] for step in steps)
        return
    import grain  # takes a third of a second

    batches = _StepBatches(source, seed, batch_size, rows, first_step, last_step)
    dataset = grain.MapDataset.source(batches)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # in a notebook; grain's workers read absl flags
            flags.FLAGS.mark_as_parsed()
        threads = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        iterable = dataset.to_iter_dataset(threads).mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    else:
        threads = min(os.cpu_count() or 1, 8)  # more threads than cores would only wait for one another
        iterable = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8))
    yield from iterable


def several(batches: Iterator[Batch], first_step: int, count: int) -> Iterator[Batch]:
    """Stacks the batches of `count` steps at a time along a new first axis.

    A group ends at each step that is a multiple of count, so the first and the last group may be shorter.
    """
    group: list[Batch] = []
    for step, batch in enumerate(batches, first_step + 1):
        group.append(batch)
        if step % count == 0:
            yield jax.tree.map(lambda *values: np.stack(values), *group)
            group = []
    if group:
        yield jax.tree.map(lambda *values: np.stack(values), *group)


def prefetch(iterator: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, computed up to `depth` ahead in a thread; an error is raised in place of its item."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]
