"""Images from trained weights, in batches over all devices: what training, `Run` and the command line share."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import ArrayLike

from ddpm_jax.diffusion import guidance
from ddpm_jax.diffusion.samplers import Progress, sample
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime import images, parallel
from ddpm_jax.runtime.progress import part_of
from ddpm_jax.runtime.rng import named_key


def make_model_fn(
    net: UNet,
    params: Any,
    labels: ArrayLike | None = None,
    *,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    guidance_interval: Sequence[int] = (),
) -> jax.tree_util.Partial:
    """(x_t, t) -> the network's output, for the functions of `ddpm_jax.diffusion`.

    Args:
      net, params: the trained network.
      labels: int32 [B], the classes of a class-conditional network; None: no class.
      guidance_scale, guidance_rescale, guidance_interval: see `guided`; a scale of 1 costs nothing.
    """
    if net.num_classes is None or labels is None:
        return jax.tree_util.Partial(net.apply, {"params": params})
    cond = {"label": labels}
    if guidance_scale == 1.0:
        return jax.tree_util.Partial(net.apply, {"params": params}, cond=cond)
    return guidance.guided(
        jax.tree_util.Partial(net.apply, {"params": params}),
        cond,
        {"label": jnp.full_like(labels, net.num_classes)},
        guidance_scale,
        rescale=guidance_rescale,
        interval=guidance_interval or guidance.NO_LIMIT,
    )


def generate(
    net: UNet,
    schedule: Schedule,
    params: Any,
    mesh: Mesh,
    *,
    shape: Sequence[int],
    indices: Sequence[int],
    seed: int,
    batch_size: int,
    labels: Sequence[int] = (),
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    guidance_interval: Sequence[int] = (),
    num_snapshots: int = 0,
    progress: Progress | None = None,
    **sampling_options: Any,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples images of a seed by their numbers; image i depends on (seed, i) and the settings alone.

    Args:
      net, schedule, params: the trained network; params on every device of the mesh.
      mesh: the devices to divide each batch over.
      shape: (H, W, C).
      indices: the images' numbers.
      seed: of the images.
      batch_size: images at a time, rounded up to a multiple of the devices.
      labels: classes for a class-conditional network, repeated for as long as there are images; none: every class in
        turn.
      guidance_scale, guidance_rescale, guidance_interval: see `guided`.
      num_snapshots: how many stages of the denoising to return of the first batch; see `sample`.
      progress: told (network calls done, calls in all).
      sampling_options: of `sample`.

    Returns:
      uint8 [N, H, W, C], and the snapshots uint8 [num_snapshots, first batch, H, W, C] or None.
    """
    numbers = np.asarray(indices)
    batch_size = parallel.rounded(min(batch_size, len(numbers)), mesh)
    batches = -(-len(numbers) // batch_size)

    rows = parallel.batch_sharding(mesh)
    done, snapshots = [], None
    for batch in range(batches):
        chosen = np.resize(numbers[batch * batch_size : (batch + 1) * batch_size], batch_size)
        result = sample(
            schedule,
            make_model_fn(
                net,
                params,
                None if net.num_classes is None else parallel.place(labels_of(net, chosen, labels), rows),
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                guidance_interval=guidance_interval,
            ),
            image_keys(mesh, seed, "image", chosen),
            (batch_size, *shape),
            num_snapshots=num_snapshots if batch == 0 else 0,
            progress=part_of(progress, batch, batches),
            **sampling_options,
        )
        if num_snapshots and batch == 0:
            result, stages = result
            snapshots = images.to_uint8(to_host(stages))
        done.append(images.to_uint8(to_host(result)))
    return np.concatenate(done)[: len(numbers)], snapshots


def labels_of(net: UNet, indices: Sequence[int] | np.ndarray, labels: Sequence[int] = ()) -> np.ndarray:
    """int32 [N], the classes of the images of these numbers: the labels, or else all classes, in turn."""
    classes = np.array(list(labels) or list(range(net.num_classes or 1)), np.int32)
    return classes[np.asarray(indices) % len(classes)]


def image_keys(mesh: Mesh, seed: int, purpose: str, numbers: np.ndarray) -> jax.Array:
    """`named_key` of each number, divided over the mesh."""
    return _keys_of(np.uint32(seed), purpose, parallel.place(numbers.astype(np.int32), parallel.batch_sharding(mesh)))


@partial(jax.jit, static_argnames="purpose")
def _keys_of(seed: np.uint32, purpose: str, numbers: jax.Array) -> jax.Array:
    return jax.vmap(lambda number: named_key(seed, purpose, number))(numbers)


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array on every process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(jnp.asarray(x), tiled=True))
