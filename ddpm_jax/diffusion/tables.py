"""Samplers as tables: every method is a handful of factors a network call, computed beforehand in float64 NumPy.

All the methods here are linear in the same few images. Writing x_t = a x_0 + s eps, D for the network's prediction of
x_0 at the present x, and D1, D2, D3 for what the calls before have left, which is their D or their eps, one row of a
table says

    next x  <-  the row's factors  .  (x, kept, D, D1, D2, D3)  +  noise
    kept    <-  other factors      .  the same
    D1 of the next row  <-  two factors  .  (x, D)

where "kept" is one image that a method may carry along: the point that Heun's step departs from, or UniPC's corrected
point. So `ddpm_jax.sample` has one loop for all of them, and another method, eta, order or choice of timesteps is
another table and compiles nothing anew as long as the number of rows is the same.

A builder takes the `Levels` that sampling passes through and gives its rows beside the paper's equation. There lambda =
log(a / s), half the log-SNR, h is its difference, and "next" means the level that a row leads to; the clean image has
a = 1, s = 0.
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

# The images that a row combines, by their column.
X, KEPT, D, D1, D2, D3 = range(6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerTable:
    """One row a network call, in order; each field is an array [R], or [R, 6] with the columns X, KEPT, D, ... D3.

    Attributes:
      t: int32, the timestep that the network is called with.
      a, s: x_t = a x_0 + s eps, to turn the network's output into x_0.
      next: the factors of the next x.
      kept: the factors of the image to keep.
      left: [R, 2], the factors of x and D that give what the row leaves to the rows after it: (0, 1) for D itself.
      log_variance_min, log_variance_max: bounds between which a learned variance interpolates; equal if it is fixed.
      noise_scale, noise_variance: the noise's variance is noise_scale * exp(that logarithm) + noise_variance.
    """

    t: np.ndarray
    a: np.ndarray
    s: np.ndarray
    next: np.ndarray
    kept: np.ndarray
    left: np.ndarray
    log_variance_min: np.ndarray
    log_variance_max: np.ndarray
    noise_scale: np.ndarray
    noise_variance: np.ndarray


# The timesteps to call the network at.


def log_alphas_cumprod(schedule: Schedule) -> np.ndarray:
    """float64 [T] from the betas: 1 - abar_t has lost its precision in a float32 abar_t."""
    with np.errstate(divide="ignore"):
        return np.cumsum(np.log1p(-np.asarray(schedule.betas, np.float64)))


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
    """`num_steps` of the timesteps first..last, descending: the order of sampling.

    Args:
      schedule: T timesteps.
      num_steps: how many; None: every one.
      spacing: "linspace", evenly from last to first;
        "leading", multiples of the rounded-down distance, from first up;
        "trailing", the rounded distance, from last down;
        "quadratic", evenly in sqrt(t) (DDIM, appendix D.2);
        "logsnr", evenly in log-SNR, or "karras", evenly in (s / a)^(1/7) (Karras et al. 2022, eq. 5): the timesteps
        nearest to those levels, none twice.
      last: the timestep to start from; None: T - 1.
      first: the lowest.
      offset: added to the timesteps of "leading", as far as they stay at most `last` (Stable Diffusion's steps_offset).
      skip_lowest: take num_steps + 1 timesteps, where there are so many, and leave out the lowest, as the solvers of
        diffusers do.

    Raises:
      ValueError: an unknown spacing, more steps than timesteps, or a `last` outside 0..T-1.
    """
    check_option("spacing", spacing, SPACINGS)
    T = schedule.num_timesteps
    last = T - 1 if last is None else last
    if not 0 <= last < T:
        raise ValueError(f"the timestep to start from is {last}; accepted: 0 to {T - 1}")
    there = last - first + 1
    num_steps = there if num_steps is None else num_steps
    if not 1 <= num_steps <= there:
        raise ValueError(f"num_steps is {num_steps}; accepted: 1 to {there}, the timesteps there are")
    if skip_lowest and num_steps < there:
        return spaced_timesteps(schedule, num_steps + 1, spacing, last, first, offset=offset)[:-1]
    if num_steps == 1:
        return np.array([last], np.int32)
    if spacing == "leading":
        ascending = first + np.arange(num_steps) * (there // num_steps)
        return (ascending + min(offset, last - ascending[-1]))[::-1].astype(np.int32)
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
    # Rounded, and moved apart where two meet: first upwards, then down from the last.
    steps = np.arange(num_steps)
    ascending = np.maximum.accumulate(np.maximum(np.round(wanted), first) - steps) + steps
    ascending = np.minimum(ascending, last - steps[::-1])
    return ascending[::-1].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Levels:
    """The S + 1 noise levels that sampling passes through, in float64: those of its timesteps, and where it ends.

    Attributes:
      t: int32 [S + 1], the timesteps; -1 at the end stands for the clean image.
      log_abar: [S + 1], log abar there; 0 at the clean image.
    """

    t: np.ndarray
    log_abar: np.ndarray

    @classmethod
    def of(cls, schedule: Schedule, timesteps: Sequence[int] | np.ndarray, end: int | None = None) -> "Levels":
        """Those of a descending sequence of timesteps, ending at the clean image or at the timestep `end`.

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

    @property
    def to_clean(self) -> bool:
        """Whether sampling ends at the clean image."""
        return self.t[-1] < 0

    @property
    def a(self) -> np.ndarray:
        return np.exp(0.5 * self.log_abar)

    @property
    def s(self) -> np.ndarray:
        return np.sqrt(-np.expm1(self.log_abar))

    @property
    def lambdas(self) -> np.ndarray:
        """log(a / s): infinite at the clean image, minus infinite at pure noise."""
        with np.errstate(divide="ignore"):
            return 0.5 * self.log_abar - np.log(self.s)


def factors(rows: int, columns: Mapping[int, Any]) -> np.ndarray:
    """float64 [rows, 6], the factors of (x, kept, D, D1, D2, D3), from the columns that are not zero.

    Args:
      rows: how many.
      columns: {X, KEPT, D, D1, D2 or D3: [rows] or a number for all}.
    """
    return np.stack([np.broadcast_to(columns.get(i, 0.0), rows) for i in range(6)], axis=-1).astype(np.float64)


def table_of(levels: Levels, next: np.ndarray, **rest: np.ndarray) -> SamplerTable:
    """A table of one call of the network at each level, from the first.

    Args:
      levels: to sample at.
      next: [S, 6] of `factors`: of the next x.
      rest: further columns of `SamplerTable`; what is not given is zero.
    """
    rows = len(next)
    zeros = dict.fromkeys(("log_variance_min", "log_variance_max", "noise_scale", "noise_variance"), np.zeros(rows))
    columns = {"kept": np.zeros((rows, 6)), "left": np.tile([0.0, 1.0], (rows, 1)), **zeros, **rest}
    return SamplerTable(levels.t[:rows], levels.a[:rows], levels.s[:rows], next, **columns)


# The methods.


def ddpm(levels: Levels, variance: str = "fixed_large", x_0_mse: ArrayLike | None = None) -> SamplerTable:
    """Ancestral sampling (DDPM, algorithm 2) over any sub-sequence (Improved DDPM, section 4).

    Between neighbours the process is a diffusion with beta = 1 - abar_t / abar_next, so the equations of the posterior
    hold with that beta. The step to the clean image is D and adds no noise.

    With x_0_mse [T], the mean squared error of the predicted x_0 at each timestep, the variance is the best that is the
    same for all pixels (Analytic-DPM, Bao et al. 2022, eq. 7): the posterior's, and what x_0 may differ from D.
    """
    check_option("variance", variance, VARIANCES)
    log_now, log_next = levels.log_abar[:-1], levels.log_abar[1:]
    one_minus_now, one_minus_next = -np.expm1(log_now), -np.expm1(log_next)
    with np.errstate(invalid="ignore"):  # abar_t = 0 at both: the step between them keeps nothing
        log_ratio = np.where(np.isneginf(log_now), -np.inf, log_now - log_next)
    beta = -np.expm1(log_ratio)
    small, noise_scale = beta * one_minus_next / one_minus_now, np.ones(len(beta))
    if levels.to_clean:
        # The last step's own variance is 0; like the schedule's arrays, its logarithm repeats its neighbour's.
        small[-1], noise_scale[-1] = small[-2] if len(small) > 1 else beta[-1], 0.0
    log_small, log_large = np.log(small), np.log(beta)
    columns = {
        D: beta * np.exp(0.5 * log_next) / one_minus_now,
        X: np.exp(0.5 * log_ratio) * one_minus_next / one_minus_now,
    }
    if x_0_mse is not None:
        mse = np.asarray(x_0_mse, np.float64)[levels.t[:-1]]
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

    eps is what x and the clipped x_0 say together; diffusers calls that use_clipped_model_output.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; accepted: 0 to 1")
    a, s, a_next, s_next = levels.a[:-1], levels.s[:-1], levels.a[1:], levels.s[1:]
    share = -np.expm1(-np.diff(levels.log_abar)) if eta else np.zeros(len(s))  # upwards it means nothing
    variance = (eta * s_next / s) ** 2 * share
    eps = np.sqrt(np.maximum(s_next**2 - variance, 0.0))
    return table_of(levels, factors(len(a), {D: a_next - eps * a / s, X: eps / s}), noise_variance=variance)


def _share_of_difference(levels: Levels) -> np.ndarray:
    """h / (2 h_before): how much of D - D1 a second-order step adds to D.

    0 in the first step, which has no D1, and in the one to the clean image, which is D.
    """
    h = np.diff(levels.lambdas)
    numerator = np.where(np.isposinf(levels.lambdas[1:]), 0.0, h)
    return np.append(0.0, numerator[1:] / (2 * h[:-1]))


def dpmpp_2m(levels: Levels) -> SamplerTable:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): deterministic, second order, one call a step."""
    a, s, a_next, s_next = levels.a[:-1], levels.s[:-1], levels.a[1:], levels.s[1:]
    gain = a_next - a * s_next / s  # a_next (1 - exp(-h))
    share = _share_of_difference(levels)
    return table_of(levels, factors(len(a), {X: s_next / s, D: gain * (1 + share), D1: -gain * share}))


def dpmpp_2m_sde(levels: Levels) -> SamplerTable:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, appendix): stochastic, one call a step."""
    a, s, a_next, s_next = levels.a[:-1], levels.s[:-1], levels.a[1:], levels.s[1:]
    decay = a * s_next / (s * a_next)  # exp(-h)
    gain = a_next * (1 - decay**2)
    share = _share_of_difference(levels)
    columns = {X: s_next / s * decay, D: gain * (1 + share), D1: -gain * share}
    return table_of(levels, factors(len(a), columns), noise_variance=s_next**2 * (1 - decay**2))


