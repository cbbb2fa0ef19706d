"""Training, and the report of a run."""

from pathlib import Path

from ml_collections import ConfigDict

from ddpm_jax.commands import cores
from ddpm_jax.report import write
from ddpm_jax.report.page import REPORT
from ddpm_jax.runtime import workdir as workdir_lib


def train(config: ConfigDict | None, workdir: str, init_from: str | None) -> Path:
    """Trains in a workdir; see `ddpm_jax.training.loop.train`.

    Args:
      config: the run's config; None: the one in the workdir.
      workdir: of the run.
      init_from: the workdir of another run, from whose averaged weights this one starts.

    Returns:
      The report of the run.
    """
    from ddpm_jax.training import loop  # imports what no other mode needs

    config = config if config is not None else workdir_lib.read_config(workdir)
    if init_from is not None:
        config.train.init_from = init_from
    cores.use(config)
    loop.train(config, workdir)
    return Path(workdir).expanduser() / REPORT


def report(workdir: str) -> Path:
    """Writes report.html of a workdir."""
    return write(workdir)
