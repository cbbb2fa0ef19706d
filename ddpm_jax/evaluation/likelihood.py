"""The likelihood of a set of images in bits/dim: the variational bound, its estimate from a few terms, and the bound of
the probability flow.

Each processes the images in batches sharded over a mesh. Image i's noise is a function of (seed, purpose, i), so the
batch size and the number of devices change results only by rounding, and results for parts of a data set, computed
separately, can be added: `part + part`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from ddpm_jax.data.source import Source
from ddpm_jax.data.spread import spread
from ddpm_jax.diffusion import bound, flow
from ddpm_jax.diffusion.gaussian import ModelFn, Parameterization
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.runtime import images as images_lib
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.batches import regroup
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.progress import part_of
from ddpm_jax.sampling.condition import Cond, Condition
from ddpm_jax.sampling.generate import image_keys

Progress = Callable[[int, int], None]
Images = np.ndarray | Iterable[np.ndarray]

_PILOT = 16  # images from which a proposal is estimated
_UNCLIPPED = Parameterization(clip=False)  # the original does not clip here


@dataclasses.dataclass(frozen=True)
class Examples:
    """Images, with their conditions, whose likelihood is computed.

    Attributes:
      images: uint8 [N, H, W, C], or an iterable of such portions, each with any N.
      cond: of all images, arrays [N, ...] as the network takes them; None: no condition.
      first: the index of the first image.
      num_images: their number, which progress over an iterable needs.
    """

    images: Images
    cond: Cond = None
    first: int = 0
    num_images: int | None = None

    @classmethod
    def spread(cls, source: Source, count: int, condition: Condition) -> "Examples":
        """`count` examples evenly spread over a source, or all if it has fewer, with their conditions."""
        batch = condition.read(spread(source, count), source)
        return cls(batch["image"], condition.of_batch(batch), num_images=len(batch["image"]))

    def start(self, count: int) -> tuple["Examples", "Examples"]:
        """The first `count` of them, and all of them, still unread."""
        images, rest = self.images, self.images
        if not isinstance(images, np.ndarray):
            portions, taken = iter(images), []
            for portion in _checked(portions):
                taken.append(portion)
                if sum(map(len, taken)) >= count:
                    break
            if not taken:
                raise UserError("a likelihood needs at least 1 image")
            images, rest = np.concatenate(taken), chain(taken, portions)
        few = Examples(images[:count], jax.tree.map(lambda x: x[:count], self.cond), self.first)
        return few, dataclasses.replace(self, images=rest)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and spread over images of a number, or of an array of numbers.

    Attributes:
      count: number of images.
      mean: float64, over the images.
      scatter: float64 like mean, the sum of squared deviations from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, values: ArrayLike) -> "Statistics":
        """The statistics of values [N, ...], one per image."""
        values = np.asarray(values, np.float64)
        mean = values.mean(0)
        return cls(len(values), mean, np.sum((values - mean) ** 2, axis=0))

    def __add__(self, other: "Statistics") -> "Statistics":
        """The statistics of both sets together (Chan, Golub & LeVeque 1979)."""
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        return Statistics(
            count, mean, self.scatter + other.scatter + difference**2 * (self.count * other.count / count)
        )

    @property
    def standard_error(self) -> np.ndarray:
        """The standard error of the mean; NaN for a single image."""
        if self.count < 2:
            return np.full_like(self.mean, np.nan)
        return np.sqrt(self.scatter / (self.count - 1) / self.count)

    @property
    def rms(self) -> np.ndarray:
        """The root mean square."""
        return np.sqrt(self.mean**2 + self.scatter / self.count)

    def to_json(self) -> dict[str, Any]:
        """{"mean", "standard_error"}, the latter None for one image."""
        error = self.standard_error.tolist() if self.count > 1 else None
        return {"mean": self.mean.tolist(), "standard_error": error}


class _Sums:
    """A dataclass whose fields can be added: the sum of two sets' results is the result of both together."""

    def __add__(self, other: Any) -> Any:
        if type(self) is not type(other):
            return NotImplemented
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return type(self)(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclasses.dataclass(frozen=True)
class Bound(_Sums):
    """The variational bound of a set of images, in bits/dim (DDPM, eq. 5), over the images.

    Attributes:
      total: the bound.
      prior: L_T.
      kl: L_{T-1} + ... + L_1. The prior plus kl is the rate of a lossy code, and L_0 its distortion (section 4.3).
      terms: [T], L_0 and each KL term, by t.
      mse: [T], the squared error of the x_0 predicted at each t, clipped to [-1, 1].
    """

    total: Statistics
    prior: Statistics
    kl: Statistics
    terms: Statistics
    mse: Statistics

    @property
    def num_images(self) -> int:
        return self.total.count

    @property
    def decoder(self) -> Statistics:
        """L_0."""
        return Statistics(self.terms.count, self.terms.mean[0], self.terms.scatter[0])

    @property
    def rate(self) -> np.ndarray:
        """[T], bits/dim needed to transmit x_t: L_T and the KL terms above t (DDPM, section 4.3 and figure 5)."""
        above = np.append(np.cumsum(self.terms.mean[:0:-1])[::-1], 0.0)
        return self.prior.mean + above

    @property
    def distortion(self) -> np.ndarray:
        """[T], root mean squared error, on the scale of 0 to 255, of the x_0 predicted from x_t."""
        return 127.5 * np.sqrt(self.mse.mean)

    def proposal(self, uniform: float = 0.1) -> np.ndarray:
        """[T], the optimal probabilities of t for `estimate_bound` on similar images."""
        return bound.term_proposal(self.terms.rms, uniform)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        parts = ("total", "prior", "kl", "decoder", "terms")
        return {
            "num_images": self.num_images,
            **{name: getattr(self, name).to_json() for name in parts},
            "rate": self.rate.tolist(),
            "distortion": self.distortion.tolist(),
        }


@dataclasses.dataclass(frozen=True)
class BoundEstimate(_Sums):
    """An unbiased estimate of the variational bound, in bits/dim, over the images.

    Attributes:
      total: the bound. Its standard error covers both the choice of images and the terms drawn.
      prior, decoder: L_T and L_0, computed in full.
      kl: the sum of the other terms.
      kl_variance: the part of the variance of each image's kl that is due to drawing t and the noise.
    """

    total: Statistics
    prior: Statistics
    decoder: Statistics
    kl: Statistics
    kl_variance: Statistics

    @property
    def num_images(self) -> int:
        return self.total.count

    @property
    def draw_error(self) -> float:
        """The standard error due to drawing alone, relative to the total over all terms for the same images."""
        return float(np.sqrt(self.kl_variance.mean / self.num_images))

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        parts = ("total", "prior", "kl", "decoder")
        return {
            "num_images": self.num_images,
            **{name: getattr(self, name).to_json() for name in parts},
            "draw_error": self.draw_error,
        }


@dataclasses.dataclass(frozen=True)
class FlowBound(_Sums):
    """The bound on -log P of 8-bit images by the probability-flow ODE, in bits/dim, over the images.

    Attributes:
      total: the bound.
      decoder: -log P(x_0 | x_{t=0}), which is L_0.
      flow: log q(x_{t=0} | x_0) - log p_ODE(x_{t=0}).
    """

    total: Statistics
    decoder: Statistics
    flow: Statistics

    @property
    def num_images(self) -> int:
        return self.total.count

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "num_images": self.num_images,
            **{name: getattr(self, name).to_json() for name in ("total", "decoder", "flow")},
        }


