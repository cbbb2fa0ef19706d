"""report.html: a run on one self-contained page, which opens straight from the disk."""

from ddpm_jax.report.page import update, write

__all__ = ["update", "write"]
