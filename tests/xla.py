"""Settings for the tests, which spend their time tracing and compiling programs that run once or twice."""

import gc
import os
from importlib.metadata import version

GC_THRESHOLDS = (100_000, 50, 100)  # traces are made of many small objects that live long
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    # The older way to compile fusions takes less than half the time; it is gone in 0.12. Compiling a program in one
    # piece takes a fifth less, since the pieces would be compiled in parallel on cores that run other tests.
    QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def xla_flags(devices: int) -> str:
    """For so many CPU devices in one process."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK_TO_COMPILE}"


def trace_fast() -> None:
    """Makes tracing a fifth faster, here and in child processes; to be called before jax is imported.

    Compiled programs then lack the source line and the module of each operation, which only profiles show.
    """
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
    os.environ["FLAX_PROFILE"] = "0"
    gc.set_threshold(*GC_THRESHOLDS)
