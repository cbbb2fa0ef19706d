"""The further input of some runs, beside the condition: the result of the previous stage, or a picture to inpaint.

A super-resolution run takes a low-resolution picture. In training it is made from the training picture, so the run
needs no other stage; in sampling it comes from another run or from a file. An inpainting run takes a picture and a
mask. This input is a part of a `ddpm_jax.sampling.generate.Model` that most models lack; `ddpm_jax.config.make_given`
makes it from a run's config.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ddpm_jax.data.pictures import Fit
from ddpm_jax.data.pipeline import stacked
from ddpm_jax.data.source import Source
from ddpm_jax.diffusion.gaussian import normal, q_sample
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.runtime import images
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.rng import named_key
from ddpm_jax.sampling.condition import Condition
from ddpm_jax.sampling.decoder import random_flip
from ddpm_jax.sampling.latents import Latents

# How to enlarge pictures: linearly, linearly with the corner pixels aligned, or by the cubic filter of Keys (1981)
# with a = -0.5.
ENLARGING = ("linear", "corners", "cubic")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The further inputs of some images, one row each.

    Attributes:
      values: [N, *shape], see `Given`.
      cond: of each image, which replaces the request's condition; None: the request's.
    """

    values: np.ndarray
    cond: Mapping[str, np.ndarray] | None = None


def from_examples(given: "Given | None", condition: Condition, source: Source, numbers: Sequence[int]) -> Inputs | None:
    """Default inputs for the images with these numbers: training examples, spread over the set.

    Args:
      given: of the model; None: it has no further input.
      condition: of the request; if it is empty, the examples' own condition replaces it.
      source: of the examples.
      numbers: of the images.
    """
    if given is None:
        return None
    golden = 0.5 * (np.sqrt(5.0) - 1.0)  # whose multiples are spread evenly, for any number of images
    places = (np.asarray(numbers) * golden % 1.0 * len(source)).astype(int)
    batch = stacked((source[place] for place in places.tolist()), len(places)) | {"index": places}
    cond = None if condition.is_said else condition.of_batch(condition.read(batch, source))
    return Inputs(given.of_examples(batch), cond)


