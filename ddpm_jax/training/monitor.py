"""A small evaluation on the way: bits/dim and a Frechet distance of the averaged weights, logged like other metrics."""

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.data.sources import Source
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.evaluation import image_sets, likelihood, metrics
from ddpm_jax.evaluation.features import open_features
from ddpm_jax.evaluation.summaries import summarize
from ddpm_jax.models.unet import UNet
from ddpm_jax.sampling.generate import generate, make_model_fn

_BATCH = 64


class Monitor:
    """What the config's `evaluate` asks for, prepared once.

    Few images and few steps: the numbers follow a run, and are no results of it.

    Args:
      config: of the run.
      net, schedule, mesh: of the training.
      source: the images that it learns from.

    Raises:
      UserError: weights of Inception that are not to be had.
    """

    def __init__(self, config: ConfigDict, net: UNet, schedule: Schedule, mesh: Mesh, source: Source):
        self._config, self._net, self._schedule, self._mesh = config, net, schedule, mesh
        self._shape = source.shape
        evaluate = config.evaluate
        self._images, self._labels = image_sets.spread(source, evaluate.likelihood_images)
        if evaluate.num_images:
            self._features = open_features(evaluate.features or None, source.shape)
            images, _ = image_sets.spread(source, evaluate.num_real)
            self._real = summarize(self._features, [images], mesh, batch_size=_BATCH, keep=False)

    def __call__(self, params: Any, progress: Callable[[int, int], None] | None = None) -> dict[str, float]:
        """Numbers by the names that they are logged under.

        Args:
          params: averaged weights, on every device of the mesh.
          progress: told (network calls done, calls) of the sampling.
        """
        config = self._config.evaluate
        values: dict[str, float] = {}
        if config.likelihood_images:
            found = likelihood.estimate_bound(
                self._schedule,
                make_model_fn(self._net, params),
                self._images,
                self._mesh,
                seed=self._config.seed,
                batch_size=_BATCH,
                labels=self._labels.tolist() if self._net.num_classes else (),
                prediction=self._config.diffusion.prediction,
                variance=self._config.diffusion.variance,
            )
            values["bits_per_dim"] = float(found.total.mean)
            values["bits_per_dim_error"] = float(found.total.standard_error)
        if config.num_images:
            samples, _ = generate(
                self._net,
                self._schedule,
                params,
                self._mesh,
                shape=self._shape,
                indices=range(config.num_images),
                seed=self._config.seed,
                batch_size=self._config.sample.batch_size,
                progress=progress,
                **config_lib.evaluation_sampling(self._config),
            )
            fake = summarize(self._features, [samples], self._mesh, batch_size=_BATCH, keep=False)
            name = "fid" if self._features.frechet == "FID" else "frechet_distance_digits"
            values[name] = metrics.frechet_distance(fake.moments["pool"], self._real.moments["pool"])
        return values
