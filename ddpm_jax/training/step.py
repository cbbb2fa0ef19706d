"""One training step, compiled once for the whole mesh."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.rng import named_key
from ddpm_jax.training.objectives import Examples, Objective
from ddpm_jax.training.state import Params, TrainState, update_ema

Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Sums over the steps since the last report, kept on the devices so that no step waits for the host.

    Attributes:
      steps: number of steps summed up.
      loss, grad_norm: sums of the batch's mean loss and of the gradient's global norm before clipping.
      quarter_loss, quarter_count: [4], sums over examples by quarter of t; without timesteps, zeros.
      bad_step, bad_loss, bad_grad_norm: the first step whose loss or gradient was not finite; -1: none.
    """

    steps: jax.Array
    loss: jax.Array
    grad_norm: jax.Array
    quarter_loss: jax.Array
    quarter_count: jax.Array
    bad_step: jax.Array
    bad_loss: jax.Array
    bad_grad_norm: jax.Array

    @staticmethod
    def zero() -> "Metrics":
        return Metrics(
            steps=jnp.zeros((), jnp.int32),
            loss=jnp.zeros(()),
            grad_norm=jnp.zeros(()),
            quarter_loss=jnp.zeros(4),
            quarter_count=jnp.zeros(4),
            bad_step=jnp.full((), -1, jnp.int32),
            bad_loss=jnp.zeros(()),
            bad_grad_norm=jnp.zeros(()),
        )

    def add(self, step: jax.Array, loss: jax.Array, grad_norm: jax.Array, quarter: jax.Array | None) -> "Metrics":
        """Adds one step's per-example losses [B] and the quarters [B] of their t; None: there are no timesteps."""
        mean = jnp.mean(loss)
        is_first_bad = (self.bad_step < 0) & ~(jnp.isfinite(mean) & jnp.isfinite(grad_norm))
        in_quarter = jnp.zeros((1, 4), bool) if quarter is None else quarter[:, None] == jnp.arange(4)
        return Metrics(
            steps=self.steps + 1,
            loss=self.loss + mean,
            grad_norm=self.grad_norm + grad_norm,
            quarter_loss=self.quarter_loss + jnp.sum(jnp.where(in_quarter, loss[:, None], 0.0), axis=0),
            quarter_count=self.quarter_count + jnp.sum(in_quarter, axis=0, dtype=jnp.float32),  # in one all-reduce
            bad_step=jnp.where(is_first_bad, step, self.bad_step),
            bad_loss=jnp.where(is_first_bad, mean, self.bad_loss),
            bad_grad_norm=jnp.where(is_first_bad, grad_norm, self.bad_grad_norm),
        )


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    accumulation: int = 1,
    steps_per_dispatch: int = 1,
) -> jax.stages.Wrapped:
    """The jit-compiled step: (state, metrics, batch) -> (state, metrics); the state is donated.

    The batch is sharded over the mesh, the state as by `parallel.state_shardings`. Dropout and the objective's random
    draws (noise, timesteps, dropped conditions, flips) are functions of (seed, step), drawn for the global batch, so
    they do not depend on the number of devices.

    Args:
      objective: the training objective.
      optimizer: the optax optimiser.
      mesh: from `parallel.make_mesh`.
      seed: of the run.
      accumulation: number of parts of a batch whose gradients are computed one after the other, to save memory. The
        gradient is the same, except for dropout, which is drawn for each part.
      steps_per_dispatch: if above 1, each array of the batch has a new first axis of up to this many steps, which are
        taken in one call; useful for fast accelerators, which would otherwise wait for the host.

    Returns:
      A function of the state, the metrics so far and a batch of what the objective reads.
    """
    T = objective.num_timesteps
    # XLA's CPU backend computes gradients of convolutions 35 to 100 times slower inside a loop.
    unroll = {"unroll": True} if mesh.devices.flat[0].platform == "cpu" else {}

    def gradient(
        params: Params, frozen: Params, examples: Examples, dropout_key: jax.Array
    ) -> tuple[Params, jax.Array]:
        """The gradient of the examples' weighted mean loss, and their losses."""

        def loss_fn(params: Params) -> tuple[jax.Array, jax.Array]:
            losses = objective.losses(params, frozen, examples, dropout_key)
            return jnp.mean(examples["weight"] * losses), losses

        return jax.grad(loss_fn, has_aux=True)(params)

    def accumulated(
        params: Params, frozen: Params, examples: Examples, dropout_key: jax.Array
    ) -> tuple[Params, jax.Array]:
        """`gradient` of the rows i, i + accumulation, ... for each i, so that no row leaves its device."""

        def add(total: Params, part: tuple[jax.Array, Examples]) -> tuple[Params, jax.Array]:
            index, examples = part
            grads, losses = gradient(params, frozen, examples, jax.random.fold_in(dropout_key, index))
            return jax.tree.map(jnp.add, total, grads), losses

        def split(x: jax.Array) -> jax.Array:
            x = x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(x, parallel.batch_sharding(mesh, axis=1))

        parts = jnp.arange(accumulation), jax.tree.map(split, examples)
        total, losses = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts, **unroll)
        return jax.tree.map(lambda grad: grad / accumulation, total), losses.swapaxes(0, 1).reshape(-1)

    def step(state: TrainState, metrics: Metrics, batch: Batch) -> tuple[TrainState, Metrics]:
        key = partial(named_key, seed, index=state.step)
        examples = objective.examples(batch, key, state.history)

        # Each device needs all of the parameters temporarily and adds up its part of the gradient.
        params, frozen = jax.lax.with_sharding_constraint((state.params, state.frozen), parallel.replicated(mesh))
        grads, losses = (accumulated if accumulation > 1 else gradient)(params, frozen, examples, key("dropout"))
        grads = jax.lax.with_sharding_constraint(grads, parallel.state_shardings(mesh, grads))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            ema={decay: update_ema(ema, params, float(decay), state.step) for decay, ema in state.ema.items()},
            opt_state=opt_state,
            history=None if state.history is None else state.history.update(examples["t"], losses),
            frozen=state.frozen,
        )
        new_state = jax.lax.with_sharding_constraint(new_state, parallel.state_shardings(mesh, new_state))
        quarter = None if T is None else examples["t"] * 4 // T
        return new_state, metrics.add(state.step, losses, optax.tree.norm(grads), quarter)

    def steps(state: TrainState, metrics: Metrics, batches: Batch) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda carry, batch: (step(*carry, batch), None), (state, metrics), batches, **unroll)[0]

    whole, stacked = parallel.replicated(mesh), int(steps_per_dispatch > 1)
    return jax.jit(
        steps if stacked else step,
        in_shardings=(None, whole, parallel.batch_sharding(mesh, axis=stacked)),
        out_shardings=(None, whole),
        donate_argnums=0,
    )


def step_arguments(
    objective: Objective, state: TrainState, mesh: Mesh, batch_size: int, steps_per_dispatch: int = 1
) -> tuple[TrainState, Metrics, dict[str, Any]]:
    """The arguments of `make_train_step`'s function as `jax.ShapeDtypeStruct`s with their shardings.

    Args:
      objective, mesh, steps_per_dispatch: see `make_train_step`.
      state: its shapes.
      batch_size: of a step.
    """
    lead = (steps_per_dispatch, batch_size) if steps_per_dispatch > 1 else (batch_size,)
    rows = parallel.batch_sharding(mesh, axis=len(lead) - 1)
    metrics = jax.eval_shape(Metrics.zero)
    return (
        parallel.laid(state, parallel.state_shardings(mesh, state)),
        parallel.laid(metrics, jax.tree.map(lambda _: parallel.replicated(mesh), metrics)),
        {name: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=rows) for name, x in objective.reads.items()},
    )
