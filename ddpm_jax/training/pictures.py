"""The pictures that training saves in samples/, made with the run's averaged weights."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.data.source import Source
from ddpm_jax.data.spread import spread
from ddpm_jax.diffusion.samplers import Observer
from ddpm_jax.runtime import images, parallel
from ddpm_jax.runtime.progress import ProgressBar
from ddpm_jax.sampling.clip import embed_pictures, embed_texts
from ddpm_jax.sampling.embeddings import Embeddings
from ddpm_jax.sampling.generate import Model, Request, generate
from ddpm_jax.sampling.given import from_examples
from ddpm_jax.sampling.latents import Latents
from ddpm_jax.training.objectives import Contrastive, Diffusion, Objective, Params, Reconstruction

_NUM_SNAPSHOTS = 10
_STRIP_IMAGES = 8
_SEARCHED = 2048  # training pictures to search


class Pictures(Protocol):
    """The pictures of a run. Every process of a job calls these methods; process 0 writes."""

    def save_step(self, params: Params, path: Path) -> None:
        """Writes one picture of the current state."""
        ...

    def save_final(self, params: Params, folder: Path) -> None:
        """Writes the pictures at the end of the run."""
        ...


def make_pictures(config: ConfigDict, objective: Objective, mesh: Mesh, source: Source) -> Pictures:
    """The pictures for this objective."""
    if isinstance(objective, Reconstruction):
        return Reconstructions(config, objective, mesh, source)
    if isinstance(objective, Contrastive):
        return FoundCaptions(config, objective, mesh, source)
    assert isinstance(objective, Diffusion)
    if isinstance(objective.model.decoder, Embeddings):
        return NearestPictures(config, objective.model, mesh, source)
    return Samples(config, objective.model, mesh, source)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples of a diffusion, from the same noise every time; conditions are taken from training pictures."""

    config: ConfigDict
    model: Model
    mesh: Mesh
    source: Source

    def save_step(self, params: Params, path: Path) -> None:
        log = self.config.log
        with _bar("sampling, calls") as bar:
            request = config_lib.sampling_request(self.config, self.model.condition)
            steps = dataclasses.replace(request.steps, num_steps=log.sample_steps or None)
            request = dataclasses.replace(request, steps=steps)
            grid, _ = self._generate(params, log.sample_images, request, Observer(bar.update))
        _save(path, lambda: images.grid(grid))

    def save_final(self, params: Params, folder: Path) -> None:
        """Writes final.png, a grid, and denoising.png, a strip of the first images on the way from noise."""
        sample, request = self.config.sample, config_lib.sampling_request(self.config, self.model.condition)
        calls = config_lib.sampling_calls(self.config, self.model.schedule)
        _say(f"sampling {sample.num_images} images ...")
        with _bar("sampling, calls") as bar:
            observer = Observer(bar.update, num_snapshots=min(_NUM_SNAPSHOTS, calls + 1))
            grid, snapshots = self._generate(params, sample.num_images, request, observer)
        assert snapshots is not None
        _save(folder / "final.png", lambda: images.grid(grid))
        stages = snapshots[:, : min(_STRIP_IMAGES, sample.num_images)].swapaxes(0, 1)
        strip = stages.reshape(-1, *stages.shape[2:])
        _save(folder / "denoising.png", lambda: images.grid(strip, columns=len(snapshots)))

    def _generate(
        self, params: Params, num_images: int, request: Request, observer: Observer
    ) -> tuple[np.ndarray, np.ndarray | None]:
        model, numbers = self.model, range(num_images)
        given = from_examples(model.given, request.condition, self.source, numbers)
        return generate(
            self.model,
            params,
            self.mesh,
            request,
            given=given,
            indices=numbers,
            seed=self.config.seed,
            batch_size=self.config.sample.batch_size,
            observer=observer,
        )


@dataclasses.dataclass(frozen=True)
class NearestPictures:
    """The training pictures whose embeddings are nearest to those that a prior draws for the data set's captions."""

    config: ConfigDict
    model: Model
    mesh: Mesh
    source: Source

    def save_step(self, params: Params, path: Path) -> None:
        self._save(params, path, self.config.log.sample_images)

    def save_final(self, params: Params, folder: Path) -> None:
        self._save(params, folder / "final.png", self.config.sample.num_images)

    def _save(self, params: Params, path: Path, count: int) -> None:
        with _bar("sampling, calls") as bar:
            found, _ = generate(
                self.model,
                params,
                self.mesh,
                config_lib.sampling_request(self.config, self.model.condition),
                indices=range(count),
                seed=self.config.seed,
                batch_size=self.config.sample.batch_size,
                observer=Observer(bar.update),
            )
        known = spread(self.source, _SEARCHED)
        decoder = self.model.decoder
        assert isinstance(decoder, Embeddings)
        nearest = np.argmax(found[:, 0, 0] @ decoder.read(known)["embedding"][:, 0, 0].T, axis=1)
        _save(path, lambda: images.grid(known["image"][nearest]))


@dataclasses.dataclass(frozen=True)
class Reconstructions:
    """Pairs of training pictures and an autoencoder's reconstructions from the mean of their posterior."""

    config: ConfigDict
    objective: Reconstruction
    mesh: Mesh
    source: Source

    def save_step(self, params: Params, path: Path) -> None:
        self._save_pairs(params, path, self.config.log.sample_images)

    def save_final(self, params: Params, folder: Path) -> None:
        self._save_pairs(params, folder / "final.png", self.config.sample.num_images)

    def _save_pairs(self, params: Params, path: Path, count: int) -> None:
        whole = jax.tree.map(parallel.to_host, params)
        pictures = spread(self.source, count)["image"]
        shape = self.objective.pixels.picture_shape
        decoder = Latents(shape, self.objective.autoencoder, lambda: whole, scaling_factor=1.0)
        pairs = np.stack([pictures, decoder.decode(decoder.encode(pictures))], axis=1)
        columns = 2 * max(round((len(pairs) / 2) ** 0.5), 1)
        _save(path, lambda: images.grid(pairs.reshape(-1, *shape), columns))


@dataclasses.dataclass(frozen=True)
class FoundCaptions:
    """Training pictures, each above the caption that a CLIP picks for it among all their captions, in red if it is not
    the picture's own."""

    config: ConfigDict
    objective: Contrastive
    mesh: Mesh
    source: Source

    def save_step(self, params: Params, path: Path) -> None:
        self._save_found(params, path, self.config.log.sample_images)

    def save_final(self, params: Params, folder: Path) -> None:
        self._save_found(params, folder / "final.png", self.config.sample.num_images)

    def _save_found(self, params: Params, path: Path, count: int) -> None:
        clip = self.objective.clip_of(jax.tree.map(parallel.to_host, params))
        batch = spread(self.source, count)
        pictures, own = batch["image"], [self.source.captions[place][0] for place in batch["index"].tolist()]
        captions = list(dict.fromkeys(own))
        batches = {"mesh": self.mesh, "batch_size": self.config.sample.batch_size}
        texts = embed_texts(clip, captions, **batches)
        best = np.argmax(embed_pictures(clip, pictures, **batches) @ texts.T, axis=1)
        found = [captions[place] for place in best]
        tiles = [
            images.captioned(picture, text, "black" if text == right else "red")
            for picture, text, right in zip(pictures, found, own, strict=True)
        ]
        _save(path, lambda: images.grid(np.stack(tiles)))


def _bar(what: str) -> ProgressBar:
    return ProgressBar(what, 0, enabled=jax.process_index() == 0)


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def _save(path: Path, make: Callable[[], Any]) -> None:
    if jax.process_index() == 0:
        images.save(path, make())
