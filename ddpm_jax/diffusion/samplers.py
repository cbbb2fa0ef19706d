"""Sampling: one `lax.scan` over a table of coefficients; `tables.py` says what a method is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.gaussian import (
    PREDICTIONS,
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
from ddpm_jax.diffusion.tables import (
    DEFAULT_SPACING,
    SAMPLERS,
    Levels,
    SamplerTable,
    make_table,
    spaced_timesteps,
    with_resampling,
)

SNAPSHOTS = ("x", "x_0")
_REPORTS = 100  # a run of a table tells its progress at most so many times


def plan(
    schedule: Schedule,
    *,
    num_steps: int | None = None,
    spacing: str = "linspace",
    timesteps: Sequence[int] | None = None,
    t_start: int | None = None,
    t_end: int | None = None,
) -> Levels:
    """The noise levels of a sampling run.

    Args:
      schedule: T timesteps.
      num_steps, spacing: see `spaced_timesteps`.
      timesteps: the user's own, descending, in the place of those three.
      t_start: the first timestep; None: T - 1.
      t_end: the timestep to stop at, whose x is the result; None: the clean image.

    Raises:
      ValueError: timesteps that do not exist, do not descend, or contradict t_start.
    """
    if timesteps is not None:
        if num_steps is not None or t_start is not None:
            raise ValueError("timesteps take the place of num_steps and t_start; give either")
        return Levels.of(schedule, timesteps, t_end)
    if t_end is None:
        chosen = spaced_timesteps(schedule, num_steps, spacing, t_start)
        if t_start is not None:
            chosen[0] = t_start  # x_t has that noise, whatever the spacing starts from
        return Levels.of(schedule, chosen)
    t_start = schedule.num_timesteps - 1 if t_start is None else t_start
    if not 0 <= t_end < t_start:
        raise ValueError(f"t_end is {t_end}; accepted: 0 to {t_start - 1}, below the timestep to start from")
    steps = t_start - t_end if num_steps is None else num_steps
    if not 1 <= steps <= t_start - t_end:
        raise ValueError(f"num_steps is {steps}; accepted: 1 to {t_start - t_end}, the timesteps there are")
    # Between two ends, "leading" and "trailing" are the same.
    spacing = "linspace" if spacing in ("leading", "trailing") else spacing
    return Levels.of(schedule, spaced_timesteps(schedule, steps + 1, spacing, t_start, t_end)[:-1], t_end)


def sample(
    schedule: Schedule,
    model_fn: ModelFn,
    key: Array,
    shape: Sequence[int],
    *,
    sampler: str = "ddpm",
    num_steps: int | None = None,
    spacing: str | None = None,
    timesteps: Sequence[int] | None = None,
    eta: float | None = None,
    order: int | None = None,
    x_t: Array | None = None,
    t_start: int | None = None,
    t_end: int | None = None,
    known: tuple[Array, Array] | None = None,
    resampling: tuple[int, int] | None = None,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool = True,
    dynamic_threshold: float | None = None,
    num_snapshots: int = 0,
    snapshots_of: str = "x",
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Images from noise, or from an image that carries noise, by one jit-compiled `lax.scan`.

    The noise of example i depends on its own key alone, not on the size of the batch. Values of eta, order, spacing,
    timesteps, t_start, variance and schedule compile nothing anew while the number of calls is the same.

    Args:
      schedule: T timesteps; its arrays must be concrete, since the steps are planned outside of jit.
      model_fn: (x_t, t) -> output. As `jax.tree_util.Partial(net.apply, variables)`, new weights recompile nothing.
      key: one typed key, or [B] of them, one an image.
      shape: (B, H, W, C).
      sampler: "ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun" or "unipc"; see `ddpm_jax.diffusion.tables`.
      num_steps: timesteps to call the network at ("heun" calls twice); None: every one.
      spacing: how they are spread: "linspace", "leading", "trailing", "quadratic", "logsnr" or "karras"; None:
        "linspace" for ddpm and ddim, "logsnr" for the others.
      timesteps: the user's own, descending, in their place.
      eta: of "ddim", 0 (the default) to 1.
      order: of "unipc", 1, 2 (the default) or 3.
      x_t: [B, H, W, C] to start from; None: noise.
      t_start: the timestep of x_t; None: T - 1.
      t_end: the timestep to stop at; None: the clean image.
      known: (image, mask), both to broadcast to `shape`: where the mask is true, the image's own noisy values take the
        place of x before every call, and its clean ones at the end.
      resampling: (jump, times) of RePaint's resampling; see `with_resampling`.
      prediction, variance, clip, dynamic_threshold: as in `p_mean_variance`; a method other than "ddpm" has its own
        variance, and a learned one is left aside.
      num_snapshots: how many images on the way to return as well.
      snapshots_of: "x", or "x_0" for what the network took it for.
      progress: told (calls done, calls) about a hundred times, from inside the scan.

    Returns:
      x_0 [B, H, W, C], clipped to [-1, 1] if `clip`, or x at t_end; with num_snapshots also
      [num_snapshots, B, H, W, C], evenly spaced over the calls; of "x", the first is the start. The last is what the
      last call gave, before known pixels are put in their places.

    Raises:
      ValueError: an unknown option, more steps than timesteps, an x_t of another shape, or a network of eps at a
        timestep of pure noise.
    """
    check_option("sampler", sampler, tuple(SAMPLERS))
    check_option("prediction", prediction, PREDICTIONS)
    check_option("snapshots_of", snapshots_of, SNAPSHOTS)
    shape = tuple(shape)
    if x_t is not None and x_t.shape != shape:
        raise ValueError(f"x_t has shape {x_t.shape}; shape says {shape}")
    if x_t is None and t_start not in (None, schedule.num_timesteps - 1):
        raise ValueError(f"t_start is {t_start}, but there is no x_t of that timestep to start from")
    if dynamic_threshold is not None and not 0 < dynamic_threshold <= 1:
        raise ValueError(f"dynamic_threshold is {dynamic_threshold}; accepted: above 0 to 1, or None")
    spacing = DEFAULT_SPACING[sampler] if spacing is None else spacing
    levels = plan(schedule, num_steps=num_steps, spacing=spacing, timesteps=timesteps, t_start=t_start, t_end=t_end)
    table = make_table(sampler, levels, variance=variance, eta=eta, order=order)
    if resampling is not None:
        table = with_resampling(table, levels, *resampling)
    if known is not None and t_end is not None:
        raise ValueError("known pixels need sampling to the clean image; leave t_end out")
    most = len(table.t) + (snapshots_of == "x")
    if num_snapshots and not 2 <= num_snapshots <= most:
        raise ValueError(f"num_snapshots is {num_snapshots}; accepted: 0, or 2 to {most}")
    return run_table(
        table,
        model_fn,
        key,
        shape,
        x_t=x_t,
        known=known,
        prediction=prediction,
        variance=variance,
        clip=clip,
        dynamic_threshold=dynamic_threshold,
        num_snapshots=num_snapshots,
        snapshots_of=snapshots_of,
        progress=progress,
    )


