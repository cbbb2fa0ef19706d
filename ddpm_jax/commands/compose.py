"""A pipeline of runs."""

from collections.abc import Sequence
from pathlib import Path

from ddpm_jax import pipeline
from ddpm_jax.runtime.errors import UserError


def compose(stages: Sequence[str], workdir: str) -> Path:
    """Writes the workdir of a pipeline; see `ddpm_jax.pipeline.compose`."""
    if not stages:
        raise UserError("--mode=compose needs --stages: the workdirs of the runs, in order, such as runs/base,runs/sr")
    return pipeline.compose(stages, workdir)
