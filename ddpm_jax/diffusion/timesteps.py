"""Drawing the timesteps of a batch, and the history of losses for importance sampling."""

import dataclasses

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.gaussian import Array, check_option
from ddpm_jax.diffusion.shapes import Keys, PerExample, Timesteps

TIMESTEP_SAMPLERS = ("uniform", "stratified", "importance")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossHistory:
    """The latest losses of every timestep, for importance sampling of t (Improved DDPM, eq. 18).

    Attributes:
      losses: float32 [T, 10], one ring buffer per timestep.
      counts: int32 [T], the number of losses seen at each timestep.
    """

    losses: Array
    counts: Array

    @staticmethod
    def create(num_timesteps: int, length: int = 10) -> "LossHistory":
        return LossHistory(jnp.zeros((num_timesteps, length)), jnp.zeros(num_timesteps, jnp.int32))

    def update(self, t: Timesteps, losses: PerExample) -> "LossHistory":
        """Adds a batch's losses [B] at t [B]; each timestep keeps its last 10."""
        length = self.losses.shape[1]
        same = t[:, None] == t[None, :]
        earlier = jnp.sum(jnp.tril(same, -1), axis=1)
        later = jnp.sum(jnp.triu(same, 1), axis=1)
        column = (self.counts[t] + earlier) % length
        row = jnp.where(later < length, t, self.counts.shape[0])  # out of range: dropped
        return LossHistory(
            self.losses.at[row, column].set(losses.astype(jnp.float32), mode="drop"), self.counts.at[t].add(1)
        )

    def probabilities(self, uniform: float = 1e-3) -> Array:
        """p(t) proportional to sqrt(E[L_t^2]), mixed with a little of the uniform distribution; uniform until every
        timestep has 10 losses."""
        T, length = self.losses.shape
        weights = jnp.sqrt(jnp.mean(self.losses**2, axis=1))
        weights = weights / jnp.maximum(jnp.sum(weights), 1e-20)
        warm = jnp.all(self.counts >= length)
        return jnp.where(warm, weights * (1 - uniform) + uniform / T, 1.0 / T)


def sample_timesteps(
    key: Keys, batch_size: int, num_timesteps: int, method: str = "uniform", history: LossHistory | None = None
) -> tuple[Timesteps, PerExample]:
    """Draws a batch's timesteps.

    Args:
      key: typed key.
      batch_size, num_timesteps: B and T.
      method: "uniform", independent draws (the paper); "stratified", one random offset and even spacing over 0..T-1, so
        that each t alone is uniform (Kingma et al. 2021, appendix I); "importance", in proportion to `history`.
      history: the losses seen so far, for "importance".

    Returns:
      t int32 [B], and weights [B] that make the weighted loss an unbiased estimate of the uniform one.
    """
    check_option("timestep sampler", method, TIMESTEP_SAMPLERS)
    if method == "uniform":
        return jax.random.randint(key, (batch_size,), 0, num_timesteps), jnp.ones(batch_size)
    if method == "stratified":
        u = (jax.random.uniform(key) + jnp.arange(batch_size) / batch_size) % 1.0
        t = jnp.minimum((u * num_timesteps).astype(jnp.int32), num_timesteps - 1)
        return t, jnp.ones(batch_size)
    if history is None:
        raise ValueError("timestep sampler 'importance' needs a LossHistory")
    p = history.probabilities()
    t = jax.random.categorical(key, jnp.log(p), shape=(batch_size,))
    return t.astype(jnp.int32), 1.0 / (num_timesteps * p[t])