def run_table(
    table: SamplerTable,
    model_fn: ModelFn,
    key: Array,
    shape: tuple[int, ...],
    *,
    x_t: Array | None = None,
    known: tuple[Array, Array] | None = None,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool = True,
    dynamic_threshold: float | None = None,
    num_snapshots: int = 0,
    snapshots_of: str = "x",
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Runs any table; the arguments are those of `sample`."""
    if prediction == "eps" and np.any(table.a == 0):
        raise ValueError("prediction 'eps' says nothing about x_0 at a timestep of pure noise; accepted there: x_0, v")
    table = jax.tree.map(lambda c: c if c.dtype == np.int32 else np.asarray(c, np.float32), table)
    if key.ndim == 0:
        key = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(shape[0]))
    with _listening(progress, len(table.t)):
        result = _run_table(
            as_argument(model_fn),
            table,
            key,
            x_t,
            known,
            shape,
            prediction,
            variance == "learned",
            clip,
            dynamic_threshold,
            num_snapshots,
            snapshots_of,
            progress is not None,
        )
        return jax.block_until_ready(result) if progress else result


@partial(
    jax.jit,
    static_argnames=(
        "shape",
        "prediction",
        "learned",
        "clip",
        "dynamic_threshold",
        "num_snapshots",
        "snapshots_of",
        "reports",
    ),
)
def _run_table(
    model_fn,
    table,
    keys,
    x_t,
    known,
    shape,
    prediction,
    learned,
    clip,
    dynamic_threshold,
    num_snapshots,
    snapshots_of,
    reports,
):
    calls = table.t.shape[0]

    def noise(index, *purpose):
        def draw(key):
            for number in (index, *purpose):
                key = jax.random.fold_in(key, number)
            return key

        return normal(jax.vmap(draw)(keys), shape)

    def row(carry, row_and_index):
        x, kept, past, snapshots = carry
        row, index = row_and_index
        if known is not None:
            image, mask = known
            x = jnp.where(mask, row.a * image + row.s * noise(index + 1, 1), x)
        t = jnp.full(shape[:1], row.t)
        output, interpolation = split_output(model_fn(x, t), "learned" if learned else "fixed_large")
        x_0 = clip_x_0(to_x_0(prediction, output, x, row.a, row.s), clip, dynamic_threshold)
        log_variance = row.log_variance_min
        if interpolation is not None:
            log_variance = interpolate_log_variance(interpolation, row.log_variance_min, row.log_variance_max)
        images = (x, kept, x_0, *past)
        x, kept = (sum(f * image for f, image in zip(factors, images, strict=True)) for factors in (row.next, row.kept))
        # index + 1, since 0 drew the start.
        x += jnp.sqrt(row.noise_scale * jnp.exp(log_variance) + row.noise_variance) * noise(index + 1)
        if num_snapshots:
            # Each slot is overwritten until its time has passed, so that not every image need be kept.
            if snapshots_of == "x":
                slot = ((index + 1) * (num_snapshots - 1) + calls - 1) // calls
            else:
                slot = ((index + 1) * num_snapshots + calls - 1) // calls - 1
            snapshots = snapshots.at[slot].set(x if snapshots_of == "x" else x_0)
        if reports:
            every = -(-calls // _REPORTS)
            due = ((index + 1) % every == 0) | (index + 1 == calls)
            jax.lax.cond(due, lambda: jax.debug.callback(_report, index + 1), lambda: None)
        return (x, kept, (x_0, *past[:-1]), snapshots), None

    x = noise(0) if x_t is None else x_t.astype(jnp.float32)
    snapshots = jnp.zeros((num_snapshots, *shape)).at[:1].set(x) if num_snapshots else None
    zero = jnp.zeros_like(x)
    start = (x, zero, (zero, zero, zero), snapshots)
    (x, _, _, snapshots), _ = jax.lax.scan(row, start, (table, jnp.arange(calls)))
    if known is not None:
        x = jnp.where(known[1], known[0], x)
    return (x, snapshots) if num_snapshots else x


# Who is told how far the running table is. The compiled program calls one function for all, so that it need not be
# compiled for each listener.
_listeners: list[Callable[[int], None]] = []


def _report(done: Any) -> None:
    for listener in _listeners:
        listener(int(done))


@contextmanager
def _listening(progress: Callable[[int, int], None] | None, calls: int) -> Iterator[None]:
    if progress is None:
        yield
        return
    listener = lambda done: progress(done, calls)  # noqa: E731
    _listeners.append(listener)
    try:
        yield
        jax.effects_barrier()
    finally:
        _listeners.remove(listener)
