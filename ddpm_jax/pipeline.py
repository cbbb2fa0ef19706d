"""Pipelines: several runs, each of which takes the result of the previous one.

Imagen is one (Saharia et al. 2022): a run draws a small picture for a text, and super-resolution runs enlarge it. A
pipeline is a workdir that names its stages and has no weights of its own. Opened, it is a `Run`: sampling, shards,
evaluation and the playground work as for any other.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ddpm_jax.diffusion.samplers import Observer
from ddpm_jax.run import Run, open_run
from ddpm_jax.runtime import workdir
from ddpm_jax.runtime.checkpoints import newest_step
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import new_folder, read_json_object, write_text
from ddpm_jax.runtime.progress import part_of
from ddpm_jax.sampling.condition import FIELDS, KEYWORDS, Condition
from ddpm_jax.sampling.embeddings import Embedder, ImageEmbedding
from ddpm_jax.sampling.generate import Request
from ddpm_jax.sampling.given import Inputs

_PER_STAGE = ("guidance_scale", "guidance_rescale", "num_steps", "sampler", "dynamic_threshold")


@dataclasses.dataclass(frozen=True, repr=False)
class Pipeline(Run):
    """Several runs in order. The attributes that it shares with `Run` are those of the last stage.

    Attributes:
      before: the stages before the last, in order.
    """

    before: tuple[Run, ...] = ()

    @property
    def stages(self) -> tuple[Run, ...]:
        """All stages, in order."""
        return (*self.before, self._last)

    @property
    def condition(self) -> Condition:
        """The condition of the first stage; the other stages get the same request, as far as they accept it."""
        return self.before[0].condition

    @property
    def weights(self) -> str:
        return "; ".join(stage.weights for stage in self.stages)

    def at(self, height: int | None = None, width: int | None = None) -> Self:
        """The pipeline itself, whose size is fixed; raises UserError for any other size."""
        own = self.shape[:2]
        wanted = (height or own[0], width or own[1])
        if wanted != own:
            raise UserError(
                f"height and width are {wanted[0]} and {wanted[1]}; accepted for this pipeline: {own[0]} and {own[1]}"
            )
        return self

    def request(self, **options: Any) -> Request:
        """The request that these options of `sample` make of the first stage, with those of the others in `then`.

        An option applies to all stages. guidance_scale, guidance_rescale, num_steps, sampler and dynamic_threshold may
        be lists with a value for each stage; None keeps the stage's own. A stage does not get options that it does not
        accept, such as a prompt, or guidance without one.
        """
        count = len(self.stages)
        for name in _PER_STAGE:
            value = options.get(name)
            if isinstance(value, list | tuple) and len(value) != count:
                raise UserError(f"{name} has {len(value)} values; accepted: one, or one for each of {count} stages")
        first, *rest = (stage.request(**_of_stage(stage, number, options)) for number, stage in enumerate(self.stages))
        return dataclasses.replace(first, then=tuple(rest))

    def calls(self, **options: Any) -> int:
        """How often `sample` calls the networks for an image, with these options."""
        return sum(stage.calls(**_of_stage(stage, number, options)) for number, stage in enumerate(self.stages))

    def settings(self, *, seed: int, batch_size: int | None = None, **options: Any) -> dict[str, Any]:
        self.request(**options)  # refuses a list of a different length
        first, *rest = (
            stage.settings(seed=seed, batch_size=batch_size, **_of_stage(stage, number, options))
            for number, stage in enumerate(self.stages)
        )
        return first | {"stages": rest}

    @property
    def _last(self) -> Run:
        return Run(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Run)})

    def _given(self) -> Any:
        raise UserError(
            "a pipeline enlarges only its own pictures; accepted for --mode=upscale: a run that is one of its stages"
        )

    def _generated(
        self,
        request: Request,
        indices: Sequence[int],
        seed: int,
        batch_size: int | None,
        observer: Observer,
        inputs: Inputs | None = None,
        purpose: str = "image",
    ) -> tuple[np.ndarray, np.ndarray | None]:
        if request.between:
            raise UserError("a pipeline does not interpolate between prompts or classes; its first stage does")
        count = len(self.stages)
        begin = 0 if inputs is None else self._of_given_embedding()
        for number, (stage, asked) in enumerate(zip(self.stages, (request, *request.then), strict=True)):
            if number < begin:
                continue
            progress = part_of(observer.progress, number - begin, count - begin)
            watching = dataclasses.replace(observer, progress=progress) if number == count - 1 else Observer(progress)
            # Stages of the same size would otherwise draw the same noise.
            noise = f"{purpose} of stage {number + 1}" if number else purpose
            images, snapshots = stage._generated(asked, indices, seed, batch_size, watching, inputs, noise)
            inputs = Inputs(images, self._said_to(number + 1, inputs, len(images)))
        return images, snapshots

    def _said_to(self, number: int, inputs: Inputs | None, count: int) -> Mapping[str, np.ndarray] | None:
        """The null condition for stage `number` if the inputs replace the request's condition; None: the request's."""
        if inputs is None or inputs.cond is None or number == len(self.stages):
            return None
        return self.stages[number].condition.null(count)

    @property
    def embedder(self) -> Embedder:
        return self.stages[self._of_given_embedding()].embedder

    def _of_given_embedding(self) -> int:
        """The number of the stage that takes an image embedding."""
        for number, stage in enumerate(self.stages):
            if isinstance(stage.model.given, ImageEmbedding):
                return number
        raise UserError("no stage of this pipeline takes an image embedding; accepted: one trained with embedding.clip")


def _of_stage(stage: Run, number: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options for a stage."""
    found = {
        name: value[number] if name in _PER_STAGE and isinstance(value, list | tuple) else value
        for name, value in options.items()
    }
    if number == 0:
        return found  # refuses what it does not accept
    controls = {FIELDS[control.name] for control in stage.condition.controls()}
    found = {name: value for name, value in found.items() if name not in KEYWORDS or name in controls}
    if stage.condition.cannot_guide:
        found = {name: value for name, value in found.items() if not name.startswith("guidance_")}
    return found


