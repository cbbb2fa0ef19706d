"""XLA's flags of the tests, whose time goes into compiling programs that run once or twice."""

from importlib.metadata import version

QUICK_TO_COMPILE = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    # The older way to compile fusions, in less than half of the time; 0.12 has it no more. And a program in one piece,
    # in a fifth less, for the pieces would be compiled side by side on cores that have other tests to run.
    QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def xla_flags(devices: int) -> str:
    """For so many CPU devices in one process."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK_TO_COMPILE}"
