"""A workdir opened for use: its config, its weights on this machine's devices, and what one can do with them.

`Run` is one class in three files: `sampling` has its attributes and draws images from noise, `editing` edits pictures,
and `run` opens pictures and draws from the inputs of super-resolution and of DALL-E 2's decoder. `opening` opens a
workdir.
"""

from ddpm_jax.run.opening import load_adapters, open_run
from ddpm_jax.run.run import Run

__all__ = ["Run", "load_adapters", "open_run"]
