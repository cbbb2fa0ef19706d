"""The methods of a run that edit pictures."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ddpm_jax.diffusion import editing
from ddpm_jax.diffusion.samplers import Observer, Progress, Watch
from ddpm_jax.run.sampling import SamplingRun
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.progress import part_of
from ddpm_jax.sampling.editing import Editor, check_ends, check_pictures
from ddpm_jax.sampling.options import OPTIONS, deterministic, last_timesteps


@dataclasses.dataclass(frozen=True, repr=False)
class EditingRun(SamplingRun):
    """The part of `ddpm_jax.run.Run` that edits pictures; `ddpm_jax.sampling.editing.Editor` does the work."""

    def vary(
        self,
        pictures: np.ndarray,
        t: int | None = None,
        seed: int = 0,
        *,
        strength: float | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Draws variations of pictures, uint8 in the shape of `pictures`: diffuses them to t and denoises them.

        Args:
          pictures: uint8 [N, H, W, C].
          t: the timestep to diffuse to; the larger, the less of a picture is kept.
          seed: picture i's noise depends on the seed and i.
          strength: instead of t, the share of the sampling steps to take, above 0 and at most 1: 0.75 takes 15 of 20,
            as diffusers' image to image does.
          batch_size, options: as in `sample`, among them progress, watch and snapshots_of.
        """
        if (t is None) == (strength is None):
            raise UserError(f"t is {t} and strength is {strength}; accepted: one of the two")
        if strength is not None:
            steps = self.request(**{name: options[name] for name in OPTIONS if name in options}).steps
            options["timesteps"] = last_timesteps(steps, self.schedule, strength)
            options.pop("num_steps", None)  # which they follow from
            t = int(options["timesteps"][0])
        assert t is not None
        return self._editor(options, batch_size).vary(pictures, t, seed)

    def denoise(
        self,
        pictures: np.ndarray,
        t: int | None = None,
        seed: int = 0,
        *,
        batch_size: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Removes the noise of pictures, uint8 in the shape of `pictures`; see `ddpm_jax.diffusion.editing.denoise`.

        Args:
          pictures: uint8 [N, H, W, C].
          t: the timestep with as much noise; None: an estimate, see `estimate_t`.
          seed, batch_size, options: as in `vary`.
        """
        t = self.estimate_t(pictures) if t is None else t
        return self._editor(options, batch_size).denoise(pictures, t, seed)

    def estimate_t(self, pictures: np.ndarray) -> int:
        """The timestep with as much noise as the pictures, uint8 [N, H, W, C], have."""
        sigma = editing.estimate_sigma(self.model.decoder.encode(check_pictures(pictures, self.shape)))
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
        """Repaints pictures where the mask is true, uint8 in the shape of `pictures`; all other pixels keep every bit.

        A network that takes the masked picture as an input (model.masked_picture) samples the part under the mask from
        noise. With any other network, the known part is restored before each step (RePaint).

        Args:
          pictures: uint8 [N, H, W, C].
          mask: bool [H, W], or [N, H, W] with a mask for each picture.
          jump, times: of RePaint's resampling, see `ddpm_jax.diffusion.editing.inpaint`; None: 10 and 1.
          fixed_noise: the known part has the noise that sampling starts from at all steps, as in diffusers, instead of
            new noise at each step.
          seed: picture i's noise depends on the seed and i.
          batch_size, progress, watch, snapshots_of, options: as in `sample`.
        """
        options |= {"progress": progress, "watch": watch, "snapshots_of": snapshots_of}
        return self._editor(options, batch_size).inpaint(pictures, mask, seed, jump, times, fixed_noise)

    def interpolate(
        self,
        first: np.ndarray,
        second: np.ndarray,
        weights: Sequence[float] = tuple(np.linspace(0, 1, 11)),
        t: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> np.ndarray:
        """Interpolates between two pictures, uint8 [len(weights), H, W, C] (DDPM, section 4.3 and figure 8).

        Args:
          first, second: uint8 [H, W, C].
          weights: of the second, 0 to 1.
          t: the timestep that both are diffused to; None: half of the timesteps.
          seed: of the noise, which is the same for all.
          options: as in `sample`.
        """
        t = self.schedule.num_timesteps // 2 if t is None else t
        return self._editor(options).interpolate(first, second, weights, t, seed)

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
        """Interpolates between two pictures along the arc between their noises under deterministic DDIM, uint8
        [len(weights), H, W, C] (DDIM, section 5.3).

        Args:
          first, second: uint8 [H, W, C].
          weights: of the second, 0 to 1.
          num_steps, spacing: of encoding and of decoding; None: the config's.
          progress: as in `sample`, over both.
          watch: as in `sample`, during decoding.
        """
        check_ends(first, second, self.shape)
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
        """The noises from which deterministic DDIM draws these pictures, float32 in the shape of `pictures`; see
        `ddpm_jax.diffusion.editing.encode`. `decode` is the inverse.

        Args:
          pictures: uint8 [N, H, W, C].
          num_steps, spacing: of DDIM; None: the config's.
          progress: as in `sample`.
        """
        return self._editor({**deterministic(num_steps, spacing), "progress": progress}).encode(pictures)

    def decode(
        self,
        noise: np.ndarray,
        num_steps: int | None = None,
        spacing: str | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> np.ndarray:
        """The pictures that deterministic DDIM draws from these noises, uint8 [N, H, W, C].

        Args:
          noise: float32 [N, H, W, C], such as the result of `encode`.
          num_steps, spacing: of DDIM; None: the config's.
          progress, watch: as in `sample`.
        """
        options = {**deterministic(num_steps, spacing), "progress": progress, "watch": watch}
        return self._editor(options).decode(noise)

    def coarse_to_fine(self, num_images: int, t: int, seed: int = 0, **options: Any) -> np.ndarray:
        """Images that share their x_t, uint8 [num_images, H, W, C] (DDPM, figure 7).

        Args:
          num_images, seed: how many images of which seed.
          t: of the shared x_t; the larger, the less the images have in common.
          options: as in `sample`.
        """
        return self._editor(options).coarse_to_fine(num_images, t, seed)

    def _editor(self, options: Mapping[str, Any], batch_size: int | None = None) -> Editor:
        """The editor for these options of `sample`, among them progress, watch and snapshots_of."""
        options = dict(options)
        watching = {name: options.pop(name) for name in ("progress", "watch", "snapshots_of") if name in options}
        return Editor(
            self.model,
            self.params,
            self.mesh,
            self.request(**options),
            batch_size or self.config.sample.batch_size,
            Observer(**watching),
        )
