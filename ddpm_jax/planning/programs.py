"""The programs of a run, ready to be compiled or measured: a training step, a batch's sampling, a batch's features."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.diffusion.samplers import sample
from ddpm_jax.evaluation import features, inception
from ddpm_jax.planning.flops import matrix_flops
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.rng import named_key
from ddpm_jax.sampling.generate import make_model_fn
from ddpm_jax.training.state import create_state, init_params
from ddpm_jax.training.step import Metrics, make_train_step

PROGRAMS = ("train", "sample", "evaluate")
_FEATURES_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Planned:
    """A program of the run, not yet compiled.

    Attributes:
      title: what a call of it does.
      function: jit-compiled.
      arguments: as `jax.ShapeDtypeStruct`s that lie on the mesh.
      images: how many it makes, learns from or judges in a call.
      calls: how often the network runs in it, one call after the other; costs are told for one of them.
      donates: whether its first arguments come back as its results, to be handed to the next call.
    """

    title: str
    function: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    images: int
    calls: int = 1
    donates: bool = False

    def flops(self) -> float:
        """Of all calls and devices together."""
        return matrix_flops(self.function.trace(*self.arguments).jaxpr)


def programs_of(
    config: ConfigDict, mesh: Mesh, names: Sequence[str], num_classes: int, calls: int | None = None
) -> dict[str, Planned]:
    """The run's programs of these names, of PROGRAMS, on a mesh; `calls`: of sampling, None for the config's."""
    makers: dict[str, Callable[[], Planned]] = {
        "train": lambda: training_step(config, mesh, num_classes),
        "sample": lambda: sampling(config, mesh, num_classes, calls),
        "evaluate": lambda: judging(config, mesh),
    }
    return {name: makers[name]() for name in names}


def training_step(config: ConfigDict, mesh: Mesh, num_classes: int) -> Planned:
    """One training step, whatever the number of steps that the run takes in one dispatch."""
    net, optimizer = config_lib.make_model(config, num_classes), config_lib.make_optimizer(config)
    function = make_train_step(
        net,
        config_lib.make_schedule_from(config),
        optimizer,
        mesh,
        **config_lib.step_options(config),
    )

    def create() -> Any:
        params = init_params(net, _shape(config), config.seed)
        steps = config_lib.history_timesteps(config)
        return create_state(params, optimizer, config.train.ema_decays, num_timesteps=steps)

    state, size = jax.eval_shape(create), config.train.batch_size
    arguments = (
        parallel.laid(state, parallel.state_shardings(mesh, state)),
        _whole(mesh, jax.eval_shape(Metrics.zero)),
        {"image": _rows(mesh, (size, *_shape(config)), np.uint8), "label": _rows(mesh, (size,), np.int32)},
    )
    return Planned(f"training step of {size} images", function, arguments, size, donates=True)


def sampling(config: ConfigDict, mesh: Mesh, num_classes: int, calls: int | None) -> Planned:
    """The whole sampling of a batch."""
    net, schedule = config_lib.make_model(config, num_classes), config_lib.make_schedule_from(config)
    options, guidance = config_lib.sampling_options(config), config_lib.guidance_options(config)
    if calls is not None:
        config = config.copy_and_resolve_references()
        config.sample.num_steps = options["num_steps"] = min(calls, schedule.num_timesteps)
    size, in_all = parallel.rounded(config.sample.batch_size, mesh), config_lib.sampling_calls(config, schedule)

    def function(params: Any, numbers: jax.Array, labels: jax.Array | None) -> jax.Array:
        keys = jax.vmap(lambda number: named_key(0, "image", number))(numbers)
        model_fn = make_model_fn(net, params, labels, **guidance)
        return sample(schedule, model_fn, keys, (size, *_shape(config)), **options)

    params = config_lib.param_shapes(config, num_classes)
    numbers = _rows(mesh, (size,), np.int32)
    labels = None if net.num_classes is None else numbers
    arguments = (parallel.laid(params, parallel.state_shardings(mesh, params)), numbers, labels)
    jitted = jax.jit(function, out_shardings=parallel.batch_sharding(mesh))
    return Planned(f"network call of sampling {size} images", jitted, arguments, size, in_all)


def judging(config: ConfigDict, mesh: Mesh) -> Planned:
    """Features of generated images, by Inception or, of the embedded digits, their classifier."""
    shape, size = _shape(config), parallel.rounded(_FEATURES_BATCH, mesh)
    if shape == (8, 8, 1):
        name, apply = "digits classifier", features.train_digits_classifier().apply
    else:
        name, net = "Inception", inception.InceptionV3()
        shape = (*shape[:2], 3)
        variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *shape), jnp.uint8))
        apply = Partial(net.apply, variables)
    arguments = (_whole(mesh, apply), _rows(mesh, (size, *shape), np.uint8))
    function = jax.jit(functools.partial(features.judge, mesh=mesh))
    return Planned(f"features of {size} images by {name}", function, arguments, size)


def _shape(config: ConfigDict) -> tuple[int, int, int]:
    return config.data.height, config.data.width, config.data.channels


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=parallel.batch_sharding(mesh))


def _whole(mesh: Mesh, tree: Any) -> Any:
    whole = parallel.replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)
