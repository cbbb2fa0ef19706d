"""Training, and the page of a run."""

from pathlib import Path

from ml_collections import ConfigDict

from ddpm_jax.report import write
from ddpm_jax.runtime import cores
from ddpm_jax.runtime import workdir as workdir_lib


def train(config: ConfigDict | None, workdir: str, init_from: str | None) -> None:
    """Trains in a workdir; see `ddpm_jax.training.loop.train`.

    Args:
      config: of the run; None: that of the workdir.
      workdir: of the run.
      init_from: the workdir of another run, whose averaged weights it starts from.
    """
    from ddpm_jax.training import loop  # which imports what no other mode needs

    config = config if config is not None else workdir_lib.read_config(workdir)
    if init_from is not None:
        config.train.init_from = init_from
    cores.use(config)
    loop.train(config, workdir)


def report(workdir: str) -> Path:
    """Writes report.html of a workdir."""
    path = write(workdir)
    print(path)
    return path
