"""The cost of a run: estimated from its programs compiled for a TPU slice, which need not be present, or measured on
this machine's devices."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ddpm_jax.commands import cores
from ddpm_jax.planning.compiled import estimate, open_topology
from ddpm_jax.planning.measured import measure
from ddpm_jax.planning.programs import names_of
from ddpm_jax.planning.table import table
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime import workdir as workdir_lib
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import write_text
from ddpm_jax.validation import validate

FILE = "plan.json"


def plan(
    config: ConfigDict | None,
    workdir: str,
    topology: str | None,
    programs: Sequence[str],
    dtype: str | None = None,
) -> Path | None:
    """Prints the cost of a run, and writes it to plan.json in the workdir if there is one.

    Args:
      config: of the run; None: the one in the workdir.
      workdir: of the run; "": none.
      topology: the TPU slice to compile for, such as "v5e:2x4"; None: measure on this machine's devices.
      programs: which of `names_of` to plan; empty: all.
      dtype: of the weights and the arithmetic in sampling, and of the arithmetic in training; None: the config's.

    Returns:
      plan.json, or None without a workdir.

    Raises:
      UserError: no config, one that cannot run, an unknown topology, no libtpu, a program that does not fit.
    """
    config, dataset = _open(config, workdir)
    if dtype is not None:
        config = config.copy_and_resolve_references()
        config.model.dtype = dtype
    programs = programs or names_of(config)
    if topology is None:
        cores.use(config)
        validate(config, jax.device_count())
        result = measure(config, dataset, parallel.make_mesh(**config.mesh), programs, dtype)
    else:
        chip, mesh = open_topology(topology, config)
        result = estimate(config, dataset, chip, mesh, topology, programs, dtype)
    print(table(result))
    if not workdir:
        return None
    file = workdir_lib.check_writable(workdir) / FILE
    if jax.process_index() == 0:
        write_text(file, json.dumps(result, indent=2) + "\n")
    return file


def _open(config: ConfigDict | None, path: str) -> tuple[ConfigDict, dict[str, Any] | None]:
    """The config, and the description of its data set if there is one."""
    if config is None:
        if not path:
            raise UserError("--mode=plan needs --config, or the --workdir of a run")
        config = workdir_lib.read_config(path)
    return config, workdir_lib.read_dataset(path) if path else None