def heun(levels: Levels) -> SamplerTable:
    """EDM's deterministic second-order sampler (Karras et al. 2022, algorithm 1) on the variance-preserving process.

    In x / a this is the variance-exploding process of sigma = s / a, whose derivative is (x / a - D) / sigma. A step is
    two calls: Euler's at the present level, then, from Euler's point at the next, the mean of both derivatives. To the
    clean image, and from pure noise, Euler's is the whole step. S timesteps are 2 S - 1 calls.
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
    interleave = lambda first, second: np.stack([first, second], axis=1).reshape(2 * S, *first.shape[1:])  # noqa: E731
    calls = Levels(interleave(levels.t[:-1], levels.t[1:]), interleave(levels.log_abar[:-1], levels.log_abar[1:]))
    rows = 2 * S - 1 if levels.to_clean else 2 * S
    keep_x = factors(S, {X: 1.0})
    return table_of(calls, interleave(euler, mean)[:rows], kept=interleave(keep_x, np.zeros((S, 6)))[:rows])


def plms(levels: Levels) -> SamplerTable:
    """Pseudo linear multistep (PNDM: Liu et al. 2022, arXiv:2202.09778), as in Stable Diffusion: DDIM's steps by a
    fourth-order Adams-Bashforth combination of eps, one call a step and one more in all.

    The first step is taken twice, the second time with the mean of the eps at both of its ends. The next two have fewer
    eps behind them and are of second and third order (the paper's equations 12 and 22).
    """
    a, s = levels.a, levels.s
    if a[0] == 0:
        raise ValueError("sampler 'plms' has no step from a timestep of pure noise; accepted there: the other samplers")
    unit, S = np.eye(6), len(levels.t) - 1
    rows = [0, 1, *range(1, S)] if S > 1 else [0]  # the level of each call
    eps = [(unit[X] - a[i] * unit[D]) / s[i] for i in rows]

    def step(i: int, start: np.ndarray, eps: np.ndarray) -> np.ndarray:
        return a[i + 1] / a[i] * start + (s[i + 1] - a[i + 1] * s[i] / a[i]) * eps

    next, kept = np.zeros((len(rows), 6)), np.zeros((len(rows), 6))
    for row, (i, e) in enumerate(zip(rows, eps, strict=True)):
        if row == 0:
            next[row], kept[row] = step(i, unit[X], e), unit[X]
        elif row == 1:
            next[row], kept[row] = step(0, unit[KEPT], (e + unit[D1]) / 2), unit[D1]
        else:
            # Row 1 leaves what does not count, so the eps of row 0 is kept until it is out of use.
            first, kept[row] = unit[KEPT if row < 5 else D3], unit[KEPT] if row < 4 else 0.0
            combined = {2: (3 * e - first) / 2, 3: (23 * e - 16 * unit[D1] + 5 * first) / 12}.get(
                row, (55 * e - 59 * unit[D1] + 37 * unit[D2] - 9 * first) / 24
            )
            next[row] = step(i, unit[X], combined)
    calls = Levels(levels.t[[*rows, -1]], levels.log_abar[[*rows, -1]])
    return table_of(calls, next, kept=kept, left=np.stack([1 / s[rows], -a[rows] / s[rows]], axis=-1))


def unipc(levels: Levels, order: int = 2) -> SamplerTable:
    """UniPC (Zhao et al. 2023, algorithms 5 to 8, for x_0) with B(h) = e^h - 1, of order 1, 2 or 3, one call a step.

    Each call first corrects the point that it was made at, with what it found there, and predicts the next point from
    the corrected one, which is kept for the next correction.
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
    """The factors of the point at level i + 1: predicted, or corrected with what was `found` there.

    Args:
      levels: of sampling.
      i: the level to step from.
      start: [6], the factors of the point there.
      past: the columns of the predictions of x_0 at the levels i, i - 1, ...
      found: the column of the one at level i + 1.
    """
    a, s, lambdas = levels.a, levels.s, levels.lambdas
    h = lambdas[i + 1] - lambdas[i]
    gain = a[i + 1] - a[i] * s[i + 1] / s[i]  # a_next (1 - exp(-h)), also a_next B(-h)
    point = s[i + 1] / s[i] * start
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


# Where the timesteps lie if nobody says: second-order steps want them even in log-SNR.
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
) -> SamplerTable:
    """The table of a sampler by name.

    Args:
      sampler: one of `SAMPLERS`.
      levels: that it passes through.
      variance: of "ddpm"; the other methods bring their own.
      eta: of "ddim"; None: 0.
      order: of "unipc"; None: 2.
      x_0_mse: of "ddpm", [T], for Analytic-DPM's variance in place of `variance`; None: that.

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
    if "variance" in takes:
        options["variance"] = variance
    return SAMPLERS[sampler](levels, **options)


# Tables made of others.


def ddim_inverse(levels: Levels) -> SamplerTable:
    """DDIM's steps backwards, from the image as the last called level's x to the noise of the first (Song et al. 2021,
    section 5.4): S timesteps are S - 1 calls."""
    called = slice(None, -1) if levels.to_clean else slice(None)
    if len(levels.t[called]) < 2:
        raise ValueError("encoding needs 2 timesteps or more")
    upwards = Levels(levels.t[called][::-1], levels.log_abar[called][::-1])
    return ddim(upwards)


def with_resampling(table: SamplerTable, levels: Levels, jump: int, times: int) -> SamplerTable:
    """RePaint's resampling (Lugmayr et al. 2022, section 4.2): every `jump` rows are run `times` times, with the noise
    of `jump` levels added again in between.

    Raises:
      ValueError: a table whose rows use more than x and D, or counts below 1.
    """
    if jump < 1 or times < 1:
        raise ValueError(f"jump and times are {jump} and {times}; accepted: 1 or more")
    rows = len(table.t)
    if rows != len(levels.t) - 1 or np.any(table.next[:, [KEPT, D1, D2, D3]]):
        raise ValueError("resampling needs a sampler without memory: ddpm or ddim")
    order: list[int] = []
    share: list[float] = []  # abar_noisier / abar after a row whose result is noised again
    for first in range(0, rows, jump):
        last = min(first + jump, rows)
        again = np.exp(levels.log_abar[first] - levels.log_abar[last])
        for time in range(times):
            order += range(first, last)
            share += [1.0] * (last - first - 1) + [again if time < times - 1 else 1.0]
    chosen, ratio = jax.tree.map(lambda column: column[order], table), np.array(share)
    return dataclasses.replace(
        chosen,
        next=chosen.next * np.sqrt(ratio)[:, None],
        noise_scale=chosen.noise_scale * ratio,
        noise_variance=chosen.noise_variance * ratio + 1 - ratio,
    )
