"""The forward process q and the reverse process p_theta as pure functions of arrays.

The network's output can mean three equivalent things, given x_t = a x_0 + s eps with a = sqrt(abar_t) and
s = sqrt(1 - abar_t):

    eps    the noise                                        (DDPM)
    x_0    the clean image
    v      a eps - s x_0                                    (Salimans & Ho 2022)

`to_x_0` and `from_x_0` convert between them, and everything else is written in terms of x_0. Images are [B, H, W, C]
in [-1, 1] (any [B, ...] works), t is int32 [B] in 0..T-1.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ddpm_jax.diffusion.schedules import Schedule, extract
from ddpm_jax.diffusion.shapes import Factors, Images, Keys, Outputs, Timesteps

Array = jax.Array
ModelFn = Callable[[Images, Timesteps], Outputs]

PREDICTIONS = ("eps", "x_0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned")


@dataclasses.dataclass(frozen=True)
class Parameterization:
    """What a network's output means, and how the predicted x_0 is clipped; see `p_mean_variance`.

    Attributes:
      prediction: "eps", "x_0" or "v".
      variance: "fixed_small", "fixed_large" or "learned".
      clip: whether the predicted x_0 is clipped to [-clip_range, clip_range].
      dynamic_threshold: the quantile for dynamic thresholding instead; None: off.
      clip_range: 1 for images.
      threshold_limit: the largest threshold of dynamic thresholding; None: no limit.
    """

    prediction: str = "eps"
    variance: str = "fixed_large"
    clip: bool = True
    dynamic_threshold: float | None = None
    clip_range: float = 1.0
    threshold_limit: float | None = None

    @property
    def unclipped(self) -> "Parameterization":
        """The same without clipping, for likelihoods."""
        return dataclasses.replace(self, clip=False, dynamic_threshold=None)

    def check(self) -> None:
        """ValueError for an unknown prediction or variance, an invalid quantile, or an empty range."""
        check_option("prediction", self.prediction, PREDICTIONS)
        check_option("variance", self.variance, VARIANCES)
        if self.dynamic_threshold is not None and not 0 < self.dynamic_threshold <= 1:
            raise ValueError(f"dynamic_threshold is {self.dynamic_threshold}; accepted: above 0, at most 1, or None")
        if not self.clip_range > 0:
            raise ValueError(f"clip_range is {self.clip_range}; accepted: above 0")
        if self.threshold_limit is not None and not self.threshold_limit >= 1:
            raise ValueError(f"threshold_limit is {self.threshold_limit}; accepted: 1 or more, or None")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussian:
    """p_theta(x_{t-1} | x_t): mean, variance and log_variance [B, H, W, C] (the variances may broadcast), and the x_0
    that the mean was computed from."""

    mean: Images
    variance: Images | Factors
    log_variance: Images | Factors
    x_0: Images


def check_option(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")


def normal(key: Keys, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Standard normal noise of `shape`, from one key or from one key per example ([B] keys).

    With one key per example, an image's noise does not depend on which other images share its batch.
    """
    if key.ndim == 0:
        return jax.random.normal(key, shape, dtype)
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:], dtype))(key)


def fold_in(key: Keys, number: Array | int) -> Array:
    """`jax.random.fold_in` for one key, or for each of [B] keys."""

    def fold(k: Array) -> Array:
        return jax.random.fold_in(k, number)

    return jax.vmap(fold)(key) if key.ndim else fold(key)


# Forward process.


def q_step(schedule: Schedule, x_prev: Images, t: Timesteps, noise: Images) -> Images:
    """One noising step, x_t ~ q(x_t | x_{t-1}) (DDPM, eq. 2), given its standard normal noise."""
    beta = extract(schedule.betas, t, x_prev.ndim)
    return jnp.sqrt(1.0 - beta) * x_prev + jnp.sqrt(beta) * noise


def q_sample(schedule: Schedule, x_0: Images, t: Timesteps, noise: Images) -> Images:
    """x_t ~ q(x_t | x_0) in closed form (DDPM, eq. 4), given its standard normal noise.

    Args:
      schedule: T timesteps.
      x_0: [B, H, W, C].
      t: int32 [B].
      noise: like x_0.

    Returns:
      [B, H, W, C].
    """
    a = extract(schedule.sqrt_alphas_cumprod, t, x_0.ndim)
    s = extract(schedule.sqrt_one_minus_alphas_cumprod, t, x_0.ndim)
    return a * x_0 + s * noise


