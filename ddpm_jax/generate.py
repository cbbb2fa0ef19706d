"""Images from trained weights, in batches over all devices: what training, `Run` and the command line share."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ddpm_jax import images, parallel
from ddpm_jax.diffusion.samplers import sample
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.models.unet import UNet
from ddpm_jax.rng import named_key


def generate(
    net: UNet,
    schedule: Schedule,
    params: Any,
    mesh: Mesh,
    *,
    shape: Sequence[int],
    num_images: int,
    seed: int,
    batch_size: int,
    labels: Sequence[int] = (),
    num_snapshots: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **sampling_options: Any,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples images 0 .. num_images - 1 of a seed; image i depends on (seed, i) and the settings alone.

    Args:
      net, schedule, params: the trained network; params on every device of the mesh.
      mesh: the devices to divide each batch over.
      shape: (H, W, C).
      num_images, seed: how many of which seed.
      batch_size: images at a time, rounded up to a multiple of the devices.
      labels: classes for a class-conditional network, repeated for as long as there are images; none: every class in
        turn.
      num_snapshots: how many stages of the denoising to return of the first batch; see `sample`.
      progress: told how many images are done.
      sampling_options: of `sample`.

    Returns:
      uint8 [num_images, H, W, C], and the snapshots uint8 [num_snapshots, first batch, H, W, C] or None.
    """
    devices = mesh.devices.size
    batch_size = min(batch_size, num_images)
    batch_size = -(-batch_size // devices) * devices
    divided = parallel.batch_sharding(mesh)
    make_keys = jax.jit(jax.vmap(lambda index: named_key(seed, "image", index)), out_shardings=divided)
    make_labels = jax.jit(lambda values: values, out_shardings=divided)
    labels = list(labels) or list(range(net.num_classes or 1))

    done, snapshots = [], None
    for first in range(0, num_images, batch_size):
        indices = np.arange(first, first + batch_size)
        cond = None
        if net.num_classes is not None:
            cond = {"label": make_labels(np.array([labels[i % len(labels)] for i in indices], np.int32))}
        result: Any = sample(
            schedule,
            jax.tree_util.Partial(net.apply, {"params": params}, cond=cond),
            make_keys(indices),
            (batch_size, *shape),
            num_snapshots=num_snapshots if first == 0 else 0,
            **sampling_options,
        )
        if num_snapshots and first == 0:
            result, stages = result
            snapshots = images.to_uint8(_to_host(stages))
        done.append(images.to_uint8(_to_host(result)))
        progress(min(first + batch_size, num_images), num_images)
    return np.concatenate(done)[:num_images], snapshots


def _to_host(x: jax.Array) -> np.ndarray:
    """The whole array on every process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(jnp.asarray(x), tiled=True))
