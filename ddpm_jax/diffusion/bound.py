"""The variational bound on the negative log-likelihood, whole or estimated from a few of its terms.

The bound (DDPM, eq. 5) is

    L = L_T + L_{T-1} + ... + L_1 + L_0

with L_T = KL(q(x_T | x_0) || N(0, I)), the L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)), and L_0 the
negative log-likelihood of the 8-bit image under a discretised Gaussian. All are given in bits per dimension. With
t counted from 0, entry t of an array of terms is L_0 for t = 0 and the KL between step t + 1 and t otherwise.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jax.typing import ArrayLike

from ddpm_jax.diffusion.gaussian import (
    PREDICTIONS,
    VARIANCES,
    Array,
    ModelFn,
    as_argument,
    check_option,
    clip_x_0,
    convert_prediction,
    fold_in,
    normal,
    p_mean_variance,
    q_posterior,
    q_sample,
    split_output,
)
from ddpm_jax.diffusion.schedules import Schedule, extract
from ddpm_jax.diffusion.shapes import Images, Keys, Outputs, PerExample, Timesteps


def mean_flat(x: Images) -> Array:
    """Mean over all axes but the first."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def normal_kl(mean_1: Array, log_variance_1: Array, mean_2: Array, log_variance_2: Array) -> Array:
    """KL(N(mean_1, var_1) || N(mean_2, var_2)) in nats, elementwise."""
    difference = log_variance_1 - log_variance_2
    # exp(d) - 1 - d of nearly equal variances cancels; its series does not.
    series = difference**2 * (0.5 + difference / 6.0 + difference**2 / 24.0)
    excess = jnp.where(jnp.abs(difference) < 0.03, series, jnp.expm1(difference) - difference)
    return 0.5 * (excess + (mean_1 - mean_2) ** 2 * jnp.exp(-log_variance_2))


def discretized_gaussian_log_likelihood(x: Images, mean: Array, log_scale: Array) -> Array:
    """log-probability, in nats, of 8-bit values under a Gaussian integrated over their bins (DDPM, eq. 13).

    Args:
      x: values k / 127.5 - 1 for k in 0..255.
      mean, log_scale: the Gaussian's mean and the logarithm of its standard deviation.

    Returns:
      Elementwise log-probabilities. The 256 bins are 2 / 255 wide, the outer two open; their probabilities sum to one.
    """
    inverse = jnp.exp(-log_scale)
    centred = x - mean
    upper = jnp.where(x > 0.999, jnp.inf, (centred + 1.0 / 255.0) * inverse)
    lower = jnp.where(x < -0.999, -jnp.inf, (centred - 1.0 / 255.0) * inverse)
    # In the upper tail the difference of two CDF values loses its precision. The normal distribution is symmetric, so
    # these bins are reflected into the lower tail.
    reflect = centred > 0
    lower, upper = jnp.where(reflect, -upper, lower), jnp.where(reflect, -lower, upper)
    # Infinities would make the gradient of the untaken branch NaN.
    upper_open, lower_open = jnp.isposinf(upper), jnp.isneginf(lower)
    log_upper = jnp.where(upper_open, 0.0, log_ndtr(jnp.where(upper_open, 0.0, upper)))
    log_lower = log_ndtr(jnp.where(lower_open, -1.0, lower))
    # A bin too narrow or too far out for float32 to see a difference still gets a tiny probability.
    ratio = jnp.where(lower_open, 0.0, jnp.exp(jnp.minimum(log_lower - log_upper, -1e-7)))
    return log_upper + jnp.log1p(-ratio)


def prior_bpd(schedule: Schedule, x_0: Images) -> PerExample:
    """L_T [B] in bits/dim: how far q(x_T | x_0) is from N(0, I)."""
    last = jnp.full(x_0.shape[:1], schedule.num_timesteps - 1)
    mean = extract(schedule.sqrt_alphas_cumprod, last, x_0.ndim) * x_0
    log_variance = 2.0 * jnp.log(extract(schedule.sqrt_one_minus_alphas_cumprod, last, x_0.ndim))
    return mean_flat(normal_kl(mean, log_variance, jnp.zeros(()), jnp.zeros(()))) / math.log(2.0)


