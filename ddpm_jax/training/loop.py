"""The training loop: a run from its config to its pictures, or onwards from its last checkpoint."""

import dataclasses
import functools
import itertools
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax import report
from ddpm_jax.data import pipeline
from ddpm_jax.data.dataset import open_dataset
from ddpm_jax.data.sources import Source
from ddpm_jax.evaluation.image_sets import spread
from ddpm_jax.models import lora
from ddpm_jax.runtime import images, parallel, processes, workdir
from ddpm_jax.runtime.checkpoints import Checkpoints, newest_step
from ddpm_jax.runtime.errors import UserError, first_line
from ddpm_jax.runtime.files import read_json_lines
from ddpm_jax.runtime.progress import ProgressBar, format_seconds
from ddpm_jax.training.autoencoders import autoencoder_description
from ddpm_jax.training.clips import clip_description
from ddpm_jax.training.journal import METRICS, Journal
from ddpm_jax.training.monitor import Monitor, make_monitor
from ddpm_jax.training.objectives import make_objective
from ddpm_jax.training.pictures import make_pictures
from ddpm_jax.training.signals import stop_signals
from ddpm_jax.training.start import start_weights
from ddpm_jax.training.state import Params, TrainState, create_state
from ddpm_jax.training.step import Metrics, make_train_step
from ddpm_jax.training.texts import text_description
from ddpm_jax.validation import validate

_DATA_IMAGES = 64


class DivergedError(UserError):
    """Training met a loss or gradient that is not finite."""


def train(config: ConfigDict, path: str | Path) -> None:
    """Trains in a workdir, from the start or from its newest checkpoint, to config.train.num_steps.

    Leaves there: report.html, config.json, dataset.json, environment.json, history.jsonl, metrics.jsonl, tensorboard/,
    checkpoints/ and samples/.
    SIGTERM or the first Ctrl-C saves a checkpoint and returns.

    Args:
      config: see `ddpm_jax.config.default_config`.
      path: the workdir.

    Raises:
      UserError: anything wrong with the config, the images or the workdir, before any compile starts; or another
        process that trains in the workdir.
      DivergedError: the loss became NaN or infinite; the last good checkpoint stays.
    """
    validate(config, jax.device_count(), workdir.read_dataset(path))
    with workdir.locked(path, "training") as (folder, check_lock):
        workdir.check_config(folder, config)
        known = workdir.read_dataset(folder)
        source = open_dataset(config, known)
        description = source.describe() | text_description(config, source, folder, known)
        description |= autoencoder_description(config, source, folder, known)
        description |= clip_description(config, folder, known)
        workdir.check_dataset(folder, description)
        processes.meet("images")  # collectives would not wait for a process that prepares or checks them much longer
        was_finished = processes.agree(workdir.is_finished(folder, config))
        try:
            if jax.process_index() == 0:
                workdir.record(folder, config, description)
            _Training(config, folder, source, description, check_lock).run(was_finished)
        except OSError as error:
            raise UserError(
                f"the run in {str(folder)!r} cannot go on: {error}; when this is mended the same command goes on from "
                "the last checkpoint"
            ) from None


