"""The whole class of a trained run, with the methods of super-resolution and of DALL-E 2's decoder."""

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
    """A trained run. `SamplingRun` draws from noise, `EditingRun` edits pictures.

    Attributes:
      config: the config that it was trained with.
      dataset: the description of its training set.
      step: of the checkpoint.
      ema_decay: of the moving average of the weights; None: the weights as trained.
      model: its condition, network, diffusion and decoder.
      params: the weights, on all devices of `mesh`.
      mesh: this machine's devices.
      loras: the LoRA files that were added to the weights.
    """

    def pictures(self, *names: str | Path) -> np.ndarray:
        """Opens pictures for the edits, uint8 [N, H, W, C].

        Args:
          names: files, which are scaled to cover the run's size and cropped; or "data:17", the training image with
            that number, counted from 0 in the order of the data set or, in a folder, of the file names.

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
                raise UserError(f"{name!r} is not a training image; the data set has data:0 to data:{len(source) - 1}")
            found.append(source[int(number)]["image"])
        return np.stack(found) if found else np.zeros((0, *self.shape), np.uint8)

    def low_resolution_pictures(self, *names: str | Path) -> np.ndarray:
        """Opens picture files for `upscale`, uint8 [N, h, w, C]; see `pictures`."""
        return np.stack([_opened(name, Fit(*self._given().shape)) for name in names])

    def _given(self) -> LowResolution:
        given = self.model.given
        if not isinstance(given, LowResolution):
            raise UserError("this run does not enlarge pictures; accepted: one that was trained with config.upscale")
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
        """Enlarges pictures with a super-resolution run (config.upscale): uint8 [N, H, W, C].

        Args:
          pictures: uint8 [N, h, w, C], of the low resolution of the run; see `low_resolution_pictures`.
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
        """Draws pictures with the image embeddings of given ones, uint8 [N, H, W, C] (DALL-E 2, section 3.1).

        Args:
          pictures: uint8 [N, H, W, C].
          seed, progress, options: as in `sample`; without prompts, the embedding is the only condition.
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
        """Draws pictures along the arc between the embeddings of two, uint8 [len(weights), H, W, C] (DALL-E 2, section
        3.2); all start from the same noise.

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
        """Changes a picture by the difference of two captions, uint8 [len(weights), H, W, C] (DALL-E 2, section 3.3);
        all results start from the same noise.

        Args:
          picture: uint8 [H, W, C].
          caption: of the picture.
          target: a caption of the picture that is wanted.
          weights: how far to rotate the picture's embedding towards the difference of the captions', 0 to 1.
          seed, progress, options: as in `variations`.
        """
        turned = self.embedder.turned(picture, caption, target, weights)
        return self.of_embeddings(turned, seed, same_noise=True, progress=progress, **options)

    @property
    def embedder(self) -> Embedder:
        """The CLIP of a run whose network takes image embeddings."""
        if not isinstance(self.model.given, ImageEmbedding):
            raise UserError("this run does not take an image embedding; accepted: one trained with embedding.clip")
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
        """Draws pictures with these CLIP image embeddings, uint8 [N, H, W, C].

        Args:
          embeddings: float32 [N, D].
          seed, batch_size, progress, options: as in `sample`; without prompts, the embedding is the only condition.
          same_noise: all start from the noise of image 0.
        """
        request = self.request(**options)
        values = np.asarray(embeddings, np.float32)[:, None, None]
        said = None if request.condition.is_said else request.condition.null(len(values))
        numbers = [0] * len(values) if same_noise else range(len(values))
        return self._generated(request, numbers, seed, batch_size, Observer(progress), Inputs(values, said))[0]


def _opened(name: str | Path, fit: Fit) -> np.ndarray:
    try:
        return open_picture(Path(name).expanduser(), fit)
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        raise UserError(f"{str(name)!r} cannot be read as a picture: {reason(error)}") from None
