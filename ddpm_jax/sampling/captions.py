"""The condition of runs that were trained on captions: texts, whose states the network attends to."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ddpm_jax.data.source import Source
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.condition import Batch, Cond, Control, refuse_others
from ddpm_jax.text.encoders import Texts

_MOST_LISTED = 64  # prompts listed in the settings; for more, they have a digest
_MOST_TOLD = 8  # cut prompts that are named; more are counted


@dataclasses.dataclass(frozen=True)
class CaptionCondition:
    """A text; the empty text is the null condition.

    Attributes:
      texts: the tokenizer and the encoder.
      dropout: the share of training examples whose caption is dropped.
      shown: captions of the training set, for images without a prompt, in turn.
      prompts: of the request, repeated for all images.
      negative_prompts: the same for the null side of guidance, instead of the empty text.
    """

    texts: Texts
    dropout: float = 0.0
    shown: tuple[str, ...] = ("",)
    prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()

    @property
    def reads(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return self.texts.shapes

    @property
    def is_said(self) -> bool:
        return bool(self.prompts)

    @property
    def rows(self) -> int:
        return len(self.prompts)

    @property
    def can_be_left_out(self) -> bool:
        return self.dropout > 0

    @property
    def cannot_guide(self) -> str:
        return "" if self.dropout else "it needs a run with a text.dropout above 0"

    @property
    def only_guided(self) -> str:
        return "a negative prompt" if self.negative_prompts else ""

    def network_options(self) -> dict[str, Any]:
        return {}

    def network(self, net: nn.Module) -> nn.Module:
        return self.texts.network(net)

    def read(self, batch: Batch, source: Source, draws: np.ndarray | None = None) -> Batch:
        of_images = [source.captions[index] for index in batch["index"].tolist()]
        chosen = np.zeros(len(of_images), np.uint64) if draws is None else draws
        picked = [several[int(draw % len(several))] for several, draw in zip(of_images, chosen, strict=True)]
        return {**batch, **self.texts.arrays(picked)}

    def of_batch(self, batch: Batch) -> dict[str, Any]:
        return {name: batch[name] for name in self.reads}

    def of_training(self, batch: Batch, key: Callable[[str], jax.Array]) -> Cond:
        cond = self.of_batch(batch)
        if not self.dropout:
            return cond
        count = len(next(iter(cond.values())))
        dropped = jax.random.bernoulli(key("caption_dropout"), self.dropout, (count,))
        null = self.texts.arrays([""])
        return {
            name: jnp.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), null[name], value)
            for name, value in cond.items()
        }

    def say(self, **said: Sequence[Any]) -> "CaptionCondition":
        refuse_others(said, "prompts", "negative_prompts")
        given: dict[str, Any] = {
            name: _checked(name, said[name]) for name in ("prompts", "negative_prompts") if len(said.get(name, ()))
        }
        for prompts in given.values():
            _tell_what_is_cut(self.texts, prompts)
        return dataclasses.replace(self, **given)

    def require(self) -> None:
        if not self.prompts:
            raise UserError("guidance needs a prompt to steer towards; give one")

    def of_images(self, numbers: np.ndarray) -> Cond:
        """Without prompts, the captions `shown`, in turn."""
        return self._rows(self.prompts or self.shown, numbers)

    def null(self, count: int) -> Cond:
        if not self.can_be_left_out:
            raise UserError("this run was not trained to work without a caption (text.dropout is 0); give a prompt")
        return self._rows(self.negative_prompts or ("",), np.arange(count))

    def _rows(self, texts: Sequence[str], numbers: np.ndarray) -> dict[str, np.ndarray]:
        of_images = np.asarray(numbers) % len(texts)
        needed, rows = np.unique(of_images, return_inverse=True)
        arrays = self.texts.arrays([texts[i] for i in needed.tolist()])
        return {name: values[rows] for name, values in arrays.items()}

    def settings(self) -> dict[str, Any]:
        return {"prompts": _listed(self.prompts), "negative_prompts": _listed(self.negative_prompts)}

    def record(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        texts = self.prompts or self.shown
        return {"prompt": np.array([texts[i] for i in (np.asarray(numbers) % len(texts)).tolist()])}

    def controls(self) -> list[Control]:
        prompt = Control("prompt", "Prompt", suggestions=[*dict.fromkeys(filter(None, self.shown))])
        negative = Control("negative_prompt", "Negative prompt", only_guided=True)
        return [prompt, negative] if self.dropout else [prompt]


def _checked(name: str, prompts: Sequence[Any]) -> tuple[str, ...]:
    if isinstance(prompts, str):
        raise UserError(f"{name} is the text {prompts[:40]!r}; accepted: a list of texts")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserError(f"{name}[{number}] is {prompt!r}; accepted: texts")
        if "\0" in prompt:
            raise UserError(f"{name}[{number}], {prompt[:40]!r}, contains a NUL character, which texts may not contain")
    return tuple(prompts)


def _tell_what_is_cut(texts: Texts, prompts: tuple[str, ...]) -> None:
    length = texts.tokenizer.max_length
    found = [(prompt, cut) for prompt, cut in zip(prompts, texts.tokenizer.encode(prompts).cut, strict=True) if cut]
    for prompt, cut in found[:_MOST_TOLD]:
        shown = cut if len(cut) <= 200 else f"{cut[:100]} ... {cut[-100:]}"
        _tell_once(f"The prompt {prompt[:60]!r} is longer than {length} tokens; this end of it is cut off: {shown!r}")
    if len(found) > _MOST_TOLD:
        _tell_once(f"{len(found) - _MOST_TOLD} more of {len(prompts)} prompts are longer than {length} tokens and cut")


@functools.lru_cache(maxsize=4096)
def _tell_once(sentence: str) -> None:
    """Warns once, even if a request is read several times."""
    logging.warning("%s", sentence)


def _listed(prompts: tuple[str, ...]) -> Any:
    if len(prompts) <= _MOST_LISTED:
        return list(prompts)
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    return {"count": len(prompts), "sha256": digest}
