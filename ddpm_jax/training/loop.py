"""The training loop: takes a run from its config, or from its last checkpoint, to its final pictures."""

import dataclasses
import functools
import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax import report
from ddpm_jax.data.dataset import open_dataset
from ddpm_jax.data.source import Source
from ddpm_jax.data.spread import spread
from ddpm_jax.models import lora
from ddpm_jax.runtime import images, parallel, processes, workdir
from ddpm_jax.runtime.checkpoints import Checkpoints, newest_step
from ddpm_jax.runtime.errors import UserError, first_line
from ddpm_jax.runtime.files import read_json_lines
from ddpm_jax.runtime.progress import ProgressBar, format_seconds
from ddpm_jax.training.autoencoders import autoencoder_description
from ddpm_jax.training.batches import Waited, device_batches
from ddpm_jax.training.clips import clip_description
from ddpm_jax.training.compiled import CompiledStep, length
from ddpm_jax.training.due import Calendar, is_passed
from ddpm_jax.training.interval import Interval, means, memory
from ddpm_jax.training.journal import METRICS, Journal
from ddpm_jax.training.monitor import Monitor, make_monitor
from ddpm_jax.training.objectives import make_objective
from ddpm_jax.training.pictures import make_pictures
from ddpm_jax.training.signals import stop_signals
from ddpm_jax.training.start import base_weights, start_weights
from ddpm_jax.training.state import Params, TrainState, create_state
from ddpm_jax.training.step import Metrics, make_train_step, step_arguments
from ddpm_jax.training.texts import text_description
from ddpm_jax.validation import validate

_DATA_IMAGES = 64


