"""report.html: a run on one page, which opens from the disk and asks for nothing else."""

from ddpm_jax.report.page import update, write

__all__ = ["update", "write"]
