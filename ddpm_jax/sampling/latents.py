"""The decoder of latent diffusion (Rombach et al. 2022): an autoencoder's latents are diffused instead of pixels."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ddpm_jax.models.autoencoder import Autoencoder, param_shapes
from ddpm_jax.runtime import images, memory, parallel
from ddpm_jax.runtime.cache import Cache
from ddpm_jax.runtime.errors import UserError

_PIXELS = 2**18  # pixels that a device encodes or decodes at a time, or a single larger picture


@dataclasses.dataclass(frozen=True)
class Latents:
    """The latents of a frozen autoencoder, scaled to about unit variance.

    Training draws new latents from the autoencoder's posterior at each step. Edits take its mean, so a picture always
    has the same latents. The posterior of a training image, and of its mirror image if training flips, is computed
    once and cached.

    Attributes:
      picture_shape: (H, W, C); H and W divisible by the autoencoder's `downscaling`.
      autoencoder: the module.
      open_params: reads its parameters at their first use.
      scaling_factor: multiplies its latents.
      flip: whether training mirrors half of the images left to right.
      cache_bytes: of the cache.
    """

    picture_shape: tuple[int, int, int]
    autoencoder: Autoencoder
    open_params: Callable[[], Any]
    scaling_factor: float
    flip: bool = False
    cache_bytes: int = 2 << 30

    @property
    def shape(self) -> tuple[int, ...]:
        height, width, _ = self.picture_shape
        factor = self.autoencoder.downscaling
        return (height // factor, width // factor, self.autoencoder.latent_channels)

    @property
    def reads(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Mean and standard deviation of each image's posterior, followed by those of its mirror image."""
        return {"posterior": jax.ShapeDtypeStruct((2 if self.flip else 1, 2, *self.shape), jnp.float32)}

    def of_size(self, height: int, width: int) -> "Latents":
        factor = self.autoencoder.downscaling
        if min(height, width) < factor or height % factor or width % factor:
            raise UserError(f"height and width are {height} and {width}; accepted: multiples of {factor}")
        return dataclasses.replace(self, picture_shape=(height, width, self.picture_shape[-1]))

    def read(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        pictures = dict(zip(batch["index"].tolist(), batch["image"], strict=True))

        def posteriors(numbers: list[int]) -> np.ndarray:
            chosen = np.stack([pictures[number] for number in numbers])
            both = (chosen, chosen[:, :, ::-1]) if self.flip else (chosen,)
            return np.stack([np.stack(self._posterior(x, len(batch["index"])), axis=1) for x in both], axis=1)

        return {"posterior": np.stack(self._cache(batch["index"].tolist(), posteriors))}

    def of_batch(self, batch: Mapping[str, jax.Array], key: Callable[[str], jax.Array]) -> jax.Array:
        posterior = batch["posterior"]
        if self.flip:
            mirrored = jax.random.bernoulli(key("flip"), shape=posterior.shape[:1])
            posterior = jnp.where(mirrored.reshape(-1, *[1] * (posterior.ndim - 2)), posterior[:, 1], posterior[:, 0])
        else:
            posterior = posterior[:, 0]
        mean, deviation = posterior[:, 0], posterior[:, 1]
        return self.scaling_factor * (mean + deviation * jax.random.normal(key("posterior"), mean.shape))

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        return self.scaling_factor * self._posterior(pictures)[0]

    def encode_known(self, pictures: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """The latents of pictures with grey under the mask, bool [N, H, W, 1]."""
        known = np.where(masks, np.float32(0), images.to_float(pictures))
        return self.scaling_factor * self._by_chunks("encode", known)[0]

    def encode_mask(self, masks: np.ndarray) -> np.ndarray:
        """A latent is under the mask if any of its pixels is."""
        height, width, _ = self.shape
        factor = self.autoencoder.downscaling
        blocks = masks.reshape(len(masks), height, factor, width, factor, 1)
        return np.asarray(blocks.any(axis=(2, 4)))

    def decode(self, x_0: Any) -> np.ndarray:
        lead = np.shape(x_0)[: -len(self.shape)]
        mesh = x_0.sharding.mesh if isinstance(getattr(x_0, "sharding", None), NamedSharding) else None
        latents = parallel.to_host(x_0).reshape(-1, *self.shape) / self.scaling_factor
        pictures = self._by_chunks("decode", latents, mesh)
        return images.to_uint8(pictures).reshape(*lead, *self.picture_shape)

    def param_shapes(self) -> Any:
        """The autoencoder's parameters as `jax.ShapeDtypeStruct`s."""
        return param_shapes(self.autoencoder)

    def program(self, method: str) -> Callable[..., Any]:
        """(params, x) -> the result of the autoencoder's "encode" or "decode"."""
        return functools.partial(_apply, self.autoencoder, method)

    def at_a_time(self, count: int, mesh: Mesh) -> int:
        """How many of `count` pictures to encode or decode at a time, to bound the memory."""
        height, width, _ = self.picture_shape
        return parallel.rounded(min(max(_PIXELS // (height * width), 1) * mesh.size, count), mesh)

    def _posterior(self, pictures: np.ndarray, batch_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the latents of uint8 pictures, not scaled.

        The size of the chunks follows from `batch_size`, the size of the batch that the pictures are part of, so that
        the same program encodes them however many of the batch are cached.
        """
        mean, log_variance = self._by_chunks("encode", images.to_float(pictures), batch_size=batch_size)
        return mean, np.exp(0.5 * log_variance)

    def _by_chunks(self, method: str, x: np.ndarray, mesh: Mesh | None = None, batch_size: int = 1) -> Any:
        """Calls the autoencoder's method in chunks, to bound the memory; the last chunk is padded."""
        mesh = parallel.make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
        size, program = self.at_a_time(max(len(x), batch_size), mesh), self.program(method)
        size = parallel.cacheable_chunk(size) if method == "encode" else size
        place, done = functools.partial(parallel.place, sharding=parallel.batch_sharding(mesh)), []
        with jax.transfer_guard("allow"):
            params = self._params_on(mesh)
            for first in range(0, len(x), size):
                chunk = np.resize(np.arange(first, min(first + size, len(x))), size)
                found = program(params, place(x[chunk]))
                done.append(jax.tree.map(parallel.to_host, found))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(x)], *done)

    @functools.cached_property
    def _cache(self) -> "Cache[int, np.ndarray]":
        (posterior,) = self.reads.values()
        return Cache(self.cache_bytes // (4 * int(np.prod(posterior.shape))))

    @functools.cached_property
    def _placed(self) -> dict[Mesh, Any]:
        return {}

    def _params_on(self, mesh: Mesh) -> Any:
        if mesh not in self._placed:
            memory.return_freed_memory()  # of the network, whose calls have ended when pictures are decoded
            self._placed[mesh] = jax.device_put(self.open_params(), parallel.replicated(mesh))
        return self._placed[mesh]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(autoencoder: Autoencoder, method: str, params: Any, x: jax.Array) -> Any:
    return autoencoder.apply({"params": params}, x, method=method)
