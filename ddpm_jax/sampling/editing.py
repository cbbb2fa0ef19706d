"""Edits 8-bit pictures in batches: encodes them, calls `ddpm_jax.diffusion.editing`, and decodes the results."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.diffusion import editing
from ddpm_jax.diffusion.gaussian import fold_in, normal
from ddpm_jax.diffusion.samplers import Observer, sample
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.diffusion.tables import DEFAULT_SPACING
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.errors import UserError, as_user_errors
from ddpm_jax.runtime.rng import named_key
from ddpm_jax.sampling.generate import Model, Request, generate, image_keys
from ddpm_jax.sampling.given import Inputs, MaskedPicture
from ddpm_jax.sampling.latents import Latents

# Options of `ddpm_jax.diffusion.editing.encode` that are steps or output of a request.
_ENCODING = (
    *("num_steps", "spacing", "spacing_offset", "skip_lowest", "stop_at_first", "levels", "fractional"),
    *("prediction", "variance"),
)


def check_pictures(pictures: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The pictures; UserError unless they are uint8 [N, *shape]."""
    pictures = np.asarray(pictures)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1:] != shape:
        raise UserError(
            f"the pictures are {pictures.dtype} of shape {pictures.shape}; accepted: uint8 of shape "
            f"(N, {', '.join(map(str, shape))})"
        )
    return pictures