class _Training:
    """One start of a run: the pieces that the loop hands around."""

    def __init__(
        self,
        config: ConfigDict,
        folder: Path,
        source: Source,
        description: dict[str, Any],
        check_lock: Callable[[], None],
    ):
        self.config, self.folder, self.source, self.check_lock = config, folder, source, check_lock
        self.is_main = jax.process_index() == 0
        self.mesh = parallel.make_mesh(**config.mesh)
        self.objective = make_objective(config, description)
        self.pictures = make_pictures(config, self.objective, self.mesh, source)
        self.optimizer = config_lib.make_optimizer(config)
        self.learning_rate = config_lib.learning_rate(config)
        self.decay = str(config.train.ema_decays[0])
        self._dispatches = 0

    def run(self, was_finished: bool) -> None:
        """To the end; of a run that `was_finished` only what is lacking."""
        self.checkpoints = Checkpoints(self.folder, self.config.checkpoint.keep)
        try:
            self._run(was_finished)
        except Exception as error:
            with suppress(UserError, OSError):  # of several, the first is told
                self.checkpoints.wait()
                self._note("failed", newest_step(self.folder) or 0, why=first_line(error))
            raise
        self.checkpoints.close()

    def _run(self, was_finished: bool) -> None:
        config, began = self.config, time.monotonic()
        step, state = self._initial_state()
        num_steps = config.train.num_steps
        num_parameters = sum(p.size for p in jax.tree.leaves(state.params))
        if was_finished and step >= num_steps:
            self._make_up(state, step)
            self._say(f"finished before; pictures are in {self.folder / 'samples'}")
            return
        self._begin(step, num_parameters)
        self._say(
            f"{num_parameters:,} parameters, {len(self.source):,} images of "
            f"{'x'.join(map(str, self.source.shape))}, {jax.device_count()} {jax.devices()[0].platform} device(s), "
            f"{jax.process_count()} process(es)"
        )
        if step:
            self._make_up(state, step)
        if step < num_steps:
            state = self._steps(state, step)
            step = int(state.step)
        if step >= num_steps:
            self._final_pictures(state)
        self.checkpoints.wait()
        self._note("stopped" if step < num_steps else "finished", step)
        if step < num_steps:
            self._say(f"stopped at step {step} of {num_steps}, saved; the same command goes on from there")
        else:
            self._say(f"done in {format_seconds(time.monotonic() - began)}; pictures are in {self.folder / 'samples'}")

    def _begin(self, step: int, num_parameters: int) -> None:
        """Notes the start, and draws some of the images once."""
        path = self.folder / "samples" / "data.png"
        if self.is_main and not path.exists():
            images.save(path, images.grid(spread(self.source, _DATA_IMAGES)["image"]))
        reached = max((line["step"] for line in read_json_lines(self.folder / METRICS)), default=0)
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        self._note("started", step, reached=reached, devices=devices, num_parameters=num_parameters)

    def _note(self, event: str, step: int, **values: Any) -> None:
        self.check_lock()
        if self.is_main:
            workdir.note(self.folder, event, step, **values)
        self._report()

    def _report(self) -> None:
        if self.is_main:
            report.update(self.folder)

    def _initial_state(self) -> tuple[int, TrainState]:
        config = self.config

        def init() -> Params:
            return self.objective.init_params(config.seed)

        def create(params: Params) -> TrainState:
            return create_state(
                params, self.optimizer, config.train.ema_decays, num_timesteps=config_lib.history_timesteps(config)
            )

        shapes = jax.eval_shape(create, jax.eval_shape(init))  # neither is traced again below
        shardings = parallel.state_shardings(self.mesh, shapes)
        restored = self.checkpoints.restore_latest(parallel.laid(shapes, shardings))
        if restored:
            step, state = restored
            self._say(f"going on from the checkpoint of step {step}")
            return step, dataclasses.replace(state, frozen=self._frozen())
        jit = partial(jax.jit, compiler_options=parallel.run_once_options())
        if config.train.init_from and not config.lora.rank:
            step, weights = start_weights(config, shapes.params)
            self._say(f"starting from the weights of {config.train.init_from}, step {step}")
            start = jax.device_put(weights, shardings.params)
        else:
            start = jit(init, out_shardings=shardings.params)()
        return 0, dataclasses.replace(jit(create, out_shardings=shardings)(start), frozen=self._frozen())

    def _frozen(self) -> Params:
        """The parameters of the network whose adapters are trained, from the run that this one started from; the
        workdir keeps them. None without adapters."""
        shapes = self.objective.frozen_shapes()
        if shapes is None:
            return None
        shardings = parallel.state_shardings(self.mesh, shapes)
        base = Checkpoints(self.folder / workdir.BASE)
        try:
            if base.steps():
                return base.restore_weights(None, "params", parallel.laid(shapes, shardings))[1]
            step, weights = start_weights(self.config, shapes)
            self._say(f"adapting the weights of {self.config.train.init_from}, step {step}")
            params = jax.device_put(weights, shardings)
            base.save_weights(step, params)
            return params
        finally:
            base.close()

    def _steps(self, state: TrainState, first_step: int) -> TrainState:
        """Runs from first_step to the end, or until told to stop; the last state is saved."""
        config, num_steps = self.config, self.config.train.num_steps
        log, checkpoint = config.log, config.checkpoint
        train_step = make_train_step(
            self.objective,
            self.optimizer,
            self.mesh,
            steps_per_dispatch=config.train.steps_per_dispatch,
            **config_lib.step_options(config),
        )
        whole = parallel.replicated(self.mesh)
        zero_metrics = jax.jit(Metrics.zero, out_shardings=whole)
        measure = jax.jit(self._measure, compiler_options=parallel.run_once_options())
        metrics = zero_metrics()
        if first_step:
            shapes = parallel.laid(metrics, jax.tree.map(lambda x: x.sharding, metrics))
            metrics = self.checkpoints.restore_unreported(first_step, shapes) or metrics
        monitor = self._monitor if config.evaluate.every_steps else None
        batches = _Waited(self._batches(first_step))

        self._say("compiling the training step ...")
        compile_began = time.monotonic()
        first = next(batches)
        compiled = train_step.lower(state, metrics, first).compile()
        self._say(f"compiled in {time.monotonic() - compile_began:.0f} s")
        processes.meet("compiled")  # collectives would not wait for a process that compiles much longer

        batches.waited = 0.0
        last_saved, last_save_time = first_step, time.monotonic()
        interval_began, interval_step = time.monotonic(), first_step
        in_flight: deque[Metrics] = deque()
        with (
            self._journal(first_step) as journal,
            stop_signals() as stop,
            ProgressBar("step", num_steps, first_step, None, self.is_main) as bar,
            jax.transfer_guard("disallow"),  # nothing goes to or from the devices but what says so
        ):
            step = first_step
            for batch in itertools.chain([first], batches):
                # At the ends of a run, several steps at once may be fewer.
                length = len(jax.tree.leaves(batch)[0])
                program = compiled if length == len(jax.tree.leaves(first)[0]) else train_step
                state, metrics = program(state, metrics, batch)
                before, step = step, step + (length if config.train.steps_per_dispatch > 1 else 1)
                is_due = partial(_is_passed, before, step)
                # A few steps lie in the devices' queue; with more, a signal to stop would have to wait for them all.
                in_flight.append(metrics)
                if len(in_flight) > parallel.IN_FLIGHT:
                    jax.block_until_ready(in_flight.popleft())
                self.checkpoints.check()
                stopping = self._is_stopping(stop, step)
                logging_now = is_due(log.every_steps) or step == num_steps
                saving = (
                    stopping
                    or step == num_steps
                    or is_due(checkpoint.every_steps)
                    or (logging_now and self._are_minutes_passed(last_save_time))
                )
                if logging_now or saving:
                    self.check_lock()
                    measured = measure(state) if logging_now else {}  # by all: each may have a part of the parameters
                    values = _means(jax.device_get(metrics))
                    if logging_now and journal:
                        now = time.monotonic()
                        speed = (step - interval_step) / (now - interval_began)
                        values |= {
                            **{name: float(value) for name, value in jax.device_get(measured).items()},
                            "steps_per_second": speed,
                            "images_per_second": speed * config.train.batch_size,
                            "input_wait": batches.waited / (now - interval_began),
                            **_memory(),
                        }
                        journal.write(step, values)
                        bar.done = step
                        bar.report(f"loss {values['loss']:.4f}  {values['images_per_second']:.0f} images/s")
                    if logging_now:
                        metrics = zero_metrics()
                if saving and step != last_saved:
                    with jax.transfer_guard("allow"):  # Orbax copies to the host without saying so
                        self.checkpoints.save(step, state, metrics)
                    last_saved, last_save_time = step, time.monotonic()
                    self._report()
                if stopping:
                    break
                if log.sample_every_steps and is_due(log.sample_every_steps) and step < num_steps:
                    with bar.aside(), jax.transfer_guard("allow"):
                        self._sample_grid(state, step)
                if monitor and is_due(config.evaluate.every_steps):
                    with bar.aside(), jax.transfer_guard("allow"):
                        values = self._evaluate(monitor, state)
                    if journal:
                        journal.write(step, values)
                if logging_now:
                    interval_began, interval_step, batches.waited = time.monotonic(), step, 0.0
                if bar.is_live:
                    bar.update(step)
        return state

    @contextmanager
    def _journal(self, first_step: int) -> Iterator[Journal | None]:
        """The run's, of the process that writes it."""
        if not self.is_main:
            yield None
            return
        with closing(Journal(self.folder, first_step, self.config)) as journal:
            yield journal

    @functools.cached_property
    def _monitor(self) -> Monitor:
        return make_monitor(self.config, self.objective, self.mesh, self.source)

    def _measure(self, state: TrainState) -> dict[str, jax.Array]:
        """What is logged of a state: the norm of its parameters, and the learning rate that its last step had."""
        return {"param_norm": optax.tree.norm(state.params), "learning_rate": self.learning_rate(state.step - 1)}

    def _batches(self, first_step: int) -> Iterator[dict[str, jax.Array]]:
        """The batches from first_step on, on the devices; those of several steps stacked if they are taken at once."""
        config, mesh = self.config, self.mesh
        size, several = config.train.batch_size, config.train.steps_per_dispatch
        rows = parallel.local_rows(mesh, size)
        batches = pipeline.host_batches(
            self.source,
            seed=config.seed,
            batch_size=size,
            first_step=first_step,
            last_step=config.train.num_steps,
            rows=rows,
            cache_bytes=int(config.data.cache_gib * 2**30),
            num_workers=config.data.num_workers,
        )
        batches = self._read(batches, first_step, rows)
        if several > 1:
            batches = pipeline.several(batches, first_step, several)

        def put(batch: pipeline.Batch) -> dict[str, jax.Array]:
            return {
                name: parallel.from_local_rows(mesh, batch[name], rows, size, axis=int(several > 1)) for name in batch
            }

        return pipeline.prefetch(map(put, batches), depth=2)

    def _read(
        self, batches: Iterable[pipeline.Batch], first_step: int, rows: slice | np.ndarray
    ) -> Iterator[pipeline.Batch]:
        """The batches with what the objective reads of them; what it draws is a function of seed, step and row."""
        for step, batch in enumerate(batches, first_step):
            draws = pipeline.batch_draws(self.config.seed, step, self.config.train.batch_size)
            yield self.objective.read(batch, self.source, draws[rows])

    def _is_stopping(self, stop: threading.Event, step: int) -> bool:
        """Whether this process was told to stop, or any of a multi-host job; the same answer on all."""
        if jax.process_count() == 1:
            return stop.is_set()
        self._dispatches += 1  # jax wants a number that rises by one
        return multihost_utils.reached_preemption_sync_point(self._dispatches)

    def _are_minutes_passed(self, since: float) -> bool:
        """Whether checkpoint.every_minutes are, by process 0's clock; the same answer on all."""
        every = self.config.checkpoint.every_minutes
        if not every:
            return False
        with jax.transfer_guard("allow"):
            return processes.agree(time.monotonic() - since >= 60 * every)

    def _make_up(self, state: TrainState, step: int) -> None:
        """The picture and the evaluation of the step that the run goes on from, if it was cut off before them."""
        config, several = self.config, self.config.train.steps_per_dispatch
        log, evaluate = config.log, config.evaluate
        is_due = partial(_is_passed, (step - 1) // several * several, step)
        drawn = not log.sample_every_steps or step >= config.train.num_steps or self._picture(step).exists()
        if not drawn and is_due(log.sample_every_steps):
            self._sample_grid(state, step)
        if evaluate.every_steps and is_due(evaluate.every_steps):
            lines = read_json_lines(self.folder / METRICS)
            # An evaluation's line has no loss.
            if not any(line.get("step") == step and "loss" not in line for line in lines):
                values = self._evaluate(self._monitor, state)
                with self._journal(step) as journal:
                    if journal:
                        journal.write(step, values)

    def _picture(self, step: int) -> Path:
        return self.folder / "samples" / f"step_{step:08d}.png"

    def _sample_grid(self, state: TrainState, step: int) -> None:
        """By the averaged weights; of the same draws every time, so that the pictures can be compared."""
        self.pictures.save_step(self._averaged(state), self._picture(step))
        self._report()

    def _averaged(self, state: TrainState) -> Params:
        """The parameters that pictures are made with."""
        average = state.ema[self.decay]
        return (
            lora.merge(state.frozen, average, config_lib.lora_scale(self.config)) if self.config.lora.rank else average
        )

    def _evaluate(self, monitor: Monitor, state: TrainState) -> dict[str, float]:
        with ProgressBar("evaluating, calls", 0, enabled=self.is_main) as bar:
            values = monitor(self._averaged(state), bar.update)
        self._say("  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        return values

    def _final_pictures(self, state: TrainState) -> None:
        self.pictures.save_final(self._averaged(state), self.folder / "samples")

    def _say(self, text: str) -> None:
        if self.is_main:
            print(text, file=sys.stderr, flush=True)


def _is_passed(before: int, step: int, every: int) -> bool:
    """Whether a multiple of `every` lies after step `before` and not after `step`."""
    return step // every > before // every


class _Waited:
    """An iterator that adds up the seconds which the loop waited for its items."""

    def __init__(self, iterator: Iterator[dict[str, jax.Array]]):
        self._iterator, self.waited = iterator, 0.0

    def __iter__(self) -> "_Waited":
        return self

    def __next__(self) -> dict[str, jax.Array]:
        began = time.monotonic()
        try:
            return next(self._iterator)
        finally:
            self.waited += time.monotonic() - began


def _means(metrics: Metrics) -> dict[str, float]:
    """Means of the sums; DivergedError if a step was not finite."""
    if metrics.bad_step >= 0:
        raise DivergedError(
            f"training diverged at step {int(metrics.bad_step) + 1}: loss {float(metrics.bad_loss):g}, gradient norm "
            f"{float(metrics.bad_grad_norm):g}; the last good checkpoint is kept (a lower optimizer.learning_rate, a "
            "longer warm-up or float32 may help)"
        )
    steps = float(metrics.steps)
    if not steps:
        return {}
    quarters = {
        f"loss_t_quarter_{i + 1}": float(total / count)
        for i, (total, count) in enumerate(zip(metrics.quarter_loss, metrics.quarter_count, strict=True))
        if count
    }
    return {"loss": float(metrics.loss) / steps, **quarters, "grad_norm": float(metrics.grad_norm) / steps}


def _memory() -> dict[str, float]:
    """Peak memory of the first device in GiB; on CPU that of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"peak_memory_gib": stats["peak_bytes_in_use"] / 2**30}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
