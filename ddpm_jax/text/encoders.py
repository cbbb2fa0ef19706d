"""Texts as the arrays that a network is conditioned on, by an encoder that is trained along or one that is frozen."""

import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.models.captioned import Captioned
from ddpm_jax.models.clip import CLIPTextEncoder
from ddpm_jax.text.tokenizers import Tokenizer

Shapes = Mapping[str, jax.ShapeDtypeStruct]
_CHUNK = 32  # texts that a frozen encoder takes at a time


class Texts(Protocol):
    """How texts reach a network.

    Attributes:
      tokenizer: of the texts.
      shapes: of the arrays of one text, by their names in `cond`.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def shapes(self) -> Shapes: ...

    def arrays(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The entries of `cond` for these texts, a row each."""
        ...

    def network(self, net: nn.Module) -> nn.Module:
        """The network that takes them, around one that takes an encoder's states."""
        ...


@dataclasses.dataclass(frozen=True)
class TrainedTexts:
    """Token ids, for an encoder whose parameters are a part of the network's.

    Attributes:
      tokenizer: of the texts.
      encoder: called (ids, mask), such as a `TextEncoder`.
    """

    tokenizer: Tokenizer
    encoder: nn.Module

    @property
    def shapes(self) -> Shapes:
        length = (self.tokenizer.max_length,)
        return {"ids": jax.ShapeDtypeStruct(length, jnp.int32), "ids_mask": jax.ShapeDtypeStruct(length, jnp.bool_)}

    def arrays(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        tokens = self.tokenizer.encode(texts)
        return {"ids": tokens.ids, "ids_mask": tokens.mask}

    def network(self, net: nn.Module) -> nn.Module:
        return Captioned(net, self.encoder)


@dataclasses.dataclass(frozen=True)
class FrozenTexts:
    """The states of a frozen encoder. Each text is encoded once, when it is first needed, and cached.

    Attributes:
      tokenizer: of the texts.
      encoder: CLIP's.
      open_params: reads the encoder's parameters when they are first needed.
      cache_bytes: the size of the cache, from which the least recently used texts are dropped.
    """

    tokenizer: Tokenizer
    encoder: CLIPTextEncoder
    open_params: Callable[[], Any]
    cache_bytes: int = 2 << 30
    _lock: Any = dataclasses.field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @property
    def shapes(self) -> Shapes:
        length, width = self.tokenizer.max_length, self.encoder.width
        return {
            "tokens": jax.ShapeDtypeStruct((length, width), jnp.float32),
            "tokens_mask": jax.ShapeDtypeStruct((length,), jnp.bool_),
            "vector": jax.ShapeDtypeStruct((self.encoder.projection or width,), jnp.float32),
        }

    def network(self, net: nn.Module) -> nn.Module:
        return net

    def arrays(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        with self._lock:  # training reads batches in a thread of its own
            found = {text: self._kept[text] for text in texts if text in self._kept}
            missing = [text for text in dict.fromkeys(texts) if text not in found]
            for first in range(0, len(missing), _CHUNK):
                chunk = missing[first : first + _CHUNK]
                found |= zip(chunk, self._encoded(chunk), strict=True)
            for text, states in found.items():
                self._kept[text] = states
                self._kept.move_to_end(text)
            while len(self._kept) > max(self._most, 1):
                self._kept.popitem(last=False)
        return {name: np.stack([found[text][name] for text in texts]) for name in self.shapes}

    def _encoded(self, texts: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """The states of at most _CHUNK texts; the last is repeated, so that one program does for any number."""
        tokens = self.tokenizer.encode([*texts, *[texts[-1]] * (_CHUNK - len(texts))])
        # A training step has the empty text's states as a constant, so this may be called while the step is traced.
        with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
            states, vectors = (np.asarray(x) for x in self._apply(self._params, tokens.ids, tokens.mask))
        rows = zip(states, tokens.mask, vectors, strict=True)
        return [dict(zip(self.shapes, row, strict=True)) for row in list(rows)[: len(texts)]]

    @functools.cached_property
    def _params(self) -> Any:
        return jax.device_put(self.open_params(), jax.local_devices()[0])

    @functools.cached_property
    def _apply(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        def apply(params: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
            states: Any = self.encoder.apply({"params": params}, ids, mask)
            return states.tokens, states.pooled if states.projected is None else states.projected

        return jax.jit(apply)

    @functools.cached_property
    def _kept(self) -> "OrderedDict[str, dict[str, np.ndarray]]":
        return OrderedDict()

    @property
    def _most(self) -> int:
        """How many texts fit into the cache."""
        return self.cache_bytes // sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in self.shapes.values())
