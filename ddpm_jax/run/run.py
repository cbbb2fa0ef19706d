"""A trained run, whole: what it draws from noise, edits, and makes of pictures and embeddings that it is given."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.data.dataset import training_images
from ddpm_jax.data.pictures import Fit, open_picture
from ddpm_jax.diffusion.samplers import Observer, Progress
from ddpm_jax.run.editing import EditingRun
from ddpm_jax.runtime.errors import UserError, reason
from ddpm_jax.sampling.embeddings import Embedder, ImageEmbedding
from ddpm_jax.sampling.given import Inputs, LowResolution


@dataclasses.dataclass(frozen=True, repr=False)
class Run(EditingRun):
    """A trained run. What it draws from noise is in `SamplingRun`, its edits are in `EditingRun`.

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

    def low_resolution_pictures(self, *names: str | Path) -> np.ndarray:
        """uint8 [N, h, w, C] of picture files, as `upscale` takes them; see `pictures`."""
        return np.stack([_opened(name, Fit(*self._given().shape)) for name in names])

    def _given(self) -> LowResolution:
        given = self.model.given
        if not isinstance(given, LowResolution):
            raise UserError("this run enlarges no pictures; accepted: one that was trained with config.upscale")
        return given

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
        between = self.embedder.between(first, second, weights)
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
        turned = self.embedder.turned(picture, caption, target, weights)
        return self.of_embeddings(turned, seed, same_noise=True, progress=progress, **options)

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


def _opened(name: str | Path, fit: Fit) -> np.ndarray:
    try:
        return open_picture(Path(name).expanduser(), fit)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"{str(name)!r} cannot be read as a picture: {reason(error)}") from None
