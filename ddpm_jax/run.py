"""A workdir opened for use: its config, its weights on this machine's devices, and what one does with them."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax import parallel, workdir
from ddpm_jax.checkpoints import Checkpoints
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.errors import UserError
from ddpm_jax.generate import generate
from ddpm_jax.models.unet import UNet


@dataclasses.dataclass(frozen=True)
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

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images."""
        data = self.config.data
        return (data.height, data.width, data.channels)

    @property
    def model_fn(self) -> jax.tree_util.Partial:
        """(x_t, t) -> the network's output, for the functions of `ddpm_jax.diffusion`."""
        return jax.tree_util.Partial(self.net.apply, {"params": self.params})

    def sample(
        self,
        num_images: int = 16,
        seed: int = 0,
        *,
        num_steps: int | None = None,
        batch_size: int | None = None,
        labels: Sequence[int] = (),
        progress: Callable[[int, int], None] = lambda done, total: None,
        **options: Any,
    ) -> np.ndarray:
        """Images 0 .. num_images - 1 of a seed; each depends on the seed and its number, not on how many there are.

        Args:
          num_images, seed: how many of which seed.
          num_steps: network calls an image; None: the config's.
          batch_size: images at a time; None: the config's.
          labels: of a class-conditional run, repeated as needed; none: every class in turn.
          progress: told (images done, images wanted).
          options: of `ddpm_jax.sample`, in place of the config's: variance, clip, dynamic_threshold.

        Returns:
          uint8 [num_images, H, W, C].

        Raises:
          UserError: a count, number of steps or label that does not fit.
        """
        classes = self.net.num_classes
        if num_images < 1:
            raise UserError(f"the number of images is {num_images}; at least 1 is needed")
        if labels and classes is None:
            raise UserError("this run is not class-conditional, so there are no classes to choose")
        wrong = [label for label in labels if not 0 <= label < (classes or 0)]
        if wrong:
            raise UserError(f"class {wrong[0]} does not exist; this run has classes 0 to {(classes or 0) - 1}")
        try:
            return generate(
                self.net,
                self.schedule,
                self.params,
                self.mesh,
                shape=self.shape,
                num_images=num_images,
                seed=seed,
                batch_size=batch_size or self.config.sample.batch_size,
                labels=labels,
                progress=progress,
                **{
                    **config_lib.sampling_options(self.config),
                    "num_steps": num_steps or self.config.sample.num_steps or None,
                    **options,
                },
            )[0]
        except ValueError as error:
            raise UserError(str(error)) from None


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
    config_lib.validate(config)
    decays = config.train.ema_decays
    ema_decay = None if raw else decays[0] if ema_decay is None else ema_decay
    if ema_decay is not None and ema_decay not in decays:
        raise UserError(f"this run has no average of decay {ema_decay}; it has {', '.join(map(str, decays))}")
    dataset = workdir.read_dataset(path)
    if dataset is None:
        raise UserError(f"--workdir {str(path)!r} has no checkpoint yet")
    num_classes = len(dataset["class_names"])
    net = config_lib.make_model(config, num_classes)
    mesh = parallel.make_mesh()
    shapes = config_lib.param_shapes(config, num_classes)
    whole = parallel.replicated(mesh)
    wanted = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=whole), shapes)
    checkpoints = Checkpoints(Path(path).expanduser(), read_only=True)
    found, params = checkpoints.restore_weights(step, "params" if raw else f"ema_{ema_decay}", wanted)
    checkpoints.close()
    return Run(config, dataset, found, ema_decay, net, config_lib.make_schedule_from(config), params, mesh)
