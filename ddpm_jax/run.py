"""A workdir opened for use: its config, its weights on this machine's devices, and what one does with them."""

import dataclasses
import functools
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
from ddpm_jax.diffusion.samplers import Progress, Watch, plan_table, sample
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.diffusion.tables import DEFAULT_SPACING
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime import images, parallel, workdir
from ddpm_jax.runtime.checkpoints import Checkpoints
from ddpm_jax.runtime.errors import UserError, reason
from ddpm_jax.runtime.progress import part_of
from ddpm_jax.runtime.rng import named_key
from ddpm_jax.sampling.generate import generate, image_keys, labels_of, make_model_fn, to_host
from ddpm_jax.validation import check_guidance, validate

_GUIDANCE = ("guidance_scale", "guidance_rescale", "guidance_interval")


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A trained run.

    Attributes:
      config: what it was told.
      dataset: the description of what it learned from.
      step: of the checkpoint.
      ema_decay: of the weights, or None for the weights as trained.
      net, schedule: the network and its diffusion.
      params: the weights, on all devices of `mesh`.
      mesh: this machine's devices.
    """

    config: ConfigDict
    dataset: dict[str, Any]
    step: int
    ema_decay: float | None
    net: UNet
    schedule: Schedule
    params: Any
    mesh: Mesh

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"Run({size} images, {count:,} parameters, {self.weights}, predicts {self.config.diffusion.prediction})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images."""
        data = self.config.data
        return (data.height, data.width, data.channels)

    @property
    def model_fn(self) -> jax.tree_util.Partial:
        """(x_t, t) -> the network's output without a class, for the functions of `ddpm_jax.diffusion`."""
        return make_model_fn(self.net, self.params)

    @property
    def weights(self) -> str:
        """Which weights these are, in words."""
        return f"step {self.step}, {'raw weights' if self.ema_decay is None else f'EMA {self.ema_decay}'}"

    def sample(
        self,
        num_images: int = 16,
        seed: int = 0,
        *,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        labels: Sequence[int] = (),
        progress: Progress | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Images 0 .. num_images - 1 of a seed; each depends on the seed, its number and the settings alone.

        Args:
          num_images, seed: how many of which seed.
          indices: the images' numbers, in the place of num_images.
          batch_size: images at a time; None: the config's.
          labels: of a class-conditional run, repeated as needed; none: every class in turn.
          progress: told (network calls done, calls in all).
          options: in place of the config's: sampler, num_steps, spacing, spacing_offset, skip_lowest, stop_at_first,
            timesteps, eta, order, clip, dynamic_threshold (see `ddpm_jax.sample`), x_0_mse [T] (see
            `ddpm_jax.diffusion.tables.ddpm`), guidance_scale, guidance_rescale, guidance_interval (see `guided`); or
            watch, with snapshots_of, told of each batch as `ddpm_jax.sample` says.

        Returns:
          uint8 [num_images, H, W, C].

        Raises:
          UserError: a count, option or label that does not fit.
        """
        return self._generate(num_images, seed, indices, batch_size, labels, progress=progress, **options)[0]

    def progressive(
        self,
        num_images: int = 8,
        seed: int = 0,
        *,
        num_stages: int = 10,
        of: str = "x_0",
        labels: Sequence[int] = (),
        progress: Progress | None = None,
        **options: Any,
    ) -> np.ndarray:
        """The way from noise to image in `num_stages`, uint8 [num_stages, num_images, H, W, C] (DDPM, figure 6).

        Args:
          num_images, seed, labels, progress: as in `sample`; all images are one batch.
          num_stages: evenly spaced over the network's calls, the last the result; at most as many as there are calls.
          of: "x_0", what the network takes the image for, or "x", the image with its noise.
          options: of `ddpm_jax.sample` and guidance, as in `sample`.
        """
        options |= {"num_snapshots": num_stages, "snapshots_of": of}
        stages = self._generate(num_images, seed, None, num_images, labels, progress=progress, **options)[1]
        assert stages is not None
        return stages[:, :num_images]

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
                try:
                    found.append(open_picture(Path(name).expanduser(), Fit(*self.shape)))
                except Exception as error:  # Pillow's decoders raise many kinds
                    raise UserError(f"{str(name)!r} cannot be read as a picture: {reason(error)}") from None
                continue
            source = training_images(self.config, self.dataset) if source is None else source
            if not number.isdecimal() or int(number) >= len(source):
                raise UserError(f"{name!r} is no training image; the data set has data:0 to data:{len(source) - 1}")
            found.append(source[int(number)]["image"])
        return np.stack(found) if found else np.zeros((0, *self.shape), np.uint8)

    def vary(self, pictures: np.ndarray, t: int, seed: int = 0, **options: Any) -> np.ndarray:
        """Other pictures like these, uint8 like `pictures`: diffused to t and denoised again.

        Args:
          pictures: uint8 [N, H, W, C].
          t: how far; the larger, the less is kept.
          seed: picture i's noise depends on the seed and i.
          options: labels, batch_size, progress and those of `sample`.
        """
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
        return editing.nearest_timestep(self.schedule, editing.estimate_sigma(images.to_float(self._check(pictures))))

    def inpaint(
        self, pictures: np.ndarray, mask: np.ndarray, seed: int = 0, *, jump: int = 10, times: int = 1, **options: Any
    ) -> np.ndarray:
        """Paints anew where the mask is true, uint8 like `pictures`; the rest stays as it is, to the bit.

        Args:
          pictures: uint8 [N, H, W, C].
          mask: bool [H, W], or one a picture, [N, H, W].
          jump, times: of RePaint's resampling, see `ddpm_jax.diffusion.editing.inpaint`.
          seed, options: as in `vary`.
        """
        pictures, mask = self._check(pictures), np.asarray(mask, bool)
        if mask.shape not in (pictures.shape[1:3], pictures.shape[:3]):
            raise UserError(f"the mask has shape {mask.shape}; accepted: {pictures.shape[1:3]} or {pictures.shape[:3]}")
        masks = np.broadcast_to(mask, pictures.shape[:3])[..., None]
        paint = functools.partial(editing.inpaint, jump=jump, times=times)
        found = self._edit(paint, pictures, seed, "inpaint", masks, **options)
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
        return self._call(mix, len(weights), t=t, **options)

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
        self._check_without_labels()
        x_0 = images.to_float(self._check(pictures))
        options = self._options(_deterministic(num_steps, spacing))
        self._check_unguided(options)
        names = (*config_lib.STEPS, "prediction", "variance")
        way = {name: options[name] for name in names if name in options}
        way["spacing"] = options["spacing"] or DEFAULT_SPACING["ddim"]
        try:
            return to_host(editing.encode(self.schedule, self.model_fn, x_0, progress=progress, **way))
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
        if np.shape(noise)[1:] != self.shape:
            raise UserError(f"the noise has shape {np.shape(noise)}; accepted: (N, {', '.join(map(str, self.shape))})")

        def draw(schedule: Schedule, model_fn: Any, **rest: Any) -> jax.Array:
            x_t = jax.numpy.asarray(noise, jax.numpy.float32)
            return sample(schedule, model_fn, jax.random.key(0), x_t.shape, x_t=x_t, **rest)

        return self._call(draw, len(noise), progress=progress, watch=watch, **_deterministic(num_steps, spacing))

    def coarse_to_fine(self, num_images: int, t: int, seed: int = 0, **options: Any) -> np.ndarray:
        """Images that share their x_t, uint8 [num_images, H, W, C] (DDPM, figure 7).

        Args:
          num_images, seed: how many, of which seed.
          t: of the shared x_t: the larger, the less they have in common.
          options: of `sample`.
        """
        shape = (num_images, *self.shape)
        split = functools.partial(editing.coarse_to_fine, key=named_key(seed, "coarse to fine"), shape=shape, t=t)
        return self._call(split, num_images, **options)

    def labels_of(self, indices: Sequence[int], labels: Sequence[int] = ()) -> np.ndarray:
        """int32 [N], the classes that `sample` gives the images of these numbers; 0 without classes."""
        return labels_of(self.net, indices, labels)

    def calls(self, **options: Any) -> int:
        """How often `sample` calls the network for an image, with these of its options."""
        options = self._options({name: value for name, value in options.items() if name != "labels"})
        names = (*config_lib.PLANNING, "timesteps")
        planned = {name: options[name] for name in names if options.get(name) is not None}
        try:
            return len(plan_table(self.schedule, **planned).t)
        except ValueError as error:
            raise UserError(str(error)) from None

    def settings(
        self, *, seed: int, labels: Sequence[int] = (), batch_size: int | None = None, **options: Any
    ) -> dict[str, Any]:
        """All that decides what `sample` makes of an image's number, as JSON values."""
        weights = 0
        for leaf in jax.tree.leaves(self.params):
            weights = zlib.crc32(to_host(leaf).tobytes(), weights)
        options = self._options(options)
        return {
            "step": self.step,
            "ema_decay": self.ema_decay,
            "weights_crc32": weights,
            "seed": seed,
            "labels": list(labels),
            "batch_size": batch_size or self.config.sample.batch_size,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in options.items()},
        }

    def _options(self, given: Mapping[str, Any], t: int | None = None) -> dict[str, Any]:
        """The config's sampling options and those given instead, None standing for the config's.

        Where sampling starts from t, num_steps are at most the timesteps from there.
        """
        options = config_lib.sampling_options(self.config) | config_lib.guidance_options(self.config)
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("sampler", options["sampler"]) != options["sampler"]:
            options |= {"eta": None, "order": None}  # of the other sampler
            options.pop("skip_lowest", None)
        if given.get("spacing", options["spacing"]) != options["spacing"]:
            for name in ("spacing_offset", "skip_lowest"):  # of the other spacing
                options.pop(name, None)
        if "timesteps" in given:
            options["num_steps"] = None
        if "clip" in given:
            options["dynamic_threshold"] = None
        options |= given
        if t is not None and options["num_steps"]:
            options["num_steps"] = min(options["num_steps"], t + 1)
        options |= {name: options[name] or None for name in ("dynamic_threshold", "order")}  # 0: off, as in a config
        check_guidance(self.config, **{name: options[name] for name in _GUIDANCE})
        return options

    def _check_labels(self, labels: Sequence[int]) -> None:
        classes = self.net.num_classes
        if len(labels) and classes is None:
            raise UserError("this run is not class-conditional, so there are no classes to choose")
        wrong = [label for label in labels if not 0 <= label < (classes or 0)]
        if wrong:
            raise UserError(f"class {wrong[0]} does not exist; this run has classes 0 to {(classes or 0) - 1}")

    def _check_unguided(self, options: Mapping[str, Any]) -> None:
        if options["guidance_scale"] != 1.0:
            raise UserError("guidance needs the classes that it goes towards; name them")

    def _check_without_labels(self) -> None:
        if self.net.num_classes is not None and not self.config.train.label_dropout:
            raise UserError("this run knows images by their class alone (train.label_dropout is 0); name the classes")

    def _ends(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        for picture in (first, second):
            if np.shape(picture) != self.shape:
                raise UserError(
                    f"a picture has shape {np.shape(picture)}; accepted: {self.shape} for each end, such as "
                    "run.pictures(...)[0]"
                )
        return images.to_float(self._check(np.stack([first, second])))

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
        labels: Sequence[int],
        **options: Any,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        indices = range(num_images) if indices is None else indices
        if not len(indices):
            raise UserError(f"the number of images is {len(indices)}; at least 1 is needed")
        self._check_labels(labels)
        try:
            return generate(
                self.net,
                self.schedule,
                self.params,
                self.mesh,
                shape=self.shape,
                indices=indices,
                seed=seed,
                batch_size=batch_size or self.config.sample.batch_size,
                labels=labels,
                **self._options(options),
            )
        except ValueError as error:
            raise UserError(str(error)) from None

    def _call(
        self,
        function: Callable[..., jax.Array],
        num_images: int,
        labels: Sequence[int] = (),
        t: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> np.ndarray:
        """uint8 of function(schedule, model_fn, **sampling options), whose batch has num_images; it starts from t."""
        self._check_labels(labels)
        if not len(labels):
            self._check_without_labels()
        options = self._options(options, t)
        guidance = {name: options.pop(name) for name in _GUIDANCE}
        if not len(labels):
            self._check_unguided(guidance)
        chosen = labels_of(self.net, range(num_images), labels) if len(labels) else None
        try:
            model_fn = make_model_fn(self.net, self.params, chosen, **guidance)
            return images.to_uint8(to_host(function(self.schedule, model_fn, progress=progress, **options)))
        except ValueError as error:
            raise UserError(str(error)) from None

    def _edit(
        self,
        function: Callable[..., jax.Array],
        pictures: np.ndarray,
        seed: int,
        purpose: str,
        *per_picture: np.ndarray,
        labels: Sequence[int] = (),
        batch_size: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """function(schedule, model_fn, keys, x_0, ...) of all pictures, in batches divided over the devices."""
        pictures = self._check(pictures)
        size = parallel.rounded(min(batch_size or self.config.sample.batch_size, len(pictures)), self.mesh)
        place = functools.partial(parallel.place, sharding=parallel.batch_sharding(self.mesh))
        done = []
        for first in range(0, len(pictures), size):
            chosen = np.resize(np.arange(first, min(first + size, len(pictures))), size)
            keys = image_keys(self.mesh, seed, purpose, chosen)
            arrays = [place(images.to_float(pictures[chosen])), *(place(array[chosen]) for array in per_picture)]
            batch_labels = labels_of(self.net, chosen, labels).tolist() if len(labels) else ()

            def edit(schedule: Schedule, model_fn: Any, **rest: Any) -> jax.Array:
                return function(schedule, model_fn, keys, *arrays, **rest)  # noqa: B023

            done.append(self._call(edit, size, labels=batch_labels, **options))
        return np.concatenate(done)[: len(pictures)]


def _deterministic(num_steps: int | None, spacing: str | None) -> dict[str, Any]:
    return {"sampler": "ddim", "eta": 0.0, "clip": False, "num_steps": num_steps, "spacing": spacing}


def load(path: str | Path, step: int | None = None, ema_decay: float | None = None, raw: bool = False) -> Run:
    """Opens a workdir: restores a checkpoint's weights onto this machine's devices.

    Args:
      path: the workdir.
      step: of the checkpoint; None: the newest that can be read.
      ema_decay: which moving average; None: the first of the config's.
      raw: the weights as trained instead of an average.

    Raises:
      UserError: no run there, no such checkpoint, or no such average.
    """
    config = workdir.read_config(path)
    validate(config)
    decays = config.train.ema_decays
    ema_decay = None if raw else decays[0] if ema_decay is None else ema_decay
    if ema_decay is not None and ema_decay not in decays:
        raise UserError(f"this run has no average of decay {ema_decay}; it has {', '.join(map(str, decays))}")
    dataset = workdir.read_dataset(path)
    if dataset is None:
        raise UserError(f"{str(path)!r} has no checkpoint yet")
    num_classes = len(dataset["class_names"])
    net = config_lib.make_model(config, num_classes)
    devices, fsdp = jax.device_count(), config.mesh.fsdp
    mesh = parallel.make_mesh(fsdp=devices if fsdp == -1 else math.gcd(fsdp, devices))
    shapes = config_lib.param_shapes(config, num_classes)
    wanted = parallel.laid(shapes, parallel.state_shardings(mesh, shapes))
    checkpoints = Checkpoints(Path(path).expanduser(), read_only=True)
    found, params = checkpoints.restore_weights(step, "params" if raw else f"ema_{ema_decay}", wanted)
    checkpoints.close()
    return Run(config, dataset, found, ema_decay, net, config_lib.make_schedule_from(config), params, mesh)
