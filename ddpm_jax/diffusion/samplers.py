"""Sampling: one `lax.scan` over a table of coefficients; `tables.py` defines the methods."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from ddpm_jax.diffusion.gaussian import (
    Array,
    ModelFn,
    Parameterization,
    as_argument,
    check_option,
    clip_x_0,
    fold_in,
    interpolate_log_variance,
    normal,
    split_output,
    to_x_0,
)
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.diffusion.shapes import Images, Keys
from ddpm_jax.diffusion.tables import (
    DEFAULT_SPACING,
    LEVELS,
    SAMPLERS,
    Levels,
    SamplerTable,
    make_table,
    spaced_timesteps,
    with_resampling,
)

Progress = Callable[[int, int], None]
Watch = Callable[[int, int, Array], None]
# x, the kept image, the prediction of x_0, what earlier calls remembered, and the snapshots.
_Carry = tuple[Array, Array, Array, tuple[Array, ...], Array | None]

SNAPSHOTS = ("x", "x_0")
_PORTION = 10  # network calls per call of the compiled program
_WATCHED = 2  # the same with a `watch` callback
_STARTS_AT_FIRST = "stop_at_first ends at timestep 0, where sampling starts; accepted: a start above timestep 0"


def plan(
    schedule: Schedule,
    *,
    num_steps: int | None = None,
    spacing: str = "linspace",
    spacing_offset: int = 0,
    skip_lowest: bool = False,
    stop_at_first: bool = False,
    levels: str | None = None,
    fractional: bool = False,
    timesteps: Sequence[int] | None = None,
    t_start: int | None = None,
    t_end: int | None = None,
) -> Levels:
    """The noise levels of a sampling run.

    Args:
      schedule: T timesteps.
      num_steps, spacing, spacing_offset, skip_lowest: see `spaced_timesteps`.
      stop_at_first: end at the noise level of timestep 0 instead of the clean image, as with diffusers'
        set_alpha_to_one=False. A call at timestep 0 itself would not change x and is left out.
      levels, fractional: a spacing for noise levels that may lie between timesteps, and whether the network is called
        at fractional timesteps there; see `Levels.between`. None: the noise levels of the timesteps.
      timesteps: custom timesteps, descending, instead of num_steps and spacing.
      t_start: the first timestep; None: T - 1.
      t_end: the timestep to stop at, whose x is the result; None: the clean image.

    Raises:
      ValueError: timesteps that do not exist, do not descend, or contradict t_start; fractional without levels.
    """
    if fractional and levels is None:
        raise ValueError(f"fractional timesteps need levels; accepted: {', '.join(LEVELS)}")
    between = None if levels is None else partial(Levels.between, schedule, how=levels, fractional=fractional)
    if timesteps is not None:
        if num_steps is not None or t_start is not None:
            raise ValueError("timesteps replace num_steps and t_start; give one or the other")
        if levels is not None:
            raise ValueError(f"timesteps have noise levels of their own, but levels is {levels!r}; leave one out")
        return _ending(schedule, timesteps, t_end, stop_at_first)
    if t_end is None:
        options: dict[str, Any] = {"offset": spacing_offset, "skip_lowest": skip_lowest}
        chosen = spaced_timesteps(schedule, num_steps, spacing, t_start, **options)
        if t_start is not None:
            chosen[0] = t_start  # the noise level of x_t, wherever the spacing starts
        if between is None:
            return _ending(schedule, chosen, None, stop_at_first)
        if stop_at_first and chosen[0] == 0:
            raise ValueError(_STARTS_AT_FIRST)
        return between(chosen, 0 if stop_at_first else None)
    t_start = schedule.num_timesteps - 1 if t_start is None else t_start
    if not 0 <= t_end < t_start:
        raise ValueError(f"t_end is {t_end}; accepted: 0 to {t_start - 1}, below the starting timestep")
    steps = t_start - t_end if num_steps is None else num_steps
    if not 1 <= steps <= t_start - t_end:
        raise ValueError(f"num_steps is {steps}; accepted: 1 to {t_start - t_end}, the number of timesteps")
    # Between two ends, "leading" and "trailing" are the same.
    spacing = "linspace" if spacing in ("leading", "trailing") else spacing
    chosen = spaced_timesteps(schedule, steps + 1, spacing, t_start, t_end)
    return Levels.of(schedule, chosen[:-1], t_end) if between is None else between(chosen, t_end)


def _ending(
    schedule: Schedule, timesteps: Sequence[int] | np.ndarray, t_end: int | None, stop_at_first: bool
) -> Levels:
    if not stop_at_first or t_end is not None:
        return Levels.of(schedule, timesteps, t_end)
    timesteps = np.asarray(timesteps)
    timesteps = timesteps[:-1] if timesteps.size and timesteps[-1] == 0 else timesteps
    if not timesteps.size:
        raise ValueError(_STARTS_AT_FIRST)
    return Levels.of(schedule, timesteps, 0)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a sampling run; the attributes are those arguments of `sample`."""

    sampler: str = "ddpm"
    num_steps: int | None = None
    spacing: str | None = None
    spacing_offset: int = 0
    skip_lowest: bool = False
    stop_at_first: bool = False
    timesteps: Sequence[int] | None = None
    eta: float | None = None
    order: int | None = None
    x_0_mse: ArrayLike | None = None
    levels: str | None = None
    fractional: bool = False
    scaled_start: bool = False

    def levels_of(self, schedule: Schedule, t_start: int | None = None, t_end: int | None = None) -> Levels:
        """The noise levels to sample at; arguments and ValueErrors as in `plan`."""
        check_option("sampler", self.sampler, tuple(SAMPLERS))
        return plan(
            schedule,
            num_steps=self.num_steps,
            spacing=DEFAULT_SPACING[self.sampler] if self.spacing is None else self.spacing,
            spacing_offset=self.spacing_offset,
            skip_lowest=self.skip_lowest,
            stop_at_first=self.stop_at_first,
            levels=self.levels,
            fractional=self.fractional,
            timesteps=self.timesteps,
            t_start=t_start,
            t_end=t_end,
        )

    def table(
        self,
        schedule: Schedule,
        variance: str = "fixed_large",
        prediction: str = "eps",
        *,
        t_start: int | None = None,
        t_end: int | None = None,
        resampling: tuple[int, int] | None = None,
    ) -> SamplerTable:
        """The steps as a table with one row per network call.

        Args:
          schedule: T timesteps.
          variance: of p_theta, for "ddpm".
          prediction: of the network, for "plms".
          t_start, t_end: see `plan`.
          resampling: see `with_resampling`; None: no resampling.

        Raises:
          ValueError: an unknown option, or options that contradict each other.
        """
        if self.x_0_mse is not None and np.shape(self.x_0_mse) != (schedule.num_timesteps,):
            raise ValueError(f"x_0_mse has shape {np.shape(self.x_0_mse)}; accepted: one value for each of T timesteps")
        levels = self.levels_of(schedule, t_start, t_end)
        table = make_table(
            self.sampler,
            levels,
            variance=variance,
            eta=self.eta,
            order=self.order,
            x_0_mse=self.x_0_mse,
            prediction=prediction,
        )
        return table if resampling is None else with_resampling(table, levels, *resampling)

    def start_scale(self, table: SamplerTable) -> float:
        """The standard deviation of the noise that a run of this table starts from."""
        return float(table.s[0]) if self.scaled_start else 1.0