def compose(stages: Sequence[str | Path], path: str | Path) -> Path:
    """Writes the workdir of a pipeline.

    Args:
      stages: workdirs in order, of runs or of pipelines; a pipeline stands for its stages.
      path: of the new workdir.

    Raises:
      UserError: a stage that is not a run, or does not take the output of the previous one; a folder that is not empty.
    """
    target = Path(path).expanduser()
    folders = [folder for stage in stages for folder in _expanded(Path(stage).expanduser(), target)]
    if len(folders) < 2:
        raise UserError(f"--stages has {len(folders)} run; accepted: two or more, in order")
    runs = [open_run(folder) for folder in folders]
    _check(folders, runs)
    entries = [
        (os.path.relpath(folder.resolve(), target.resolve()), run.step, run.shape)
        for folder, run in zip(folders, runs, strict=True)
    ]
    with new_folder(target, "--workdir") as temporary:
        record(temporary, entries, folders[-1])
    return target


def record(folder: Path, stages: Sequence[tuple[str, int, Sequence[int]]], last: Path | None = None) -> None:
    """Writes the files of a pipeline into its folder.

    Args:
      folder: an existing one.
      stages: for each stage its workdir, relative to the folder, its step and the shape of its output.
      last: the workdir of the last stage; None: the one in `stages`.
    """
    last = folder / stages[-1][0] if last is None else last
    workdir.record(folder, workdir.read_config(last), workdir.read_dataset(last) or {})
    entries = [{"workdir": path, "step": step, "size": list(size)} for path, step, size in stages]
    write_text(folder / workdir.STAGES, json.dumps({"stages": entries}, indent=2) + "\n")


def load(path: str | Path, step: int | None = None, **options: Any) -> Run:
    """Opens a workdir, of a run or of a pipeline; see `ddpm_jax.run.open_run` for the options.

    Raises:
      UserError: as in `open_run`; a pipeline with a stage that is missing or has been trained further.
    """
    folder = Path(path).expanduser()
    if not (folder / workdir.STAGES).is_file():
        return open_run(path, step, **options)
    if step is not None or options.get("loras"):
        raise UserError(f"{str(path)!r} is a pipeline; accepted without --step and --lora, which are for its stages")
    runs = []
    for number, entry in enumerate(read_json_object(folder / workdir.STAGES)["stages"], 1):
        stage = (folder / entry["workdir"]).resolve()
        what = f"stage {number} of {str(path)!r}, {str(stage)!r},"
        if not stage.is_dir():
            raise UserError(f"{what} is not there any more; put it back, or compose the pipeline again")
        if newest_step(stage) != entry["step"]:
            raise UserError(
                f"{what} was at step {entry['step']} and is at step {newest_step(stage)} now; compose the pipeline "
                "again"
            )
        runs.append(open_run(stage, **options))
    *before, last = runs
    return Pipeline(
        **{field.name: getattr(last, field.name) for field in dataclasses.fields(Run)}, before=tuple(before)
    )


def _expanded(folder: Path, target: Path) -> list[Path]:
    """The runs of a stage, which may be a pipeline."""
    if folder.resolve() == target.resolve():
        raise UserError(f"--stages has {str(folder)!r}, which is the --workdir of the pipeline itself")
    if not (folder / workdir.STAGES).is_file():
        return [folder]
    entries = read_json_object(folder / workdir.STAGES)["stages"]
    return [folder / entry["workdir"] for entry in entries]


def _check(folders: Sequence[Path], runs: Sequence[Run]) -> None:
    """Raises UserError unless each run takes the output of the previous one."""
    for number in range(1, len(runs)):
        given, name = runs[number].model.given, str(folders[number])
        if given is None or given.needs:
            raise UserError(
                f"stage {number + 1}, {name!r}, takes no input from another stage; accepted: a run trained "
                "with config.upscale or config.embedding"
            )
        clips = [run.dataset.get("clip_crc32") for run in runs[number - 1 : number + 1]]
        if isinstance(given, ImageEmbedding) and clips[0] is not None and clips[0] != clips[1]:
            raise UserError(
                f"stage {number + 1}, {name!r}, was trained with a different CLIP than stage {number}, "
                f"{str(folders[number - 1])!r}; accepted: the same"
            )
        made = runs[number - 1].shape
        if tuple(given.shape) != tuple(made):
            sizes = ["x".join(map(str, shape)) for shape in (made, given.shape)]
            raise UserError(
                f"stage {number}, {str(folders[number - 1])!r}, makes {sizes[0]}, but stage {number + 1}, {name!r}, "
                f"takes {sizes[1]}; accepted: the same"
            )
