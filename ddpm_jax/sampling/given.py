"""What a run is given besides its condition: the result of the stage before it in a pipeline, or a picture to mend.

A super-resolution run is given a low-resolution picture. In training it is made from the training picture, so that the
run needs no other stage; in sampling it comes from another run or from a file. An inpainting run is given a picture and
a mask. It is one more part of a `ddpm_jax.sampling.generate.Model`, which most models do without, and is made once from
a run's config (`ddpm_jax.config.make_given`).
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
from ddpm_jax.data.sources import Source
from ddpm_jax.diffusion.gaussian import normal, q_sample
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.runtime import images
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.rng import named_key
from ddpm_jax.sampling.condition import Condition
from ddpm_jax.sampling.decoder import random_flip
from ddpm_jax.sampling.latents import Latents

# How pictures are enlarged: linearly, the same with the corner pixels of both at the same places, or by the cubic
# filter of Keys (1981) with a = -0.5.
ENLARGING = ("linear", "corners", "cubic")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is given for some images, a row each.

    Attributes:
      values: [N, *shape], see `Given`.
      cond: of each image, in the place of what the request says; None: what it says.
    """

    values: np.ndarray
    cond: Mapping[str, np.ndarray] | None = None


def from_examples(given: "Given | None", condition: Condition, source: Source, numbers: Sequence[int]) -> Inputs | None:
    """What the images of these numbers are given where nobody gives anything: training examples, spread over the set.

    Args:
      given: of the model; None: it is given nothing.
      condition: of the request; if nothing is said, that of the examples takes its place.
      source: of the examples.
      numbers: of the images.
    """
    if given is None:
        return None
    golden = 0.5 * (np.sqrt(5.0) - 1.0)  # the multiples of which are spread evenly, however many there are
    places = (np.asarray(numbers) * golden % 1.0 * len(source)).astype(int)
    batch = stacked((source[place] for place in places.tolist()), len(places)) | {"index": places}
    cond = None if condition.is_said else condition.of_batch(condition.read(batch, source))
    return Inputs(given.of_examples(batch), cond)


class Given(Protocol):
    """One kind of what a run is given.

    Attributes:
      shape: of it, for one image.
      reads: the entry of a training batch that it needs, beside "image".
      cond: the entries of the network's `cond` that it becomes, without the batch's axis.
      needs: what is said where nothing is given of what only a person can give; "": another stage gives it, and
        training images stand in for it.
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
        """The same for images of another size; UserError for one that it cannot have."""
        ...

    def of_examples(self, batch: Mapping[str, Any]) -> np.ndarray:
        """What is given for the examples of a batch of `host_batches`, on the host; in training, the entry `reads`."""
        ...

    def of_training(self, batch: Mapping[str, jax.Array], key: Callable[[str], jax.Array]) -> dict[str, jax.Array]:
        """The entries of `cond` for a training batch, on the devices; `key` gives the step's key for a purpose."""
        ...

    def check(self, values: Any) -> np.ndarray:
        """What was given for some images; UserError if it has another shape or type."""
        ...

    def of_images(self, values: np.ndarray, seed: int, numbers: np.ndarray) -> dict[str, Any]:
        """The entries of `cond` for the images of these numbers of a seed, of what is given for each."""
        ...

    def null(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        """The entries that guidance leads away from; they are those of `cond` where it is never left out."""
        ...

    def settings(self) -> dict[str, Any]:
        """What decides how it is used, as JSON values."""
        ...


@dataclasses.dataclass(frozen=True)
class LowResolution:
    """A low-resolution picture, enlarged and noised, for a run that enlarges pictures (Ho et al. 2022, Cascaded
    Diffusion Models; Saharia et al. 2022, Imagen).

    Noise conditioning augmentation: in training the enlarged picture is diffused to a random level, which the network
    is told; in sampling to a chosen one. So the network learns to trust the picture only so far, and mends the faults
    of the stage before it.

    Attributes:
      shape: (h, w, C) of the low-resolution pictures.
      picture_shape: (H, W, C) of the enlarged ones.
      schedule: whose timesteps are the levels.
      most: the share of the timesteps from which training draws the level; 0: there is no noise, and no level.
      level: the level of sampling, as a share of the timesteps, at most `most`.
      flip: whether training mirrors half of the images, as its decoder does.
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
                "sizes that are whole numbers at that factor"
            )
        channels = self.shape[-1]
        shape = (int(small[0]), int(small[1]), channels)
        return dataclasses.replace(self, shape=shape, picture_shape=(height, width, channels))

    def of_examples(self, batch: Mapping[str, Any]) -> np.ndarray:
        """As the data set of a run of that size would have them."""
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
    """`_noised`, each picture by the noise of its number."""
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
    """The entries of `cond` of uint8 pictures at a level [B]; None: without noise. key is one, or one a picture."""
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
    """A picture and a mask, for a run that paints anew what is under the mask: Stable Diffusion's inpainting networks.

    The network sees, beside the latents that it denoises, the mask at their size and the latents of the picture whose
    part under the mask is grey. So it knows at every step what the new part has to fit. Guidance leaves neither out.

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
        """What is given for uint8 pictures [N, H, W, C] and bool masks [N, H, W, 1].

        Of the mask, each latent sees the pixel at the upper left of those that it stands for, as in diffusers.
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
