"""Small evaluations of the averaged weights during training, logged like other metrics: bits/dim and a Frechet
distance, or a CLIP's retrieval accuracy."""

import re
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.data.source import Source
from ddpm_jax.data.spread import spread
from ddpm_jax.diffusion.samplers import Observer
from ddpm_jax.evaluation import likelihood, metrics, retrieval
from ddpm_jax.evaluation.features import open_features
from ddpm_jax.evaluation.summaries import summarize
from ddpm_jax.runtime import parallel
from ddpm_jax.sampling.generate import Model, generate
from ddpm_jax.sampling.given import from_examples
from ddpm_jax.training.objectives import Contrastive, Diffusion, Objective

_BATCH = 64


class Monitor(Protocol):
    """An evaluation during training, prepared once."""

    def __call__(self, params: Any, progress: Callable[[int, int], None] | None = None) -> dict[str, float]:
        """Computes the metrics, by the names to log them under.

        Args:
          params: averaged weights, on every device of the mesh.
          progress: called with (calls or pictures done, all of them).
        """
        ...


def make_monitor(config: ConfigDict, objective: Objective, mesh: Mesh, source: Source) -> Monitor:
    """The monitor for this objective; raises UserError like `DiffusionMonitor`."""
    if isinstance(objective, Contrastive):
        return ContrastiveMonitor(config, objective, mesh, source)
    assert isinstance(objective, Diffusion)
    return DiffusionMonitor(config, objective.model, mesh, source)


class ContrastiveMonitor:
    """The share of config.evaluate.num_images pictures whose own caption a CLIP ranks first."""

    def __init__(self, config: ConfigDict, objective: Contrastive, mesh: Mesh, source: Source):
        self._objective, self._mesh = objective, mesh
        self._asked = retrieval.questions(source, config.evaluate.num_images)

    def __call__(self, params: Any, progress: Callable[[int, int], None] | None = None) -> dict[str, float]:
        clip = self._objective.clip_of(jax.tree.map(parallel.to_host, params))
        found = retrieval.answers(clip, self._asked, self._mesh, batch_size=_BATCH, progress=progress)
        return {"retrieval_" + re.sub(r"\W+", "_", name): share for name, share in found.items()}


class DiffusionMonitor:
    """The evaluation that the config's `evaluate` section describes, prepared once.

    It uses few images and few steps: the numbers show a run's progress and are not final results.

    Args:
      config: of the run.
      model, mesh: of the training.
      source: the training set.

    Raises:
      UserError: Inception's weights are not available.
    """

    def __init__(self, config: ConfigDict, model: Model, mesh: Mesh, source: Source):
        self._config, self._model, self._mesh, self._source = config, model, mesh, source
        evaluate = config.evaluate
        if evaluate.likelihood_images:
            self._examples = likelihood.Examples.spread(source, evaluate.likelihood_images, model.condition)
        if evaluate.num_images:
            self._features = open_features(evaluate.features or None, source.shape)
            images = spread(source, evaluate.num_real)["image"]
            self._real = summarize(self._features, [images], mesh, batch_size=_BATCH, keep=False)

    def __call__(self, params: Any, progress: Callable[[int, int], None] | None = None) -> dict[str, float]:
        """Computes the metrics, by the names to log them under.

        Args:
          params: averaged weights, on every device of the mesh.
          progress: called with (network calls done, all calls) during sampling.
        """
        config = self._config.evaluate
        values: dict[str, float] = {}
        if config.likelihood_images:
            found = likelihood.estimate_bound(
                self._model.schedule,
                self._model.model_fn(params),
                self._examples,
                self._mesh,
                output=config_lib.parameterization(self._config).unclipped,
                seed=self._config.seed,
                batch_size=_BATCH,
            )
            values["bits_per_dim"] = float(found.total.mean)
            values["bits_per_dim_error"] = float(found.total.standard_error)
        if config.num_images:
            request = config_lib.evaluation_request(self._config, self._model.condition)
            numbers = range(config.num_images)
            samples, _ = generate(
                self._model,
                params,
                self._mesh,
                request,
                given=from_examples(self._model.given, request.condition, self._source, numbers),
                indices=numbers,
                seed=self._config.seed,
                batch_size=self._config.sample.batch_size,
                observer=Observer(progress),
            )
            fake = summarize(self._features, [samples], self._mesh, batch_size=_BATCH, keep=False)
            name = "fid" if self._features.frechet == "FID" else "frechet_distance_digits"
            values[name] = metrics.frechet_distance(fake.moments["pool"], self._real.moments["pool"])
        return values
