"""Noise schedules: the betas of the forward process and every array that the equations derive from them.

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                            (DDPM, eq. 2)
    alpha_t = 1 - beta_t,  abar_t = alpha_0 ... alpha_t,  abar_{-1} = 1

Timesteps count from 0, as in the original code: t = 0 means diffused once (the paper counts from 1). All arithmetic is
float64 NumPy; a `Schedule` holds the results as float32.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The arrays of one noise schedule, each float32 [T]; a pytree, so it passes through jit, vmap and scan.

    Attributes:
      betas: variance of the noise that step t adds.
      alphas_cumprod: abar_t, the share of x_0's power in x_t.
      alphas_cumprod_prev: abar_{t-1}, 1 at t = 0.
      sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod: factors of x_0 and of the noise in x_t (eq. 4).
      log_snr: log(abar_t / (1 - abar_t)).
      posterior_variance: beta_t (1 - abar_{t-1}) / (1 - abar_t), 0 at t = 0 (eq. 7).
      posterior_log_variance_clipped: its logarithm, entry 0 replaced by entry 1.
      posterior_mean_coef1, posterior_mean_coef2: factors of x_0 and of x_t in the posterior's mean (eq. 7).
      log_betas: log(beta_t).
      fixed_large_log_variance: log(beta_t), with the posterior's entry 1 as entry 0.
    """

    betas: Array
    alphas_cumprod: Array
    alphas_cumprod_prev: Array
    sqrt_alphas_cumprod: Array
    sqrt_one_minus_alphas_cumprod: Array
    log_snr: Array
    posterior_variance: Array
    posterior_log_variance_clipped: Array
    posterior_mean_coef1: Array
    posterior_mean_coef2: Array
    log_betas: Array
    fixed_large_log_variance: Array

    @property
    def num_timesteps(self) -> int:
        return self.betas.shape[-1]


def _linear(T: int, beta_start: float, beta_end: float) -> np.ndarray:
    return np.linspace(beta_start, beta_end, T)


def _quadratic(T: int, beta_start: float, beta_end: float) -> np.ndarray:
    return np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2


def _constant(T: int, beta_end: float) -> np.ndarray:
    return np.full(T, beta_end)


def _jsd(T: int) -> np.ndarray:
    """1/T, 1/(T-1), ..., 1 (Sohl-Dickstein et al. 2015)."""
    return 1.0 / np.linspace(T, 1, T)


def _warmup(fraction: float) -> Callable[..., np.ndarray]:
    def betas(T: int, beta_start: float, beta_end: float) -> np.ndarray:
        betas = np.full(T, beta_end)
        rising = int(T * fraction)
        betas[:rising] = np.linspace(beta_start, beta_end, rising)
        return betas

    return betas


def _from_alphas_cumprod(f: Callable[[np.ndarray], np.ndarray], T: int, max_beta: float) -> np.ndarray:
    """Betas of abar(u) = f(u) / f(0), u = (t + 1) / T: 1 - abar_t / abar_{t-1}, at most max_beta."""
    values = f(np.arange(T + 1) / T)
    betas: np.ndarray = np.minimum(1.0 - values[1:] / values[:-1], max_beta)
    return betas