def vb_term_bpd(
    schedule: Schedule,
    model_output: Outputs,
    x_0: Images,
    x_t: Images,
    t: Timesteps,
    *,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool = False,
) -> PerExample:
    """The bound's term at each example's t, [B] in bits/dim: L_0 where t = 0, else KL(q || p_theta).

    Args:
      schedule: T timesteps.
      model_output: the network's output at (x_t, t).
      x_0: [B, H, W, C], 8-bit values scaled to [-1, 1].
      x_t: a draw of q(x_t | x_0).
      t: int32 [B].
      prediction, variance, clip: as in `p_mean_variance`. The original does not clip here.
    """
    true_mean, _, true_log_variance = q_posterior(schedule, x_0, x_t, t)
    p = p_mean_variance(schedule, model_output, x_t, t, prediction=prediction, variance=variance, clip=clip)
    kl = mean_flat(normal_kl(true_mean, true_log_variance, p.mean, p.log_variance))
    decoder = -mean_flat(discretized_gaussian_log_likelihood(x_0, p.mean, 0.5 * p.log_variance))
    return jnp.where(t == 0, decoder, kl) / math.log(2.0)


# The bound of given images: all terms, or a random few.


def _term(
    schedule: Schedule, model_fn: ModelFn, x_0: Images, t: Timesteps, noise: Images, **options: Any
) -> tuple[PerExample, Images]:
    """The bound's term at each example's t and the x_0 predicted there, with one network call."""
    x_t = q_sample(schedule, x_0, t, noise)
    output = model_fn(x_t, t)
    bound = vb_term_bpd(schedule, output, x_0, x_t, t, **options)
    output = split_output(output, options["variance"])[0]
    return bound, convert_prediction(schedule, output, x_t, t, options["prediction"], "x_0")


@partial(jax.jit, static_argnames=("prediction", "variance", "clip"))
def _bound_terms(
    schedule: Schedule, model_fn: ModelFn, key: Keys, x_0: Images, timesteps: Array, **options: Any
) -> dict[str, Array]:
    def term(_: None, t: Array) -> tuple[None, dict[str, Array]]:
        noise = normal(fold_in(key, t), x_0.shape)
        bound, predicted = _term(schedule, model_fn, x_0, jnp.full(x_0.shape[:1], t), noise, **options)
        mse, clipped_mse = (mean_flat((x - x_0) ** 2) for x in (predicted, clip_x_0(predicted)))
        return None, {"terms": bound, "x_0_mse": mse, "clipped_x_0_mse": clipped_mse}

    return jax.lax.scan(term, None, timesteps)[1]


def bound_terms(
    schedule: Schedule,
    model_fn: ModelFn,
    key: Keys,
    x_0: Images,
    timesteps: ArrayLike | None = None,
    *,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Array]:
    """The bound's terms at the given timesteps, with one network call each, jit-compiled.

    Args:
      schedule: T timesteps.
      model_fn: (x_t, t) -> output; see `p_sample`.
      key: one typed key, or [B] of them, one per image. The noise at t is drawn from fold_in(key, t).
      x_0: [B, H, W, C], 8-bit values scaled to [-1, 1].
      timesteps: int [n]; None: all T.
      prediction, variance, clip: as in `p_mean_variance`.
      progress: called with (calls done, all calls) between segments of the scan.

    Returns:
      "terms" [n, B] in bits/dim, L_0 where t = 0; and the squared error of the x_0 predicted there, "x_0_mse" [n, B]
      as it is and "clipped_x_0_mse" [n, B] after clipping to [-1, 1].

    Raises:
      ValueError: an unknown option.
    """
    check_option("prediction", prediction, PREDICTIONS)
    check_option("variance", variance, VARIANCES)
    timesteps = np.arange(schedule.num_timesteps) if timesteps is None else np.asarray(timesteps)
    timesteps = timesteps.astype(np.int32)
    if not progress:
        terms: dict[str, Array] = _bound_terms(
            schedule, as_argument(model_fn), key, x_0, timesteps, prediction=prediction, variance=variance, clip=clip
        )
        return terms
    calls = len(timesteps)
    parts = []
    for first, rows in segments(calls):
        options = {"prediction": prediction, "variance": variance, "clip": clip}
        parts.append(_bound_terms(schedule, as_argument(model_fn), key, x_0, timesteps[rows], **options))
        jax.block_until_ready(parts[-1])
        progress(min(first + len(rows), calls), calls)
    return {name: jnp.concatenate([part[name] for part in parts])[:calls] for name in parts[0]}


