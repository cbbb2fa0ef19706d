"""A workdir opened for use: its config, its weights on this machine's devices, and what one does with them."""

import dataclasses
import functools
import inspect
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.data.dataset import training_images
from ddpm_jax.data.pictures import Fit, open_picture
from ddpm_jax.diffusion import editing
from ddpm_jax.diffusion.gaussian import Parameterization, fold_in, normal
from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.diffusion.samplers import Observer, Progress, Steps, Watch, sample
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.diffusion.tables import DEFAULT_SPACING
from ddpm_jax.interop.diffusers import adapters as adapters_lib
from ddpm_jax.interop.diffusers.adapters import LoraFile
from ddpm_jax.models import lora
from ddpm_jax.runtime import parallel, workdir
from ddpm_jax.runtime.checkpoints import Checkpoints
from ddpm_jax.runtime.errors import UserError, nearest, reason
from ddpm_jax.runtime.progress import part_of
from ddpm_jax.runtime.rng import named_key
from ddpm_jax.sampling import condition as condition_lib
from ddpm_jax.sampling.captions import CaptionCondition
from ddpm_jax.sampling.condition import Condition, check_guidance
from ddpm_jax.sampling.embeddings import Embedder, ImageEmbedding
from ddpm_jax.sampling.generate import Model, Request, generate, image_keys
from ddpm_jax.sampling.given import Inputs, LowResolution, MaskedPicture, from_examples
from ddpm_jax.sampling.latents import Latents
from ddpm_jax.text.encoders import FrozenTexts
from ddpm_jax.validation import validate

