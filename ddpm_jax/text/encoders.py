"""Texts as the arrays that a network is conditioned on, with a text encoder that is either trained or frozen."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.models.captioned import Captioned
from ddpm_jax.runtime import memory, parallel
from ddpm_jax.runtime.cache import Cache
from ddpm_jax.text.tokenizers import Tokenizer

Shapes = Mapping[str, jax.ShapeDtypeStruct]
_CHUNK = 2  # batch size of a frozen encoder, as for a prompt and its negative; a single text is padded to it


class Texts(Protocol):
    """How texts condition a network.

    Attributes:
      tokenizer: of the texts.
      shapes: the shapes of one text's arrays, by their names in `cond`.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def shapes(self) -> Shapes: ...

    def arrays(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The entries of `cond` for these texts, one row per text."""
        ...

    def network(self, net: nn.Module) -> nn.Module:
        """Wraps a network that takes an encoder's states as one that takes these entries."""
        ...


@dataclasses.dataclass(frozen=True)
class TrainedTexts:
    """Token ids, for an encoder whose parameters are part of the network's.

    Attributes:
      tokenizer: of the texts.
      encoder: called with (ids, mask), such as a `TextEncoder`.
      mask_padding, pooled: as in `FrozenTexts`.
      encode_padding: whether the encoder treats padding like other tokens.
    """

    tokenizer: Tokenizer
    encoder: nn.Module
    mask_padding: bool = True
    pooled: bool = True
    encode_padding: bool = False

    @property
    def shapes(self) -> Shapes:
        length = (self.tokenizer.max_length,)
        return {"ids": jax.ShapeDtypeStruct(length, jnp.int32), "ids_mask": jax.ShapeDtypeStruct(length, jnp.bool_)}

    def arrays(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        tokens = self.tokenizer.encode(texts)
        return {"ids": tokens.ids, "ids_mask": tokens.mask}

    def network(self, net: nn.Module) -> nn.Module:
        return Captioned(net, self.encoder, self.mask_padding, self.pooled, self.encode_padding)


class Encoder(Protocol):
    """An encoder as `FrozenTexts` needs it: called with (ids, mask), it returns `TextStates`.

    Attributes:
      width: width of the tokens' states.
      vector_width: width of the state of the whole text.
    """

    @property
    def width(self) -> int: ...

    @property
    def vector_width(self) -> int: ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class FrozenTexts:
    """The states of a frozen encoder. Each text is encoded once, when it is first needed, and cached.

    Attributes:
      tokenizer: of the texts.
      encoder: CLIP's or T5's.
      open_params: reads the encoder's parameters when they are first needed.
      cache_bytes: size of the cache, which drops the least recently used texts.
      mask_padding: whether the network attends only to a text's tokens; Stable Diffusion's also attends to padding.
      pooled: whether the network takes the state of the whole text, as "vector".
      mask_in_encoder: whether the encoder ignores padding even if the network attends to it.
    """

    tokenizer: Tokenizer
    encoder: Encoder
    open_params: Callable[[], Any]
    cache_bytes: int = 2 << 30
    mask_padding: bool = True
    pooled: bool = True
    mask_in_encoder: bool = False

    @property
    def shapes(self) -> Shapes:
        length, width = self.tokenizer.max_length, self.encoder.width
        shapes = {"tokens": jax.ShapeDtypeStruct((length, width), jnp.float32)}
        if self.mask_padding:
            shapes["tokens_mask"] = jax.ShapeDtypeStruct((length,), jnp.bool_)
        if self.pooled:
            shapes["vector"] = jax.ShapeDtypeStruct((self.encoder.vector_width,), jnp.float32)
        return shapes

    def network(self, net: nn.Module) -> nn.Module:
        return net

    def trained(self) -> TrainedTexts:
        """The same states, from an encoder whose parameters are part of the network's."""
        assert isinstance(self.encoder, nn.Module)
        return TrainedTexts(self.tokenizer, self.encoder, self.mask_padding, self.pooled, not self._is_masked)

    def arrays(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        rows = self._cache(texts, self._made)
        return {name: np.stack([row[name] for row in rows]) for name in self.shapes}

    def _made(self, texts: list[str]) -> list[dict[str, np.ndarray]]:
        size = parallel.cacheable_chunk(_CHUNK)
        chunks = (texts[first : first + size] for first in range(0, len(texts), size))
        return [states for chunk in chunks for states in self._encoded(chunk, size)]

    def _encoded(self, texts: Sequence[str], size: int) -> list[dict[str, np.ndarray]]:
        """The states of at most `size` texts; the last is repeated, so that one program serves any number."""
        tokens = self.tokenizer.encode([*texts, *[texts[-1]] * (size - len(texts))])
        mask = tokens.mask if self._is_masked else None
        # The empty text's states are a constant of the training step, so this may run while the step is traced.
        with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
            states, vectors = (np.asarray(x) for x in self._apply(self._params, tokens.ids, mask))
        found = {"tokens": states, "tokens_mask": tokens.mask, "vector": vectors}
        return [{name: found[name][row] for name in self.shapes} for row in range(len(texts))]

    @property
    def _is_masked(self) -> bool:
        """Whether the encoder ignores padding. If the network attends to padding, the encoder usually does as well."""
        return self.mask_padding or self.mask_in_encoder

    @functools.cached_property
    def _params(self) -> Any:
        params = jax.device_put(self.open_params(), jax.local_devices()[0])
        memory.return_freed_memory()
        return params

    @functools.cached_property
    def _apply(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        def apply(params: Any, ids: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            states: Any = self.encoder.apply({"params": params}, ids, mask)
            return states.tokens, states.pooled if states.projected is None else states.projected

        return jax.jit(apply)

    @functools.cached_property
    def _cache(self) -> Cache[str, dict[str, np.ndarray]]:
        size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in self.shapes.values())
        return Cache(self.cache_bytes // size)
