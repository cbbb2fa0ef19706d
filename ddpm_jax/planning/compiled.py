"""Estimates a run's cost from its programs compiled for a TPU slice that need not be available."""

import dataclasses
import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm_jax.planning import hlo, totals
from ddpm_jax.planning.chips import TPUS, Chip, Roofline, roofline
from ddpm_jax.planning.programs import Dataset, Planned, programs_of
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.errors import UserError, first_line
from ddpm_jax.validation import validate

_LADDER = (8, 16, 32, 64, 128, 256)  # chips


def open_topology(name: str, config: ConfigDict) -> tuple[Chip, Mesh]:
    """The chip of a TPU slice and the run's mesh on it; UserError if there is no such slice or no compiler for it."""
    found = re.fullmatch(rf"({'|'.join(TPUS)}):(\d+(?:x\d+){{1,2}})", name)
    if not found:
        raise UserError(
            f"--topology is {name!r}; accepted: a TPU ({', '.join(TPUS)}) and a layout, such as v5e:2x4 or v4:2x2x2"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology needs the TPU compiler, which is not installed: pip install 'ddpm-jax[tpu]'")
    version, chips = found[1], math.prod(int(n) for n in found[2].split("x"))
    # Set before anything asks jax for a device. Without these the compiler looks for a TPU on this machine and keeps
    # other plans from running at the same time.
    accelerator = {"v5e": f"v5litepod-{chips}", "v6e": f"v6e-{chips}"}.get(version, f"{version}-{2 * chips}")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": accelerator}
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # the cache cannot read back programs for a TPU
    validate(config, chips)
    from jax.experimental import topologies

    joined = {"chip_config_name": "megacore"} if version == "v4" else {}  # both cores of a chip as one device
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **joined).devices
    except Exception as error:  # the plugin may raise anything
        raise UserError(f"--topology is {name!r}, which libtpu does not know: {first_line(error)}") from None
    return TPUS[version], parallel.make_mesh(**config.mesh, devices=devices)


def estimate(
    config: ConfigDict,
    dataset: Dataset,
    chip: Chip,
    mesh: Mesh,
    topology: str,
    names: Sequence[str],
    dtype: str | None = None,
) -> dict[str, Any]:
    """The cost of the programs as compiled for these chips."""
    chips = mesh.devices.size
    result: dict[str, Any] = totals.header(config, dataset, chips) | {
        "kind": "model",
        "topology": topology,
        "chip": dataclasses.asdict(chip),
        "programs": {},
    }
    for name, planned in programs_of(config, dataset, mesh, names, dtype).items():
        program, seconds = _compiled(planned, mesh, f"{topology}, {chips} x {chip.name}")
        bounds = _bounds(chip, program)
        result["programs"][name] = {
            "title": planned.title,
            "images": planned.images,
            "calls": planned.calls,
            "attention": planned.attention(),
            "compile_seconds": round(seconds, 1),
            **dataclasses.asdict(program),
            **dataclasses.asdict(bounds),
            "seconds": bounds.seconds,
            "bound": bounds.bound,
        }
        if name == "train" and chips > 1:
            result["ladder"] = _ladder(config, chip, program, mesh)
    return result | {"run": totals.of_run(config, result)}


def _compiled(planned: Planned, mesh: Mesh, where: str) -> tuple[hlo.Program, float]:
    """The cost of one of the program's network calls, and the seconds that compiling took."""
    print(f"compiling for {where}: {planned.title} ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    try:
        compiled = planned.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"[Uu]sed ([\d.]+\w) of ([\d.]+\w) hbm", str(error))
        if used:
            raise UserError(f"{planned.title}: does not fit: it needs {used[1]}, but a chip has {used[2]}") from None
        raise UserError(f"{planned.title}: it does not compile: {first_line(error)}") from None
    program = hlo.analyse(compiled, planned.flops() / mesh.devices.size, mesh.shape["fsdp"])
    return program.over(planned.calls), time.monotonic() - began


def _bounds(chip: Chip, program: hlo.Program) -> Roofline:
    return roofline(chip, program.flops, program.traffic, program.collectives)


def _ladder(config: ConfigDict, chip: Chip, program: hlo.Program, mesh: Mesh) -> list[dict[str, Any]]:
    """The training step on slices of other sizes along "data", with a growing batch and with a fixed one."""
    size, chips, rungs = config.train.batch_size, mesh.devices.size, []
    for count in (count for count in _LADDER if count % mesh.shape["fsdp"] == 0):
        factor = count / chips
        collectives = hlo.on_more_chips(program.collectives, factor)
        batches = {round(size * factor): 1.0} if (size * factor).is_integer() else {}
        if size % count == 0:
            batches.setdefault(size, 1 / factor)
        for batch, share in batches.items():  # examples per chip, relative to the compiled program
            traffic = program.state_traffic + share * (program.traffic - program.state_traffic)
            bounds = roofline(chip, share * program.flops, traffic, collectives)
            how = "compiled" if count == chips else "same program" if share == 1 else "estimated"
            rungs.append({"chips": count, "batch": batch, "how": how})
            rungs[-1] |= totals.speed(config, bounds.seconds, batch, count)
            rungs[-1] |= dataclasses.asdict(bounds) | {"bound": bounds.bound}
    return rungs
