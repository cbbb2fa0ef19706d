"""Sampling: one `lax.scan` whose steps and coefficients are data.

A sampler is a table with one row a network call, computed beforehand in float64 NumPy. A row says at which t the
network is called, how its output becomes a prediction of x_0, and how x at the next step follows:

    x  <-  x_0_coef * x_0  +  x_coef * x  +  noise_scale * z,    z ~ N(0, I)

So another sampler, variance or choice of steps is another table for the same loop, and compiles nothing anew as long
as the number of steps is the same.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.gaussian import (
    PREDICTIONS,
    VARIANCES,
    Array,
    ModelFn,
    as_argument,
    check_option,
    clip_x_0,
    interpolate_log_variance,
    normal,
    split_output,
    to_x_0,
)
from ddpm_jax.diffusion.schedules import Schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerTable:
    """One row a step, in the order of sampling; each field is an array [S].

    Attributes:
      t: int32, the timestep the network is called with.
      a, s: x_t = a x_0 + s eps, to turn the network's output into x_0.
      x_0_coef, x_coef: factors of the predicted x_0 and of the present x.
      log_variance_min, log_variance_max: bounds between which a learned variance interpolates; equal if it is fixed.
      noise: 1 where noise is added, 0 where not.
    """

    t: np.ndarray
    a: np.ndarray
    s: np.ndarray
    x_0_coef: np.ndarray
    x_coef: np.ndarray
    log_variance_min: np.ndarray
    log_variance_max: np.ndarray
    noise: np.ndarray


def spaced_timesteps(num_timesteps: int, num_steps: int | None = None, last: int | None = None) -> np.ndarray:
    """`num_steps` timesteps spread evenly over 0..last, both ends included, descending: the order of sampling.

    Args:
      num_timesteps: T.
      num_steps: how many; None: every one from `last` (T - 1) down to 0.
      last: the timestep to start from; None: T - 1.

    Raises:
      ValueError: more steps than timesteps, or a `last` outside 0..T-1.
    """
    last = num_timesteps - 1 if last is None else last
    if not 0 <= last < num_timesteps:
        raise ValueError(f"the timestep to start from is {last}; accepted: 0 to {num_timesteps - 1}")
    num_steps = last + 1 if num_steps is None else num_steps
    if not 1 <= num_steps <= last + 1:
        raise ValueError(f"num_steps is {num_steps}; accepted: 1 to {last + 1}, the timesteps there are")
    if num_steps == 1:
        return np.array([last], np.int32)
    return np.round(np.linspace(last, 0, num_steps)).astype(np.int32)


def ddpm_table(schedule: Schedule, timesteps: Sequence[int] | np.ndarray, variance: str) -> SamplerTable:
    """Ancestral sampling over any descending sub-sequence of timesteps (DDPM, algorithm 2; Improved DDPM, section 4).

    Between neighbours s < t of the sub-sequence the process is a diffusion with beta = 1 - abar_t / abar_s, so the
    equations of the posterior hold with that beta. The last step goes to x_0 itself and adds no noise.
    """
    check_option("variance", variance, VARIANCES)
    # From the betas, in float64: 1 - abar_t has lost its precision in a float32 abar_t.
    with np.errstate(divide="ignore"):
        log_alphas_cumprod = np.cumsum(np.log1p(-np.asarray(schedule.betas, np.float64)))
    timesteps = np.asarray(timesteps, np.int32)
    log_now = log_alphas_cumprod[timesteps]
    log_next = np.append(log_alphas_cumprod[timesteps[1:]], 0.0)
    one_minus_now, one_minus_next = -np.expm1(log_now), -np.expm1(log_next)
    with np.errstate(invalid="ignore"):  # abar_t = 0 at both: the step between them keeps nothing
        log_ratio = np.where(np.isneginf(log_now), -np.inf, log_now - log_next)
    beta = -np.expm1(log_ratio)
    posterior_variance = beta * one_minus_next / one_minus_now
    # The last step's own variance is 0; like the schedule's arrays, its logarithm repeats its neighbour's.
    posterior_variance[-1] = posterior_variance[-2] if len(timesteps) > 1 else beta[-1]
    log_small, log_large = np.log(posterior_variance), np.log(beta)
    return SamplerTable(
        t=timesteps,
        a=np.exp(0.5 * log_now),
        s=np.sqrt(one_minus_now),
        x_0_coef=beta * np.exp(0.5 * log_next) / one_minus_now,
        x_coef=np.exp(0.5 * log_ratio) * one_minus_next / one_minus_now,
        log_variance_min=log_large if variance == "fixed_large" else log_small,
        log_variance_max=log_small if variance == "fixed_small" else log_large,
        noise=np.append(np.ones(len(timesteps) - 1), 0.0),
    )


SAMPLERS: dict[str, Callable[[Schedule, np.ndarray, str], SamplerTable]] = {"ddpm": ddpm_table}


def sample(
    schedule: Schedule,
    model_fn: ModelFn,
    key: Array,
    shape: Sequence[int],
    *,
    sampler: str = "ddpm",
    num_steps: int | None = None,
    x_t: Array | None = None,
    t_start: int | None = None,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool = True,
    dynamic_threshold: float | None = None,
    num_snapshots: int = 0,
) -> Array | tuple[Array, Array]:
    """Images from noise, or from an image that carries noise, by one jit-compiled `lax.scan`.

    The noise of example i depends on its own key alone, not on the size of the batch.

    Args:
      schedule: T timesteps; its arrays must be concrete, since the steps are planned outside of jit.
      model_fn: (x_t, t) -> output. As `jax.tree_util.Partial(net.apply, variables)`, new weights recompile nothing.
      key: one typed key, or [B] of them, one an image.
      shape: (B, H, W, C).
      sampler: "ddpm".
      num_steps: network calls; None: one for every timestep.
      x_t: [B, H, W, C] to start from; None: noise.
      t_start: the timestep of x_t; None: T - 1.
      prediction, variance, clip, dynamic_threshold: as in `p_mean_variance`.
      num_snapshots: how many images on the way to return as well.

    Returns:
      x_0 [B, H, W, C], clipped to [-1, 1] if `clip`; with num_snapshots also [num_snapshots, B, H, W, C], the first
      the start, the last the result, the others evenly spaced in between.

    Raises:
      ValueError: an unknown option, more steps than timesteps, or an x_t of another shape.
    """
    check_option("sampler", sampler, tuple(SAMPLERS))
    check_option("prediction", prediction, PREDICTIONS)
    shape = tuple(shape)
    if x_t is not None and x_t.shape != shape:
        raise ValueError(f"x_t has shape {x_t.shape}; shape says {shape}")
    if x_t is None and t_start not in (None, schedule.num_timesteps - 1):
        raise ValueError(f"t_start is {t_start}, but there is no x_t of that timestep to start from")
    timesteps = spaced_timesteps(schedule.num_timesteps, num_steps, t_start)
    if num_snapshots and not 2 <= num_snapshots <= len(timesteps) + 1:
        raise ValueError(f"num_snapshots is {num_snapshots}; accepted: 0, or 2 to {len(timesteps) + 1}")
    table = jax.tree.map(
        lambda column: column if column.dtype == np.int32 else column.astype(np.float32),
        SAMPLERS[sampler](schedule, timesteps, variance),
    )
    if key.ndim == 0:
        key = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(shape[0]))
    return _sample(
        as_argument(model_fn),
        table,
        key,
        x_t,
        shape,
        prediction,
        variance == "learned",
        clip,
        dynamic_threshold,
        num_snapshots,
    )


@partial(jax.jit, static_argnames=("shape", "prediction", "learned", "clip", "dynamic_threshold", "num_snapshots"))
def _sample(model_fn, table, keys, x_t, shape, prediction, learned, clip, dynamic_threshold, num_snapshots):
    num_steps = table.t.shape[0]

    def noise(index):
        return normal(jax.vmap(lambda k: jax.random.fold_in(k, index))(keys), shape)

    def step(carry, row_and_index):
        x, snapshots = carry
        row, index = row_and_index
        t = jnp.full(shape[:1], row.t)
        output, interpolation = split_output(model_fn(x, t), "learned" if learned else "fixed_large")
        x_0 = clip_x_0(to_x_0(prediction, output, x, row.a, row.s), clip, dynamic_threshold)
        log_variance = row.log_variance_min
        if interpolation is not None:
            log_variance = interpolate_log_variance(interpolation, row.log_variance_min, row.log_variance_max)
        # index + 1, since 0 drew the start.
        x = row.x_0_coef * x_0 + row.x_coef * x + row.noise * jnp.exp(0.5 * log_variance) * noise(index + 1)
        if num_snapshots:
            # Each slot is overwritten until its time has passed, so that T images need not be kept.
            slot = ((index + 1) * (num_snapshots - 1) + num_steps - 1) // num_steps
            snapshots = snapshots.at[slot].set(x)
        return (x, snapshots), None

    x = noise(0) if x_t is None else x_t.astype(jnp.float32)
    snapshots = jnp.zeros((num_snapshots, *shape)).at[:1].set(x) if num_snapshots else None
    (x, snapshots), _ = jax.lax.scan(step, (x, snapshots), (table, jnp.arange(num_steps)))
    return (x, snapshots) if num_snapshots else x
