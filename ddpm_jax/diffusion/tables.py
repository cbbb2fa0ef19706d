"""Samplers as tables: each method is a handful of factors per network call, computed beforehand in float64 NumPy.

All the methods here are linear in the same few images. Writing x_t = a x_0 + s eps, D for the network's prediction of
x_0 at the current x, and D1, D2, D3 for what was remembered one, two and three calls before, one row of a table means

    next x      <-  the row's factors  .  (x, kept, D, D1, D2, D3)  +  noise
    kept        <-  other factors      .  the same
    remembered  <-  other factors      .  (x, D)

where "kept" is one image that a method may carry along: the starting point of Heun's step, or UniPC's corrected point.
Most methods remember D itself; PLMS remembers eps = (x - a D) / s. So `ddpm_jax.sample` has one loop for all of them,
and another method, eta, order or choice of timesteps is just another table, which does not recompile.

A builder takes the `Levels` that sampling passes through and returns the rows, following the paper's equation. There
lambda = log(a / s), half the log-SNR, h is its difference, and "next" means the level that a row leads to; the clean
image has a = 1, s = 0.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from ddpm_jax.diffusion.gaussian import VARIANCES, check_option
from ddpm_jax.diffusion.schedules import Schedule

SPACINGS = ("linspace", "leading", "trailing", "quadratic", "logsnr", "karras")

LEVELS = ("linspace", "karras", "logsnr")

# The images that a row combines, by their column.
X, KEPT, D, D1, D2, D3 = range(6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerTable:
    """One row per network call, in order; each field is an array [R], or [R, 6] with the columns X, KEPT, D, ... D3.

    Attributes:
      t: the timestep that the network is called with: int32, or floating-point if some are fractional.
      a, s: x_t = a x_0 + s eps, to convert the network's output to x_0.
      next: the factors of the next x.
      kept: the factors of the image to keep.
      remembered: [R, 2], the factors (of x, of D) of what later rows use as D1, D2 and D3.
      log_variance_min, log_variance_max: bounds between which a learned variance interpolates; equal if it is fixed.
      noise_scale, noise_variance: the noise's variance is noise_scale * exp(log_variance) + noise_variance.
    """

    t: np.ndarray
    a: np.ndarray
    s: np.ndarray
    next: np.ndarray
    kept: np.ndarray
    remembered: np.ndarray
    log_variance_min: np.ndarray
    log_variance_max: np.ndarray
    noise_scale: np.ndarray
    noise_variance: np.ndarray


# Timesteps and noise levels.


def log_alphas_cumprod(schedule: Schedule) -> np.ndarray:
    """log abar_t, float64 [T], from the betas: from a float32 abar_t, 1 - abar_t would be imprecise."""
    with np.errstate(divide="ignore"):
        log_abar: np.ndarray = np.cumsum(np.log1p(-np.asarray(schedule.betas, np.float64)))
    return log_abar


def spaced_timesteps(
    schedule: Schedule,
    num_steps: int | None = None,
    spacing: str = "linspace",
    last: int | None = None,
    first: int = 0,
    *,
    offset: int = 0,
    skip_lowest: bool = False,
) -> np.ndarray:
    """`num_steps` of the timesteps first..last, descending, the order of sampling.

    Args:
      schedule: T timesteps.
      num_steps: number of timesteps; None: all.
      spacing: "linspace", evenly from last to first;
        "leading", multiples of the distance rounded down, from first up;
        "trailing", multiples of the rounded distance, from last down;
        "quadratic", evenly in sqrt(t) (DDIM, appendix D.2);
        "logsnr", evenly in log-SNR, or "karras", evenly in (s / a)^(1/7) (Karras et al. 2022, eq. 5): the distinct
        timesteps nearest to those levels.
      last: the timestep to start from; None: T - 1.
      first: the lowest timestep.
      offset: added to the timesteps of "leading", which are limited to `last` (Stable Diffusion's steps_offset).
      skip_lowest: take num_steps + 1 timesteps, if there are that many, and leave out the lowest, as diffusers' solvers
        do.

    Raises:
      ValueError: an unknown spacing, more steps than timesteps, or a `last` outside 0..T-1.
    """
    check_option("spacing", spacing, SPACINGS)
    T = schedule.num_timesteps
    last = T - 1 if last is None else last
    if not 0 <= last < T:
        raise ValueError(f"the starting timestep is {last}; accepted: 0 to {T - 1}")
    there = last - first + 1
    num_steps = there if num_steps is None else num_steps
    if not 1 <= num_steps <= there:
        raise ValueError(f"num_steps is {num_steps}; accepted: 1 to {there}, the number of timesteps")
    if skip_lowest and num_steps < there:
        return spaced_timesteps(schedule, num_steps + 1, spacing, last, first, offset=offset)[:-1]
    if num_steps == 1:
        return np.array([last], np.int32)
    if spacing == "leading":
        ascending = first + np.arange(num_steps) * (there // num_steps)
        shifted: np.ndarray = ascending + min(offset, last - ascending[-1])
        return shifted[::-1].astype(np.int32)
    if spacing == "trailing":
        return (first + np.round(np.arange(num_steps, 0, -1) * (there / num_steps)) - 1).astype(np.int32)
    if spacing == "linspace":
        return np.round(np.linspace(last, first, num_steps)).astype(np.int32)
    if spacing == "quadratic":
        wanted = np.linspace(math.sqrt(first), math.sqrt(last), num_steps) ** 2
    else:
        log_abar = log_alphas_cumprod(schedule)[: last + 1]
        finite = log_abar[np.isfinite(log_abar)]
        log_sigma = 0.5 * (np.log(-np.expm1(finite)) - finite)
        low, high = log_sigma[first], log_sigma[-1]
        levels = np.linspace(low, high, num_steps)
        if spacing == "karras":
            levels = 7 * np.log(np.linspace(np.exp(low / 7), np.exp(high / 7), num_steps))
        wanted = np.interp(levels, log_sigma, np.arange(len(finite)))
        wanted[-1] = last
    # Rounded, and moved apart where two coincide: first upwards, then down from the last.
    steps = np.arange(num_steps)
    ascending = np.maximum.accumulate(np.maximum(np.round(wanted), first) - steps) + steps
    ascending = np.minimum(ascending, last - steps[::-1])
    return ascending[::-1].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Levels:
    """The S + 1 noise levels that sampling passes through, in float64: those of its timesteps and the one it ends at.

    Attributes:
      t: [S + 1], the timesteps, int32, or float64 if some are fractional; -1 at the end stands for the clean image.
      log_abar: [S + 1], log abar there; 0 at the clean image.
    """

    t: np.ndarray
    log_abar: np.ndarray

    @classmethod
    def of(cls, schedule: Schedule, timesteps: Sequence[int] | np.ndarray, end: int | None = None) -> "Levels":
        """The levels of descending timesteps, ending at the clean image or at the timestep `end`.

        Raises:
          ValueError: timesteps that do not descend, or that lie outside the schedule's.
        """
        t = np.asarray(timesteps)
        t = t if end is None else np.append(t, end)
        if t.ndim != 1 or not t.size or t.dtype.kind not in "iu" or np.any(np.diff(t) >= 0):
            raise ValueError(f"the timesteps are {t.tolist()}; accepted: descending integers")
        if t[0] >= schedule.num_timesteps or t[-1] < 0:
            raise ValueError(f"the timesteps are {t[0]} to {t[-1]}; accepted: {schedule.num_timesteps - 1} to 0")
        log_abar = log_alphas_cumprod(schedule)[t]
        if end is None:
            t, log_abar = np.append(t, -1), np.append(log_abar, 0.0)
        return cls(t.astype(np.int32), log_abar)

    @classmethod
    def between(
        cls, schedule: Schedule, timesteps: np.ndarray, end: int | None, how: str, fractional: bool = True
    ) -> "Levels":
        """Evenly spaced noise levels, which may lie between timesteps: as many as there are timesteps, from the first
        timestep's to the last one's.

        Pure noise counts as abar = 2^-24, since interpolation needs a finite s / a.

        Args:
          schedule: T timesteps.
          timesteps: descending; only the first, the last and their number matter.
          end: the timestep to end at, which may be the last of them; None: the clean image.
          how: "linspace", evenly in t, with s / a interpolated between the neighbouring timesteps;
            "karras", evenly in (s / a)^(1/7), or "logsnr", evenly in log-SNR, with t interpolated in log(s / a).
          fractional: whether the network is called at these t, or at the nearest timesteps.

        Raises:
          ValueError: an unknown `how`.
        """
        check_option("levels", how, LEVELS)
        all_log_abar = np.maximum(log_alphas_cumprod(schedule), -24 * math.log(2))
        log_sigma = 0.5 * (np.log(-np.expm1(all_log_abar)) - all_log_abar)
        first, last = timesteps[0], timesteps[-1]
        if how == "linspace":
            t = np.linspace(first, last, len(timesteps))
            chosen = np.log(np.interp(t, np.arange(len(log_sigma)), np.exp(log_sigma)))
        else:
            chosen = np.linspace(log_sigma[first], log_sigma[last], len(timesteps))
            if how == "karras":
                low, high = np.exp(log_sigma[[last, first]] / 7)
                chosen = 7 * np.log(np.linspace(high, low, len(timesteps)))
            t = np.interp(chosen, log_sigma, np.arange(len(log_sigma)))
        log_abar = -np.log1p(np.exp(2 * chosen))
        if end is None:
            t, log_abar = np.append(t, -1), np.append(log_abar, 0.0)
        elif end != last:
            t, log_abar = np.append(t, end), np.append(log_abar, all_log_abar[end])
        return cls(t if fractional else np.round(t).astype(np.int32), log_abar)

    @property
    def to_clean(self) -> bool:
        """Whether sampling ends at the clean image."""
        return bool(self.t[-1] < 0)

    @property
    def a(self) -> np.ndarray:
        a: np.ndarray = np.exp(0.5 * self.log_abar)
        return a

    @property
    def s(self) -> np.ndarray:
        s: np.ndarray = np.sqrt(-np.expm1(self.log_abar))
        return s

    @property
    def lambdas(self) -> np.ndarray:
        """log(a / s): infinite at the clean image, minus infinite at pure noise."""
        with np.errstate(divide="ignore"):
            lambdas: np.ndarray = 0.5 * self.log_abar - np.log(self.s)
        return lambdas


def factors(rows: int, columns: Mapping[int, Any]) -> np.ndarray:
    """The factors of (x, kept, D, D1, D2, D3), float64 [rows, 6], from the columns that are not zero.

    Args:
      rows: number of rows.
      columns: {X, KEPT, D, D1, D2 or D3: [rows], or one number for all}.
    """
    return np.stack([np.broadcast_to(columns.get(i, 0.0), rows) for i in range(6)], axis=-1).astype(np.float64)


def table_of(levels: Levels, next: np.ndarray, **rest: np.ndarray) -> SamplerTable:
    """A table with one network call at each level, from the first.

    Args:
      levels: to sample at.
      next: [S, 6], the `factors` of the next x.
      rest: further columns of `SamplerTable`. The others are zero, except that D is remembered.
    """
    rows = len(next)
    zeros = dict.fromkeys(("log_variance_min", "log_variance_max", "noise_scale", "noise_variance"), np.zeros(rows))
    columns = {"kept": np.zeros((rows, 6)), "remembered": np.tile((0.0, 1.0), (rows, 1)), **zeros, **rest}
    return SamplerTable(levels.t[:rows], levels.a[:rows], levels.s[:rows], next, **columns)


# The methods.


def ddpm(levels: Levels, variance: str = "fixed_large", x_0_mse: ArrayLike | None = None) -> SamplerTable:
    """Ancestral sampling (DDPM, algorithm 2) over any subsequence of timesteps (Improved DDPM, section 4).

    Between neighbours the process is a diffusion with beta = 1 - abar_t / abar_next, so the equations of the posterior
    hold with that beta. The step to the clean image yields D and adds no noise.

    With x_0_mse [T], the mean squared error of the predicted x_0 at each timestep, the variance is the optimal one that
    is the same for all pixels (Analytic-DPM, Bao et al. 2022, eq. 7): the posterior's plus that of the error of D.
    """
    check_option("variance", variance, VARIANCES)
    log_now, log_next = levels.log_abar[:-1], levels.log_abar[1:]
    one_minus_now, one_minus_next = -np.expm1(log_now), -np.expm1(log_next)
    with np.errstate(invalid="ignore"):  # abar_t = 0 at both: the step between them keeps nothing of x
        log_ratio = np.where(np.isneginf(log_now), -np.inf, log_now - log_next)
    beta = -np.expm1(log_ratio)
    small, noise_scale = beta * one_minus_next / one_minus_now, np.ones(len(beta))
    if levels.to_clean:
        # The last step's variance is 0; as in the schedule's arrays, its logarithm repeats its neighbour's.
        small[-1], noise_scale[-1] = small[-2] if len(small) > 1 else beta[-1], 0.0
    log_small, log_large = np.log(small), np.log(beta)
    columns = {
        D: beta * np.exp(0.5 * log_next) / one_minus_now,
        X: np.exp(0.5 * log_ratio) * one_minus_next / one_minus_now,
    }
    if x_0_mse is not None:
        mse = np.interp(levels.t[:-1], np.arange(np.size(x_0_mse)), x_0_mse)
        log_small = log_large = np.log(small + columns[D] ** 2 * mse)
    return table_of(
        levels,
        factors(len(beta), columns),
        log_variance_min=log_large if variance == "fixed_large" else log_small,
        log_variance_max=log_small if variance == "fixed_small" else log_large,
        noise_scale=noise_scale,
    )


def ddim(levels: Levels, eta: float = 0.0) -> SamplerTable:
    """DDIM (Song et al. 2021, eqs. 12 and 16): eta 0 is deterministic, eta 1 has the posterior's variance.

    eps is computed from x and the clipped x_0, which diffusers calls use_clipped_model_output.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; accepted: 0 to 1")
    a, s, a_next, s_next = levels.a[:-1], levels.s[:-1], levels.a[1:], levels.s[1:]
    share = -np.expm1(-np.diff(levels.log_abar)) if eta else np.zeros(len(s))  # meaningless if levels ascend
    variance = (eta * s_next / s) ** 2 * share
    eps = np.sqrt(np.maximum(s_next**2 - variance, 0.0))
    return table_of(levels, factors(len(a), {D: a_next - eps * a / s, X: eps / s}), noise_variance=variance)


def _share_of_difference(levels: Levels) -> np.ndarray:
    """h / (2 h_before): how much of D - D1 a second-order step adds to D.

    It is 0 in the first step, which has no D1, and in the step to the clean image, which yields D.
    """
    h = np.diff(levels.lambdas)
    numerator = np.where(np.isposinf(levels.lambdas[1:]), 0.0, h)
    return np.append(0.0, numerator[1:] / (2 * h[:-1]))


def dpmpp_2m(levels: Levels) -> SamplerTable:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): deterministic, second order, one call per step."""
    a, s, a_next, s_next = levels.a[:-1], levels.s[:-1], levels.a[1:], levels.s[1:]
    gain = a_next - a * s_next / s  # a_next (1 - exp(-h))
    share = _share_of_difference(levels)
    return table_of(levels, factors(len(a), {X: s_next / s, D: gain * (1 + share), D1: -gain * share}))


def dpmpp_2m_sde(levels: Levels) -> SamplerTable:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, appendix): stochastic, one call per step."""
    a, s, a_next, s_next = levels.a[:-1], levels.s[:-1], levels.a[1:], levels.s[1:]
    decay = a * s_next / (s * a_next)  # exp(-h)
    gain = a_next * (1 - decay**2)
    share = _share_of_difference(levels)
    columns = {X: s_next / s * decay, D: gain * (1 + share), D1: -gain * share}
    return table_of(levels, factors(len(a), columns), noise_variance=s_next**2 * (1 - decay**2))


