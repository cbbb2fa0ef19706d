"""Images from trained weights: condition -> generation -> decoder, in batches over all devices.

What training, `Run`, the plans and the command line share.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from ddpm_jax.diffusion import guidance as guidance_lib
from ddpm_jax.diffusion.gaussian import Parameterization
from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.diffusion.samplers import Observer, Steps, run_table
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.progress import part_of
from ddpm_jax.runtime.rng import named_key
from ddpm_jax.sampling.condition import Cond, Condition
from ddpm_jax.sampling.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a model.

    Attributes:
      condition: with what a person said.
      steps: that sampling takes.
      output: what the network's output means, and how its x_0 is clipped.
      guidance: towards the condition.
    """

    condition: Condition
    steps: Steps
    output: Parameterization
    guidance: Guidance

    def keywords(self) -> dict[str, Any]:
        """The steps and the output as the keyword arguments of `ddpm_jax.sample`."""
        parts = (self.steps, self.output)
        return {field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)}

    def settings(self) -> dict[str, Any]:
        """The steps, the output and the guidance as JSON values."""
        values = self.keywords() | {f"guidance_{k}": v for k, v in dataclasses.asdict(self.guidance).items()}
        # Of these only what is given, and last: files of earlier versions are recognised by the others.
        plain = Steps()
        for name in ("spacing_offset", "skip_lowest", "stop_at_first", "timesteps", "x_0_mse"):
            value, default = values.pop(name), getattr(plain, name)
            if type(value) is not type(default) or value != default:
                values[name] = value
        return {name: np.asarray(v).tolist() if isinstance(v, (tuple, np.ndarray)) else v for name, v in values.items()}


@dataclasses.dataclass(frozen=True)
class Model:
    """The three parts of a system, without weights.

    Attributes:
      condition: what a person may say.
      net, schedule: the generation, a network and its diffusion.
      decoder: between what is diffused and pictures.
    """

    condition: Condition
    net: nn.Module
    schedule: Schedule
    decoder: Decoder

    def model_fn(self, params: Any, cond: Cond = None, null: Cond = None, guidance: Guidance | None = None) -> Partial:
        """(x_t, t) -> the network's output, for the functions of `ddpm_jax.diffusion`.

        Args:
          params: of the network.
          cond: of each image; None: of a network without condition.
          null: the null condition of each image, where there is guidance.
          guidance: towards cond; None or a scale of 1 costs nothing.
        """
        network = Partial(self.net.apply, {"params": params})
        if guidance is not None and guidance.is_on:
            interval = guidance.interval or guidance_lib.NO_LIMIT
            return guidance_lib.guided(network, cond, null, guidance.scale, rescale=guidance.rescale, interval=interval)
        return network if cond is None else Partial(self.net.apply, {"params": params}, cond=cond)

    def init_params(self, seed: int) -> Any:
        """The random parameters that a run of this seed starts from."""
        example = self.condition.of_images(np.zeros(1, np.int32))
        x, t = jax.numpy.zeros((1, *self.decoder.shape)), jax.numpy.zeros(1, jax.numpy.int32)
        return self.net.init(named_key(seed, "init"), x, t, example)["params"]

    def param_shapes(self) -> Any:
        """The parameters as `jax.ShapeDtypeStruct`s."""
        return jax.eval_shape(lambda: self.init_params(0))


def asked(model: Model, params: Any, request: Request, numbers: np.ndarray, mesh: Mesh) -> Partial:
    """The model function of a batch of images, each with its condition, divided over the mesh.

    Args:
      model, params: params on every device of the mesh.
      request: what is asked of them.
      numbers: of the images.
      mesh: whose number of devices divides that of the images.
    """
    place = partial(parallel.place, sharding=parallel.batch_sharding(mesh))
    cond = jax.tree.map(place, request.condition.of_images(numbers))
    null = jax.tree.map(place, request.condition.null(len(numbers))) if request.guidance.is_on else None
    return model.model_fn(params, cond, null, request.guidance)


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
) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples images of a seed by their numbers; image i depends on (seed, i) and the request alone.

    Args:
      model, params: params on every device of the mesh.
      mesh: the devices to divide each batch over.
      request: what is asked for.
      indices: the images' numbers.
      seed: of the images.
      batch_size: images at a time, rounded up to a multiple of the devices.
      observer: who watches; snapshots are taken of the first batch, and progress counts all of them.

    Returns:
      uint8 [N, H, W, C], and the snapshots uint8 [num_snapshots, first batch, H, W, C] or None.
    """
    observer = observer or Observer()
    numbers = np.asarray(indices)
    batch_size = parallel.rounded(min(batch_size, len(numbers)), mesh)
    batches = -(-len(numbers) // batch_size)
    table = request.steps.table(model.schedule, request.output.variance)

    done, snapshots = [], None
    for batch in range(batches):
        chosen = np.resize(numbers[batch * batch_size : (batch + 1) * batch_size], batch_size)
        watching = dataclasses.replace(
            observer,
            progress=part_of(observer.progress, batch, batches),
            num_snapshots=0 if batch else observer.num_snapshots,
        )
        result = run_table(
            table,
            asked(model, params, request, chosen, mesh),
            image_keys(mesh, seed, "image", chosen),
            (batch_size, *model.decoder.shape),
            output=request.output,
            observer=watching,
        )
        if watching.num_snapshots:
            result, stages = result
            snapshots = model.decoder.decode(stages)
        done.append(model.decoder.decode(result))
    return np.concatenate(done)[: len(numbers)], snapshots


def image_keys(mesh: Mesh, seed: int, purpose: str, numbers: np.ndarray) -> jax.Array:
    """`named_key` of each number, divided over the mesh."""
    return _keys_of(np.uint32(seed), purpose, parallel.place(numbers.astype(np.int32), parallel.batch_sharding(mesh)))


@partial(jax.jit, static_argnames="purpose")
def _keys_of(seed: np.uint32, purpose: str, numbers: jax.Array) -> jax.Array:
    return jax.vmap(lambda number: named_key(seed, purpose, number))(numbers)