_GUIDANCE = {f"guidance_{field.name}" for field in dataclasses.fields(Guidance)}
_OPTIONS = (  # of `Run.request`
    *(field.name for part in (Steps, Parameterization) for field in dataclasses.fields(part)),
    *sorted(_GUIDANCE),
    *condition_lib.KEYWORDS,
)


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A trained run.

    Attributes:
      config: what it was told.
      dataset: the description of what it learned from.
      step: of the checkpoint.
      ema_decay: of the weights, or None for the weights as trained.
      model: its condition, network, diffusion and decoder.
      params: the weights, on all devices of `mesh`.
      mesh: this machine's devices.
      loras: the files that were added to the weights.
    """

    config: ConfigDict
    dataset: dict[str, Any]
    step: int
    ema_decay: float | None
    model: Model
    params: Any
    mesh: Mesh
    loras: tuple[LoraFile, ...] = ()

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"Run({size} images, {count:,} parameters, {self.weights}, predicts {self.config.diffusion.prediction})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images."""
        return self.model.decoder.picture_shape

    @property
    def condition(self) -> Condition:
        """What can be said to the run."""
        return self.model.condition

    @property
    def net(self) -> Any:
        """The network, a linen module."""
        return self.model.net

    @property
    def schedule(self) -> Schedule:
        """The schedule of its diffusion."""
        return self.model.schedule

    @property
    def model_fn(self) -> jax.tree_util.Partial:
        """(x_t, t) -> the network's output where nothing is said, for the functions of `ddpm_jax.diffusion`."""
        return self.model.model_fn_of_null(self.params)

    @property
    def weights(self) -> str:
        """Which weights these are, in words."""
        which = "raw weights" if self.ema_decay is None else f"EMA {self.ema_decay}"
        return ", ".join([f"step {self.step}", which, *(f"LoRA {file.name} at {file.weight:g}" for file in self.loras)])

    def at(self, height: int | None = None, width: int | None = None) -> "Run":
        """The same run for pictures of another size; None: the size that it has.

        Raises:
          UserError: a size that its decoder or its network cannot have.
        """
        size = self.shape[0] if height is None else height, self.shape[1] if width is None else width
        if size == self.shape[:2]:
            return self
        decoder, given = self.model.decoder.of_size(*size), self.model.given
        resized = dataclasses.replace(self.model, decoder=decoder, given=given and given.of_size(*size))
        run = dataclasses.replace(self, model=resized)
        try:
            jax.eval_shape(lambda: run.net.init(jax.random.key(0), *run.model.example()))
        except ValueError as error:
            raise UserError(f"height and width are {size[0]} and {size[1]}: {error}") from None
        return run

    def sample(
        self,
        num_images: int = 16,
        seed: int = 0,
        *,
        height: int | None = None,
        width: int | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
        snapshots_of: str = "x",
        **options: Any,
    ) -> np.ndarray:
        """Images 0 .. num_images - 1 of a seed; each depends on the seed, its number and the settings alone.

        Args:
          num_images, seed: how many of which seed.
          height, width: of the images; None: the run's. See `at`, which gives the other methods another size.
          indices: the images' numbers, in the place of num_images.
          batch_size: images at a time; None: the config's.
          progress: told (network calls done, calls in all).
          watch, snapshots_of: told of each batch as `ddpm_jax.sample` says.
          options: labels, the classes of a class-conditional run, or prompts, of a run that learned from captions,
            repeated as needed (without them every class, or captions of the data set, come in turn);
            negative_prompts, which guidance leads away from; and in place of the config's: sampler, num_steps, spacing,
            spacing_offset, skip_lowest, stop_at_first, levels, fractional, scaled_start, timesteps, eta, order, clip,
            clip_range, dynamic_threshold, threshold_limit (see `ddpm_jax.sample`), x_0_mse [T] (see
            `ddpm_jax.diffusion.tables.ddpm`), guidance_scale, guidance_rescale, guidance_interval (see `guided`).

        Returns:
          uint8 [num_images, H, W, C].

        Raises:
          UserError: a count or option that does not exist or does not fit.
        """
        observer = Observer(progress, watch, snapshots_of=snapshots_of)
        return self.at(height, width)._generate(num_images, seed, indices, batch_size, observer, options)[0]

    def upscale(
        self,
        pictures: np.ndarray,
        seed: int = 0,
        *,
        batch_size: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Enlarges pictures, uint8 [N, H, W, C], of a run that was trained to (config.upscale).

        Args:
          pictures: uint8 [N, h, w, C], of the size that the run enlarges; see `low_resolution_pictures`.
          seed: picture i's noise depends on the seed and i.
          batch_size, progress, options: as in `sample`.
        """
        given = self._given()
        inputs = Inputs(given.check(pictures))
        numbers = range(len(inputs.values))
        return self._generated(self.request(**options), numbers, seed, batch_size, Observer(progress), inputs)[0]

    def variations(
        self, pictures: np.ndarray, seed: int = 0, *, progress: Progress | None = None, **options: Any
    ) -> np.ndarray:
        """Other pictures with the image embeddings of these, uint8 [N, H, W, C] (DALL-E 2, section 3.1).

        Args:
          pictures: uint8 [N, H, W, C].
          seed, progress, options: as in `sample`; without prompts, the network is told the embedding alone.
        """
        return self.of_embeddings(self.embedder.of_pictures(pictures), seed, progress=progress, **options)

    def blend(
        self,
        first: np.ndarray,
        second: np.ndarray,
        weights: Sequence[float] = tuple(np.linspace(0, 1, 11)),
        seed: int = 0,
        *,
        progress: Progress | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Pictures along the arc between two pictures' embeddings, uint8 [len(weights), H, W, C] (DALL-E 2, section
        3.2); all share their noise.

        Args:
          first, second: uint8 [H, W, C].
          weights: of the second, 0 to 1.
          seed, progress, options: as in `variations`.
        """
        ends = self.embedder.of_pictures(np.stack([first, second]))
        between = np.asarray(editing.slerp(jax.numpy.asarray(ends[0]), jax.numpy.asarray(ends[1]), weights))
        return self.of_embeddings(between, seed, same_noise=True, progress=progress, **options)

    def text_difference(
        self,
        picture: np.ndarray,
        caption: str,
        target: str,
        weights: Sequence[float] = (0.0, 0.25, 0.5),
        seed: int = 0,
        *,
        progress: Progress | None = None,
        **options: Any,
    ) -> np.ndarray:
        """A picture moved by what one caption has over another, uint8 [len(weights), H, W, C] (DALL-E 2, section 3.3);
        all share their noise.

        Args:
          picture: uint8 [H, W, C].
          caption: of the picture.
          target: a caption of what it shall become.
          weights: how far its embedding is turned towards the difference of both captions' embeddings, 0 to 1.
          seed, progress, options: as in `variations`.
        """
        old, new = self.embedder.of_texts([caption, target])
        length = np.linalg.norm(new - old)
        if not length > 0:
            raise UserError(f"the captions {caption!r} and {target!r} have one embedding; accepted: different ones")
        (start,) = self.embedder.of_pictures(picture[None])
        difference = (new - old) * (np.linalg.norm(start) / length)
        turned = editing.slerp(jax.numpy.asarray(start), jax.numpy.asarray(difference), weights)
        return self.of_embeddings(np.asarray(turned), seed, same_noise=True, progress=progress, **options)

    @property
    def embedder(self) -> Embedder:
        """The CLIP of a run that is given image embeddings."""
        if not isinstance(self.model.given, ImageEmbedding):
            raise UserError("this run is given no image embedding; accepted: one that was trained with embedding.clip")
        return self.model.given.embedder

    def of_embeddings(
        self,
        embeddings: np.ndarray,
        seed: int = 0,
        *,
        same_noise: bool = False,
        batch_size: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Pictures of CLIP's image embeddings, uint8 [N, H, W, C].

        Args:
          embeddings: float32 [N, D].
          seed, batch_size, progress, options: as in `sample`; without prompts, the network is told the embedding alone.
          same_noise: all are drawn from the noise of image 0.
        """
        request = self.request(**options)
        values = np.asarray(embeddings, np.float32)[:, None, None]
        said = None if request.condition.is_said else request.condition.null(len(values))
        numbers = [0] * len(values) if same_noise else range(len(values))
        return self._generated(request, numbers, seed, batch_size, Observer(progress), Inputs(values, said))[0]

    def low_resolution_pictures(self, *names: str | Path) -> np.ndarray:
        """uint8 [N, h, w, C] of picture files, as `upscale` takes them; see `pictures`."""
        return np.stack([_opened(name, Fit(*self._given().shape)) for name in names])

    def _given(self) -> LowResolution:
        given = self.model.given
        if not isinstance(given, LowResolution):
            raise UserError("this run enlarges no pictures; accepted: one that was trained with config.upscale")
        return given

    def progressive(
        self,
        num_images: int = 8,
        seed: int = 0,
        *,
        num_stages: int = 10,
        of: str = "x_0",
        progress: Progress | None = None,
        **options: Any,
    ) -> np.ndarray:
        """The way from noise to image in `num_stages`, uint8 [num_stages, num_images, H, W, C] (DDPM, figure 6).

        Args:
          num_images, seed, progress: as in `sample`; all images are one batch.
          num_stages: evenly spaced over the network's calls, the last the result; at most as many as there are calls.
          of: "x_0", what the network takes the image for, or "x", the image with its noise.
          options: as in `sample`.
        """
        observer = Observer(progress, num_snapshots=num_stages, snapshots_of=of)
        stages = self._generate(num_images, seed, None, num_images, observer, options)[1]
        assert stages is not None
        return stages[:, :num_images]

    def between(
        self,
        num_images: int = 1,
        seed: int = 0,
        weights: Sequence[float] = tuple(np.linspace(0, 1, 11)),
        *,
        batch_size: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> np.ndarray:
        """From one prompt or class to another on the same noise, uint8 [num_images, len(weights), H, W, C].

        Args:
          num_images, seed, batch_size, progress: as in `sample`; at a weight of 0 or 1 the images are those of `sample`
            with the first or the second alone.
          weights: of the second, 0 to 1; see `ddpm_jax.diffusion.guidance.between`.
          options: as in `sample`; prompts, or labels, are two.
        """
        request = self.request(**options)
        if request.condition.rows != 2:
            raise UserError(f"{request.condition.rows} prompts or classes are given; accepted: two")
        if not len(weights) or num_images < 1:
            raise UserError(
                f"{num_images} images at {len(weights)} weights are asked for; at least 1 of each is needed"
            )
        request = dataclasses.replace(request, between=tuple(map(float, weights)))
        count = num_images * len(weights)
        images = self._generated(request, range(count), seed, batch_size, Observer(progress))[0]
        return images.reshape(num_images, len(weights), *self.shape)

    def pictures(self, *names: str | Path) -> np.ndarray:
        """uint8 [N, H, W, C] of pictures, as the edits take them.

        Args:
          names: files, which are scaled to cover the run's size and cropped; or "data:17", the training image of that
            number, counted from 0 in the order of the data set or, in a folder, of the files' names.

        Raises:
          UserError: a picture that cannot be read, or an image that the data set does not have.
        """
        source, found = None, []
        for name in names:
            kind, _, number = str(name).partition(":")
            if kind != "data":
                found.append(_opened(name, Fit(*self.shape)))
                continue
            source = training_images(self.config, self.dataset) if source is None else source
            if not number.isdecimal() or int(number) >= len(source):
                raise UserError(f"{name!r} is no training image; the data set has data:0 to data:{len(source) - 1}")
            found.append(source[int(number)]["image"])
        return np.stack(found) if found else np.zeros((0, *self.shape), np.uint8)

    def vary(
        self,
        pictures: np.ndarray,
        t: int | None = None,
        seed: int = 0,
        *,
        strength: float | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Other pictures like these, uint8 like `pictures`: diffused to t and denoised again.

        Args:
          pictures: uint8 [N, H, W, C].
          t: how far; the larger, the less is kept.
          seed: picture i's noise depends on the seed and i.
          strength: instead of t, the share of the sampling steps to take, above 0 to 1: 0.75 takes 15 of 20, as
            diffusers' image to image does.
          options: batch_size, progress and those of `sample`.
        """
        if (t is None) == (strength is None):
            raise UserError(f"t is {t} and strength is {strength}; accepted: one of the two")
        if strength is not None:
            options["timesteps"] = self._last_timesteps(strength, options)
            options.pop("num_steps", None)  # which they follow from
            t = int(options["timesteps"][0])
        assert t is not None
        return self._edit(functools.partial(editing.vary, t=t), pictures, seed, "vary", t=t, **options)

    def denoise(self, pictures: np.ndarray, t: int | None = None, seed: int = 0, **options: Any) -> np.ndarray:
        """Clean pictures of noisy ones, uint8 like `pictures`; see `ddpm_jax.diffusion.editing.denoise`.

        Args:
          pictures: uint8 [N, H, W, C].
          t: of their noise; None: estimated, see `estimate_t`.
          seed, options: as in `vary`.
        """
        t = self.estimate_t(pictures) if t is None else t
        return self._edit(functools.partial(editing.denoise, t=t), pictures, seed, "denoise", t=t, **options)

    def estimate_t(self, pictures: np.ndarray) -> int:
        """The timestep whose noise is as strong as that in the pictures, uint8 [N, H, W, C]."""
        sigma = editing.estimate_sigma(self.model.decoder.encode(self._check(pictures)))
        return editing.nearest_timestep(self.schedule, sigma)

    def inpaint(
        self,
        pictures: np.ndarray,
        mask: np.ndarray,
        seed: int = 0,
        *,
        jump: int | None = None,
        times: int | None = None,
        fixed_noise: bool = False,
        batch_size: int | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
        snapshots_of: str = "x",
        **options: Any,
    ) -> np.ndarray:
        """Paints anew where the mask is true, uint8 like `pictures`; the rest stays as it is, to the bit.

        A run whose network is given the masked picture (model.masked_picture) samples what is under the mask from
        noise. Any other has the rest restored before each step (RePaint).

        Args:
          pictures: uint8 [N, H, W, C].
          mask: bool [H, W], or one a picture, [N, H, W].
          jump, times: of RePaint's resampling, see `ddpm_jax.diffusion.editing.inpaint`; None: 10 and 1.
          fixed_noise: instead of RePaint's noise of its own at each step, the known part has the noise that sampling
            starts from at all steps, as in diffusers.
          seed: picture i's noise depends on the seed and i.
          batch_size, progress, watch, snapshots_of, options: as in `sample`.
        """
        pictures, mask = self._check(pictures), np.asarray(mask, bool)
        if mask.shape not in (pictures.shape[1:3], pictures.shape[:3]):
            raise UserError(f"the mask has shape {mask.shape}; accepted: {pictures.shape[1:3]} or {pictures.shape[:3]}")
        masks = np.broadcast_to(mask, pictures.shape[:3])[..., None]
        if isinstance(self.model.given, MaskedPicture):
            for name, value in {"jump": jump, "times": times, "fixed_noise": fixed_noise or None}.items():
                if value is not None:
                    raise UserError(
                        f"{name} is {value}, which is for networks that are not given the picture, as this run's is; "
                        f"accepted: no {name}"
                    )
            assert isinstance(self.model.decoder, Latents)
            inputs = Inputs(self.model.given.of_pictures(self.model.decoder, pictures, masks))
            request, observer = self.request(**options), Observer(progress, watch, snapshots_of=snapshots_of)
            found = self._generated(request, range(len(pictures)), seed, batch_size, observer, inputs)[0]
            return np.where(masks, found, pictures)

        def paint(schedule: Schedule, model_fn: Any, keys: jax.Array, x_0: jax.Array, *rest: Any, **said: Any) -> Any:
            noise = normal(fold_in(keys, 0), x_0.shape) if fixed_noise else None  # 0: as where no noise is given
            said |= {"jump": 10 if jump is None else jump, "times": 1 if times is None else times, "known_noise": noise}
            return editing.inpaint(schedule, model_fn, keys, x_0, *rest, **said)

        options |= {"batch_size": batch_size, "progress": progress, "watch": watch, "snapshots_of": snapshots_of}
        found = self._edit(paint, pictures, seed, "inpaint", self.model.decoder.encode_mask(masks), **options)
        return np.where(masks, found, pictures)

    def interpolate(
        self,
        first: np.ndarray,
        second: np.ndarray,
        weights: Sequence[float] = tuple(np.linspace(0, 1, 11)),
        t: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> np.ndarray:
        """From one picture to another, uint8 [len(weights), H, W, C] (DDPM, section 4.3 and figure 8).

        Args:
          first, second: uint8 [H, W, C].
          weights: of the second, 0 to 1.
          t: how far both are diffused; None: half of the timesteps.
          seed: of the noise, which all share.
          options: of `sample`.
        """
        ends = self._ends(first, second)
        t = self.schedule.num_timesteps // 2 if t is None else t
        mix = functools.partial(
            editing.interpolate, key=named_key(seed, "interpolate"), x_0=ends[0], other=ends[1], weights=weights, t=t
        )
        return self._call(mix, np.arange(len(weights)), t=t, **options)

    def interpolate_latents(
        self,
        first: np.ndarray,
        second: np.ndarray,
        weights: Sequence[float] = tuple(np.linspace(0, 1, 11)),
        num_steps: int | None = None,
        spacing: str | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> np.ndarray:
        """From one picture to another along the arc between the noises that deterministic DDIM makes them of, uint8
        [len(weights), H, W, C] (DDIM, section 5.3).

        Args:
          first, second: uint8 [H, W, C].
          weights: of the second, 0 to 1.
          num_steps, spacing: of both ways; None: the config's.
          progress: as in `sample`; of both ways.
          watch: as in `sample`; of the way from the noises.
        """

        self._ends(first, second)
        noise = self.encode(np.stack([first, second]), num_steps, spacing, part_of(progress, 0, 2))
        x_t = np.asarray(editing.slerp(noise[0], noise[1], weights))
        return self.decode(x_t, num_steps, spacing, part_of(progress, 1, 2), watch)

    def encode(
        self,
        pictures: np.ndarray,
        num_steps: int | None = None,
        spacing: str | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """The noises that deterministic DDIM makes these pictures of, float32 like `pictures`; see
        `ddpm_jax.diffusion.editing.encode`. `decode` makes pictures of them.

        Args:
          pictures: uint8 [N, H, W, C].
          num_steps, spacing: of the way; None: the config's.
          progress: as in `sample`.
        """
        self.model.check_alone()
        x_0 = self.model.decoder.encode(self._check(pictures))
        request = self.request(**deterministic(num_steps, spacing))
        if request.guidance.is_on:
            request.condition.require()
        model_fn = self.model.model_fn(self.params, request.condition.null(len(x_0)))
        of_steps = ("num_steps", "spacing", "spacing_offset", "skip_lowest", "stop_at_first", "levels", "fractional")
        way = {name: request.keywords()[name] for name in (*of_steps, "prediction", "variance")}
        way["spacing"] = way["spacing"] or DEFAULT_SPACING["ddim"]
        try:
            return parallel.to_host(editing.encode(self.schedule, model_fn, x_0, progress=progress, **way))
        except ValueError as error:
            raise UserError(str(error)) from None

    def decode(
        self,
        noise: np.ndarray,
        num_steps: int | None = None,
        spacing: str | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> np.ndarray:
        """The pictures that deterministic DDIM makes of noises, uint8 [N, H, W, C].

        Args:
          noise: float32 [N, H, W, C], such as `encode` gives.
          num_steps, spacing: of the way; None: the config's.
          progress, watch: as in `sample`.
        """
        shape = self.model.decoder.shape
        if np.shape(noise)[1:] != shape:
            raise UserError(f"the noise has shape {np.shape(noise)}; accepted: (N, {', '.join(map(str, shape))})")

        def draw(schedule: Schedule, model_fn: Any, **rest: Any) -> jax.Array:
            x_t = jax.numpy.asarray(noise, jax.numpy.float32)
            return sample(schedule, model_fn, jax.random.key(0), x_t.shape, x_t=x_t, **rest)

        way = deterministic(num_steps, spacing)
        return self._call(draw, np.arange(len(noise)), progress=progress, watch=watch, **way)

    def coarse_to_fine(self, num_images: int, t: int, seed: int = 0, **options: Any) -> np.ndarray:
        """Images that share their x_t, uint8 [num_images, H, W, C] (DDPM, figure 7).

        Args:
          num_images, seed: how many, of which seed.
          t: of the shared x_t: the larger, the less they have in common.
          options: of `sample`.
        """
        shape = (num_images, *self.model.decoder.shape)
        split = functools.partial(editing.coarse_to_fine, key=named_key(seed, "coarse to fine"), shape=shape, t=t)
        return self._call(split, np.arange(num_images), **options)

    def calls(self, **options: Any) -> int:
        """How often `sample` calls the network for an image, with these of its options."""
        request = self.request(**options)
        try:
            return request.candidates * len(request.steps.table(self.schedule, request.output.variance).t)
        except ValueError as error:
            raise UserError(str(error)) from None

    def settings(self, *, seed: int, batch_size: int | None = None, **options: Any) -> dict[str, Any]:
        """All that decides what `sample` makes of an image's number, as JSON values."""
        weights = 0
        for leaf in jax.tree.leaves(self.params):
            weights = zlib.crc32(parallel.to_host(leaf).tobytes(), weights)
        request = self.request(**options)
        height, width, _ = self.shape
        is_own_size = (height, width) == (self.config.data.height, self.config.data.width)
        return {
            "step": self.step,
            "ema_decay": self.ema_decay,
            "weights_crc32": weights,
            "seed": seed,
            **({} if is_own_size else {"size": [height, width]}),
            **request.condition.settings(),
            "batch_size": batch_size or self.config.sample.batch_size,
            **request.settings(),
            **(self.model.given.settings() if self.model.given else {}),
            **({"loras": [file.settings() for file in self.loras]} if self.loras else {}),
        }

    def request(self, **options: Any) -> Request:
        """What these options of `sample` ask for; one that is None, or not there, is the config's.

        Raises:
          UserError: an option that does not exist or does not fit.
        """
        for name in options:
            if name not in _OPTIONS:
                known = (*_OPTIONS, *inspect.signature(self.sample).parameters)
                raise UserError(f"a run has no option {name!r}.{nearest(name, known)}")
        given = {name: value for name, value in options.items() if value is not None}
        for name in ("guidance_scale", "num_steps"):
            if isinstance(given.get(name), list):
                raise UserError(f"{name} has {len(given[name])} values; accepted for a single run: one")
        request = config_lib.sampling_request(self.config, self.condition)
        steps, output, guidance = request.steps, request.output, request.guidance
        if given.get("sampler", steps.sampler) != steps.sampler:
            steps = dataclasses.replace(steps, eta=None, order=None, skip_lowest=False)  # of the other sampler
        if given.get("spacing", steps.spacing) != steps.spacing:
            steps = dataclasses.replace(  # of the other spacing
                steps, spacing_offset=0, skip_lowest=False, levels=None, fractional=False, scaled_start=False
            )
        if "timesteps" in given:
            steps = dataclasses.replace(steps, num_steps=None, levels=None, fractional=False)
        if "clip" in given:
            output = dataclasses.replace(output, dynamic_threshold=None)
        steps, output = (_replaced(part, given) for part in (steps, output))
        # 0 is off, as in a config.
        steps = dataclasses.replace(steps, order=steps.order or None)
        output = dataclasses.replace(
            output,
            dynamic_threshold=output.dynamic_threshold or None,
            threshold_limit=output.threshold_limit or None,
        )
        of_guidance = {name.removeprefix("guidance_"): given[name] for name in _GUIDANCE & given.keys()}
        guidance = _replaced(guidance, of_guidance)
        said = {name: given[name] for name in condition_lib.KEYWORDS if name in given}
        condition = self.condition.say(**said)
        check_guidance(condition, guidance)
        return dataclasses.replace(request, condition=condition, steps=steps, output=output, guidance=guidance)

    def _last_timesteps(self, strength: float, options: Mapping[str, Any]) -> np.ndarray:
        """Of the timesteps that sampling with these options takes, the lowest share that `strength` names."""
        if not 0 < strength <= 1:
            raise UserError(f"strength is {strength}; accepted: above 0 to 1")
        steps = self.request(**{name: options[name] for name in _OPTIONS if name in options}).steps
        try:
            # Only timesteps themselves can be taken from; levels between them are left aside.
            timesteps = dataclasses.replace(steps, levels=None, fractional=False).levels_of(self.schedule).t[:-1]
        except ValueError as error:
            raise UserError(str(error)) from None
        count = int(len(timesteps) * strength)
        if not count:
            raise UserError(f"strength is {strength}, which leaves none of {len(timesteps)} steps")
        return timesteps[-count:]

    def _ends(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        for picture in (first, second):
            if np.shape(picture) != self.shape:
                raise UserError(
                    f"a picture has shape {np.shape(picture)}; accepted: {self.shape} for each end, such as "
                    "run.pictures(...)[0]"
                )
        return self.model.decoder.encode(self._check(np.stack([first, second])))

    def _check(self, pictures: np.ndarray) -> np.ndarray:
        pictures = np.asarray(pictures)
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1:] != self.shape:
            raise UserError(
                f"the pictures are {pictures.dtype} of shape {pictures.shape}; accepted: uint8 of shape "
                f"(N, {', '.join(map(str, self.shape))})"
            )
        return pictures

    def _generate(
        self,
        num_images: int,
        seed: int,
        indices: Sequence[int] | None,
        batch_size: int | None,
        observer: Observer,
        options: Mapping[str, Any],
    ) -> tuple[np.ndarray, np.ndarray | None]:
        indices = range(num_images) if indices is None else indices
        if not len(indices):
            raise UserError(f"the number of images is {len(indices)}; at least 1 is needed")
        return self._generated(self.request(**options), indices, seed, batch_size, observer)

    def _inputs(self, request: Request, indices: Sequence[int]) -> Inputs | None:
        """What the images of these numbers are given where nobody gives anything, made of training images."""
        if self.model.given is None:
            return None
        if self.model.given.needs:
            raise UserError(self.model.given.needs)
        return from_examples(self.model.given, request.condition, training_images(self.config, self.dataset), indices)

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
        inputs = self._inputs(request, indices) if inputs is None else inputs
        try:
            return generate(
                self.model,
                self.params,
                self.mesh,
                request,
                indices=indices,
                seed=seed,
                batch_size=batch_size or self.config.sample.batch_size,
                observer=observer,
                given=inputs,
                purpose=purpose,
            )
        except ValueError as error:
            raise UserError(str(error)) from None

    def _call(
        self,
        function: Callable[..., jax.Array],
        numbers: np.ndarray,
        t: int | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
        snapshots_of: str = "x",
        **options: Any,
    ) -> np.ndarray:
        """uint8 of function(schedule, model_fn, **sampling options), whose batch has images of these numbers.

        Where sampling starts from t, num_steps are at most the timesteps from there.
        """
        self.model.check_alone()
        request = self.request(**options)
        condition, guidance = request.condition, request.guidance
        if guidance.is_on:
            condition.require()
        null = condition.null(len(numbers)) if guidance.is_on or not condition.is_said else None
        cond = condition.of_images(numbers) if condition.is_said else null
        keywords = request.keywords()
        if t is not None and keywords["num_steps"]:
            keywords["num_steps"] = min(keywords["num_steps"], t + 1)
        keywords |= {"progress": progress, "watch": watch, "snapshots_of": snapshots_of}
        try:
            model_fn = self.model.model_fn(self.params, cond, null, guidance)
            return self.model.decoder.decode(function(self.schedule, model_fn, **keywords))
        except ValueError as error:
            raise UserError(str(error)) from None

    def _edit(
        self,
        function: Callable[..., jax.Array],
        pictures: np.ndarray,
        seed: int,
        purpose: str,
        *per_picture: np.ndarray,
        batch_size: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """function(schedule, model_fn, keys, x_0, ...) of all pictures, in batches divided over the devices."""
        x_0 = self.model.decoder.encode(self._check(pictures))
        size = parallel.rounded(min(batch_size or self.config.sample.batch_size, len(x_0)), self.mesh)
        place = functools.partial(parallel.place, sharding=parallel.batch_sharding(self.mesh))
        done = []
        for first in range(0, len(x_0), size):
            chosen = np.resize(np.arange(first, min(first + size, len(x_0))), size)
            keys = image_keys(self.mesh, seed, purpose, chosen)
            arrays = [place(array[chosen]) for array in (x_0, *per_picture)]

            def edit(schedule: Schedule, model_fn: Any, **rest: Any) -> jax.Array:
                return function(schedule, model_fn, keys, *arrays, **rest)  # noqa: B023

            done.append(self._call(edit, chosen, **options))
        return np.concatenate(done)[: len(x_0)]


def _opened(name: str | Path, fit: Fit) -> np.ndarray:
    try:
        return open_picture(Path(name).expanduser(), fit)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"{str(name)!r} cannot be read as a picture: {reason(error)}") from None


def _replaced(part: Any, given: Mapping[str, Any]) -> Any:
    """The dataclass with those of its fields that are given."""
    return dataclasses.replace(part, **{f.name: given[f.name] for f in dataclasses.fields(part) if f.name in given})


def deterministic(num_steps: int | None = None, spacing: str | None = None) -> dict[str, Any]:
    """The options of `Run.sample` for the ways between pictures and noises."""
    return {"sampler": "ddim", "eta": 0.0, "clip": False, "num_steps": num_steps, "spacing": spacing}


def open_run(
    path: str | Path,
    step: int | None = None,
    ema_decay: float | None = None,
    raw: bool = False,
    dtype: str | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
) -> Run:
    """Opens the workdir of a single run: restores a checkpoint's weights onto this machine's devices.

    Args:
      path: the workdir.
      step: of the checkpoint; None: the newest that can be read.
      ema_decay: which moving average; None: the first of the config's.
      raw: the weights as trained instead of an average.
      dtype: "float32" or "bfloat16", of the weights in memory and of the network's arithmetic; None: float32 weights,
        and the arithmetic of config.model.dtype.
      loras: LoRA files and the weight of each, usually 1, for a Stable Diffusion; they are added to the network and to
        the text encoder.

    Raises:
      UserError: no run there, no such checkpoint, or no such average; a LoRA that does not fit.
    """
    config, dataset = workdir.read_config(path), workdir.read_dataset(path)
    if dtype is not None:
        config.model.dtype = dtype
    validate(config, dataset=dataset)
    if config.train.objective == "autoencoder":
        raise UserError(
            f"{str(path)!r} holds an autoencoder, which makes no pictures by itself; accepted: a run whose "
            "autoencoder.source it is, or ddpm_jax.load_autoencoder"
        )
    if config.train.objective == "clip":
        raise UserError(
            f"{str(path)!r} holds a CLIP, which makes no pictures; accepted: a run whose text.encoder it is, or "
            "ddpm_jax.load_clip"
        )
    decays = config.train.ema_decays
    ema_decay = None if raw else decays[0] if ema_decay is None else ema_decay
    if ema_decay is not None and ema_decay not in decays:
        raise UserError(f"this run has no average of decay {ema_decay}; it has {', '.join(map(str, decays))}")
    if dataset is None:
        raise UserError(f"{str(path)!r} has no checkpoint yet")
    model = config_lib.make_model(config, dataset, dtype)
    devices, fsdp = jax.device_count(), config.mesh.fsdp
    mesh = parallel.make_mesh(fsdp=devices if fsdp == -1 else math.gcd(fsdp, devices))
    folder, shapes = Path(path).expanduser(), model.param_shapes()
    part = _part(dataset, ema_decay)
    if config.lora.rank:
        _, base = _restored(folder / workdir.BASE, None, "params", shapes, mesh, dtype)
        found, adapted = _restored(folder, step, part, _adapter_shapes(config, shapes), mesh, None)
        params = jax.jit(lora.merge, donate_argnums=0)(base, adapted, config_lib.lora_scale(config))
        if config.lora.text_encoder:
            model, params = _with_texts_frozen(config, dataset, model, params)
    else:
        found, params = _restored(folder, step, part, shapes, mesh, dtype)
    model, added = adapters_lib.add(loras, dataset, model, params) if loras else (model, ())
    return Run(config, dataset, found, ema_decay, model, params, mesh, added)


def load_adapters(run: Run, path: str | Path) -> Any:
    """The adapters that a run of lora.rank above 0 trained, which `load` added to its weights.

    Args:
      run: of `load`.
      path: its workdir.
    """
    folder, part = Path(path).expanduser(), _part(run.dataset, run.ema_decay)
    shapes = config_lib.make_model(run.config, run.dataset).param_shapes()
    return _restored(folder, run.step, part, _adapter_shapes(run.config, shapes), run.mesh, None)[1]


def _with_texts_frozen(
    config: ConfigDict, dataset: Mapping[str, Any], model: Model, params: Mapping[str, Any]
) -> tuple[Model, Any]:
    """A model whose text encoder was adapted along with the network, as one whose encoder is frozen in this state."""
    encoder = jax.tree.map(parallel.to_host, params["encoder"])
    config = config.copy_and_resolve_references()
    config.lora.text_encoder = False
    condition = config_lib.make_condition(config, dataset)
    assert isinstance(condition, CaptionCondition)
    assert isinstance(condition.texts, FrozenTexts)
    texts = dataclasses.replace(condition.texts, open_params=lambda: jax.tree.map(np.asarray, encoder))
    condition = dataclasses.replace(condition, texts=texts)
    net = config_lib.make_network(config, condition)
    return dataclasses.replace(model, condition=condition, net=net), params["net"]


def _part(dataset: Mapping[str, Any], ema_decay: float | None) -> str:
    """Which weights of a checkpoint; of imported ones there is no average, or it is the same."""
    return "params" if ema_decay is None or "imported" in dataset else f"ema_{ema_decay}"


def _adapter_shapes(config: ConfigDict, shapes: Any) -> Any:
    return jax.eval_shape(lambda: lora.init(shapes, config.lora.rank, jax.random.key(0)))


def _restored(folder: Path, step: int | None, part: str, shapes: Any, mesh: Mesh, dtype: str | None) -> tuple[int, Any]:
    """The step and the weights of a checkpoint, on the mesh and in the dtype; None: as they are."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), shapes)
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        return checkpoints.restore_weights(step, part, parallel.laid(shapes, parallel.state_shardings(mesh, shapes)))
    finally:
        checkpoints.close()