class Given(Protocol):
    """One kind of further input.

    Attributes:
      shape: of the input of one image.
      reads: the entry of a training batch that it needs, beside "image".
      cond: the entries of the network's `cond` that it becomes, without the batch's axis.
      needs: the error message if only the user can give the input and has not; "": another stage gives it, and
        training images can replace it.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def reads(self) -> Mapping[str, jax.ShapeDtypeStruct]: ...

    @property
    def cond(self) -> Mapping[str, jax.ShapeDtypeStruct]: ...

    @property
    def needs(self) -> str: ...

    def of_size(self, height: int, width: int) -> "Given":
        """The same for images of a different size; raises UserError for a size that is not supported."""
        ...

    def of_examples(self, batch: Mapping[str, Any]) -> np.ndarray:
        """The inputs for a batch of `host_batches`, on the host; in training, the entry `reads`."""
        ...

    def of_training(self, batch: Mapping[str, jax.Array], key: Callable[[str], jax.Array]) -> dict[str, jax.Array]:
        """The entries of `cond` for a training batch, on the devices; `key` gives the step's key for a purpose."""
        ...

    def check(self, values: Any) -> np.ndarray:
        """The inputs of some images; UserError for a different shape or type."""
        ...

    def of_images(self, values: np.ndarray, seed: int, numbers: np.ndarray) -> dict[str, Any]:
        """The entries of `cond` for the images with these numbers, from their inputs and the seed's noise."""
        ...

    def null(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        """The entries for the null side of guidance; the same as `cond` if the input is never dropped."""
        ...

    def settings(self) -> dict[str, Any]:
        """The settings of sampling, as JSON values."""
        ...


@dataclasses.dataclass(frozen=True)
class LowResolution:
    """A low-resolution picture, enlarged and noised, for super-resolution runs (Ho et al. 2022, Cascaded
    Diffusion Models; Saharia et al. 2022, Imagen).

    Noise conditioning augmentation: the enlarged picture is diffused to a level that the network gets as an input; the
    level is random in training and fixed in sampling. The network therefore learns how far to trust the picture, and
    corrects the errors of the previous stage.

    Attributes:
      shape: (h, w, C) of the low-resolution pictures.
      picture_shape: (H, W, C) of the enlarged ones.
      schedule: its timesteps are the levels.
      most: training draws the level from this share of the timesteps; 0: no noise and no level.
      level: the level of sampling, as a share of the timesteps, at most `most`.
      flip: whether training mirrors half of the images, like the decoder.
      enlarging: one of `ENLARGING`.
    """

    shape: tuple[int, int, int]
    picture_shape: tuple[int, int, int]
    schedule: Schedule
    most: float
    level: float
    flip: bool = False
    enlarging: str = "linear"
    needs: ClassVar[str] = ""

    @property
    def reads(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {"low_resolution": jax.ShapeDtypeStruct(self.shape, jnp.uint8)}

    @property
    def cond(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        image = {"image": jax.ShapeDtypeStruct(self.picture_shape, jnp.float32)}
        return image | ({"level": jax.ShapeDtypeStruct((), jnp.int32)} if self.most else {})

    def of_size(self, height: int, width: int) -> "LowResolution":
        small = [self.shape[axis] * side / self.picture_shape[axis] for axis, side in enumerate((height, width))]
        if not all(side.is_integer() and side >= 1 for side in small):
            old, new = (f"{side[0]}x{side[1]}" for side in (self.picture_shape, (height, width)))
            raise UserError(
                f"height and width are {new}; this run enlarges {self.shape[0]}x{self.shape[1]} to {old}; accepted: "
                "sizes that this factor divides into whole numbers of pixels"
            )
        channels = self.shape[-1]
        shape = (int(small[0]), int(small[1]), channels)
        return dataclasses.replace(self, shape=shape, picture_shape=(height, width, channels))

    def of_examples(self, batch: Mapping[str, Any]) -> np.ndarray:
        """The pictures as in the training set of a run of that size."""
        fit = Fit(*self.shape)
        grey = batch["image"].shape[-1] == 1
        return np.stack([fit(Image.fromarray(image.squeeze(-1) if grey else image)) for image in batch["image"]])

    def of_training(self, batch: Mapping[str, jax.Array], key: Callable[[str], jax.Array]) -> dict[str, jax.Array]:
        pictures = batch["low_resolution"]
        if self.flip:
            pictures = random_flip(key("flip"), pictures)
        most = self._timestep(self.most) + 1
        level = jax.random.randint(key("augmentation_level"), (len(pictures),), 0, most) if self.most else None
        return _noised(self.schedule, pictures, level, key("augmentation"), self.picture_shape, self.enlarging)

    def check(self, values: Any) -> np.ndarray:
        values = np.asarray(values)
        if values.dtype != np.uint8 or values.ndim != 4 or values.shape[1:] != self.shape:
            raise UserError(
                f"the pictures to enlarge are {values.dtype} of shape {values.shape}; accepted: uint8 of shape "
                f"(N, {', '.join(map(str, self.shape))})"
            )
        return values

    def of_images(self, values: np.ndarray, seed: int, numbers: np.ndarray) -> dict[str, Any]:
        level = np.full(len(values), self._timestep(self.level), np.int32) if self.most else None
        arrays = (self.schedule, values, level, np.uint32(seed), np.asarray(numbers, np.int32))
        return jax.tree.map(np.asarray, _noised_by_number(*arrays, shape=self.picture_shape, how=self.enlarging))

    def null(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        return dict(cond)

    def settings(self) -> dict[str, Any]:
        return {"augmentation": self.level} if self.most else {}

    def _timestep(self, share: float) -> int:
        return round(share * (self.schedule.num_timesteps - 1))


@partial(jax.jit, static_argnames=("shape", "how"))
def _noised_by_number(
    schedule: Schedule,
    pictures: jax.Array,
    level: jax.Array | None,
    seed: np.uint32,
    numbers: jax.Array,
    shape: tuple[int, int, int],
    how: str,
) -> dict[str, jax.Array]:
    """`_noised`, with the noise of each picture's number."""
    keys = jax.vmap(lambda number: named_key(seed, "augmentation", number))(numbers)
    return _noised(schedule, pictures, level, keys, shape, how)


def _noised(
    schedule: Schedule,
    pictures: jax.Array,
    level: jax.Array | None,
    key: jax.Array,
    shape: tuple[int, int, int],
    how: str,
) -> dict[str, jax.Array]:
    """The entries of `cond` for uint8 pictures at a level [B]; None: no noise. One key, or one for each picture."""
    enlarged = _enlarged(images.to_float(pictures), (len(pictures), *shape), how)
    if level is None:
        return {"image": enlarged}
    return {"image": q_sample(schedule, enlarged, level, normal(key, enlarged.shape)), "level": level}


def _enlarged(pictures: jax.Array, shape: tuple[int, ...], how: str) -> jax.Array:
    """Pictures [B, h, w, C] at the size of `shape`; see `ENLARGING`."""
    if how != "corners":
        return jax.image.resize(pictures, shape, how, antialias=False)
    scale = jnp.array([(large - 1) / (small - 1) for large, small in zip(shape[1:3], pictures.shape[1:3], strict=True)])
    return jax.image.scale_and_translate(
        pictures, shape, (1, 2), scale, 0.5 * (1 - scale), method="linear", antialias=False
    )


@dataclasses.dataclass(frozen=True)
class MaskedPicture:
    """A picture and a mask, for networks that repaint the part under the mask: Stable Diffusion's for inpainting.

    Beside the latents that it denoises, the network sees the mask at their size and the latents of the picture with
    grey under the mask. It therefore knows at every step what the new part has to fit. Guidance drops neither.

    Attributes:
      latent_shape: (h, w, C) of the latents.
      downscaling: sides of pictures over sides of latents.
    """

    latent_shape: tuple[int, ...]
    downscaling: int
    needs: ClassVar[str] = (
        "this run paints a part of a picture anew, and needs the picture and a mask; accepted: --mode=inpaint with "
        "--input and --mask, or Run.inpaint"
    )

    @property
    def shape(self) -> tuple[int, ...]:
        *size, channels = self.latent_shape
        return (*size, 1 + channels)

    @property
    def reads(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {}

    @property
    def cond(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {"image": jax.ShapeDtypeStruct(self.shape, jnp.float32)}

    def of_size(self, height: int, width: int) -> "MaskedPicture":
        size = height // self.downscaling, width // self.downscaling
        return dataclasses.replace(self, latent_shape=(*size, self.latent_shape[-1]))

    def of_pictures(self, latents: Latents, pictures: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """The inputs for uint8 pictures [N, H, W, C] and bool masks [N, H, W, 1].

        A latent sees the mask at the upper left of its pixels, as in diffusers.
        """
        seen = masks[:, :: self.downscaling, :: self.downscaling].astype(np.float32)
        return np.concatenate([seen, latents.encode_known(pictures, masks)], axis=-1)

    def of_examples(self, batch: Mapping[str, Any]) -> np.ndarray:
        raise UserError(self.needs)

    def of_training(self, batch: Mapping[str, jax.Array], key: Callable[[str], jax.Array]) -> dict[str, jax.Array]:
        raise UserError(self.needs)

    def check(self, values: Any) -> np.ndarray:
        values = np.asarray(values, np.float32)
        if values.shape[1:] != self.shape:
            raise UserError(
                f"the masks and latents have shape {values.shape}; accepted: (N, {', '.join(map(str, self.shape))})"
            )
        return values

    def of_images(self, values: np.ndarray, seed: int, numbers: np.ndarray) -> dict[str, Any]:
        return {"image": values}

    def null(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        return dict(cond)

    def settings(self) -> dict[str, Any]:
        return {}
