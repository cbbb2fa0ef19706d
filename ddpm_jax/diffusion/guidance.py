"""Classifier-free guidance (Ho & Salimans 2022)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ddpm_jax.diffusion.gaussian import Array, as_argument

ConditionalFn = Callable[[Array, Array, Any], Array]  # (x_t, t, cond) -> output

NO_LIMIT = (0, 2**31 - 1)


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The strength of classifier-free guidance; see `guided`. An empty interval means all timesteps."""

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[int, ...] = ()

    @property
    def is_on(self) -> bool:
        """Whether the network must also be called without the condition."""
        return self.scale != 1.0

    def check(self) -> None:
        """ValueError for values that are out of range or have no effect."""
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"guidance_rescale is {self.rescale}; accepted: 0 to 1")
        if len(self.interval) not in (0, 2) or list(self.interval) != sorted(self.interval):
            raise ValueError(
                f"guidance_interval is {tuple(self.interval)}; accepted: the lowest and the highest timestep"
            )
        if not self.is_on and (self.rescale or len(self.interval)):
            raise ValueError("guidance_rescale and guidance_interval need a guidance_scale other than 1")


def guided(
    model_fn: ConditionalFn,
    cond: Any,
    null_cond: Any,
    scale: ArrayLike = 1.0,
    *,
    rescale: ArrayLike = 0.0,
    interval: Sequence[ArrayLike] = NO_LIMIT,
) -> jax.tree_util.Partial:
    """The model function  null + scale (cond - null), with one network call on the doubled batch.

    All values are arguments of the compiled program: a different scale does not recompile.

    Args:
      model_fn: (x_t, t, cond) -> output; the weights of a `jax.tree_util.Partial` stay arguments as well.
      cond, null_cond: pytrees of [B, ...], with and without the condition.
      scale: a number, or [B], one per image. 1 is the conditional output alone, 0 the unconditional one.
      rescale: 0 to 1, how far the output's standard deviation is rescaled to the conditional output's (Lin et al. 2023,
        section 3.4), which prevents overexposed pictures at a large scale.
      interval: (lowest, highest) guided t; outside it the conditional output is used (Kynkaanniemi et al. 2024).

    Returns:
      (x_t, t) -> output; the channels of a learned variance are those of the conditional output.
    """
    numbers = tuple(jnp.asarray(value, jnp.float32) for value in (scale, rescale, *interval))
    return jax.tree_util.Partial(_guided, as_argument(model_fn), cond, null_cond, *numbers)


def between(model_fn: ConditionalFn, x: Array, t: Array, cond: tuple[Any, Any, Array]) -> Array:
    """The model function between two conditions: (1 - w) first + w second, with one network call on the doubled batch.

    For a given x and t, eps, x_0 and v are affine functions of the score. So at each t the mixture corresponds to the
    score of a density proportional to p(x | first) ** (1 - w) p(x | second) ** w.

    Args:
      model_fn: as in `guided`.
      x, t: [B, ...] and [B].
      cond: (first, second, w): two conditions as in `guided`, and the share [B] of the second.
    """
    first, second, share = cond
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), first, second)
    one, other = jnp.split(model_fn(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both), 2)
    return one + share.reshape(-1, *[1] * (x.ndim - 1)) * (other - one)


def _guided(
    model_fn: ConditionalFn,
    cond: Any,
    null_cond: Any,
    scale: Array,
    rescale: Array,
    lowest: Array,
    highest: Array,
    x: Array,
    t: Array,
) -> Array:
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), cond, null_cond)
    output = model_fn(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
    (with_cond, rest), (without, _) = (
        (half[..., : x.shape[-1]], half[..., x.shape[-1] :]) for half in jnp.split(output, 2)
    )

    def wide(value: Array) -> Array:
        return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))

    result = without + wide(scale) * (with_cond - without)
    axes = tuple(range(1, x.ndim))
    ratio = jnp.std(with_cond, axes, keepdims=True) / jnp.maximum(jnp.std(result, axes, keepdims=True), 1e-12)
    result *= 1.0 + wide(rescale) * (ratio - 1.0)
    result = jnp.where(wide((t >= lowest) & (t <= highest)), result, with_cond)
    return jnp.concatenate([result, rest], axis=-1)
