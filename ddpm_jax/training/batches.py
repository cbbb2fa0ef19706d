"""The batches of a run: reads them on the host and puts them on the devices ahead of the loop."""

import time
from collections.abc import Iterable, Iterator

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm_jax.data import pipeline
from ddpm_jax.data.source import Source
from ddpm_jax.runtime import parallel
from ddpm_jax.training.objectives import Objective


def device_batches(
    config: ConfigDict, objective: Objective, source: Source, mesh: Mesh, first_step: int
) -> Iterator[dict[str, jax.Array]]:
    """The batches from first_step to the end of the run; stacked for several steps per dispatch."""
    size, several = config.train.batch_size, config.train.steps_per_dispatch
    rows = parallel.local_rows(mesh, size)
    batches = pipeline.host_batches(
        source,
        seed=config.seed,
        batch_size=size,
        first_step=first_step,
        last_step=config.train.num_steps,
        rows=rows,
        cache_bytes=int(config.data.cache_gib * 2**30),
        num_workers=config.data.num_workers,
    )

    def read(batches: Iterable[pipeline.Batch]) -> Iterator[pipeline.Batch]:
        """Adds what the objective reads; its random draws are a function of seed, step and row."""
        for step, batch in enumerate(batches, first_step):
            yield objective.read(batch, source, pipeline.batch_draws(config.seed, step, size)[rows])

    def put(batch: pipeline.Batch) -> dict[str, jax.Array]:
        return {name: parallel.from_local_rows(mesh, batch[name], rows, size, axis=int(several > 1)) for name in batch}

    batches = read(batches)
    if several > 1:
        batches = pipeline.several(batches, first_step, several)
    return pipeline.prefetch(map(put, batches), depth=2)


class Waited:
    """An iterator that adds up the seconds that the loop waits for its items, in `waited`."""

    def __init__(self, iterator: Iterator[dict[str, jax.Array]]):
        self._iterator, self.waited = iterator, 0.0

    def __iter__(self) -> "Waited":
        return self

    def __next__(self) -> dict[str, jax.Array]:
        began = time.monotonic()
        try:
            return next(self._iterator)
        finally:
            self.waited += time.monotonic() - began
