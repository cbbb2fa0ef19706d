"""The training state."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ddpm_jax.diffusion.timesteps import LossHistory

Params = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree of what training carries from step to step. Random numbers follow from the seed and the step.

    Attributes:
      step: int32, number of updates made.
      params: of the network, float32.
      ema: one moving average of the parameters per decay, {"0.9999": params}, float32.
      opt_state: of the optax optimiser.
      history: the losses by timestep for importance sampling of t, else None.
      frozen: parameters that training reads but never changes and that checkpoints leave out: those of the network
        whose adapters are trained; else None.
    """

    step: jax.Array
    params: Params
    ema: dict[str, Params]
    opt_state: optax.OptState
    history: LossHistory | None
    frozen: Params = None


def create_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    ema_decays: Sequence[float],
    *,
    num_timesteps: int | None = None,
) -> TrainState:
    """The initial state of a run with these parameters; a pure function, to be jit-compiled with the shardings of its
    results.

    Args:
      params: of the network.
      optimizer: the optax optimiser.
      ema_decays: one moving average is kept for each.
      num_timesteps: T if a loss history is kept, else None.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema={str(decay): jax.tree.map(jnp.copy, params) for decay in ema_decays},
        opt_state=optimizer.init(params),
        history=None if num_timesteps is None else LossHistory.create(num_timesteps),
    )


def update_ema(ema: Params, params: Params, decay: float, step: jax.Array) -> Params:
    """decay * ema + (1 - decay) * params; at step 0 a copy of the parameters, as in the original."""
    keep = jnp.where(step == 0, 0.0, decay)
    return jax.tree.map(lambda average, new: keep * average + (1.0 - keep) * new, ema, params)
