"""Measures the programs of a run on the local devices."""

import dataclasses
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm_jax.planning import totals
from ddpm_jax.planning.chips import chip_of
from ddpm_jax.planning.programs import Dataset, Planned, programs_of
from ddpm_jax.runtime import parallel

_CALLS = 10  # of the network, for the sampler's time
_SECONDS, _FEWEST_CALLS = 2.0, 3  # a measurement takes at least as long, and at least as many calls


def measure(
    config: ConfigDict, dataset: Dataset, mesh: Mesh, names: Sequence[str], dtype: str | None = None
) -> dict[str, Any]:
    """The time of the programs on the devices of the mesh, with random weights and images."""
    chip = chip_of(jax.devices()[0].device_kind)
    result: dict[str, Any] = totals.header(config, dataset, mesh.devices.size) | {
        "kind": "measurement",
        "device": jax.devices()[0].device_kind,
        "chip": dataclasses.asdict(chip) if chip else None,
        "programs": {},
    }
    plain = config.copy_and_resolve_references()
    plain.model.remat = "none"  # recomputation is not part of the model's arithmetic
    as_written = programs_of(plain, dataset, mesh, names, dtype, _CALLS)
    for name, planned in programs_of(config, dataset, mesh, names, dtype, _CALLS).items():
        flops = as_written[name].flops() / planned.calls / mesh.devices.size
        compiling, seconds = _timed(planned)
        result["programs"][name] = {
            "title": planned.title,
            "images": planned.images,
            "calls": planned.calls,
            "attention": as_written[name].attention(),
            "compile_seconds": round(compiling, 1),
            "flops": flops,
            "seconds": seconds,
            "utilisation": flops / seconds / chip.flops if chip else None,
        }
    return result | {"run": totals.of_run(config, result)}


def _timed(planned: Planned) -> tuple[float, float]:
    """Seconds of the first call, which compiles, and of one network call in the later ones."""
    print(f"measuring: {planned.title} ...", file=sys.stderr, flush=True)
    shardings = jax.tree.map(lambda x: x.sharding, planned.arguments)

    def values(x: jax.ShapeDtypeStruct) -> jax.Array:  # random, since products of zeros take less power, and less time
        if x.dtype == jnp.uint8:
            return jax.random.bits(jax.random.key(0), x.shape, jnp.uint8)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jax.random.uniform(jax.random.key(0), x.shape, x.dtype, maxval=0.02)
        return jnp.zeros(x.shape, x.dtype)

    make = jax.jit(
        lambda: jax.tree.map(values, planned.arguments),
        out_shardings=shardings,
        compiler_options=parallel.run_once_options(),
    )
    arguments = make()

    def call(times: int) -> float:
        nonlocal arguments
        began = time.monotonic()
        in_flight: deque[Any] = deque()
        for _ in range(times):
            found = planned.function(*arguments)
            if planned.donates:
                arguments = (*found, *arguments[len(found) :])
            # The device computes while the host dispatches more calls, as in a run; the first result was donated.
            in_flight.append(found[-1] if planned.donates else found)
            if len(in_flight) > parallel.IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
        jax.block_until_ready(list(in_flight))
        return time.monotonic() - began

    compiling = call(1)
    calls = max(_FEWEST_CALLS, math.ceil(_SECONDS / call(1)))
    return compiling, call(calls) / calls / planned.calls
