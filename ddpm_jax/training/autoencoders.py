"""The frozen autoencoder of a latent diffusion run, kept in its workdir so that sampling needs nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.data.source import Source
from ddpm_jax.data.spread import spread
from ddpm_jax.interop.diffusers import autoencoder as autoencoder_lib
from ddpm_jax.models.autoencoder import Autoencoder, param_shapes
from ddpm_jax.runtime import workdir
from ddpm_jax.runtime.checkpoints import read_weights
from ddpm_jax.sampling.latents import Latents

_MEASURED = 1024  # images on whose latents the scaling factor is measured


def autoencoder_description(
    config: ConfigDict, source: Source, folder: Path, known: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Copies the autoencoder to the workdir; returns its entry in the description of the run's data, {} for pixels.

    Args:
      config: of the run.
      source: its images, on which the scaling factor is measured if the config gives none.
      folder: the workdir.
      known: the description from an earlier start of the run.

    Returns:
      "autoencoder", a diffusers folder.

    Raises:
      UserError: an autoencoder that cannot be read.
    """
    if not config.autoencoder.source:
        return {}

    def write(target: Path) -> None:
        net, params, factor = load_autoencoder(config.autoencoder.source)
        factor = config.autoencoder.scaling_factor or factor or measured_scaling(net, params, source)
        autoencoder_lib.write(target, net, params, factor)

    return {workdir.AUTOENCODER: workdir.keep_part(folder, workdir.AUTOENCODER, known, write)}


def load_autoencoder(path: str | Path) -> tuple[Autoencoder, Any, float]:
    """Opens an autoencoder, with its float32 parameters and the scaling factor of its latents.

    Args:
      path: a diffusers folder of an `AutoencoderKL`, or of a pipeline that has one; or the workdir of a run with
        train.objective "autoencoder", whose first moving average in the newest checkpoint is read.

    Returns:
      The module, with the methods "encode" and "decode"; its parameters; and the scaling factor, which is 0 for a
      workdir, where none is stored.

    Raises:
      UserError: no autoencoder there, or one that is not supported.
    """
    if not config_lib.is_workdir(path):
        return autoencoder_lib.read(config_lib.autoencoder_folder(path))
    config = workdir.read_config(path)
    net, _ = config_lib.open_autoencoder(path)
    params = read_weights(Path(path).expanduser(), f"ema_{config.train.ema_decays[0]}", param_shapes(net))
    return net, params, 0.0


def measured_scaling(net: Autoencoder, params: Any, source: Source) -> float:
    """The inverse of the latents' standard deviation, over images spread evenly over a source (Rombach et al. 2022,
    appendix G)."""
    decoder = Latents(source.shape, net, lambda: params, scaling_factor=1.0)
    posterior = decoder.read(spread(source, _MEASURED))["posterior"][:, 0]
    variance = np.var(posterior[:, 0], dtype=np.float64) + np.mean(posterior[:, 1] ** 2, dtype=np.float64)
    factor = float(1 / np.sqrt(variance))
    logging.info("The scaling factor of the latents is %.5f.", factor)
    return factor
