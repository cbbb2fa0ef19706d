"""Feature networks for evaluation: FID's Inception, a classifier of the built-in digits, or any other network."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh
from jax.tree_util import Partial
from safetensors import safe_open

from ddpm_jax.data import digits
from ddpm_jax.evaluation import inception
from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.runtime.batches import Output, in_batches
from ddpm_jax.runtime.errors import UserError, first_line
from ddpm_jax.runtime.files import atomic_path, user_cache
from ddpm_jax.runtime.images import to_float
from ddpm_jax.runtime.progress import ProgressBar

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
_CONVERTED = "pt_inception-2015-12-05.safetensors"
# As with torch.hub, the name ends in the first digits of the file's SHA-256.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8})\.[a-z]+")


@dataclasses.dataclass(frozen=True)
class Features:
    """A network that turns images into features. `custom_features` wraps any function as one.

    Attributes:
      name: of the network, in results.
      frechet: the name of the Frechet distance between these features; only Inception's is called "FID".
      shape: (H, W, C) that images must have; None: any size with three channels.
      apply: (uint8 [B, H, W, C]) -> {"pool": float32 [B, D]} and, if the network has them, "logits" [B, K] for the
        Inception Score and "spatial" [B, E] for sFID. The weights of a `jax.tree_util.Partial` are kept on the devices.
    """

    name: str
    frechet: str
    shape: tuple[int, int, int] | None
    apply: Callable[[jax.Array], Output]

    @functools.cached_property
    def digest(self) -> str:
        """12 hex digits that identify the network: a hash of its name and, for a `Partial`, its weights."""
        digest = hashlib.sha256(json.dumps([self.name, self.frechet, self.shape]).encode())
        for leaf in jax.tree.leaves(self.apply if isinstance(self.apply, Partial) else ()):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()[:12]

    def batches(self, images: Iterable[np.ndarray], mesh: Mesh, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Computes features of images, in batches of equal size sharded over the mesh.

        Args:
          images: portions of any size, uint8 [N, H, W, C] each.
          mesh: from `parallel.make_mesh`, if all processes pass the same images; or this process's own.
          batch_size: images at a time, rounded up to a multiple of the number of devices.

        Yields:
          The results of `apply`, float32 [n, ...], for all images in order.

        Raises:
          UserError: no images; images that are not 8-bit or of the wrong size; features that are not finite.
        """
        apply = self.apply if isinstance(self.apply, Partial) else Partial(self.apply)
        done = 0
        for output in in_batches(apply, map(self._checked, images), mesh, batch_size):
            yield self._finite(output, done)
            done += len(output["pool"])
        if not done:
            raise UserError(f"there are no images for {self.name} to evaluate")

    def of(self, images: Iterable[np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, np.ndarray]:
        """All of `batches` concatenated, float32 [N, ...]."""
        done = list(self.batches(images, mesh, batch_size))
        return {name: np.concatenate([part[name] for part in done]) for name in done[0]}

    def _checked(self, images: np.ndarray) -> np.ndarray:
        if images.dtype != np.uint8 or images.ndim != 4:
            raise UserError(
                f"the images to evaluate are {images.dtype} of shape {images.shape}; accepted: uint8 [N, H, W, C], "
                "from 0 to 255 as in image files"
            )
        if self.shape is None and images.shape[-1] == 1:
            return images.repeat(3, axis=-1)
        if images.shape[1:] != self.shape and (self.shape or images.shape[-1] != 3):
            raise UserError(f"{self.name} takes images of {self.shape or '3 channels'}, not of {images.shape[1:]}")
        return images

    def _finite(self, output: dict[str, np.ndarray], first: int) -> dict[str, np.ndarray]:
        for name, value in output.items():
            finite = np.isfinite(value).reshape(len(value), -1).all(1)
            if not finite.all():
                image = first + int(np.argmin(finite))
                raise UserError(f"{self.name} gives values of {name} that are not finite for image {image}")
        return output


def custom_features(
    name: str, apply: Callable[[jax.Array], jax.Array | Output], shape: tuple[int, int, int] | None = None
) -> Features:
    """Features of any network; their Frechet distance is named after it.

    Args:
      name: of the network, in results.
      apply: (uint8 [B, H, W, C]) -> features [B, D], or a dict as in `Features`; it is jit-compiled.
      shape: (H, W, C) that images must have; None: any size with three channels.
    """
    function = apply if isinstance(apply, Partial) else Partial(apply)
    return Features(name, _frechet_of(name), shape, Partial(_named, function))


def _named(apply: Partial, images: jax.Array) -> Output:
    output = apply(images)
    return output if isinstance(output, dict) else {"pool": output}


def _frechet_of(name: str) -> str:
    return f"Frechet distance ({name})"


# FID's Inception.


def load_inception(path: str | Path | None = None) -> Features:
    """Loads FID's Inception; the network is the same whatever file its weights come from.

    Args:
      path: the PyTorch port's file, or a .safetensors with its tensors. None: the one in `files.user_cache()`,
        downloaded from INCEPTION_URL the first time and kept there as .safetensors.

    Raises:
      UserError: no such file, with what to download and where to put it; or a file that is truncated, does not match
        the hash in its name, or does not contain these weights.
    """
    if path is None:
        path, tensors, digest = _cached_inception()
    else:
        path = Path(path).expanduser()
        if not path.is_file():
            raise UserError(f"{str(path)!r} does not exist; download {INCEPTION_URL} and put it there")
        tensors, digest = _read_checked(path)
    return _inception(path, tensors, digest)


def _inception(path: Path, tensors: tensors_lib.Tensors, digest: str) -> Features:
    params = inception.params_of(path, tensors)
    apply = Partial(inception.InceptionV3().apply, {"params": params})
    return Features(f"Inception v3 ({digest[:8]})", "FID", None, apply)


def _read_checked(path: Path) -> tuple[tensors_lib.Tensors, str]:
    """A file's tensors and the SHA-256 of the published file, which for a converted file is the original's."""
    digest = _check_hash(path, path.name)
    tensors = tensors_lib.read(path)
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            digest = (file.metadata() or {}).get("sha256", digest)
    return tensors, digest


def _cached_inception() -> tuple[Path, tensors_lib.Tensors, str]:
    converted, original = user_cache() / _CONVERTED, user_cache() / INCEPTION_FILE
    if converted.is_file():
        try:
            return (converted, *_read_checked(converted))
        except UserError as error:
            logging.warning("%s; it is replaced", error)
    if not original.is_file():
        _fetch(INCEPTION_URL, original)
    tensors, digest = _read_checked(original)
    try:
        tensors_lib.write(converted, tensors, {"sha256": digest, "source": INCEPTION_URL})
    except UserError as error:  # an unwritable cache must not stop the evaluation
        logging.warning("%s", error)
    return original, tensors, digest


def _fetch(url: str, path: Path) -> None:
    """Downloads a file atomically."""
    import requests

    try:
        with requests.get(url, stream=True, timeout=30) as response, atomic_path(path) as temporary:
            response.raise_for_status()
            total = int(response.headers.get("content-length", 0))
            with ProgressBar(f"fetching {path.name}", total) as bar, temporary.open("wb") as file:
                for chunk in response.iter_content(1 << 20):
                    file.write(chunk)
                    bar.update(file.tell())
            _check_hash(temporary, path.name)
    except (requests.RequestException, OSError) as error:
        raise UserError(
            f"{str(path)!r} does not exist and {url} cannot be downloaded ({first_line(error)[:200]}); download it on "
            "a machine with a network and put it there"
        ) from None


def _check_hash(path: Path, name: str) -> str:
    """The SHA-256 of a file, which must begin with the digits in its name, if there are any."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    named = _HASH_IN_NAME.search(name)
    if named and not digest.startswith(named[1]):
        raise UserError(
            f"{name!r} is damaged or a different file: its SHA-256 begins with {digest[:8]}, not with {named[1]} as in "
            "its name"
        )
    return digest


# The built-in digits' classifier.


class _Classifier(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array) -> Output:
        x = to_float(images).reshape(len(images), -1)
        x = nn.swish(nn.Dense(256)(x))
        x = nn.swish(nn.Dense(64)(x))
        return {"pool": x, "logits": nn.Dense(10)(x)}


@functools.cache
def train_digits_classifier(count: int = 1, steps: int = 400) -> Features:
    """Trains a classifier of the built-in digits, 8x8 grey, in seconds; always the same on the same machine.

    It lets an evaluation run from end to end without any download. Its distances are only comparable with one another.
    For `count` digits side by side the features are those of each digit in turn, and there are no logits.
    """
    images, labels = digits.load()
    net, optimizer = _Classifier(), optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def train() -> dict:
        params = net.init(jax.random.key(0), images[:1])["params"]

        def step(carry, key):
            params, state = carry
            chosen = jax.random.randint(key, (128,), 0, len(images))
            x, y = jnp.asarray(images)[chosen], jnp.asarray(labels)[chosen]

            def loss(params):
                output: Any = net.apply({"params": params}, x)
                return optax.softmax_cross_entropy_with_integer_labels(output["logits"], y).mean()

            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(
            step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), steps)
        )
        return params

    name = "digits classifier" if count == 1 else f"digits classifier, {count} side by side"
    apply = net.apply if count == 1 else functools.partial(_of_each_digit, net)
    return Features(name, _frechet_of(name), (8, 8 * count, 1), Partial(apply, {"params": train()}))


def _of_each_digit(net: nn.Module, variables: Any, images: jax.Array) -> Output:
    count = images.shape[2] // 8
    pieces = jnp.concatenate(jnp.split(images, count, axis=2))
    output: Any = net.apply(variables, pieces)
    return {"pool": jnp.concatenate(jnp.split(output["pool"], count), axis=-1)}


def open_features(name: str | None, shape: tuple[int, int, int] | None = None) -> Features:
    """Opens features by name: "digits", "inception", or a file with Inception's weights; None: chosen by image shape.

    Raises:
      UserError: none of these.
    """
    count = digits.side_by_side(shape)
    if name == "digits" or (name is None and count):
        return train_digits_classifier(count or 1)
    return load_inception(None if name in (None, "inception") else name)
