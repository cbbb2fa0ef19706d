"""The page's requests to a run: each form is checked before it is queued, and then computed as one batch."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ddpm_jax.data.dataset import training_images
from ddpm_jax.data.pictures import Fit
from ddpm_jax.data.prepared import prepared_name, tfds_folder
from ddpm_jax.data.source import Source
from ddpm_jax.diffusion.tables import DEFAULT_SPACING, SAMPLERS, SPACINGS
from ddpm_jax.run import Run
from ddpm_jax.runtime import images
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.condition import FIELDS, Control
from ddpm_jax.sampling.given import MaskedPicture
from ddpm_jax.serve.forms import Form, choice, data_url, integer, number, opened, text
from ddpm_jax.serve.queue import Task

MAX_TIMES = 20  # RePaint's repetitions
MAX_GUIDANCE = 20.0
MAX_TEXT = 2_000  # characters of a prompt
_SAMPLER = "dpmpp_2m"  # which the page shows first
_FRAMES = 24  # intermediate images sent to the page

Work = Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Action:
    """A checked request.

    Attributes:
      call: returns the pictures, uint8 [batch, H, W, C], given the `watch` argument of `ddpm_jax.sample`.
      num_images: number of pictures requested.
      calls, weight, program: as in `Task`.
    """

    call: Callable[..., np.ndarray]
    num_images: int
    calls: int
    weight: float
    program: tuple[Any, ...]

    def task(self, changed: Callable[[], None]) -> Task:
        return Task(self._work, self.calls, self.weight, self.program, changed)

    def _work(self, task: Task) -> dict[str, Any]:
        shown = -1

        def watch(done: int, calls: int, batch: Any) -> None:
            nonlocal shown
            task.progress(done, calls)
            frame = done * _FRAMES // calls
            if frame > shown:
                shown = frame
                pictures = images.to_uint8(np.asarray(batch)[: self.num_images])
                task.tell("running", done=done, calls=calls, pictures=[*map(data_url, pictures)])

        return {"pictures": [*map(data_url, self.call(watch=watch)[: self.num_images])]}


class Playground:
    """A run and the requests it accepts.

    Args:
      run: from `ddpm_jax.load`.
      name: of the run, for the page.
      batch_size: the most images per request. Every request is a batch of this size, so that few programs are compiled.
    """

    def __init__(self, run: Run, name: str, batch_size: int):
        self.run, self.name, self.batch_size = run, name, batch_size
        self.fit = Fit(*run.shape)
        self.source: Source | None = None
        self.without_source = ""
        try:
            self.source = _training_images(run)
        except UserError as error:
            self.without_source = str(error)
        self.actions: dict[str, Callable[[Form], Action]] = {
            "sample": self.sample,
            "vary": self.vary,
            "inpaint": self.inpaint,
            "interpolate": self.interpolate,
            "interpolate_latents": self.interpolate_latents,
        }

    @property
    def last(self) -> int:
        return self.run.schedule.num_timesteps - 1

    @property
    def _default_steps(self) -> int:
        return min(20, self.last + 1)

    def facts(self) -> dict[str, Any]:
        """What the page needs to know."""
        run, height, width = self.run, *self.run.shape[:2]
        controls = run.condition.controls()
        takes = {name: {*inspect.signature(table).parameters} & {"eta", "order"} for name, table in SAMPLERS.items()}
        return {
            "name": self.name,
            "weights": run.weights,
            "height": height,
            "width": width,
            "controls": [dataclasses.asdict(control) for control in controls],
            "guidance": not run.condition.cannot_guide,
            "guidance_scale": self._guidance_scale(controls),
            "unconditional": run.condition.can_be_left_out,
            "edits": self._edits(),
            "timesteps": self.last + 1,
            "samplers": {
                name: {"options": sorted(options), "spacing": DEFAULT_SPACING[name]} for name, options in takes.items()
            },
            "spacings": SPACINGS,
            "sampler": _SAMPLER,
            "num_steps": self._default_steps,
            "max_images": self.batch_size,
            "max_times": MAX_TIMES,
            "max_guidance": MAX_GUIDANCE,
            "max_text": MAX_TEXT,
            "training_images": 0 if self.source is None else len(self.source),
            "without_training_images": self.without_source,
        }

    def _edits(self) -> list[str]:
        """The actions that edit pictures with this run."""
        given = self.run.model.given
        if given is not None:
            return ["inpaint"] if isinstance(given, MaskedPicture) else []
        edits = ["vary", "inpaint", "interpolate"]
        return [*edits, "interpolate_latents"] if self.run.condition.can_be_left_out else edits

    def _guidance_scale(self, controls: Sequence[Control]) -> float:
        """The page's initial guidance scale: only with guidance do images follow a prompt closely."""
        if self.run.condition.cannot_guide or all(control.choices for control in controls):
            return 1.0
        own = float(self.run.config.sample.guidance_scale)
        return 2.0 if own == 1 else own

    def training_page(self, query: Form) -> dict[str, Any]:
        """Some of the training images."""
        if self.source is None:
            raise UserError(self.without_source)
        first = integer(query, "first", 0, len(self.source) - 1, 0)
        count = integer(query, "count", 1, 60, 24)
        numbers = range(first, min(first + count, len(self.source)))
        return {"first": first, "pictures": [data_url(self.source[i]["image"]) for i in numbers]}

    def fitted(self, form: Form) -> dict[str, Any]:
        """An uploaded picture, cropped and scaled as the run sees it."""
        return {"picture": data_url(self.picture(form))}

    def picture(self, form: Form, name: str = "picture") -> np.ndarray:
        """A file of the form as uint8 [H, W, C], cropped and scaled to the run's size."""
        return opened(form, name, self.fit)

    # The actions.

    def sample(self, form: Form) -> Action:
        options = self._options(form)
        calls = self._calls(options)
        seed, view = self._seed(form), choice(form, "view", ("x_0", "x"), "x_0")

        def call(**watching: Any) -> np.ndarray:
            size = self.batch_size
            return self.run.sample(size, seed, batch_size=size, **watching, **options)

        return self._action("sample", form, call, calls, options, view)

    def vary(self, form: Form) -> Action:
        t = integer(form, "t", 0, self.last, self.last // 2)
        options = self._edit_options(form, t)
        calls = self._calls(options)
        pictures, seed = self.picture(form)[None].repeat(self.batch_size, axis=0), self._seed(form)

        def call(**watching: Any) -> np.ndarray:
            return self.run.vary(pictures, t, seed, batch_size=self.batch_size, **watching, **options)

        return self._action("vary", form, call, calls, options)

    def inpaint(self, form: Form) -> Action:
        options = self._edit_options(form)
        times = integer(form, "times", 1, MAX_TIMES, 1)
        if times > 1 and options["sampler"] not in ("ddpm", "ddim"):
            raise UserError(f"times is {times}; accepted with samplers other than ddpm and ddim: 1")
        calls = self._calls(options, times)
        picture, seed = self.picture(form), self._seed(form)
        height, width, _ = self.run.shape
        mask = opened(form, "mask", Fit(height, width, 1, background="black"))[..., 0] >= 128
        if not mask.any():
            raise UserError("no part of the picture is marked for repainting")
        pictures = picture[None].repeat(self.batch_size, axis=0)

        def call(**watching: Any) -> np.ndarray:
            resampling = {"times": times} if times > 1 else {}
            return self.run.inpaint(
                pictures, mask, seed, batch_size=self.batch_size, **resampling, **watching, **options
            )

        return self._action("inpaint", form, call, calls, options)

    def interpolate(self, form: Form) -> Action:
        t = integer(form, "t", 0, self.last, self.last // 2)
        options = self._edit_options(form, t)
        calls = self._calls(options)
        (first, second), weights, seed = self._ends(form), self._weights(form), self._seed(form)

        def call(**watching: Any) -> np.ndarray:
            return self.run.interpolate(first, second, weights, t, seed, **watching, **options)

        return self._action("interpolate", form, call, calls, options)

    def interpolate_latents(self, form: Form) -> Action:
        self.run.model.check_alone()
        self.run.condition.null(1)  # this method is unconditional
        steps, spacing = self._num_steps(form), self._spacing(form)
        calls = self._calls({"sampler": "ddim", "num_steps": steps, "spacing": spacing})
        (first, second), weights = self._ends(form), self._weights(form)

        def call(watch: Any) -> np.ndarray:
            return self.run.interpolate_latents(first, second, weights, steps, spacing, watch=watch)

        return Action(call, self._num_images(form), calls, 1.0, ("interpolate_latents",))

    def _action(
        self, kind: str, form: Form, call: Work, calls: int, options: dict[str, Any], view: str = "x_0"
    ) -> Action:
        guided = self.run.request(**options).guidance.is_on

        def seen(watch: Any) -> np.ndarray:
            return call(watch=watch, snapshots_of=view)

        # With or without a prompt, the arrays have the same shapes.
        return Action(seen, self._num_images(form), calls, 2.0 if guided else 1.0, (kind, guided))

    # Options of the actions.

    def _options(self, form: Form) -> dict[str, Any]:
        """The options of `Run.sample`."""
        sampler = choice(form, "sampler", tuple(SAMPLERS), _SAMPLER)
        options: dict[str, Any] = {
            "sampler": sampler,
            "num_steps": self._num_steps(form),
            "spacing": self._spacing(form),
            "eta": number(form, "eta", 0.0, 1.0),
            "order": integer(form, "order", 1, 3),
        }
        scale = number(form, "guidance_scale", 0.0, MAX_GUIDANCE)
        options |= {} if scale is None else {"guidance_scale": scale}
        controls = {control.name: control for control in self.run.condition.controls()}
        for name, keyword in FIELDS.items():
            if name in controls and controls[name].choices:
                said = integer(form, name, 0, len(controls[name].choices) - 1)
            else:
                said = text(form, name, MAX_TEXT) or None  # a run without this control refuses it
            options |= {} if said is None else {keyword: (said,)}
        return options

    def _edit_options(self, form: Form, t: int | None = None) -> dict[str, Any]:
        """The options of edits that start at t."""
        if not isinstance(self.run.model.given, MaskedPicture) or t is not None:
            self.run.model.check_alone()
        options = self._options(form)
        if t is not None:
            options["num_steps"] = min(options["num_steps"], t + 1)
        request = self.run.request(**options)
        if not request.condition.is_said:
            request.condition.null(1)
            if request.guidance.is_on:
                request.condition.require()
        return options

    def _calls(self, options: Mapping[str, Any], times: int = 1) -> int:
        """The number of network calls; UserError for options that do not go together, or too many calls."""
        calls, most = times * self.run.calls(**options), 2 * (self.last + 1)
        if calls > most:
            raise UserError(f"this takes {calls} network calls; accepted: at most {most}")
        return calls

    def _seed(self, form: Form) -> int:
        return integer(form, "seed", 0, 2**32 - 1, 0)

    def _num_images(self, form: Form) -> int:
        return integer(form, "num_images", 1, self.batch_size, self.batch_size)

    def _num_steps(self, form: Form) -> int:
        return integer(form, "num_steps", 1, self.last + 1, self._default_steps)

    def _spacing(self, form: Form) -> str | None:
        return choice(form, "spacing", SPACINGS, "") or None

    def _ends(self, form: Form) -> tuple[np.ndarray, np.ndarray]:
        return self.picture(form, "first"), self.picture(form, "second")

    def _weights(self, form: Form) -> Sequence[float]:
        """One weight per image of a batch; the first num_images are the requested ones."""
        count = self._num_images(form)
        inner = np.linspace(0, 1, count) if count > 1 else np.array([0.5])
        return np.resize(inner, self.batch_size).tolist()


def _training_images(run: Run) -> Source:
    """The run's training set, if it is on this machine; the playground does not download it."""
    data = run.config.data
    name = prepared_name(data.source, data.name)
    if name:
        folder, is_there = tfds_folder(name, data.data_dir or None)
        if not is_there:
            raise UserError(f"this run's training set is not in {str(folder)!r}")
    return training_images(run.config, run.dataset)
