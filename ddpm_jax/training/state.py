"""What training carries from step to step."""

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
    """A pytree; random numbers are no part of it, for they follow from the seed and the step.

    Attributes:
      step: int32, how many updates were made.
      params: of the network, float32.
      ema: one average of the parameters a decay, {"0.9999": params}, float32.
      opt_state: of the optax optimiser.
      history: the losses by timestep where t is drawn by importance, else None.
      frozen: parameters that training reads and never changes, which checkpoints leave out: those of the network whose
        adapters are trained; else None.
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
    step: int = 0,
    frozen: Params = None,
) -> TrainState:
    """The state of a run that starts from these parameters; a pure function, to be jit-compiled with the shardings that
    its arrays shall have.

    Args:
      params: of the network.
      optimizer: the optax optimiser.
      ema_decays: one average each.
      num_timesteps: T if a loss history is kept, else None.
      step: how many updates the parameters have seen.
      frozen: see `TrainState`.
    """
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        ema={str(decay): jax.tree.map(jnp.copy, params) for decay in ema_decays},
        opt_state=optimizer.init(params),
        history=None if num_timesteps is None else LossHistory.create(num_timesteps),
        frozen=frozen,
    )


def update_ema(ema: Params, params: Params, decay: float, step: jax.Array) -> Params:
    """decay * ema + (1 - decay) * params; at step 0 a copy of the parameters, as in the original."""
    keep = jnp.where(step == 0, 0.0, decay)
    return jax.tree.map(lambda average, new: keep * average + (1.0 - keep) * new, ema, params)
