"""Editing existing pictures with a diffusion model: mixing, varying, denoising and inpainting.

Each function is a few lines around `sample` and passes its further options on to it. Pictures are [B, H, W, C] in
[-1, 1]; a key is one typed key or [B] of them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ddpm_jax.diffusion.gaussian import Array, ModelFn, Parameterization, fold_in, normal, q_sample
from ddpm_jax.diffusion.samplers import Observer, Progress, plan, run_table, sample
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.diffusion.shapes import Images, Keys, Masks
from ddpm_jax.diffusion.tables import ddim_inverse


def _check_t(schedule: Schedule, t: int) -> None:
    if not 0 <= t < schedule.num_timesteps:
        raise ValueError(f"t is {t}; accepted: 0 to {schedule.num_timesteps - 1}")


def diffuse(schedule: Schedule, key: Keys, x_0: Images, t: int) -> Images:
    """x_t ~ q(x_t | x_0), with the same t for all."""
    _check_t(schedule, t)
    # A different stream from sampling's noise with the same key.
    return q_sample(schedule, x_0, jnp.full(x_0.shape[:1], t), normal(fold_in(key, 2**31), x_0.shape))


def vary(schedule: Schedule, model_fn: ModelFn, key: Keys, x_0: Images, t: int, **options: Any) -> Images:
    """Variations of pictures: diffused to t and denoised again. The larger t, the less is kept.

    If the options of `sample` include `timesteps`, those are used and t is the first of them.
    """
    start: dict[str, Any] = {"t_start": t} if options.get("timesteps") is None else {}
    images: Images = sample(schedule, model_fn, key, x_0.shape, x_t=diffuse(schedule, key, x_0, t), **start, **options)
    return images


def interpolate(
    schedule: Schedule,
    model_fn: ModelFn,
    key: Keys,
    x_0: Images,
    other: Images,
    weights: ArrayLike | Sequence[float],
    t: int,
    **options: Any,
) -> Images:
    """Mixtures of two pictures: both are diffused to t, mixed, and denoised (DDPM, section 4.3).

    Args:
      schedule, model_fn: as in `sample`.
      key: one typed key. All mixtures share its noise, so they differ only in their weight.
      x_0, other: [H, W, C].
      weights: [N], the share of `other`, lambda in the paper; 0 gives a variation of x_0.
      t: the timestep to which both are diffused.
      options: passed to `sample`.

    Returns:
      [N, H, W, C].
    """
    weights = jnp.asarray(weights, jnp.float32)
    ends = diffuse(schedule, jax.random.split(key), jnp.stack([x_0, other]), t)
    mix = weights.reshape(-1, 1, 1, 1)
    x_t = (1 - mix) * ends[0] + mix * ends[1]
    keys = jnp.repeat(key[None], len(weights), axis=0)
    images: Images = sample(schedule, model_fn, keys, x_t.shape, x_t=x_t, t_start=t, **options)
    return images


def slerp(a: Array, b: Array, weights: ArrayLike | Sequence[float]) -> Array:
    """[N, ...] between a and b along the great circle through both, the norm changing evenly (DDIM, appendix D.5)."""
    norm_a, norm_b = jnp.linalg.norm(a), jnp.linalg.norm(b)
    angle = jnp.arccos(jnp.clip(jnp.vdot(a, b) / (norm_a * norm_b), -1.0, 1.0))
    weights = jnp.asarray(weights, jnp.float32).reshape(-1, *(1,) * a.ndim)
    small = jnp.sin(angle) < 1e-6
    sine = jnp.where(small, 1.0, jnp.sin(angle))
    share_a = jnp.where(small, 1 - weights, jnp.sin((1 - weights) * angle) / sine)
    share_b = jnp.where(small, weights, jnp.sin(weights * angle) / sine)
    norm = (1 - weights) * norm_a + weights * norm_b
    mixed: Array = norm * (share_a * a / norm_a + share_b * b / norm_b)
    return mixed


def encode(
    schedule: Schedule,
    model_fn: ModelFn,
    x_0: ArrayLike,
    *,
    num_steps: int | None = None,
    spacing: str = "linspace",
    spacing_offset: int = 0,
    skip_lowest: bool = False,
    stop_at_first: bool = False,
    levels: str | None = None,
    fractional: bool = False,
    prediction: str = "eps",
    variance: str = "fixed_large",
    progress: Progress | None = None,
) -> Images:
    """The noise x_T that deterministic DDIM turns into these pictures (Song et al. 2021, section 5.4).

    `sample(..., sampler="ddim", x_t=that, clip=False)` with the same steps recovers them, up to a discretisation error
    that falls with the number of steps.

    Args:
      schedule, model_fn: as in `sample`.
      x_0: [B, H, W, C].
      num_steps, spacing, spacing_offset, skip_lowest, stop_at_first, levels, fractional: see `plan`; use the same ones
        for sampling back.
      prediction, variance: what the network's output means.
      progress: called with (network calls done, all calls).
    """
    x_0 = jnp.asarray(x_0)
    steps = plan(
        schedule,
        num_steps=num_steps,
        spacing=spacing,
        spacing_offset=spacing_offset,
        skip_lowest=skip_lowest,
        stop_at_first=stop_at_first,
        levels=levels,
        fractional=fractional,
    )
    table = ddim_inverse(steps)
    # The method draws no noise, so any key will do.
    encoded: Images = run_table(
        table,
        model_fn,
        jax.random.key(0),
        x_0.shape,
        output=Parameterization(prediction, variance, clip=False),
        observer=Observer(progress),
        x_t=x_0,
    )
    return encoded


def nearest_timestep(schedule: Schedule, sigma: float) -> int:
    """The t at which the noise, relative to the image's full contrast, has standard deviation sigma = s / a."""
    log_sigma = -0.5 * np.asarray(schedule.log_snr, np.float64)
    return int(np.argmin(np.abs(log_sigma - np.log(sigma)))) if sigma > 0 else 0