def segments(rows: int, most: int = 25) -> list[tuple[int, np.ndarray]]:
    """Cuts a scan into segments of equal length, so that one program serves all: pairs (first row, indices of rows).

    If the rows do not divide evenly, the last segment repeats the last row.
    """
    count = -(-rows // most)
    size = -(-rows // count)
    return [(first, np.minimum(np.arange(first, first + size), rows - 1)) for first in range(0, rows, size)]


def variational_bound(
    schedule: Schedule,
    model_fn: ModelFn,
    key: Keys,
    x_0: Images,
    *,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Array]:
    """The bound on -log p(x_0), with one network call per timestep, jit-compiled.

    Args:
      schedule, model_fn, key, x_0, prediction, variance, clip, progress: as in `bound_terms`.

    Returns:
      What `bound_terms` returns for all T timesteps, L_0 first, and "prior" (L_T) and "total", [B] in bits/dim.
    """
    found = bound_terms(
        schedule, model_fn, key, x_0, prediction=prediction, variance=variance, clip=clip, progress=progress
    )
    prior = prior_bpd(schedule, x_0)
    return {"total": found["terms"].sum(0) + prior, "prior": prior, **found}


def term_proposal(weights: ArrayLike, uniform: float = 0.1) -> np.ndarray:
    """The probabilities with which `sampled_bound` draws the timesteps of its KL terms, float64 [T].

    Args:
      weights: [T], how large the terms are: the variance is least for sqrt(E[L_t^2]). A curve of the bound's terms or
        `LossHistory.probabilities` will do; entry 0, L_0, is ignored.
      uniform: the share of the uniform distribution over 1..T-1, which bounds the importance weights.

    Raises:
      ValueError: weights that are negative or not finite, or a share outside (0, 1].
    """
    weights = np.array(weights, np.float64)
    if weights.ndim != 1 or not np.all(np.isfinite(weights) & (weights >= 0)):
        raise ValueError(f"the weights must be finite numbers of at least 0, of shape [T], not {weights.shape}")
    if not 0 < uniform <= 1:
        raise ValueError(f"uniform is {uniform}; accepted: above 0, at most 1")
    weights[:1] = 0.0
    flat = np.append(0.0, np.ones(len(weights) - 1)) / max(len(weights) - 1, 1)
    return uniform * flat + (1.0 - uniform) * (weights / weights.sum() if weights.any() else flat)


def pilot_timesteps(schedule: Schedule, num_calls: int = 32) -> np.ndarray:
    """The timesteps of a pilot run, int [n] in 1..T-1, n at most num_calls: half evenly spaced in t, half in log t."""
    last, half = schedule.num_timesteps - 1, max(num_calls // 2, 2)
    if last < 1:
        raise ValueError("the bound of a single timestep is L_T + L_0; there are no KL terms to draw")
    return np.unique(np.round(np.concatenate([np.geomspace(1, last, half), np.linspace(1, last, half)])).astype(int))


def pilot_proposal(schedule: Schedule, terms: ArrayLike, num_calls: int = 32, uniform: float = 0.1) -> np.ndarray:
    """A proposal for `sampled_bound` from the terms of a few images, 16 say, at a few timesteps.

    Between the timesteps the logarithm of the terms' root mean square is interpolated over log t.

    Args:
      schedule: T timesteps.
      terms: [n, B], from `bound_terms` at `pilot_timesteps(schedule, num_calls)`.
      num_calls: the same number.
      uniform: see `term_proposal`.

    Returns:
      float64 [T].
    """
    rms = np.sqrt(np.mean(np.square(np.asarray(terms, np.float64)), axis=1))
    t = np.log(np.arange(1, schedule.num_timesteps))
    curve = np.interp(t, np.log(pilot_timesteps(schedule, num_calls)), np.log(np.maximum(rms, 1e-12)))
    return term_proposal(np.append(0.0, np.exp(curve)), uniform)


def sampled_bound(
    schedule: Schedule,
    model_fn: ModelFn,
    key: Keys,
    x_0: Images,
    *,
    proposal: ArrayLike,
    num_terms: int = 8,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool = False,
) -> dict[str, Array]:
    """An unbiased estimate of the bound on -log p(x_0) with num_terms + 1 network calls, jit-compiled.

    L_T and L_0 are computed as in `variational_bound`. For the sum of the T - 1 KL terms, t is drawn by importance
    sampling: the proposal's CDF is cut into num_terms / 2 strata of equal probability, and each image draws two t from
    each stratum, whose difference estimates the variance. New weights or another proposal do not recompile.

    Args:
      schedule, model_fn, key, x_0, prediction, variance, clip: as in `bound_terms`.
      proposal: [T], the probabilities of t, above 0 except for entry 0; see `term_proposal` and `pilot_proposal`.
      num_terms: KL terms drawn for each image, an even number.

    Returns:
      [B] each, in bits/dim: "total"; "prior", L_T; "decoder", L_0; "kl", the estimated sum of the other terms; and
      "kl_variance", an unbiased estimate of the variance of "kl" over the draws of t and of the noise.

    Raises:
      ValueError: an unknown option, an odd number of terms, or a proposal that never draws some t.
    """
    check_option("prediction", prediction, PREDICTIONS)
    check_option("variance", variance, VARIANCES)
    if num_terms < 2 or num_terms % 2:
        raise ValueError(f"num_terms is {num_terms}; accepted: even numbers from 2")
    p = np.asarray(proposal, np.float64)
    T = schedule.num_timesteps
    if T < 2:
        raise ValueError("the bound of a single timestep is L_T + L_0; there are no KL terms to draw")
    if p.shape != (T,) or not np.all(p[1:] > 0) or not np.isfinite(p.sum()):
        raise ValueError(f"the proposal has shape {p.shape}; accepted: ({T},), above 0 from entry 1 on")
    # Drawing uses differences of sums rounded to float32; weighting by exactly these keeps the estimate unbiased.
    cumulative = np.cumsum(p[1:] / p[1:].sum()).astype(np.float32)
    bound: dict[str, Array] = _sampled_bound(
        schedule,
        as_argument(model_fn),
        key,
        x_0,
        cumulative,
        num_terms=num_terms,
        prediction=prediction,
        variance=variance,
        clip=clip,
    )
    return bound


@partial(jax.jit, static_argnames=("num_terms", "prediction", "variance", "clip"))
def _sampled_bound(
    schedule: Schedule,
    model_fn: ModelFn,
    key: Keys,
    x_0: Images,
    cumulative: Array,
    num_terms: int,
    **options: Any,
) -> dict[str, Array]:
    size, strata = x_0.shape[0], num_terms // 2
    cumulative = cumulative.at[-1].set(1.0)
    p = jnp.diff(cumulative, prepend=0.0)
    # A different stream from the noise, which is drawn by call number.
    t_key = fold_in(key, 2**31)
    u = jax.vmap(lambda k: jax.random.uniform(k, (strata, 2)))(t_key if key.ndim else jax.random.split(t_key, size))
    u = ((jnp.arange(strata)[:, None] + u) / strata).reshape(size, num_terms).T
    drawn = jnp.minimum(jnp.searchsorted(cumulative, u, side="right"), len(p) - 1).astype(jnp.int32)
    t = jnp.concatenate([jnp.zeros((1, size), jnp.int32), drawn + 1])

    def call(_: None, t_and_index: tuple[Array, Array]) -> tuple[None, Array]:
        t, index = t_and_index
        return None, _term(schedule, model_fn, x_0, t, normal(fold_in(key, index), x_0.shape), **options)[0]

    _, terms = jax.lax.scan(call, None, (t, jnp.arange(num_terms + 1)))
    decoder, prior = terms[0], prior_bpd(schedule, x_0)
    # [strata, 2, B]: each an estimate of its stratum's share of the sum.
    values = (terms[1:] / p[drawn]).reshape(strata, 2, size) / strata
    kl = values.mean(1).sum(0)
    kl_variance = jnp.sum((values[:, 0] - values[:, 1]) ** 2, axis=0) / 4
    return {
        "total": prior + decoder + kl,
        "prior": prior,
        "decoder": decoder,
        "kl": kl,
        "kl_variance": kl_variance,
    }
