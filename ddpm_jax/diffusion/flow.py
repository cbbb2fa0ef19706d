"""The probability-flow ODE and the likelihood of images under it.

The diffusion's marginals are also those of an ODE (Song et al. 2021, eq. 13). With x_t = a x_0 + s eps and
tau = log(s / a), minus half the log-SNR, it reads

    dx / dtau = s (eps - s x) = a (a x - x_0) = a s v

which is linear in x and in the network's output, with factors between -1 and 1 for every prediction and all noise, and
which is zero for data that are standard normal themselves. Along it the log-density falls by the field's divergence
(Chen et al. 2018, eq. 8; Song et al. 2021, eq. 39).

Between the network's timesteps tau is interpolated linearly in t, and the network is called with the fractional t. Any
such field gives an exact density as the number of steps grows, however good the network is at fractional t, whereas
steps from one timestep to the next could not be refined. At t = 0, where the ODE ends, x has the noise of one step. For
the 8-bit image itself,

    -log P(x_0) <= E_q(x_{t=0} | x_0) [log q(x_{t=0} | x_0) - log p_ODE(x_{t=0}) - log P(x_0 | x_{t=0})]

with the discretised Gaussian of L_0 as P(x_0 | x_{t=0}): q replaces a dequantisation, and all bins are covered.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.bound import mean_flat, segments, vb_term_bpd
from ddpm_jax.diffusion.gaussian import (
    PREDICTIONS,
    VARIANCES,
    Array,
    ModelFn,
    as_argument,
    check_option,
    fold_in,
    normal,
    q_sample,
    split_output,
)
from ddpm_jax.diffusion.schedules import Schedule, extract
from ddpm_jax.diffusion.shapes import Images, Keys
from ddpm_jax.diffusion.tables import log_alphas_cumprod

# Explicit Runge-Kutta methods in which each stage uses only the slope of the previous one: the stages' positions within
# a step, their weights in its result, and how far each one moves towards the next.
METHODS = {
    "heun": ((0.0, 1.0), (1 / 2, 1 / 2), (1.0,)),
    "rk4": ((0.0, 1 / 2, 1 / 2, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (1 / 2, 1 / 2, 1.0)),
}
_State = tuple[Array, Array, Array]  # the start of a step, x, and the result of the step so far

DIVERGENCES = ("hutchinson", "exact")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlowTable:
    """One row per network call, in order; each field is an array [R].

    Attributes:
      t: float32, the timestep that the network is called with.
      of_x, of_output: the field is of_x * x + of_output * output.
      weight: the slope's weight in the step's result.
      onward: how far along the slope the step's next call is.
      last: bool, whether the step ends with this call.
      index: int32, the row's number, which seeds its random draws.
    """

    t: np.ndarray
    of_x: np.ndarray
    of_output: np.ndarray
    weight: np.ndarray
    onward: np.ndarray
    last: np.ndarray
    index: np.ndarray


def flow_table(schedule: Schedule, num_steps: int, method: str = "rk4", prediction: str = "eps") -> FlowTable:
    """The steps from t = 0 to T - 1, evenly spaced in log-SNR.

    If the last timestep is pure noise, at a log-SNR of minus infinity, they end at the last one that is not.

    Args:
      schedule: T timesteps; its arrays must be concrete.
      num_steps: number of steps; each calls the network twice with "heun" and four times with "rk4".
      method: "heun", of second order, or "rk4", the classical fourth-order method.
      prediction: what the network's output means.

    Raises:
      ValueError: an unknown option, no steps, or fewer than two timesteps.
    """
    check_option("method", method, tuple(METHODS))
    check_option("prediction", prediction, PREDICTIONS)
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; accepted: 1 or more")
    log_abar = log_alphas_cumprod(schedule)
    log_abar = log_abar[np.isfinite(log_abar)]
    if len(log_abar) < 2:
        raise ValueError("the probability flow needs at least two timesteps that are not pure noise")
    tau = 0.5 * (np.log(-np.expm1(log_abar)) - log_abar)
    places, weights, onward = (np.array(values) for values in METHODS[method])
    step = (tau[-1] - tau[0]) / num_steps
    at = np.minimum(tau[0] + step * (np.arange(num_steps)[:, None] + places), tau[-1]).ravel()
    a, s = np.exp(-0.5 * np.logaddexp(0.0, 2 * at)), np.exp(-0.5 * np.logaddexp(0.0, -2 * at))
    of_x, of_output = {"eps": (-(s**2), s), "x_0": (a**2, -a), "v": (0.0 * a, a * s)}[prediction]
    return FlowTable(
        t=np.interp(at, tau, np.arange(len(tau))).astype(np.float32),
        of_x=of_x,
        of_output=of_output,
        weight=np.tile(step * weights, num_steps),
        onward=np.tile(step * np.append(onward, 0.0), num_steps),
        last=np.tile(np.arange(len(places)) == len(places) - 1, num_steps),
        index=np.arange(len(at), dtype=np.int32),
    )


def flow_log_density(
    schedule: Schedule,
    model_fn: ModelFn,
    key: Keys,
    x: Images,
    *,
    num_steps: int = 50,
    method: str = "rk4",
    divergence: str = "hutchinson",
    prediction: str = "eps",
    variance: str = "fixed_large",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Array]:
    """log p_ODE(x) of x at t = 0, jit-compiled: N(0, I) at t = T - 1, carried back along the probability flow.

    Args:
      schedule: T timesteps; its arrays must be concrete, since the steps are planned outside of jit.
      model_fn: (x_t, t) -> output, t float32 [B]; see `p_sample`. Only its reverse-mode derivative is needed.
      key: one typed key, or [B] of them, one per image.
      x: [B, H, W, C].
      num_steps, method: see `flow_table`.
      divergence: "hutchinson", v . J v for new random signs v at every call, which is unbiased and costs one gradient
        per call; or "exact", with one gradient per dimension.
      prediction, variance: what the network's output means; a learned variance is ignored.
      progress: called with (network calls done, all calls) between segments of the scan.

    Returns:
      "log_density" [B] in nats, and "x" [B, H, W, C], the end point of the flow.

    Raises:
      ValueError: an unknown option, or what `flow_table` refuses.
    """
    check_option("divergence", divergence, DIVERGENCES)
    check_option("variance", variance, VARIANCES)
    table = flow_table(schedule, num_steps, method, prediction)
    table = jax.tree.map(lambda c: np.asarray(c, np.float32) if c.dtype == np.float64 else c, table)
    calls = len(table.t)
    state: _State = (x, x, x)
    growth = []
    for first, rows in segments(calls, _calls_at_once()):
        part = jax.tree.map(lambda c: c[rows], table)  # noqa: B023
        part.weight[first + np.arange(len(rows)) >= calls] = 0.0  # a repeated row moves nothing
        state, grown = _integrate(as_argument(model_fn), part, key, state, divergence, variance == "learned")
        growth.append(grown)
        if progress:
            jax.block_until_ready(state)
            progress(min(first + len(rows), calls), calls)
    return {"log_density": _standard_normal(state[0]) + sum(growth), "x": state[0]}


def _calls_at_once() -> int:
    """Network calls in one scan. On CPUs it is one: inside a loop, XLA leaves a convolution's gradient in a form that
    its fast routines do not support, and a call takes three times as long."""
    return 1 if jax.default_backend() == "cpu" else 25


@jax.jit
def _standard_normal(x: Images) -> Array:
    """log N(x; 0, I) in nats, [B]."""
    return -0.5 * math.prod(x.shape[1:]) * (math.log(2 * math.pi) + mean_flat(x**2))


@partial(jax.jit, static_argnames=("divergence", "learned"))
def _integrate(
    model_fn: ModelFn, table: FlowTable, key: Keys, state: _State, divergence: str, learned: bool
) -> tuple[_State, Array]:
    """Takes the rows' steps: returns the new state and the integral of the divergence [B]."""

    def row(state: _State, row: Any) -> tuple[_State, Array]:
        start, x, result = state

        def field(x: Array) -> Array:
            output, _ = split_output(model_fn(x, jnp.full(x.shape[:1], row.t)), "learned" if learned else "fixed_large")
            slope: Array = row.of_x * x + row.of_output * output
            return slope

        slope, pull_back = jax.vjp(field, x)
        if divergence == "exact":
            trace = _trace(pull_back, x)
        else:
            v = _signs(fold_in(fold_in(key, 1), row.index), x.shape)
            trace = jnp.sum(v * pull_back(v)[0], axis=tuple(range(1, x.ndim)))
        result = result + row.weight * slope
        x = jnp.where(row.last, result, start + row.onward * slope)
        return (jnp.where(row.last, result, start), x, result), row.weight * trace

    if table.t.shape[0] == 1:
        return row(state, jax.tree.map(lambda column: column[0], table))
    state, growth = jax.lax.scan(row, state, table)
    return state, growth.sum(0)


