"""The programs of a run, ready to be compiled or measured: a training step, and sampling, decoding and evaluating a
batch."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.data import digits
from ddpm_jax.diffusion.samplers import sample
from ddpm_jax.evaluation import features, inception
from ddpm_jax.models import attention
from ddpm_jax.planning.flops import matrix_flops
from ddpm_jax.runtime import batches, parallel
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.rng import named_key
from ddpm_jax.sampling.condition import Cond
from ddpm_jax.sampling.generate import Model
from ddpm_jax.sampling.latents import Latents
from ddpm_jax.training.objectives import make_objective
from ddpm_jax.training.state import create_state
from ddpm_jax.training.step import make_train_step, step_arguments

Dataset = Mapping[str, Any] | None

PROGRAMS = ("train", "sample", "decode", "evaluate")
_FEATURES_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Planned:
    """A program of the run, not yet compiled.

    Attributes:
      title: what one call does.
      function: jit-compiled.
      arguments: as `jax.ShapeDtypeStruct`s with shardings on the mesh.
      images: number of images processed per call.
      calls: number of sequential network calls in it; costs are given for one of them.
      donates: whether its first arguments are donated and returned as results, for the next call.
    """

    title: str
    function: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    images: int
    calls: int = 1
    donates: bool = False

    @functools.cached_property
    def _traced(self) -> tuple[jax.stages.Traced, tuple[str, ...]]:
        device = next(iter(jax.tree.leaves(self.arguments)[0].sharding.device_set))
        with attention.observed(device) as seen:
            traced = self.function.trace(*self.arguments)
        return traced, tuple(seen)

    def lower(self) -> jax.stages.Lowered:
        """The program for the devices of its arguments."""
        return self._traced[0].lower()

    def flops(self) -> float:
        """FLOP of all calls and devices together."""
        return matrix_flops(self._traced[0].jaxpr)

    def attention(self) -> tuple[str, ...]:
        """A sentence about each kind of attention in it: how it is computed, and why."""
        return self._traced[1]


def names_of(config: ConfigDict) -> tuple[str, ...]:
    """The names of the programs, among PROGRAMS, that a run with this config has."""
    if config.train.objective != "diffusion":
        return ("train",)
    return tuple(name for name in PROGRAMS if name != "decode" or config.autoencoder.source)


def programs_of(
    config: ConfigDict,
    dataset: Dataset,
    mesh: Mesh,
    names: Sequence[str],
    dtype: str | None = None,
    calls: int | None = None,
) -> dict[str, Planned]:
    """The run's programs with these names, on a mesh.

    Args:
      config: of the run.
      dataset: the description of its images; None: there is none yet.
      mesh: the devices.
      names: of the programs; see `names_of`.
      dtype: of the weights in sampling and decoding; None: float32.
      calls: number of network calls in sampling; None: the config's.

    Raises:
      UserError: a program that the run does not have.
    """
    for name in names:
        if name not in names_of(config):
            raise UserError(f"--programs has {name!r}; accepted for this run: {', '.join(names_of(config))}")
    model = config_lib.make_model(config, dataset)
    makers: dict[str, Callable[[], Planned]] = {
        "train": lambda: training_step(config, dataset, mesh),
        "sample": lambda: sampling(config, model, mesh, dtype, calls),
        "decode": lambda: decoding(config, model, mesh, dtype),
        "evaluate": lambda: judging(model.decoder.picture_shape, mesh),
    }
    return {name: makers[name]() for name in names}


def training_step(config: ConfigDict, dataset: Dataset, mesh: Mesh) -> Planned:
    """One training step, even if the run takes several steps per dispatch."""
    optimizer, size = config_lib.make_optimizer(config), config.train.batch_size
    objective = make_objective(config, dataset)
    function = make_train_step(objective, optimizer, mesh, **config_lib.step_options(config))

    def create() -> Any:
        steps = config_lib.history_timesteps(config)
        return create_state(objective.init_params(config.seed), optimizer, config.train.ema_decays, num_timesteps=steps)

    state = dataclasses.replace(jax.eval_shape(create), frozen=objective.frozen_shapes())
    arguments = step_arguments(objective, state, mesh, size)
    return Planned(f"training step of {size} images", function, arguments, size, donates=True)


def sampling(config: ConfigDict, model: Model, mesh: Mesh, dtype: str | None, calls: int | None) -> Planned:
    """Sampling a batch."""
    if calls is not None:
        config = config.copy_and_resolve_references()
        config.sample.num_steps = min(calls, model.schedule.num_timesteps)
    size, in_all = parallel.rounded(config.sample.batch_size, mesh), config_lib.sampling_calls(config, model.schedule)
    request = config_lib.sampling_request(config, model.condition)

    def function(params: Any, numbers: jax.Array, cond: Cond, null: Cond) -> jax.Array:
        keys = jax.vmap(lambda number: named_key(0, "image", number))(numbers)
        model_fn = model.model_fn(params, cond, null, request.guidance)
        return sample(model.schedule, model_fn, keys, (size, *model.decoder.shape), **request.keywords())

    def rows(of_images: Any) -> Any:
        return jax.tree.map(lambda x: _rows(mesh, x.shape, x.dtype), of_images)

    params = _held_in(dtype, model.param_shapes())
    cond = jax.eval_shape(lambda: model.example(size)[2])
    conditions = (cond, cond if request.guidance.is_on else None)
    numbers = np.arange(size, dtype=np.int32)
    arguments = (parallel.laid(params, parallel.state_shardings(mesh, params)), *map(rows, (numbers, *conditions)))
    jitted = jax.jit(function, out_shardings=parallel.batch_sharding(mesh))
    return Planned(f"network call of sampling {size} images", jitted, arguments, size, in_all)


def decoding(config: ConfigDict, model: Model, mesh: Mesh, dtype: str | None) -> Planned:
    """Decoding as many latents as are decoded at a time."""
    latents = model.decoder
    assert isinstance(latents, Latents)
    size = latents.at_a_time(config.sample.batch_size, mesh)
    params = _whole(mesh, _held_in(dtype, latents.param_shapes()))
    arguments = (params, _rows(mesh, (size, *latents.shape), jnp.float32))
    return Planned(f"decoding of {size} images", jax.jit(latents.program("decode")), arguments, size)


def judging(shape: tuple[int, int, int], mesh: Mesh) -> Planned:
    """Features of generated images of this shape, by Inception or, for the built-in digits, their classifier."""
    size = parallel.rounded(_FEATURES_BATCH, mesh)
    count = digits.side_by_side(shape)
    if count:
        name, apply = "digits classifier", features.train_digits_classifier(count).apply
    else:
        name, net = "Inception", inception.InceptionV3()
        shape = (*shape[:2], 3)
        variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *shape), jnp.uint8))
        apply = Partial(net.apply, variables)
    arguments = (_whole(mesh, apply), _rows(mesh, (size, *shape), np.uint8))
    function = jax.jit(functools.partial(batches.run_batch, mesh=mesh))
    return Planned(f"features of {size} images by {name}", function, arguments, size)


def _held_in(dtype: str | None, shapes: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), shapes)


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=parallel.batch_sharding(mesh))


def _whole(mesh: Mesh, tree: Any) -> Any:
    whole = parallel.replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)