def estimate_sigma(x: ArrayLike) -> float:
    """Standard deviation of the white noise in pictures [B, H, W, C], in their units.

    It is estimated from the median of the finest diagonal wavelet coefficients (Donoho & Johnstone 1994), which in
    smooth pictures are mostly noise. Fine detail counts as noise: for tiny pictures this is a rough guess.
    """
    x = np.asarray(x, np.float64)
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    detail = (x[:, ::2, ::2] - x[:, 1::2, ::2] - x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 2
    return float(np.median(np.abs(detail)) / 0.6744897501960817)


def denoise(schedule: Schedule, model_fn: ModelFn, key: Keys, x: Images, t: int, **options: Any) -> Images:
    """Removes white noise of standard deviation s / a at t from pictures; see `nearest_timestep`.

    x is scaled to match x_t. The result is one draw from the possible clean pictures.
    """
    _check_t(schedule, t)
    x_t = schedule.sqrt_alphas_cumprod[t] * x
    images: Images = sample(schedule, model_fn, key, x.shape, x_t=x_t, t_start=t, **options)
    return images


def inpaint(
    schedule: Schedule,
    model_fn: ModelFn,
    key: Keys,
    x_0: Images,
    mask: Masks,
    *,
    jump: int = 10,
    times: int = 1,
    known_noise: Images | None = None,
    **options: Any,
) -> Images:
    """Repaints the pixels where the mask is true to fit the others, which stay as they are.

    Args:
      schedule, model_fn: as in `sample`.
      key: one typed key, or [B] of them.
      x_0: [B, H, W, C]; its pixels under the mask are ignored.
      mask: bool, broadcastable to x_0.
      jump, times: RePaint's resampling (Lugmayr et al. 2022): every `jump` steps are run `times` times, so that the two
        parts match. times = 1 only restores the known pixels before every step, which is faster but matches less well.
      known_noise: [B, H, W, C], the noise that sampling starts from and that is added to the known part at every step,
        as in diffusers' inpainting with networks that take no mask; None: new noise at each step, as in RePaint.
      options: passed to `sample`.
    """
    known = (x_0, jnp.logical_not(mask))
    resampling = (jump, times) if times > 1 else None
    options |= {"known": known, "known_noise": known_noise, "resampling": resampling}
    images: Images = sample(schedule, model_fn, key, x_0.shape, **options)
    return images


def coarse_to_fine(
    schedule: Schedule, model_fn: ModelFn, key: Keys, shape: tuple[int, ...], t: int, **options: Any
) -> Images:
    """Images that share one x_t: with a large t they share coarse features, with a small t all but the details (DDPM,
    section 4.3 and figure 7).

    Args:
      schedule, model_fn: as in `sample`.
      key: one typed key.
      shape: (B, H, W, C).
      t: the timestep of the shared x_t.
      options: passed to `sample`; num_steps counts the steps from T - 1 to 0.
    """
    _check_t(schedule, t)
    last, num_steps = schedule.num_timesteps - 1, options.pop("num_steps", None)
    together, apart = (jax.random.fold_in(key, 2**31 + i) for i in range(2))  # no noise is drawn twice

    def steps(first: int, end: int) -> int | None:
        return None if num_steps is None else max(1, round(num_steps * (first - end) / (last + 1)))

    # The shared part also has B rows, all the same, for networks that take one condition per image.
    keys = jnp.repeat(together[None], shape[0], axis=0)
    if t < last:
        shared = sample(schedule, model_fn, keys, shape, t_end=t, num_steps=steps(last, t), **options)
    else:
        shared = normal(keys, shape)
    x_t = jnp.broadcast_to(shared[:1], shape)
    images: Images = sample(schedule, model_fn, apart, shape, x_t=x_t, t_start=t, num_steps=steps(t, -1), **options)
    return images
