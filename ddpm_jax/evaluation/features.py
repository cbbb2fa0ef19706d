"""Networks whose features images are judged by: FID's Inception, and a small classifier of the embedded digits."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ddpm_jax import parallel
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import inception
from ddpm_jax.evaluation.batches import regroup
from ddpm_jax.interop import tensors as tensors_lib

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"

Output = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Features:
    """A network that turns images into features.

    Attributes:
      name: what results say they were judged by.
      frechet: what the Frechet distance of these features is called; "FID" is Inception's alone.
      shape: (H, W, C) that images must have; None: any size of three channels.
      apply: (uint8 [B, H, W, C]) -> {"pool": float32 [B, D], "logits": float32 [B, K]} and more of float32 [B, ...].
    """

    name: str
    frechet: str
    shape: tuple[int, int, int] | None
    apply: Callable[[jax.Array], Output]

    def of(self, batches: Iterable[np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, np.ndarray]:
        """All features of images that come in any portions, in batches of one size divided over the mesh.

        Args:
          batches: uint8 [N, H, W, C] each.
          mesh: of `parallel.make_mesh`.
          batch_size: images at a time, rounded up to a multiple of the devices.

        Returns:
          What `apply` gives, of all images, as float32 [N, ...].
        """
        devices = mesh.devices.size
        size = -(-batch_size // devices) * devices
        run = jax.jit(self.apply, in_shardings=parallel.batch_sharding(mesh), out_shardings=parallel.replicated(mesh))
        done: list[dict[str, np.ndarray]] = []
        for images in regroup(batches, size):
            padded = np.resize(images, (size, *images.shape[1:])) if len(images) < size else images
            done.append({name: np.asarray(value)[: len(images)] for name, value in run(self._fit(padded)).items()})
        return {name: np.concatenate([part[name] for part in done]) for name in done[0]}

    def _fit(self, images: np.ndarray) -> np.ndarray:
        if self.shape is None:
            return images.repeat(3, axis=-1) if images.shape[-1] == 1 else images
        if images.shape[1:] != self.shape:
            raise UserError(f"{self.name} judges images of {self.shape}, not of {images.shape[1:]}")
        return images


def load_inception(path: str | Path) -> Features:
    """FID's Inception with the weights of the PyTorch port's file.

    Raises:
      UserError: no such file, with a word where to get it; or one that does not hold these weights.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{str(path)!r} is not there; fetch {INCEPTION_URL} and put it there")
    params = inception.params_of(path, tensors_lib.read(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    apply: Any = partial(inception.InceptionV3().apply, {"params": params})
    return Features(f"Inception v3 of {path.name} ({digest})", "FID", None, apply)


class _Classifier(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array) -> Output:
        x = images.reshape(len(images), -1).astype(jnp.float32) / 127.5 - 1.0
        x = nn.swish(nn.Dense(256)(x))
        x = nn.swish(nn.Dense(64)(x))
        return {"pool": x, "logits": nn.Dense(10)(x)}


def train_digits_classifier(steps: int = 400) -> Features:
    """A classifier of the embedded digits, 8x8 grey, trained here in seconds; always the same on the same machine.

    It lets an evaluation run from end to end with nothing to download. Its distances are its own, and comparable among
    themselves alone.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    net, optimizer = _Classifier(), optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def train() -> dict:
        params = net.init(jax.random.key(0), images[:1])["params"]

        def step(carry, key):
            params, state = carry
            chosen = jax.random.randint(key, (128,), 0, len(images))
            x, y = jnp.asarray(images)[chosen], jnp.asarray(digits.target)[chosen]

            def loss(params):
                output: Any = net.apply({"params": params}, x)
                return optax.softmax_cross_entropy_with_integer_labels(output["logits"], y).mean()

            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(
            step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), steps)
        )
        return params

    apply: Any = partial(net.apply, {"params": train()})
    return Features("digits classifier", "Frechet distance (digits classifier)", (8, 8, 1), apply)