@dataclasses.dataclass(frozen=True)
class Observer:
    """How a sampling run is observed: callbacks and snapshots.

    Attributes:
      progress, watch, num_snapshots, snapshots_of: as in `sample`.
    """

    progress: Progress | None = None
    watch: Watch | None = None
    num_snapshots: int = 0
    snapshots_of: str = "x"

    def check(self, calls: int) -> None:
        """ValueError for more snapshots than a run with this many network calls has."""
        check_option("snapshots_of", self.snapshots_of, SNAPSHOTS)
        most = calls + (self.snapshots_of == "x")
        if self.num_snapshots and not 2 <= self.num_snapshots <= most:
            raise ValueError(f"num_snapshots is {self.num_snapshots}; accepted: 0, or 2 to {most}")


def sample(
    schedule: Schedule,
    model_fn: ModelFn,
    key: Keys,
    shape: Sequence[int],
    *,
    sampler: str = "ddpm",
    num_steps: int | None = None,
    spacing: str | None = None,
    spacing_offset: int = 0,
    skip_lowest: bool = False,
    stop_at_first: bool = False,
    timesteps: Sequence[int] | None = None,
    eta: float | None = None,
    order: int | None = None,
    x_0_mse: ArrayLike | None = None,
    levels: str | None = None,
    fractional: bool = False,
    scaled_start: bool = False,
    x_t: Images | None = None,
    t_start: int | None = None,
    t_end: int | None = None,
    known: tuple[Array, Array] | None = None,
    known_noise: Images | None = None,
    resampling: tuple[int, int] | None = None,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool = True,
    dynamic_threshold: float | None = None,
    clip_range: float = 1.0,
    threshold_limit: float | None = None,
    num_snapshots: int = 0,
    snapshots_of: str = "x",
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Any:
    """Samples images from noise or from noisy images, with one jit-compiled `lax.scan`.

    The noise of example i depends on its own key alone, not on the size of the batch. Another sampler, eta, order,
    spacing, number of steps, fixed variance or schedule does not recompile.

    Args:
      schedule: T timesteps; its arrays must be concrete, since the steps are planned outside of jit.
      model_fn: (x_t, t) -> output. With `jax.tree_util.Partial(net.apply, variables)`, new weights do not recompile.
      key: one typed key, or [B] of them, one per image.
      shape: (B, H, W, C).
      sampler: "ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun", "unipc" or "plms"; see `ddpm_jax.diffusion.tables`.
      num_steps: number of sampling steps ("heun" calls the network twice per step, "plms" once more in all); None: all
        timesteps.
      spacing: how the timesteps are spaced: "linspace", "leading", "trailing", "quadratic", "logsnr" or "karras"; None:
        "linspace" for ddpm and ddim, "leading" for plms, "logsnr" for the others.
      spacing_offset, skip_lowest: adjust the timesteps; see `spaced_timesteps`.
      stop_at_first: end at the noise level of timestep 0 instead of the clean image; see `plan`.
      timesteps: custom timesteps, descending, instead of num_steps and spacing.
      eta: for "ddim": 0 (the default) to 1.
      order: for "unipc": 1, 2 (the default) or 3.
      x_0_mse: for "ddpm": [T], the mean squared error of the predicted x_0 at each timestep, to use Analytic-DPM's
        variance instead of `variance`; `ddpm_jax.evaluation.likelihood.evaluate_bound` measures it as `bound.mse.mean`.
      levels, fractional: a spacing for noise levels that may lie between timesteps, "linspace", "karras" or "logsnr",
        and whether the network is called at fractional timesteps there; see `Levels.between`. None: the noise levels of
        the timesteps.
      scaled_start: start from noise with the standard deviation s of the first level instead of 1, as diffusers' Euler
        and Heun schedulers do.
      x_t: [B, H, W, C] to start from; None: noise.
      t_start: the timestep of x_t; None: T - 1.
      t_end: the timestep to stop at; None: the clean image.
      known: (image, mask), both broadcastable to `shape`: where the mask is true, x is replaced by the noised image
        before every call, and by the clean image at the end.
      known_noise: [B, H, W, C], the noise of the known image at every noise level. Without x_t, sampling starts from
        this noise, and known values are put in place from the second call on. None: new noise before every call,
        including the first.
      resampling: (jump, times) of RePaint's resampling; see `with_resampling`.
      prediction, variance, clip, dynamic_threshold, clip_range, threshold_limit: as in `p_mean_variance`; methods other
        than "ddpm" have their own variance and ignore a learned one.
      num_snapshots: number of intermediate images to return as well.
      snapshots_of: "x", or "x_0" for the network's prediction of it.
      progress: called with (calls done, all calls) about every ten calls.
      watch: called with (calls done, all calls, [B, H, W, C] as chosen by `snapshots_of`) every other call; an
        exception that it raises ends the sampling.

    Returns:
      x_0 [B, H, W, C], clipped if `clip` ("plms" may end slightly outside), or x at t_end or timestep 0;
      with num_snapshots also [num_snapshots, B, H, W, C], evenly spaced over the calls; for "x" the first is the start.
      The last is the last call's result, before known pixels are put in place.

    Raises:
      ValueError: an unknown option, more steps than timesteps, an x_t of a different shape, or a network that predicts
        eps at a timestep of pure noise.
    """
    shape = tuple(shape)
    if x_t is not None and x_t.shape != shape:
        raise ValueError(f"x_t has shape {x_t.shape}, but shape is {shape}")
    if x_t is None and t_start not in (None, schedule.num_timesteps - 1):
        raise ValueError(f"t_start is {t_start}, but there is no x_t of that timestep to start from")
    steps = Steps(
        sampler,
        num_steps,
        spacing,
        spacing_offset,
        skip_lowest,
        stop_at_first,
        timesteps,
        eta,
        order,
        x_0_mse,
        levels,
        fractional,
        scaled_start,
    )
    table = steps.table(schedule, variance, prediction, t_start=t_start, t_end=t_end, resampling=resampling)
    if known is not None and t_end is not None:
        raise ValueError("known pixels require sampling down to the clean image; leave out t_end")
    if known is None and known_noise is not None:
        raise ValueError("known_noise is the noise of known pixels; give known as well")
    if known_noise is not None and known_noise.shape != shape:
        raise ValueError(f"known_noise has shape {known_noise.shape}, but shape is {shape}")
    return run_table(
        table,
        model_fn,
        key,
        shape,
        output=Parameterization(prediction, variance, clip, dynamic_threshold, clip_range, threshold_limit),
        observer=Observer(progress, watch, num_snapshots, snapshots_of),
        x_t=x_t,
        known=known,
        known_noise=known_noise,
        start_scale=steps.start_scale(table),
    )


def run_table(
    table: SamplerTable,
    model_fn: ModelFn,
    key: Keys,
    shape: tuple[int, ...],
    *,
    output: Parameterization,
    observer: Observer | None = None,
    x_t: Images | None = None,
    known: tuple[Array, Array] | None = None,
    known_noise: Images | None = None,
    start_scale: float = 1.0,
) -> Any:
    """Runs any table; arguments and results as in `sample`. start_scale is the standard deviation of the initial noise.

    The rows go through the compiled scan in portions of equal length, the last one padded with rows that are skipped.
    So one program serves any number of steps, and the host knows the progress without a callback inside the program.
    Within an outer jit the whole table is one portion.
    """
    observer = observer or Observer()
    output.check()
    observer.check(len(table.t))
    if output.prediction == "eps" and np.any(table.a == 0):
        raise ValueError("prediction 'eps' does not determine x_0 at a timestep of pure noise; accepted there: x_0, v")
    if key.ndim == 0:
        key = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(shape[0]))
    model_fn, calls = as_argument(model_fn), len(table.t)
    given = (model_fn, key, x_t, known, known_noise)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given))
    length = calls if traced else _PORTION if observer.watch is None else _WATCHED
    rows = _Rows.of(table, observer)
    sharding = None
    if not traced:
        key, sharding = _beside(model_fn, key)

    def tell(done: Array, image: Array | None) -> None:
        if observer.progress:
            observer.progress(int(done), calls)
        if observer.watch and image is not None:
            observer.watch(int(done), calls, image)

    # Fixed variances are numbers in the table, so one compiled program serves them all.
    scanned = output if output.variance == "learned" else dataclasses.replace(output, variance="fixed_large")
    if x_t is None and known_noise is not None:
        x_t = np.float32(start_scale) * known_noise
    carry, before = _start(key, x_t, np.float32(start_scale), shape, observer.num_snapshots, sharding), None
    for first in range(0, calls, length):
        portion = jax.tree.map(lambda column: column[first : first + length], rows)  # noqa: B023
        carry, done = _scan(
            model_fn,
            _filled(portion, length),
            key,
            carry,
            None if known is None else (*known, known_noise),
            output=scanned,
            snapshots_of=observer.snapshots_of if observer.num_snapshots else "x",
            sharding=sharding,
        )
        if (observer.progress or observer.watch) and not traced:
            # From the previous portion, so that the device computes the next one while the host waits here.
            if before is not None:
                tell(*before)
            # A copy, since the next portion reuses the memory of the carry.
            seen = carry[0] if observer.snapshots_of == "x" else carry[2]
            before = done, jnp.copy(seen) if observer.watch else None
    if before is not None:
        tell(*before)
    x, *_, snapshots = carry
    if known is not None:
        x = jnp.where(known[1], known[0], x)
    return (x, snapshots) if observer.num_snapshots else x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """The scan's input: the table as float32, and for every row its number from 1, its slot among the snapshots, and
    whether it is a real row."""

    table: SamplerTable
    number: np.ndarray
    slot: np.ndarray
    is_row: np.ndarray

    @classmethod
    def of(cls, table: SamplerTable, observer: Observer) -> "_Rows":
        table = jax.tree.map(lambda c: c if c.dtype == np.int32 else np.asarray(c, np.float32), table)
        calls = len(table.t)
        number = np.arange(1, calls + 1, dtype=np.int32)
        # Each slot is overwritten until its own row, so that not every image needs to be kept.
        if observer.snapshots_of == "x":
            slot = -(-number * (observer.num_snapshots - 1) // calls)
        else:
            slot = -(-number * observer.num_snapshots // calls) - 1
        return cls(table, number, slot, np.ones(calls, bool))


def _filled(rows: _Rows, length: int) -> _Rows:
    """The rows, padded to `length` with rows that are skipped."""

    def fill(column: np.ndarray) -> np.ndarray:
        return np.pad(column, [(0, length - len(column))] + [(0, 0)] * (column.ndim - 1))

    filled: _Rows = jax.tree.map(fill, rows)
    return filled


def _noise(keys: Array, shape: tuple[int, ...], *purpose: int | Array) -> Array:
    for number in purpose:
        keys = fold_in(keys, number)
    return normal(keys, shape)


def _beside(model_fn: Any, keys: Array) -> tuple[Array, NamedSharding | None]:
    """The keys on the mesh of the network's weights, and the sharding of the scan's carry there; None: no mesh.

    The first portion must see the same shardings as the others, or it would be compiled separately.
    """
    placed = [leaf.sharding for leaf in jax.tree.leaves((keys, model_fn)) if isinstance(leaf, Array)]
    named = [sharding for sharding in placed if isinstance(sharding, NamedSharding)]
    if not named:
        return keys, None
    if not isinstance(keys.sharding, NamedSharding):
        keys = jax.device_put(keys, NamedSharding(named[0].mesh, PartitionSpec()))
    assert isinstance(keys.sharding, NamedSharding)
    return keys, NamedSharding(keys.sharding.mesh, PartitionSpec(*keys.sharding.spec))


def _laid(carry: Any, sharding: NamedSharding | None) -> Any:
    """The carry, with each image on the device of its key."""
    if sharding is None:
        return carry
    *images, snapshots = carry
    images = jax.lax.with_sharding_constraint(images, sharding)
    if snapshots is not None:
        of_snapshots = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        snapshots = jax.lax.with_sharding_constraint(snapshots, of_snapshots)
    return *images, snapshots


@partial(jax.jit, static_argnums=(3, 4, 5))
def _start(
    keys: Array,
    x_t: Array | None,
    scale: Array,
    shape: tuple[int, ...],
    num_snapshots: int,
    sharding: NamedSharding | None,
) -> _Carry:
    """The initial carry."""
    x = scale * _noise(keys, shape, 0) if x_t is None else x_t.astype(jnp.float32)
    snapshots = jnp.zeros((num_snapshots, *shape)).at[:1].set(x) if num_snapshots else None
    kept, x_0, *past = (jnp.zeros_like(x) for _ in range(5))
    carry: _Carry = _laid((x, kept, x_0, tuple(past), snapshots), sharding)
    return carry


@partial(
    jax.jit,
    static_argnames=("output", "snapshots_of", "sharding"),
    donate_argnames="carry",
)
def _scan(
    model_fn: ModelFn,
    rows: _Rows,
    keys: Array,
    carry: _Carry,
    known: tuple[Array, Array, Array | None] | None,
    *,
    output: Parameterization,
    snapshots_of: str,
    sharding: NamedSharding | None,
) -> tuple[_Carry, Array]:
    shape = carry[0].shape

    def call(carry: _Carry, row: Any) -> _Carry:
        x, kept, _, past, snapshots = carry
        row, number, slot = row.table, row.number, row.slot
        if known is not None:
            image, mask, noise = known
            if noise is None:
                noise = _noise(keys, shape, number, 1)
            else:
                mask = mask & (number > 1)  # the start already has this noise
            x = jnp.where(mask, row.a * image + row.s * noise, x)
        t = jnp.full(shape[:1], row.t)
        predicted, interpolation = split_output(model_fn(x, t), output.variance)
        x_0 = to_x_0(output.prediction, predicted, x, row.a, row.s)
        x_0 = clip_x_0(x_0, output.clip, output.dynamic_threshold, output.clip_range, output.threshold_limit)
        log_variance = row.log_variance_min
        if interpolation is not None:
            log_variance = interpolate_log_variance(interpolation, row.log_variance_min, row.log_variance_max)
        images = (x, kept, x_0, *past)
        remembered = row.remembered[0] * x + row.remembered[1] * x_0
        x, kept = (sum(f * image for f, image in zip(factors, images, strict=True)) for factors in (row.next, row.kept))
        # Numbers begin at 1, since 0 drew the start.
        x += jnp.sqrt(row.noise_scale * jnp.exp(log_variance) + row.noise_variance) * _noise(keys, shape, number)
        if snapshots is not None:
            snapshots = snapshots.at[slot].set(x if snapshots_of == "x" else x_0)
        return x, kept, x_0, (remembered, *past[:-1]), snapshots

    def step(carry: _Carry, row: Any) -> tuple[_Carry, None]:
        return jax.lax.cond(row.is_row, call, lambda carry, _: carry, carry, row), None

    carry, _ = jax.lax.scan(step, carry, rows)
    return _laid(carry, sharding), jnp.max(rows.number)
