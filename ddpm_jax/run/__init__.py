"""A workdir opened for use: its config, its weights on this machine's devices, and what one does with them.

`Run` is one class in three files: `sampling` has what a run is and the images that it draws from noise, `editing` the
edits of pictures, `run` what it makes of pictures and embeddings that it is given. `opening` opens a workdir.
"""

from ddpm_jax.run.opening import load_adapters, open_run
from ddpm_jax.run.run import Run

__all__ = ["Run", "load_adapters", "open_run"]