def _cosine(T: int, offset: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
    """abar = cos^2 of a quarter turn (Nichol & Dhariwal 2021, eq. 17)."""
    return _from_alphas_cumprod(lambda u: np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2, T, max_beta)


def _sigmoid(T: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999) -> np.ndarray:
    """abar falls as a logistic curve between start and end (Jabri et al. 2022, appendix B)."""

    def f(u: np.ndarray) -> np.ndarray:
        logistic: Callable[[Any], Any] = lambda x: 1.0 / (1.0 + np.exp(-x))  # noqa: E731
        last = logistic(end / tau)
        share: np.ndarray = (last - logistic((u * (end - start) + start) / tau)) / (last - logistic(start / tau))
        return share

    return _from_alphas_cumprod(f, T, max_beta)


SCHEDULES: dict[str, Callable[..., np.ndarray]] = {
    "linear": _linear,
    "quadratic": _quadratic,
    "constant": _constant,
    "jsd": _jsd,
    "warmup10": _warmup(0.1),
    "warmup50": _warmup(0.5),
    "cosine": _cosine,
    "sigmoid": _sigmoid,
}
BETAS_OF = {  # which of `make_betas`' arguments each of these schedules takes
    **dict.fromkeys(("linear", "quadratic", "warmup10", "warmup50"), ("beta_start", "beta_end")),
    "constant": ("beta_end",),
}


def make_betas(
    name: str, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, **options: Any
) -> np.ndarray:
    """The betas of a named schedule, float64 [T].

    Args:
      name: "linear", "quadratic", "constant", "jsd", "warmup10" or "warmup50" (the original's), "cosine" (options
        offset, max_beta) or "sigmoid" (options start, end, tau, max_beta).
      num_timesteps: T.
      beta_start, beta_end: first and last beta, for the schedules that take them ("constant" only takes the last).

    Raises:
      ValueError: an unknown name, an option that the schedule does not take, or T below 1.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule is {name!r}; accepted: {', '.join(SCHEDULES)}, or an array of betas")
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps is {num_timesteps}; accepted: 1 or more")
    given = {"beta_start": beta_start, "beta_end": beta_end}
    options = {**{argument: given[argument] for argument in BETAS_OF.get(name, ())}, **options}
    unknown = sorted(options.keys() - inspect.signature(SCHEDULES[name]).parameters)
    if unknown:
        raise ValueError(f"schedule {name!r} does not take the options {unknown}")
    return SCHEDULES[name](num_timesteps, **options)


def check_betas(betas: ArrayLike) -> np.ndarray:
    """The betas as float64 [T]; a ValueError names the first that is not finite or not in (0, 1]."""
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f"betas must be an array [T] with T >= 1, not of shape {betas.shape}")
    wrong = np.flatnonzero(~(np.isfinite(betas) & (betas > 0) & (betas <= 1)))
    if wrong.size:
        raise ValueError(f"betas[{wrong[0]}] is {betas[wrong[0]]:g}; every beta must be finite, above 0 and at most 1")
    return betas


def rescale_to_zero_terminal_snr(betas: ArrayLike) -> np.ndarray:
    """Betas whose last timestep is pure noise: sqrt(abar) shifted to 0 there, and stretched (Lin et al. 2023, alg. 1).

    Without it x_T still contains a little of the image's mean, which sampling from noise lacks. It needs a network that
    predicts x_0 or v.
    """
    root = np.exp(0.5 * np.cumsum(np.log1p(-check_betas(betas))))
    if len(root) < 2 or root[0] == root[-1]:
        raise ValueError("a zero terminal SNR needs at least two timesteps")
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    rescaled: np.ndarray = 1.0 - abar / np.append(1.0, abar[:-1])
    return rescaled


def make_schedule(
    schedule: str | ArrayLike = "linear",
    num_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    **options: Any,
) -> Schedule:
    """Computes a schedule in float64 and stores it as float32.

    Args:
      schedule: a name for `make_betas`, or custom betas [T].
      num_timesteps, beta_start, beta_end, options: for named schedules, see `make_betas`.

    Returns:
      A `Schedule` of T timesteps.

    Raises:
      ValueError: what `make_betas` and `check_betas` refuse.
    """
    if isinstance(schedule, str):
        betas = make_betas(schedule, num_timesteps, beta_start, beta_end, **options)
    else:
        betas = np.asarray(schedule)
    betas = check_betas(betas)

    # Log space keeps 1 - abar_t exact where abar_t is close to 1, and log abar_t finite where abar_t underflows.
    with np.errstate(divide="ignore"):
        log_alphas_cumprod = np.cumsum(np.log1p(-betas))
    alphas_cumprod = np.exp(log_alphas_cumprod)
    one_minus = -np.expm1(log_alphas_cumprod)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    one_minus_prev = np.append(0.0, one_minus[:-1])
    posterior_variance = betas * one_minus_prev / one_minus
    # Entry 0 is zero; for the logarithm the original uses the value of entry 1.
    second = posterior_variance[1] if betas.size > 1 else betas[0]
    arrays = {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(one_minus),
        "log_snr": np.clip(log_alphas_cumprod, -1e30, None) - np.log(one_minus),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": np.log(np.append(second, posterior_variance[1:])),
        "posterior_mean_coef1": betas * np.sqrt(alphas_cumprod_prev) / one_minus,
        "posterior_mean_coef2": one_minus_prev * np.sqrt(1.0 - betas) / one_minus,
        "log_betas": np.log(betas),
        "fixed_large_log_variance": np.log(np.append(second, betas[1:])),
    }
    return Schedule(**{name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()})


def extract(array: Array, t: Array, ndim: int) -> Array:
    """array[t] as [B, 1, ..., 1] with `ndim` dimensions, to multiply images by; a scalar t gives a scalar."""
    values = jnp.asarray(array)[t]
    return values.reshape(values.shape + (1,) * (ndim - values.ndim)) if values.ndim else values