def q_posterior(schedule: Schedule, x_0: Images, x_t: Images, t: Timesteps) -> tuple[Images, Factors, Factors]:
    """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0) (DDPM, eqs. 6 and 7).

    The mean is [B, H, W, C], the variances [B, 1, 1, 1]. At t = 0 the variance is 0 and the log-variance that of t = 1.
    """
    coef1 = extract(schedule.posterior_mean_coef1, t, x_t.ndim)
    coef2 = extract(schedule.posterior_mean_coef2, t, x_t.ndim)
    variance = extract(schedule.posterior_variance, t, x_t.ndim)
    log_variance = extract(schedule.posterior_log_variance_clipped, t, x_t.ndim)
    return coef1 * x_0 + coef2 * x_t, variance, log_variance


# What the network's output means.


def to_x_0(prediction: str, output: Images, x_t: Images, a: Factors, s: Factors) -> Images:
    """x_0 from a network output of the given meaning, where x_t = a x_0 + s eps."""
    check_option("prediction", prediction, PREDICTIONS)
    if prediction == "eps":
        return (x_t - s * output) / a
    if prediction == "v":
        return a * x_t - s * output
    return output


def from_x_0(prediction: str, x_0: Images, x_t: Images, a: Factors, s: Factors) -> Images:
    """The inverse of `to_x_0`: the eps, x_0 or v that x_0 and x_t imply."""
    check_option("prediction", prediction, PREDICTIONS)
    if prediction == "eps":
        return (x_t - a * x_0) / s
    if prediction == "v":
        return (a * x_t - x_0) / s
    return x_0


def convert_prediction(
    schedule: Schedule, output: Images, x_t: Images, t: Timesteps, source: str, target: str
) -> Images:
    """Converts a network output that means `source` ("eps", "x_0" or "v") to `target`."""
    check_option("target", target, PREDICTIONS)
    if source == target:
        return output
    a = extract(schedule.sqrt_alphas_cumprod, t, x_t.ndim)
    s = extract(schedule.sqrt_one_minus_alphas_cumprod, t, x_t.ndim)
    return from_x_0(target, to_x_0(source, output, x_t, a, s), x_t, a, s)


def clip_x_0(
    x_0: Images,
    clip: bool = True,
    dynamic_threshold: float | None = None,
    clip_range: float = 1.0,
    threshold_limit: float | None = None,
) -> Images:
    """Restricts a predicted x_0 to the range of the data.

    Args:
      x_0: [B, H, W, C].
      clip: whether to clip to [-clip_range, clip_range].
      dynamic_threshold: None, or the quantile q of Imagen's dynamic thresholding (Saharia et al. 2022, section 2.3):
        each image is clipped to [-s, s] and divided by s = max(1, q-quantile of its absolute values).
      clip_range: the bound for clipping; 1 for images.
      threshold_limit: the largest s, as in DeepFloyd IF; None: no limit.
    """
    if dynamic_threshold is not None:
        axes = tuple(range(1, x_0.ndim))
        s = jnp.maximum(jnp.quantile(jnp.abs(x_0), dynamic_threshold, axis=axes, keepdims=True), 1.0)
        if threshold_limit is not None:
            s = jnp.minimum(s, threshold_limit)
        return jnp.clip(x_0, -s, s) / s
    return jnp.clip(x_0, -clip_range, clip_range) if clip else x_0