def evaluate_bound(
    schedule: Schedule,
    model_fn: ModelFn,
    examples: Examples,
    mesh: Mesh,
    *,
    output: Parameterization = _UNCLIPPED,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Bound:
    """The variational bound with all terms: T network calls per image.

    Args:
      schedule: T timesteps.
      model_fn: (x_t, t) -> output, or (x_t, t, cond=...) -> output if the examples have a condition; see
        `ddpm_jax.sampling.generate.Model.model_fn`.
      examples: the images.
      mesh: the devices to shard each batch over.
      output: what the network's output means; the original does not clip here.
      seed: of the noise.
      batch_size: images at a time, rounded up to a multiple of the number of devices.
      progress: called with (network calls done, all calls), about every 25 calls.

    Raises:
      UserError: no images, images that are not uint8 [N, H, W, C], different numbers of conditions and images, a bound
        that is not finite, or an unknown option.
    """
    measured = partial(bound.variational_bound, schedule, **_of_bound(output))
    parts = (
        Bound(
            Statistics.of(found["total"]),
            Statistics.of(found["prior"]),
            Statistics.of(found["terms"][:, 1:].astype(np.float64).sum(1)),
            Statistics.of(found["terms"]),
            Statistics.of(found["clipped_x_0_mse"]),
        )
        for found in _over_batches(measured, "bound", model_fn, examples, mesh, seed, batch_size, progress)
    )
    return _total(parts)


def estimate_bound(
    schedule: Schedule,
    model_fn: ModelFn,
    examples: Examples,
    mesh: Mesh,
    *,
    num_terms: int = 8,
    proposal: ArrayLike | None = None,
    output: Parameterization = _UNCLIPPED,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> BoundEstimate:
    """An unbiased estimate of the variational bound: num_terms + 1 network calls per image; see `bound.sampled_bound`.

    Args:
      num_terms: KL terms drawn for each image, an even number.
      proposal: [T], the probabilities of t, from `Bound.proposal` or `bound.term_proposal`; None: estimated from the
        first 16 images with at most 32 calls.
      progress: called with (network calls done, all calls) after every batch.
      schedule, model_fn, examples, mesh, output, seed, batch_size: as in `evaluate_bound`.

    Raises:
      UserError: as for `evaluate_bound`; an odd number of terms, or a proposal that does not fit.
    """
    options = _of_bound(output)
    if proposal is None:
        few, examples = examples.start(_PILOT)

        def pilot(model_fn: Any, keys: jax.Array, x_0: jax.Array, progress: Any) -> dict[str, jax.Array]:
            return bound.bound_terms(schedule, model_fn, keys, x_0, bound.pilot_timesteps(schedule), **options)

        size = max(len(few.images), 1)  # type: ignore[arg-type]
        found = _first(_over_batches(pilot, "pilot", model_fn, few, mesh, seed, size, None))
        proposal = bound.pilot_proposal(schedule, found["terms"].T)

    def measured(model_fn: Any, keys: jax.Array, x_0: jax.Array, progress: Progress | None) -> dict[str, jax.Array]:
        result = bound.sampled_bound(schedule, model_fn, keys, x_0, proposal=proposal, num_terms=num_terms, **options)
        if progress:
            jax.block_until_ready(result)
            progress(num_terms + 1, num_terms + 1)
        return result

    names = [field.name for field in dataclasses.fields(BoundEstimate)]
    parts = (
        BoundEstimate(**{name: Statistics.of(found[name]) for name in names})
        for found in _over_batches(measured, "estimate", model_fn, examples, mesh, seed, batch_size, progress)
    )
    return _total(parts)


def evaluate_flow(
    schedule: Schedule,
    model_fn: ModelFn,
    examples: Examples,
    mesh: Mesh,
    *,
    num_steps: int = 50,
    method: str = "rk4",
    divergence: str = "hutchinson",
    output: Parameterization = _UNCLIPPED,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> FlowBound:
    """The bound by the probability-flow ODE; see `ddpm_jax.diffusion.flow`.

    Args:
      num_steps, method, divergence: see `flow_log_density`. The bound becomes exact for the flow as the number of steps
        grows; a run with half as many shows how close it is.
      output: as in `evaluate_bound`; clipping applies to the decoder only, since the flow is not clipped.
      schedule, model_fn, examples, mesh, seed, batch_size, progress: as in `evaluate_bound`.

    Raises:
      UserError: as for `evaluate_bound` and `flow_log_density`.
    """
    measured = partial(
        flow.flow_bound, schedule, num_steps=num_steps, method=method, divergence=divergence, **_of_bound(output)
    )
    parts = (
        FlowBound(**{name: Statistics.of(found[name]) for name in ("total", "decoder", "flow")})
        for found in _over_batches(measured, "flow", model_fn, examples, mesh, seed, batch_size, progress)
    )
    return _total(parts)


def _of_bound(output: Parameterization) -> dict[str, Any]:
    """The keyword arguments of the bounds; these have no dynamic threshold and clip to [-1, 1], the range of 8-bit
    images."""
    return {"prediction": output.prediction, "variance": output.variance, "clip": output.clip}


def _first(parts: Iterator[Any]) -> Any:
    """The first part."""
    try:
        result = next(parts, None)
    except ValueError as error:
        raise UserError(str(error)) from None
    if result is None:
        raise UserError("a likelihood needs at least 1 image")
    return result


def _total(parts: Iterator[Any]) -> Any:
    result = _first(parts)
    for part in parts:
        result = result + part
    return result


def _over_batches(
    function: Callable[..., dict[str, jax.Array]],
    purpose: str,
    model_fn: ModelFn,
    examples: Examples,
    mesh: Mesh,
    seed: int,
    batch_size: int,
    progress: Progress | None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields function(model_fn, keys, x_0, progress=...) of every batch, its arrays [..., B] transposed to [B, ...]."""
    images, num_images = examples.images, examples.num_images
    if isinstance(images, np.ndarray):
        images, num_images = [images], len(images)
    if progress and num_images is None:
        raise ValueError("progress over an iterable of images needs num_images")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; accepted: 1 or more")
    size = parallel.rounded(min(batch_size, num_images) if num_images else batch_size, mesh)
    place = partial(parallel.place, sharding=parallel.batch_sharding(mesh))
    conditions = min((len(x) for x in jax.tree.leaves(examples.cond)), default=None)
    batches, done = -(-(num_images or 0) // size), 0
    for batch, pictures in enumerate(regroup(_checked(images), size)):
        chosen = np.resize(np.arange(len(pictures)), size)
        model = model_fn
        if conditions is not None:
            if done + len(pictures) > conditions:
                raise UserError(f"there are {conditions} conditions but more images; accepted: one per image")
            of_batch = jax.tree.map(lambda x: place(np.asarray(x)[done + chosen]), examples.cond)  # noqa: B023
            model = _with_cond(model_fn, of_batch)
        found = function(
            model,
            image_keys(mesh, seed, purpose, examples.first + done + chosen),
            place(images_lib.to_float(pictures[chosen])),
            progress=part_of(progress, batch, batches),
        )
        values = {name: np.moveaxis(parallel.to_host(x), -1, 0)[: len(pictures)] for name, x in found.items()}
        for name, value in values.items():
            _check_finite(name, value, examples.first + done)
        done += len(pictures)
        yield values
    if conditions is not None and conditions > done:
        raise UserError(f"there are {conditions} conditions for {done} images; accepted: one for each image")


def _checked(portions: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    shape = None
    for portion in portions:
        portion = np.asarray(portion)
        shape = portion.shape[1:] if shape is None else shape
        if portion.dtype != np.uint8 or portion.ndim != 4 or portion.shape[1:] != shape:
            wanted = "uint8 of shape (N, H, W, C), all of the same size"
            raise UserError(f"the images are {portion.dtype} of shape {portion.shape}; accepted: {wanted}")
        yield portion


def _check_finite(name: str, values: np.ndarray, first: int) -> None:
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        image, *t = wrong[0]
        where = f" at t = {t[0]}" if t else ""
        raise UserError(
            f"the likelihood of image {first + image} is not finite ({name!r}{where}): the network's output is not "
            "finite, or its prediction type is not the one it was trained for"
        )


def _with_cond(model_fn: Any, cond: Cond) -> jax.tree_util.Partial:
    """The model function with its condition."""
    if isinstance(model_fn, jax.tree_util.Partial):
        return jax.tree_util.Partial(model_fn.func, *model_fn.args, **model_fn.keywords, cond=cond)
    return jax.tree_util.Partial(model_fn, cond=cond)