def check_ends(first: np.ndarray, second: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The two pictures of an interpolation, stacked: uint8 [2, *shape]; UserError for a different shape or type."""
    for picture in (first, second):
        if np.shape(picture) != shape:
            raise UserError(
                f"a picture has shape {np.shape(picture)}; accepted: {shape} for both, such as run.pictures(...)[0]"
            )
    return check_pictures(np.stack([first, second]), shape)


def check_masks(mask: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """bool [N, H, W, 1] from one mask [H, W], or from one for each picture; UserError for a different shape."""
    mask = np.asarray(mask, bool)
    if mask.shape not in (pictures.shape[1:3], pictures.shape[:3]):
        raise UserError(f"the mask has shape {mask.shape}; accepted: {pictures.shape[1:3]} or {pictures.shape[:3]}")
    return np.broadcast_to(mask, pictures.shape[:3])[..., None]


@dataclasses.dataclass(frozen=True)
class Editor:
    """A model that edits pictures by a request. `ddpm_jax.run.Run` documents the edits.

    Attributes:
      model, params: params on every device of the mesh.
      mesh: the devices to divide each batch over.
      request: how to sample.
      batch_size: pictures at a time, rounded up to a multiple of the number of devices.
      observer: of the progress.
    """

    model: Model
    params: Any
    mesh: Mesh
    request: Request
    batch_size: int
    observer: Observer

    def vary(self, pictures: np.ndarray, t: int, seed: int) -> np.ndarray:
        return self._edited(functools.partial(editing.vary, t=t), pictures, seed, "vary", t=t)

    def denoise(self, pictures: np.ndarray, t: int, seed: int) -> np.ndarray:
        return self._edited(functools.partial(editing.denoise, t=t), pictures, seed, "denoise", t=t)

    def inpaint(
        self,
        pictures: np.ndarray,
        mask: np.ndarray,
        seed: int,
        jump: int | None = None,
        times: int | None = None,
        fixed_noise: bool = False,
    ) -> np.ndarray:
        pictures = check_pictures(pictures, self.model.decoder.picture_shape)
        masks = check_masks(mask, pictures)
        if isinstance(self.model.given, MaskedPicture):
            for name, value in {"jump": jump, "times": times, "fixed_noise": fixed_noise or None}.items():
                if value is not None:
                    raise UserError(
                        f"{name} is {value}, but this run's network takes the masked picture as an input, so {name} "
                        "does not apply; leave it out"
                    )
            found = self._painted_as_given(self.model.given, pictures, masks, seed)
        else:
            found = self._repainted(
                pictures, masks, seed, 10 if jump is None else jump, 1 if times is None else times, fixed_noise
            )
        return np.where(masks, found, pictures)

    def _painted_as_given(self, given: MaskedPicture, pictures: np.ndarray, masks: np.ndarray, seed: int) -> np.ndarray:
        """With a network that takes the masked picture as an input."""
        assert isinstance(self.model.decoder, Latents)
        with as_user_errors():
            return generate(
                self.model,
                self.params,
                self.mesh,
                self.request,
                indices=range(len(pictures)),
                seed=seed,
                batch_size=self.batch_size,
                observer=self.observer,
                given=Inputs(given.of_pictures(self.model.decoder, pictures, masks)),
            )[0]

    def _repainted(
        self, pictures: np.ndarray, masks: np.ndarray, seed: int, jump: int, times: int, fixed_noise: bool
    ) -> np.ndarray:
        """With RePaint."""

        def paint(schedule: Schedule, model_fn: Any, keys: jax.Array, x_0: jax.Array, *rest: Any, **said: Any) -> Any:
            noise = normal(fold_in(keys, 0), x_0.shape) if fixed_noise else None  # 0, as in sampling
            said |= {"jump": jump, "times": times, "known_noise": noise}
            return editing.inpaint(schedule, model_fn, keys, x_0, *rest, **said)

        return self._edited(paint, pictures, seed, "inpaint", self.model.decoder.encode_mask(masks))

    def interpolate(
        self, first: np.ndarray, second: np.ndarray, weights: Sequence[float], t: int, seed: int
    ) -> np.ndarray:
        self.model.check_alone()
        ends = self.model.decoder.encode(check_ends(first, second, self.model.decoder.picture_shape))
        mix = functools.partial(
            editing.interpolate, key=named_key(seed, "interpolate"), x_0=ends[0], other=ends[1], weights=weights, t=t
        )
        return self._called(mix, np.arange(len(weights)), t=t)

    def coarse_to_fine(self, num_images: int, t: int, seed: int) -> np.ndarray:
        shape = (num_images, *self.model.decoder.shape)
        split = functools.partial(editing.coarse_to_fine, key=named_key(seed, "coarse to fine"), shape=shape, t=t)
        return self._called(split, np.arange(num_images))

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        self.model.check_alone()
        decoder, request = self.model.decoder, self.request
        x_0 = decoder.encode(check_pictures(pictures, decoder.picture_shape))
        if request.guidance.is_on:
            request.condition.require()
        model_fn = self.model.model_fn(self.params, request.condition.null(len(x_0)))
        way = {name: value for name, value in request.keywords().items() if name in _ENCODING}
        way["spacing"] = way["spacing"] or DEFAULT_SPACING["ddim"]
        with as_user_errors():
            noise = editing.encode(self.model.schedule, model_fn, x_0, progress=self.observer.progress, **way)
            return parallel.to_host(noise)

    def decode(self, noise: np.ndarray) -> np.ndarray:
        shape = self.model.decoder.shape
        if np.shape(noise)[1:] != shape:
            raise UserError(f"the noise has shape {np.shape(noise)}; accepted: (N, {', '.join(map(str, shape))})")

        def draw(schedule: Schedule, model_fn: Any, **rest: Any) -> jax.Array:
            x_t = jnp.asarray(noise, jnp.float32)
            return sample(schedule, model_fn, jax.random.key(0), x_t.shape, x_t=x_t, **rest)

        return self._called(draw, np.arange(len(noise)))

    def _called(self, function: Callable[..., jax.Array], numbers: np.ndarray, t: int | None = None) -> np.ndarray:
        """The pictures, uint8, of function(schedule, model_fn, **options of sample) for images with these numbers.

        If sampling starts from t, it takes at most as many steps as there are timesteps from there.
        """
        self.model.check_alone()
        condition, guidance = self.request.condition, self.request.guidance
        if guidance.is_on:
            condition.require()
        null = condition.null(len(numbers)) if guidance.is_on or not condition.is_said else None
        cond = condition.of_images(numbers) if condition.is_said else null
        keywords = self.request.keywords()
        if t is not None and keywords["num_steps"]:
            keywords["num_steps"] = min(keywords["num_steps"], t + 1)
        keywords |= {name: getattr(self.observer, name) for name in ("progress", "watch", "snapshots_of")}
        with as_user_errors():
            model_fn = self.model.model_fn(self.params, cond, null, guidance)
            return self.model.decoder.decode(function(self.model.schedule, model_fn, **keywords))

    def _edited(
        self,
        function: Callable[..., jax.Array],
        pictures: np.ndarray,
        seed: int,
        purpose: str,
        *per_picture: np.ndarray,
        t: int | None = None,
    ) -> np.ndarray:
        """Calls function(schedule, model_fn, keys, x_0, ...) for all pictures, in batches sharded over the devices."""
        self.model.check_alone()
        x_0 = self.model.decoder.encode(check_pictures(pictures, self.model.decoder.picture_shape))
        size = parallel.rounded(min(self.batch_size, len(x_0)), self.mesh)
        place = functools.partial(parallel.place, sharding=parallel.batch_sharding(self.mesh))
        done = []
        for first in range(0, len(x_0), size):
            chosen = np.resize(np.arange(first, min(first + size, len(x_0))), size)
            keys = image_keys(self.mesh, seed, purpose, chosen)
            arrays = [place(array[chosen]) for array in (x_0, *per_picture)]

            def edit(schedule: Schedule, model_fn: Any, **rest: Any) -> jax.Array:
                return function(schedule, model_fn, keys, *arrays, **rest)  # noqa: B023

            done.append(self._called(edit, chosen, t))
        return np.concatenate(done)[: len(x_0)]
