"""The attributes of a run, and the methods that draw images from noise."""

import dataclasses
import inspect
import zlib
from collections.abc import Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.data.dataset import training_images
from ddpm_jax.diffusion.samplers import Observer, Progress, Watch
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.interop.diffusers.adapters import LoraFile
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.errors import UserError, as_user_errors
from ddpm_jax.sampling.condition import Condition
from ddpm_jax.sampling.generate import Model, Request, generate
from ddpm_jax.sampling.given import Inputs, from_examples
from ddpm_jax.sampling.options import with_options


@dataclasses.dataclass(frozen=True, repr=False)
class SamplingRun:
    """The part of `ddpm_jax.run.Run` that draws images from noise, with the attributes of the whole."""

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
        """The condition: nothing, classes or captions."""
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
        """(x_t, t) -> the network's output with the null condition, for the functions of `ddpm_jax.diffusion`."""
        return self.model.model_fn_of_null(self.params)

    @property
    def weights(self) -> str:
        """Which weights these are, in words."""
        which = "raw weights" if self.ema_decay is None else f"EMA {self.ema_decay}"
        return ", ".join([f"step {self.step}", which, *(f"LoRA {file.name} at {file.weight:g}" for file in self.loras)])

    def at(self, height: int | None = None, width: int | None = None) -> Self:
        """The same run for pictures of a different size; None: the run's own.

        Raises:
          UserError: a size that the decoder or the network does not support.
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
          num_images, seed: how many images of which seed.
          height, width: of the images; None: the run's own. `at` sets the size for the other methods.
          indices: the images' numbers, instead of num_images.
          batch_size: images at a time; None: the config's.
          progress: called with (network calls done, all calls).
          watch, snapshots_of: as in `ddpm_jax.sample`, for each batch.
          options: labels of a class-conditional run, or prompts of a text-conditional one, repeated as needed (the
            default takes the classes, or captions of the training set, in turn); negative_prompts for guidance; and
            these, which replace the config's: sampler, num_steps, spacing, spacing_offset, skip_lowest, stop_at_first,
            levels, fractional, scaled_start, timesteps, eta, order, clip, clip_range, dynamic_threshold,
            threshold_limit (see `ddpm_jax.sample`), x_0_mse [T] (see `ddpm_jax.diffusion.tables.ddpm`),
            guidance_scale, guidance_rescale, guidance_interval (see `guided`).

        Returns:
          uint8 [num_images, H, W, C].

        Raises:
          UserError: a count or option that does not exist or does not fit.
        """
        observer = Observer(progress, watch, snapshots_of=snapshots_of)
        run, numbers = self.at(height, width), _at_least_one(range(num_images) if indices is None else indices)
        return run._generated(run.request(**options), numbers, seed, batch_size, observer)[0]

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
        """Shows the way from noise to image in `num_stages`, uint8 [num_stages, num_images, H, W, C] (DDPM, figure 6).

        Args:
          num_images, seed, progress: as in `sample`; all images are one batch.
          num_stages: evenly spaced over the network's calls, at most one for each; the last is the result.
          of: "x_0", the predicted image, or "x", the noisy one.
          options: as in `sample`.
        """
        observer = Observer(progress, num_snapshots=num_stages, snapshots_of=of)
        numbers = _at_least_one(range(num_images))
        stages = self._generated(self.request(**options), numbers, seed, num_images, observer)[1]
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
        """Interpolates between two prompts or classes with the same noise, uint8 [num_images, len(weights), H, W, C].

        Args:
          num_images, seed, batch_size, progress: as in `sample`; at a weight of 0 or 1 the images are those of `sample`
            with the first or the second alone.
          weights: of the second, 0 to 1; see `ddpm_jax.diffusion.guidance.between`.
          options: as in `sample`, with two prompts or two labels.
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

    def calls(self, **options: Any) -> int:
        """How often `sample` calls the network for an image, with these options."""
        request = self.request(**options)
        with as_user_errors():
            return request.candidates * len(request.steps.table(self.schedule, request.output.variance).t)

    def settings(self, *, seed: int, batch_size: int | None = None, **options: Any) -> dict[str, Any]:
        """Everything that determines the image of a number, as JSON values."""
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
        """The request that these options of `sample` make; an option that is None or missing is the config's.

        Raises:
          UserError: an option that does not exist or does not fit.
        """
        request = config_lib.sampling_request(self.config, self.condition)
        return with_options(request, options, inspect.signature(self.sample).parameters)

    def _inputs(self, request: Request, indices: Sequence[int]) -> Inputs | None:
        """Default inputs for the images with these numbers, from training images; None: the network takes none."""
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
        with as_user_errors():
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


def _at_least_one(numbers: Sequence[int]) -> Sequence[int]:
    if not len(numbers):
        raise UserError(f"the number of images is {len(numbers)}; at least 1 is needed")
    return numbers