def split_output(model_output: Outputs, variance: str) -> tuple[Images, Images | None]:
    """Splits the channels of a network with learned variance into (prediction, interpolation); else (output, None)."""
    check_option("variance", variance, VARIANCES)
    if variance != "learned":
        return model_output, None
    channels = model_output.shape[-1]
    if channels % 2:
        raise ValueError(f"variance 'learned' needs an even number of output channels, not {channels}")
    return model_output[..., : channels // 2], model_output[..., channels // 2 :]


def interpolate_log_variance(interpolation: Images, smallest: Factors, largest: Factors) -> Images:
    """The log-variance between two bounds (Improved DDPM, eq. 15): interpolation -1 gives the smallest, 1 the largest,
    and the variance in between is interpolated geometrically."""
    fraction = (interpolation + 1.0) / 2.0
    return fraction * largest + (1.0 - fraction) * smallest


# Reverse process.


def p_mean_variance(
    schedule: Schedule,
    model_output: Outputs,
    x_t: Images,
    t: Timesteps,
    *,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool = True,
    dynamic_threshold: float | None = None,
    clip_range: float = 1.0,
    threshold_limit: float | None = None,
) -> Gaussian:
    """p_theta(x_{t-1} | x_t) from the network's output (DDPM, section 3.2).

    Args:
      schedule: T timesteps.
      model_output: [B, H, W, C], or [B, H, W, 2 C] for the learned variance.
      x_t: [B, H, W, C].
      t: int32 [B].
      prediction: what the output means: "eps", "x_0" or "v".
      variance: "fixed_small" (the posterior's), "fixed_large" (beta_t) or "learned" (between the two).
      clip: clip the predicted x_0 to [-clip_range, clip_range].
      dynamic_threshold: the quantile for dynamic thresholding instead; see `clip_x_0`.
      clip_range: the bound for clipping; 1 for images.
      threshold_limit: the largest threshold; None: no limit.

    Returns:
      A `Gaussian`: mean and x_0 [B, H, W, C]; variance and log_variance [B, 1, 1, 1], or [B, H, W, C] if learned.

    Raises:
      ValueError: an unknown prediction or variance.
    """
    output, interpolation = split_output(model_output, variance)
    x_0 = convert_prediction(schedule, output, x_t, t, prediction, "x_0")
    x_0 = clip_x_0(x_0, clip, dynamic_threshold, clip_range, threshold_limit)
    mean, small, log_small = q_posterior(schedule, x_0, x_t, t)
    if interpolation is not None:
        log_variance = interpolate_log_variance(interpolation, log_small, extract(schedule.log_betas, t, x_t.ndim))
        return Gaussian(mean, jnp.exp(log_variance), log_variance, x_0)
    if variance == "fixed_small":
        return Gaussian(mean, small, log_small, x_0)
    beta = extract(schedule.betas, t, x_t.ndim)
    return Gaussian(mean, beta, extract(schedule.fixed_large_log_variance, t, x_t.ndim), x_0)


def as_argument(model_fn: Callable[..., Array]) -> jax.tree_util.Partial:
    """The model function as a pytree that jit-compiled functions take as an argument.

    A `jax.tree_util.Partial(net.apply, variables)` is returned as it is: its weights stay arguments of the compiled
    program. Any other callable is wrapped and becomes part of the program, which is recompiled for each new object.
    """
    return model_fn if isinstance(model_fn, jax.tree_util.Partial) else jax.tree_util.Partial(model_fn)


def p_sample(
    schedule: Schedule,
    model_fn: ModelFn,
    key: Keys,
    x_t: Images,
    t: Timesteps,
    *,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool = True,
    dynamic_threshold: float | None = None,
    clip_range: float = 1.0,
    threshold_limit: float | None = None,
) -> Images:
    """One ancestral step, x_{t-1} ~ p_theta(x_{t-1} | x_t) (DDPM, algorithm 2), jit-compiled.

    No noise is added where t = 0.

    Args:
      schedule: T timesteps.
      model_fn: (x_t, t) -> output. With `jax.tree_util.Partial(net.apply, variables)`, new weights do not recompile.
      key: one typed key, or [B] of them.
      x_t: [B, H, W, C].
      t: int32 [B].
      prediction, variance, clip, dynamic_threshold, clip_range, threshold_limit: as in `p_mean_variance`.

    Returns:
      x_{t-1} [B, H, W, C].
    """
    output = Parameterization(prediction, variance, clip, dynamic_threshold, clip_range, threshold_limit)
    output.check()
    x: Images = _p_sample(schedule, as_argument(model_fn), key, x_t, t, output)
    return x


@partial(jax.jit, static_argnames="output")
def _p_sample(
    schedule: Schedule, model_fn: ModelFn, key: Keys, x_t: Images, t: Timesteps, output: Parameterization
) -> Images:
    p = p_mean_variance(schedule, model_fn(x_t, t), x_t, t, **dataclasses.asdict(output))
    last = (t == 0).reshape(-1, *(1,) * (x_t.ndim - 1))
    scale = jnp.where(last, 0.0, jnp.exp(0.5 * p.log_variance))
    return p.mean + scale * normal(key, x_t.shape, x_t.dtype)
