"""Draws images with trained weights: condition -> generation -> decoder, in batches over all devices.

Training, `Run`, the plans and the command line share it.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from ddpm_jax.diffusion import guidance as guidance_lib
from ddpm_jax.diffusion.gaussian import Parameterization
from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.diffusion.samplers import Observer, Steps, run_table
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.models.captioned import Captioned
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.progress import part_of
from ddpm_jax.runtime.rng import named_key
from ddpm_jax.sampling.condition import Cond, Condition
from ddpm_jax.sampling.decoder import Decoder
from ddpm_jax.sampling.given import Given, Inputs


@dataclasses.dataclass(frozen=True)
class Request:
    """How to sample from a model.

    Attributes:
      condition: with its classes or prompts.
      steps: of sampling.
      output: what the network's output means, and how its x_0 is clipped.
      guidance: towards the condition.
      between: for interpolation between two prompts or classes, the shares of the second; each noise gives
        len(between) images, one for each share. Empty: no interpolation.
      candidates: results to draw for each image; the one that matches its condition best is kept.
      then: the requests for the later stages of a pipeline.
    """

    condition: Condition
    steps: Steps
    output: Parameterization
    guidance: Guidance
    between: tuple[float, ...] = ()
    candidates: int = 1
    then: tuple["Request", ...] = ()

    def keywords(self) -> dict[str, Any]:
        """The steps and the output as the keyword arguments of `ddpm_jax.sample`."""
        parts = (self.steps, self.output)
        return {field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)}

    def settings(self) -> dict[str, Any]:
        """The steps, the output and the guidance as JSON values."""
        values: dict[str, Any] = self.keywords() | {
            f"guidance_{k}": v for k, v in dataclasses.asdict(self.guidance).items()
        }
        # These are included only where they differ from the default, and come last, because files of earlier versions
        # lack them.
        plain = Steps()
        for name in (
            "spacing_offset",
            "skip_lowest",
            "stop_at_first",
            "levels",
            "fractional",
            "scaled_start",
            "timesteps",
            "x_0_mse",
        ):
            value, default = values.pop(name), getattr(plain, name)
            if type(value) is not type(default) or value != default:
                values[name] = value
        for name in ("clip_range", "threshold_limit"):
            if values[name] == getattr(Parameterization(), name):
                del values[name]
        if self.candidates > 1:
            values["candidates"] = self.candidates
        return {name: np.asarray(v).tolist() if isinstance(v, (tuple, np.ndarray)) else v for name, v in values.items()}


@dataclasses.dataclass(frozen=True)
class Model:
    """The three parts of a system, without weights.

    Attributes:
      condition: nothing, classes or captions.
      net, schedule: the generation: a network and its diffusion.
      decoder: between what is diffused and pictures.
      given: a further input, from another stage or the user; None: there is none.
    """

    condition: Condition
    net: nn.Module
    schedule: Schedule
    decoder: Decoder
    given: Given | None = None

    def model_fn(
        self,
        params: Any,
        cond: Any = None,
        null: Any = None,
        guidance: Guidance | None = None,
        other: Cond = None,
        share: jax.Array | None = None,
    ) -> Partial:
        """(x_t, t) -> the network's output, for the functions of `ddpm_jax.diffusion`.

        Args:
          params: of the network.
          cond: of each image; None: the network has no condition.
          null: the null condition of each image, for guidance.
          guidance: towards cond; None or a scale of 1 takes no extra call.
          other, share: another condition of each image and its share [B]; see `ddpm_jax.diffusion.guidance.between`.
        """
        cond, null, other = (self._encoded(params, said) for said in (cond, null, other))
        network = Partial(self.net.apply, {"params": params})
        if other is not None:
            network = Partial(guidance_lib.between, network)
            cond, null = (cond, other, share), (null, null, share)
        if guidance is not None and guidance.is_on:
            interval = guidance.interval or guidance_lib.NO_LIMIT
            return guidance_lib.guided(network, cond, null, guidance.scale, rescale=guidance.rescale, interval=interval)
        return network if cond is None else Partial(network.func, *network.args, cond=cond)

    def model_fn_of_null(self, params: Any) -> Partial:
        """The model function with the null condition, for any number of images; see `Condition.null`."""
        self.check_alone()
        if not (self.condition.reads and self.condition.can_be_left_out):
            return self.model_fn(params)
        network = Partial(self.net.apply, {"params": params})
        return Partial(_of_row, network, self._encoded(params, self.condition.null(1)))

    def check_alone(self) -> None:
        """Raises UserError for a model with a further input, for callers that have none."""
        if self.given is not None:
            raise UserError(
                self.given.needs
                or "this run works on the result of another stage; accepted: --mode=sample, --mode=upscale, or a "
                "pipeline of --mode=compose"
            )

    def _encoded(self, params: Any, cond: Cond) -> Cond:
        """The condition as the network takes it at every call: texts are encoded here, once."""
        is_text = isinstance(self.net, Captioned) and cond is not None and "ids" in cond
        return _encode(self.net, params, cond) if is_text else cond

    def init_params(self, seed: int) -> Any:
        """The random parameters that a run of this seed starts from."""
        return self.initialize(named_key(seed, "init"))[1]

    def initialize(self, key: jax.Array) -> tuple[Any, Any]:
        """Calls the network for one image; returns the result, and the random parameters that were made for it."""
        try:
            hash(self.net)
        except TypeError:  # a module with a list among its attributes
            return _initialize(self.net, key, *self.example())
        return _initialize_once(self.net, key, *self.example())

    def example(self, count: int = 1) -> tuple[jax.Array, jax.Array, Cond]:
        """x, t and cond, all zeros, in the shapes of a network call for `count` images."""
        shapes = {**self.condition.reads, **(self.given.cond if self.given else {})}
        cond = {name: jnp.zeros((count, *x.shape), x.dtype) for name, x in shapes.items()} if shapes else None
        return jnp.zeros((count, *self.decoder.shape)), jnp.zeros(count, jnp.int32), cond

    def param_shapes(self) -> Any:
        """The parameters as `jax.ShapeDtypeStruct`s."""
        return jax.eval_shape(lambda: self.init_params(0))


def _initialize(net: nn.Module, key: jax.Array, x: jax.Array, t: jax.Array, cond: Cond) -> tuple[Any, Any]:
    result, variables = net.init_with_output(key, x, t, cond)
    return result, variables["params"]


_initialize_once = jax.jit(_initialize, static_argnums=0)  # traced once, however often it is asked for the shapes


def _of_row(network: Partial, row: Cond, x_t: jax.Array, t: jax.Array) -> Any:
    return network(x_t, t, jax.tree.map(lambda value: jnp.repeat(value, len(x_t), axis=0), row))


@partial(jax.jit, static_argnums=0)
def _encode(net: Captioned, params: Any, cond: Cond) -> Cond:
    encoded: Cond = net.apply({"params": params}, cond, method="encode")  # type: ignore[assignment]
    return encoded


def asked(
    model: Model, params: Any, request: Request, numbers: np.ndarray, mesh: Mesh, given: Cond = None, said: Cond = None
) -> Partial:
    """The model function for a batch of images, each with its condition, sharded over the mesh.

    Args:
      model, params: params on every device of the mesh.
      request: how to sample.
      numbers: of the images.
      mesh: the number of its devices divides the number of images.
      given: further entries of `cond` for each image, if the model has a further input.
      said: the condition of each image, which replaces the request's; None: the request's.
    """
    place = partial(parallel.place, sharding=parallel.batch_sharding(mesh))
    condition, between = request.condition, request.between
    null = condition.null(len(numbers)) if request.guidance.is_on else None
    if not between:
        cond = condition.of_images(numbers) if said is None else said
        if model.given is not None and given is not None:
            cond, null = {**(cond or {}), **given}, {**(null or {}), **model.given.null(given)}
        return model.model_fn(params, jax.tree.map(place, cond), jax.tree.map(place, null), request.guidance)
    null = jax.tree.map(place, null)
    first, second = (jax.tree.map(place, condition.of_images(np.full(len(numbers), i))) for i in range(2))
    share = place(np.array(between, np.float32)[numbers % len(between)])
    return model.model_fn(params, first, null, request.guidance, second, share)


def generate(
    model: Model,
    params: Any,
    mesh: Mesh,
    request: Request,
    *,
    indices: Sequence[int],
    seed: int,
    batch_size: int,
    observer: Observer | None = None,
    given: Inputs | None = None,
    purpose: str = "image",
) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples images of a seed by their numbers; image i depends on the seed, i, its further input and the request.

    Args:
      model, params: params on every device of the mesh.
      mesh: the devices to shard each batch over.
      request: how to sample.
      indices: the images' numbers.
      seed: of the images.
      batch_size: images at a time, rounded up to a multiple of the number of devices.
      observer: of the progress, which counts all batches and candidates; it gets snapshots of the first of them.
      given: the further inputs of the images, if the model has such an input.
      purpose: names the stream of noise; each stage of a pipeline has its own.

    Returns:
      uint8 [N, H, W, C], and the snapshots uint8 [num_snapshots, first batch, H, W, C] or None.

    Raises:
      UserError: the model needs a further input and there is none.
    """
    observer = observer or Observer()
    numbers = np.asarray(indices)
    if given is None:
        model.check_alone()
    batch_size = parallel.rounded(min(batch_size, len(numbers)), mesh)
    batches = -(-len(numbers) // batch_size)
    table = request.steps.table(model.schedule, request.output.variance, request.output.prediction)

    done, snapshots = [], None
    for batch in range(batches):
        rows = np.arange(batch * batch_size, min((batch + 1) * batch_size, len(numbers)))
        rows = np.resize(rows, batch_size)
        chosen = numbers[rows]
        entries = said = None
        if model.given is not None and given is not None:
            entries = model.given.of_images(given.values[rows], seed, chosen)
            said = None if given.cond is None else {name: value[rows] for name, value in given.cond.items()}
        draw = partial(
            run_table,
            table,
            asked(model, params, request, chosen, mesh, entries, said),
            shape=(batch_size, *model.decoder.shape),
            output=request.output,
            start_scale=request.steps.start_scale(table),
        )
        drawn = []
        for candidate in range(request.candidates):
            noise = f"{purpose}, candidate {candidate}" if candidate else purpose
            told = _part_of(_part_of(observer, batch, batches), candidate, request.candidates)
            result = draw(image_keys(mesh, seed, noise, chosen // max(len(request.between), 1)), observer=told)
            if told.num_snapshots:
                result, stages = result
                snapshots = model.decoder.decode(stages)
            drawn.append(model.decoder.decode(result))
        done.append(_best(model, request, chosen, drawn) if len(drawn) > 1 else drawn[0])
    return np.concatenate(done)[: len(numbers)], snapshots


def _part_of(observer: Observer, number: int, count: int) -> Observer:
    """The observer of one of several runs of the sampler; snapshots are taken of the first."""
    snapshots = 0 if number else observer.num_snapshots
    return dataclasses.replace(observer, progress=part_of(observer.progress, number, count), num_snapshots=snapshots)


def _best(model: Model, request: Request, numbers: np.ndarray, candidates: Sequence[np.ndarray]) -> np.ndarray:
    """For each text, the embedding with the largest dot product with the text's (DALL-E 2, section 2.2)."""
    cond = request.condition.of_images(numbers) or {}
    scores = [np.sum(embeddings[:, 0, 0] * cond["vector"], axis=-1) for embeddings in candidates]
    return np.stack(candidates)[np.argmax(scores, axis=0), np.arange(len(numbers))]


def image_keys(mesh: Mesh, seed: int, purpose: str, numbers: np.ndarray) -> jax.Array:
    """`named_key` of each number, sharded over the mesh."""
    return _keys_of(np.uint32(seed), purpose, parallel.place(numbers.astype(np.int32), parallel.batch_sharding(mesh)))


@partial(jax.jit, static_argnames="purpose")
def _keys_of(seed: np.uint32, purpose: str, numbers: jax.Array) -> jax.Array:
    return jax.vmap(lambda number: named_key(seed, purpose, number))(numbers)
