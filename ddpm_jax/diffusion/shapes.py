"""Shapes and dtypes of this package's arrays, for readers and editors (jaxtyping); nothing is checked at run time.

B examples of height H, width W and C channels; any number of axes may replace H W C.
"""

import jax
from jaxtyping import Bool, Float, Int, Key

Images = Float[jax.Array, "B H W C"]
Outputs = Float[jax.Array, "B H W D"]  # the network's: D is C, or 2 C with a learned variance
Timesteps = Int[jax.Array, "B"]  # 0 .. T - 1
PerExample = Float[jax.Array, "B"]
Factors = Float[jax.Array, "B 1 1 1"]  # one per example, to multiply images by
Masks = Bool[jax.Array, "B H W 1"]
Keys = Key[jax.Array, ""] | Key[jax.Array, "B"]  # one for all, or one per example