def heun(levels: Levels) -> SamplerTable:
    """EDM's deterministic second-order sampler (Karras et al. 2022, algorithm 1) on the variance-preserving process.

    In x / a this is the variance-exploding process with sigma = s / a, whose derivative is (x / a - D) / sigma. A step
    takes two calls: an Euler step from the current level, then, at the point it reached, a step with the mean of both
    derivatives. The step to the clean image, and one from pure noise, is Euler's alone. S timesteps take 2 S - 1 calls.
    """
    a, s, a_next, s_next = levels.a[:-1], levels.s[:-1], levels.a[1:], levels.s[1:]
    ratio = a * s_next / (s * a_next)  # sigma_next / sigma
    S = len(ratio)
    euler = factors(S, {X: s_next / s, D: a_next * (1 - ratio)})
    # a_next (kept / a + (ratio - 1) / 2 ((kept / a - D1) + (x / a_next - D) / ratio)); from pure noise, x as it is.
    safe = np.where(ratio > 0, ratio, 1.0)
    back = (1 - safe) / (2 * safe)
    mean = factors(
        S,
        {KEPT: np.where(ratio > 0, s_next / s * (1 + back), 0.0), D1: a_next * safe * back, X: -back, D: a_next * back},
    )
    mean[ratio == 0, X] = 1.0

    def interleave(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.stack([first, second], axis=1).reshape(2 * S, *first.shape[1:])

    calls = Levels(interleave(levels.t[:-1], levels.t[1:]), interleave(levels.log_abar[:-1], levels.log_abar[1:]))
    rows = 2 * S - 1 if levels.to_clean else 2 * S
    keep_x = factors(S, {X: 1.0})
    return table_of(calls, interleave(euler, mean)[:rows], kept=interleave(keep_x, np.zeros((S, 6)))[:rows])


def unipc(levels: Levels, order: int = 2) -> SamplerTable:
    """UniPC (Zhao et al. 2023, algorithms 5 to 8, for x_0) with B(h) = e^h - 1, of order 1, 2 or 3, one call per step.

    Each call's output first corrects the point where it was made, then predicts the next point from the corrected one,
    which is kept for the next correction.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order}; accepted: 1, 2, 3")
    S = len(levels.t) - 1
    orders = [min(order, i + 1, S - i if levels.to_clean else order) for i in range(S)]
    unit, next, kept = np.eye(6), np.zeros((S, 6)), np.zeros((S, 6))
    for i in range(S):
        kept[i] = unit[X] if i == 0 else _unipc_step(levels, i - 1, unit[KEPT], (D1, D2, D3)[: orders[i - 1]], D)
        next[i] = _unipc_step(levels, i, kept[i], (D, D1, D2)[: orders[i]])
    return table_of(levels, next, kept=kept)


def _unipc_step(
    levels: Levels, i: int, start: np.ndarray, past: tuple[int, ...], found: int | None = None
) -> np.ndarray:
    """The factors of the point at level i + 1: predicted, or corrected with the prediction `found` there.

    Args:
      levels: of sampling.
      i: the level to step from.
      start: [6], the factors of the point there.
      past: the columns of the predictions of x_0 at the levels i, i - 1, ...
      found: the column of the prediction at level i + 1.
    """
    a, s, lambdas = levels.a, levels.s, levels.lambdas
    h = lambdas[i + 1] - lambdas[i]
    gain = a[i + 1] - a[i] * s[i + 1] / s[i]  # a_next (1 - exp(-h)), also a_next B(-h)
    point: np.ndarray = s[i + 1] / s[i] * start
    point[past[0]] += gain
    distances = {column: (lambdas[i - k] - lambdas[i]) / h for k, column in enumerate(past) if k}
    distances = {column: r for column, r in distances.items() if np.isfinite(r)}  # not from pure noise
    if found is not None:
        distances[found] = 1.0
    r, n = np.array(list(distances.values())), len(distances)
    if n == 1:
        weights = np.array([0.5])  # one weight needs no system (the paper's section 3.1)
    else:
        phi, b = np.expm1(-h) / -h - 1.0, []
        for k in range(1, n + 1):
            b.append(phi * math.factorial(k) / np.expm1(-h))
            phi = phi / -h - 1.0 / math.factorial(k + 1)
        weights = np.linalg.solve(r ** np.arange(n)[:, None], np.array(b)) if n else np.zeros(0)
    for column, weight in zip(distances, gain * weights / r, strict=True):
        point[column] += weight
        point[past[0]] -= weight
    return point


# Weights of the past eps in the Adams-Bashforth methods, newest first; and the columns of the earlier eps, by PLMS's
# row.
_ADAMS_BASHFORTH = {
    2: np.array([3, -1]) / 2,
    3: np.array([23, -16, 5]) / 12,
    4: np.array([55, -59, 37, -9]) / 24,
}
_PAST = {2: (D2,), 3: (D1, D3), 4: (D1, D2, KEPT)}


def plms(levels: Levels, prediction: str = "eps") -> SamplerTable:
    """Pseudo linear multistep (PNDM, Liu et al. 2022, eqs. 9 and 12) with Stable Diffusion's start; deterministic.

    A step is DDIM's with a combination of the last four eps in place of eps. The first steps combine fewer, and the
    very first is taken twice: Euler's, then from the same start with the mean of the eps at both ends. S timesteps take
    S + 1 calls, a single one takes one. From pure noise, where eps does not determine x_0, the first step is Euler's.

    If the network predicts v, the method combines v instead, as in diffusers' PNDMScheduler, and then converts to eps.
    """
    of_v = prediction == "v"
    a, s, S = levels.a, levels.s, len(levels.t) - 1
    level = np.array([0, 1, *range(1, S)] if S > 1 else [0])  # of each call
    calls, unit = Levels(levels.t[level], levels.log_abar[level]), np.eye(6)
    eps = np.stack([1 / calls.s, -calls.a / calls.s], axis=-1)
    remembered = calls.a[:, None] * eps - calls.s[:, None] * unit[D, [X, D]] if of_v else eps
    found = remembered @ unit[[X, D]]
    next, kept = np.zeros_like(found), np.zeros_like(found)
    next[0] = ddim(levels).next[0]
    # What row 1 remembers is never used, but pushes out row 0's before row 4 needs it, so row 3 keeps row 0's.
    kept[0], kept[3:4] = unit[X], unit[D3]
    for row, i in enumerate(level[1:], start=1):
        if row == 1:
            i, start, combined = 0, unit[KEPT], (found[1] + unit[D1]) / 2
        else:
            past = _PAST.get(row, (D1, D2, D3))
            start, combined = unit[X], _ADAMS_BASHFORTH[min(row, 4)] @ np.stack([found[row], *unit[list(past)]])
        if of_v:
            next[row] = (a[i + 1] * a[i] + s[i + 1] * s[i]) * start + (s[i + 1] * a[i] - a[i + 1] * s[i]) * combined
        elif a[i] == 0:
            next[row] = unit[X]
        else:
            next[row] = a[i + 1] / a[i] * start + (s[i + 1] - a[i + 1] * s[i] / a[i]) * combined
    return table_of(calls, next, kept=kept, remembered=remembered)


# The default spacings: second-order steps need timesteps even in log-SNR, PLMS even in t.
DEFAULT_SPACING = {"ddpm": "linspace", "ddim": "linspace", "plms": "leading"} | dict.fromkeys(
    ("dpmpp_2m", "dpmpp_2m_sde", "heun", "unipc"), "logsnr"
)
SAMPLERS: dict[str, Callable[..., SamplerTable]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "heun": heun,
    "unipc": unipc,
    "plms": plms,
}


def make_table(
    sampler: str,
    levels: Levels,
    *,
    variance: str = "fixed_large",
    eta: float | None = None,
    order: int | None = None,
    x_0_mse: ArrayLike | None = None,
    prediction: str = "eps",
) -> SamplerTable:
    """The table of a sampler by name.

    Args:
      sampler: one of `SAMPLERS`.
      levels: that it passes through.
      variance: for "ddpm"; the other methods have their own.
      eta: for "ddim"; None: 0.
      order: for "unipc"; None: 2.
      x_0_mse: for "ddpm": [T], to use Analytic-DPM's variance instead of `variance`; None: use `variance`.
      prediction: for "plms", what the network predicts.

    Raises:
      ValueError: an unknown sampler, or an option that it does not take.
    """
    check_option("sampler", sampler, tuple(SAMPLERS))
    check_option("variance", variance, VARIANCES)
    takes = inspect.signature(SAMPLERS[sampler]).parameters
    options: dict[str, Any] = {"eta": eta, "order": order, "x_0_mse": x_0_mse}
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in takes:
            takers = [other for other in SAMPLERS if name in inspect.signature(SAMPLERS[other]).parameters]
            raise ValueError(f"sampler {sampler!r} takes no {name}; accepted: {', '.join(takers)}")
    options |= {name: value for name, value in (("variance", variance), ("prediction", prediction)) if name in takes}
    return SAMPLERS[sampler](levels, **options)


# Tables derived from others.


def ddim_inverse(levels: Levels) -> SamplerTable:
    """DDIM's steps in reverse, from the image at the lowest called level to the noise of the first (Song et al. 2021,
    section 5.4). S timesteps take S - 1 calls."""
    called = slice(None, -1) if levels.to_clean else slice(None)
    if len(levels.t[called]) < 2:
        raise ValueError("encoding needs at least 2 timesteps")
    upwards = Levels(levels.t[called][::-1], levels.log_abar[called][::-1])
    return ddim(upwards)


def with_resampling(table: SamplerTable, levels: Levels, jump: int, times: int) -> SamplerTable:
    """RePaint's resampling (Lugmayr et al. 2022, section 4.2): every `jump` rows are run `times` times, with the noise
    of `jump` levels added again in between.

    Raises:
      ValueError: a table whose rows use other images than x and D, or counts below 1.
    """
    if jump < 1 or times < 1:
        raise ValueError(f"jump and times are {jump} and {times}; accepted: 1 or more")
    rows = len(table.t)
    if rows != len(levels.t) - 1 or np.any(table.next[:, [KEPT, D1, D2, D3]]):
        raise ValueError("resampling needs a sampler that remembers nothing of earlier calls; accepted: ddpm, ddim")
    order: list[int] = []
    share: list[float] = []  # abar_noisier / abar after a row whose result is noised again
    for first in range(0, rows, jump):
        last = min(first + jump, rows)
        again = np.exp(levels.log_abar[first] - levels.log_abar[last])
        for time in range(times):
            order += range(first, last)
            share += [1.0] * (last - first - 1) + [again if time < times - 1 else 1.0]
    chosen: SamplerTable = jax.tree.map(lambda column: column[order], table)
    ratio = np.array(share)
    return dataclasses.replace(
        chosen,
        next=chosen.next * np.sqrt(ratio)[:, None],
        noise_scale=chosen.noise_scale * ratio,
        noise_variance=chosen.noise_variance * ratio + 1 - ratio,
    )