def _signs(key: Keys, shape: tuple[int, ...]) -> Array:
    """Random +1 and -1, from one key or from one key per example."""
    if key.ndim == 0:
        return jax.random.rademacher(key, shape, jnp.float32)
    return jax.vmap(lambda k: jax.random.rademacher(k, shape[1:], jnp.float32))(key)


def _trace(pull_back: Callable[[Array], tuple[Array]], x: Images) -> Array:
    """The trace of each example's Jacobian, [B], computed row by row."""
    size = math.prod(x.shape[1:])

    def entry(i: Array) -> Array:
        v = jax.nn.one_hot(i, size, dtype=x.dtype).reshape(x.shape[1:])
        (pulled,) = pull_back(jnp.broadcast_to(v, x.shape))
        return pulled.reshape(x.shape[0], size)[:, i]

    diagonal: Array = jax.lax.map(entry, jnp.arange(size), batch_size=min(size, 16))
    return diagonal.sum(0)


def flow_bound(
    schedule: Schedule,
    model_fn: ModelFn,
    key: Keys,
    x_0: Images,
    *,
    num_steps: int = 50,
    method: str = "rk4",
    divergence: str = "hutchinson",
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Array]:
    """The probability flow's bound on -log P(x_0) of 8-bit images; see the top of this module.

    log q is taken at the x drawn rather than in expectation: the tighter the bound, the less log q - log p_ODE varies.

    Args:
      key: one typed key, or [B] of them. The noise of x at t = 0 is drawn from fold_in(key, 0), as in `bound_terms`.
      x_0: [B, H, W, C], 8-bit values scaled to [-1, 1].
      schedule, model_fn, num_steps, method, divergence, prediction, progress: as in `flow_log_density`.
      variance, clip: of the decoder, as in `p_mean_variance`.

    Returns:
      [B] each, in bits/dim: "total"; "decoder", -log P(x_0 | x_{t=0}), which is L_0; and "flow", the rest:
      log q(x_{t=0} | x_0) - log p_ODE(x_{t=0}).

    Raises:
      ValueError: what `flow_log_density` refuses.
    """
    check_option("prediction", prediction, PREDICTIONS)
    check_option("variance", variance, VARIANCES)
    x, log_q, decoder = _dequantize(
        schedule, as_argument(model_fn), key, x_0, prediction=prediction, variance=variance, clip=clip
    )
    found = flow_log_density(
        schedule,
        model_fn,
        key,
        x,
        num_steps=num_steps,
        method=method,
        divergence=divergence,
        prediction=prediction,
        variance=variance,
        progress=progress,
    )
    flow = (log_q - found["log_density"]) / (math.prod(x_0.shape[1:]) * math.log(2.0))
    return {"total": flow + decoder, "decoder": decoder, "flow": flow}


@partial(jax.jit, static_argnames=("prediction", "variance", "clip"))
def _dequantize(
    schedule: Schedule, model_fn: ModelFn, key: Keys, x_0: Images, **options: Any
) -> tuple[Images, Array, Array]:
    """x ~ q(x_{t=0} | x_0), its log q in nats, and L_0 in bits/dim."""
    t = jnp.zeros(x_0.shape[:1], jnp.int32)
    noise = normal(fold_in(key, 0), x_0.shape)
    x = q_sample(schedule, x_0, t, noise)
    log_s = jnp.log(extract(schedule.sqrt_one_minus_alphas_cumprod, t, 1))
    log_q = _standard_normal(noise) - math.prod(x_0.shape[1:]) * log_s
    return x, log_q, vb_term_bpd(schedule, model_fn(x, t), x_0, x, t, **options)