def train(config: ConfigDict, path: str | Path) -> None:
    """Trains in a workdir, from the start or from its newest checkpoint, to config.train.num_steps.

    Writes report.html, config.json, dataset.json, environment.json, history.jsonl, metrics.jsonl, tensorboard/,
    checkpoints/ and samples/ there. SIGTERM or the first Ctrl-C saves a checkpoint and returns.

    Args:
      config: see `ddpm_jax.config.default_config`.
      path: the workdir.

    Raises:
      UserError: anything is wrong with the config, the images or the workdir, before any compile starts; or another
        process trains in the workdir.
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
        processes.meet("images")  # a collective would time out if one process took much longer to prepare or check them
        was_finished = processes.agree(workdir.is_finished(folder, config))
        try:
            if jax.process_index() == 0:
                workdir.record(folder, config, description)
            _Training(config, folder, source, description, check_lock).run(was_finished)
        except OSError as error:
            raise UserError(
                f"the run in {str(folder)!r} cannot continue: {error}; once this is fixed, the same command resumes "
                "from the last checkpoint"
            ) from None


class _Training:
    """One start of a run, with the parts that the steps of the loop share."""

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

    def run(self, was_finished: bool) -> None:
        """Trains to the end; if the run `was_finished`, makes only what is missing."""
        self.checkpoints = Checkpoints(self.folder, self.config.checkpoint.keep)
        try:
            self._run(was_finished)
        except Exception as error:
            with suppress(OSError):  # only the first error is reported
                try:
                    self.checkpoints.wait()
                    self._note("failed", newest_step(self.folder) or 0, why=first_line(error))
                except UserError as unsaved:
                    if isinstance(error, OSError):  # of the same full disk; this one names the intact checkpoint
                        raise unsaved from None
            raise
        self.checkpoints.close()

    def _run(self, was_finished: bool) -> None:
        config, began = self.config, time.monotonic()
        num_steps = config.train.num_steps
        num_parameters = sum(p.size for p in jax.tree.leaves(self._creation[2].params))
        if not was_finished:
            self._say(
                f"{num_parameters:,} parameters, {len(self.source):,} images of "
                f"{'x'.join(map(str, self.source.shape))}, {jax.device_count()} {jax.devices()[0].platform} device(s), "
                f"{jax.process_count()} process(es)"
            )
        # The step is compiled beside all that follows.
        run_steps = self._compile() if (newest_step(self.folder) or 0) < num_steps else None
        step, state = self._initial_state()
        if was_finished and step >= num_steps:
            self._make_up(state, step)
            self._say(f"already finished; pictures are in {self.folder / 'samples'}")
            return
        self._begin(step, num_parameters)
        if step:
            self._make_up(state, step)
        if step < num_steps:
            state = self._steps(state, step, run_steps or self._compile())
            step = int(state.step)
        if step >= num_steps:
            self._final_pictures(state)
        self.checkpoints.wait()
        self._note("stopped" if step < num_steps else "finished", step)
        if step < num_steps:
            saved = f"stopped at step {step} of {num_steps} and saved a checkpoint"
            self._say(f"{saved}; the same command resumes from there")
        else:
            self._say(f"done in {format_seconds(time.monotonic() - began)}; pictures are in {self.folder / 'samples'}")

    def _begin(self, step: int, num_parameters: int) -> None:
        """Records the start, and saves a grid of training images once."""
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

    @functools.cached_property
    def _creation(self) -> tuple[Callable[[], Params], Callable[[Params], TrainState], TrainState]:
        """The functions that make the parameters, and from them the state without `frozen`, and the state's shapes."""
        config = self.config

        def init() -> Params:
            return self.objective.init_params(config.seed)

        def create(params: Params) -> TrainState:
            return create_state(
                params, self.optimizer, config.train.ema_decays, num_timesteps=config_lib.history_timesteps(config)
            )

        return init, create, jax.eval_shape(create, jax.eval_shape(init))  # jit finds these traces

    def _compile(self) -> CompiledStep:
        """Begins to compile the training step."""
        self._say("compiling the training step ...")
        options = self.config.train
        steps_per_dispatch = min(options.steps_per_dispatch, options.num_steps)
        train_step = make_train_step(
            self.objective,
            self.optimizer,
            self.mesh,
            steps_per_dispatch=steps_per_dispatch,
            **config_lib.step_options(self.config),
        )
        shapes = dataclasses.replace(self._creation[2], frozen=self.objective.frozen_shapes())
        arguments = step_arguments(self.objective, shapes, self.mesh, options.batch_size, steps_per_dispatch)
        return CompiledStep(train_step, arguments)

    def _initial_state(self) -> tuple[int, TrainState]:
        config, (init, create, shapes) = self.config, self._creation
        shardings = parallel.state_shardings(self.mesh, shapes)
        restored = self.checkpoints.restore_latest(parallel.laid(shapes, shardings))
        if restored:
            step, state = restored
            self._say(f"resuming from the checkpoint of step {step}")
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
        """The parameters of the network whose adapters are trained; None without adapters."""
        shapes = self.objective.frozen_shapes()
        return None if shapes is None else base_weights(self.config, self.folder, shapes, self.mesh, self._say)

    def _steps(self, state: TrainState, first_step: int, run_steps: CompiledStep) -> TrainState:
        """Runs from first_step to the end, or until a signal to stop; the last state is saved."""
        config, num_steps = self.config, self.config.train.num_steps
        zero_metrics = jax.jit(Metrics.zero, out_shardings=parallel.replicated(self.mesh))
        measure = jax.jit(self._measure, compiler_options=parallel.run_once_options())
        metrics = self._unreported(zero_metrics(), first_step)
        monitor = self._monitor if config.evaluate.every_steps else None
        batches = Waited(device_batches(config, self.objective, self.source, self.mesh, first_step))
        first = next(batches)
        self._say(f"compiled in {run_steps.wait():.0f} s")
        processes.meet("compiled")  # a collective would time out if one process took much longer to compile
        last_saved = first_step
        interval = Interval(first_step, config.train.batch_size, batches)
        in_flight: deque[Metrics] = deque()
        with (
            self._journal(first_step) as journal,
            stop_signals() as stop,
            ProgressBar("step", num_steps, first_step, None, self.is_main) as bar,
            jax.transfer_guard("disallow"),  # only explicit transfers to or from the devices
        ):
            step, calendar = first_step, Calendar(config, stop)
            for batch in itertools.chain([first], batches):
                state, metrics = run_steps(state, metrics, batch)
                before, step = step, step + (length(batch) if config.train.steps_per_dispatch > 1 else 1)
                # The devices' queue holds a few steps; with more, a signal to stop would wait for all of them.
                in_flight.append(metrics)
                if len(in_flight) > parallel.IN_FLIGHT:
                    jax.block_until_ready(in_flight.popleft())
                self.checkpoints.check()
                due = calendar.after(before, step)
                if due.log or due.save:
                    self.check_lock()
                    # On all processes, since each may have a part of the parameters.
                    measured = measure(state) if due.log else {}
                    values = means(jax.device_get(metrics))
                    if due.log and journal:
                        of_state = {name: float(value) for name, value in jax.device_get(measured).items()}
                        values |= of_state | interval.speed(step) | memory()
                        journal.write(step, values)
                        bar.done = step
                        bar.report(f"loss {values['loss']:.4f}  {values['images_per_second']:.0f} images/s")
                    if due.log:
                        metrics = zero_metrics()
                if due.save and step != last_saved:
                    with jax.transfer_guard("allow"):  # Orbax copies to the host implicitly
                        self.checkpoints.save(step, state, metrics)
                    last_saved = step
                    calendar.saved()
                    self._report()
                if due.stop:
                    break
                if due.sample:
                    with bar.aside(), jax.transfer_guard("allow"):
                        self._sample_grid(state, step)
                if monitor and due.evaluate:
                    with bar.aside(), jax.transfer_guard("allow"):
                        values = self._evaluate(monitor, state)
                    if journal:
                        journal.write(step, values)
                if due.log:
                    interval.begin(step)
                if bar.is_live:
                    bar.update(step)
        return state

    def _unreported(self, metrics: Metrics, first_step: int) -> Metrics:
        """The sums over steps before first_step that are not in metrics.jsonl yet; `metrics` are zero."""
        if not first_step:
            return metrics
        shapes = parallel.laid(metrics, jax.tree.map(lambda x: x.sharding, metrics))
        return self.checkpoints.restore_unreported(first_step, shapes) or metrics

    @contextmanager
    def _journal(self, first_step: int) -> Iterator[Journal | None]:
        """The journal of the run, in the process that writes it."""
        if not self.is_main:
            yield None
            return
        with closing(Journal(self.folder, first_step, self.config)) as journal:
            yield journal

    @functools.cached_property
    def _monitor(self) -> Monitor:
        return make_monitor(self.config, self.objective, self.mesh, self.source)

    def _measure(self, state: TrainState) -> dict[str, jax.Array]:
        """Values to log: the norm of the parameters, and the learning rate of the last step."""
        return {"param_norm": optax.tree.norm(state.params), "learning_rate": self.learning_rate(state.step - 1)}

    def _make_up(self, state: TrainState, step: int) -> None:
        """Makes the picture and the evaluation of the step to resume from, if the run was interrupted before them."""
        config, several = self.config, self.config.train.steps_per_dispatch
        log, evaluate = config.log, config.evaluate
        is_due = partial(is_passed, (step - 1) // several * several, step)
        drawn = step >= config.train.num_steps or self._picture(step).exists()
        if not drawn and is_due(log.sample_every_steps):
            self._sample_grid(state, step)
        if is_due(evaluate.every_steps):
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
        """Saves a picture made with the averaged weights; see `make_pictures`."""
        self.pictures.save_step(self._averaged(state), self._picture(step))
        self._report()

    def _averaged(self, state: TrainState) -> Params:
        """The parameters for pictures."""
        average = state.ema[self.decay]
        if not self.config.lora.rank:
            return average
        return lora.merge(state.frozen, average, config_lib.lora_scale(self.config))

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
