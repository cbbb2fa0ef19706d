"""Conditions: what the user asks of the images, as the arrays that the network takes as `cond`.

A run's condition is made from its config (`ddpm_jax.config.make_condition`). In training it turns a batch into `cond`,
and replaces some of it by the null condition, which stands for no request. In sampling, `say` returns the condition
with a request, and `of_images` returns the arrays for each image. A kind of condition is one class, here or in
`captions.py`, and one line in `make_condition`; the loop, the samplers, the edits, the playground and the plans do not
depend on the kind.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data.source import Source
from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.runtime.errors import UserError, as_user_errors

Cond = Mapping[str, Any] | None
Batch = Mapping[str, Any]

# The keywords of `say`, with the reason why a run of a different kind refuses them.
KEYWORDS = {
    "labels": "this run is not class-conditional, so there are no classes to choose",
    "prompts": "this run did not learn from captions, so it takes no prompt",
    "negative_prompts": "this run did not learn from captions, so it takes no negative prompt",
}
_UNTRAINED = "it needs a run with model.class_conditional and a train.label_dropout above 0"
# The fields of the playground's page, each with its keyword.
FIELDS = {"label": "labels", "prompt": "prompts", "negative_prompt": "negative_prompts"}


def refuse_others(said: Mapping[str, Sequence[Any]], *own: str) -> None:
    """Raises UserError for keywords of a different kind of condition."""
    for keyword, values in said.items():
        if keyword not in own and len(values):
            raise UserError(KEYWORDS[keyword])


@dataclasses.dataclass(frozen=True)
class Control:
    """An input of the playground's page.

    Attributes:
      name: of the field in the page's form, of FIELDS.
      title: what the page calls it.
      choices: the names of its values 0, 1, ...; empty: any text.
      suggestions: for such a text.
      only_guided: whether it needs guidance to have an effect.
    """

    name: str
    title: str
    choices: Sequence[str] = ()
    suggestions: Sequence[str] = ()
    only_guided: bool = False


class Condition(Protocol):
    """One kind of condition, with a request or without.

    Attributes:
      reads: the entries of a training batch, beside "image", that it needs.
      is_said: whether there is a request.
      rows: the number of classes or prompts in the request, each a row of a grid; 0: there is no request.
      can_be_left_out: whether the network knows the null condition.
      cannot_guide: why guidance is not possible, which needs a network that knows images with and without the
        condition; "": it is possible.
      only_guided: a part of the request that has no effect without guidance; "": there is none.
    """

    @property
    def reads(self) -> Mapping[str, jax.ShapeDtypeStruct]: ...

    @property
    def is_said(self) -> bool: ...

    @property
    def rows(self) -> int: ...

    @property
    def can_be_left_out(self) -> bool: ...

    @property
    def cannot_guide(self) -> str: ...

    @property
    def only_guided(self) -> str: ...

    def network_options(self) -> dict[str, Any]:
        """The arguments of `UNet` that depend on it."""
        ...

    def network(self, net: nn.Module) -> nn.Module:
        """The network to train, around a `UNet` with these options."""
        ...

    def read(self, batch: Batch, source: Source, draws: np.ndarray | None = None) -> Batch:
        """The entries of a batch that `reads` names, on the host.

        Args:
          batch: of `host_batches`.
          source: of its examples.
          draws: uint64 [B], random numbers that choose among several captions of an example; None: the first.
        """
        ...

    def of_batch(self, batch: Batch) -> Cond:
        """`cond` for the examples of a batch."""
        ...

    def of_training(self, batch: Batch, key: Callable[[str], jax.Array]) -> Cond:
        """The same with some examples dropped to the null condition; `key` gives the step's key for a purpose."""
        ...

    def say(self, **said: Sequence[Any]) -> "Condition":
        """The condition with a request, by KEYWORDS; without keywords it stays the same. UserError for a request that
        does not fit."""
        ...

    def require(self) -> None:
        """Raises UserError if there is no request to guide towards."""
        ...

    def of_images(self, numbers: np.ndarray) -> Cond:
        """`cond` for the images with these numbers, on the host; without a request, classes or captions in turn."""
        ...

    def null(self, count: int) -> Cond:
        """The null condition of `count` images; UserError if the network does not know it."""
        ...

    def settings(self) -> dict[str, Any]:
        """The request, as JSON values."""
        ...

    def record(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The request for each of these images, to be stored with it."""
        ...

    def controls(self) -> list[Control]:
        """The inputs of the playground for it."""
        ...


@dataclasses.dataclass(frozen=True)
class NoCondition:
    """Images like the training images, without a condition: the plain DDPM."""

    reads: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)
    is_said: bool = False
    rows: int = 0
    can_be_left_out: bool = True
    cannot_guide: str = _UNTRAINED
    only_guided: str = ""

    def network_options(self) -> dict[str, Any]:
        return {}

    def network(self, net: nn.Module) -> nn.Module:
        return net

    def read(self, batch: Batch, source: Source, draws: np.ndarray | None = None) -> Batch:
        return batch

    def of_batch(self, batch: Batch) -> Cond:
        return None

    def of_training(self, batch: Batch, key: Callable[[str], jax.Array]) -> Cond:
        return None

    def say(self, **said: Sequence[Any]) -> "NoCondition":
        refuse_others(said)
        return self

    def require(self) -> None:
        raise UserError("guidance needs a run that was trained with a condition, such as classes")

    def of_images(self, numbers: np.ndarray) -> Cond:
        return None

    def null(self, count: int) -> Cond:
        return None

    def settings(self) -> dict[str, Any]:
        return {"labels": []}

    def record(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        return {"label": np.zeros(len(numbers), np.int32)}

    def controls(self) -> list[Control]:
        return []


@dataclasses.dataclass(frozen=True)
class ClassCondition:
    """The class of an image, `cond["label"]`; label `len(class_names)` is the null class.

    Attributes:
      class_names: of the data set.
      dropout: the share of training examples whose class is dropped.
      null_class: whether the network has one.
      labels: the classes of the request, repeated for all images.
    """

    class_names: Sequence[str]
    dropout: float = 0.0
    null_class: bool = True
    labels: tuple[int, ...] = ()
    only_guided: str = ""

    @property
    def reads(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {"label": jax.ShapeDtypeStruct((), jnp.int32)}

    @property
    def is_said(self) -> bool:
        return bool(self.labels)

    @property
    def rows(self) -> int:
        return len(self.labels)

    @property
    def can_be_left_out(self) -> bool:
        return self.dropout > 0

    @property
    def cannot_guide(self) -> str:
        if not self.null_class:
            return "it needs a network with a null class, but this one has none (model.null_class is False)"
        return "" if self.dropout else _UNTRAINED

    def network_options(self) -> dict[str, Any]:
        return {"num_classes": len(self.class_names)}

    def network(self, net: nn.Module) -> nn.Module:
        return net

    def read(self, batch: Batch, source: Source, draws: np.ndarray | None = None) -> Batch:
        return batch

    def of_batch(self, batch: Batch) -> Cond:
        return {"label": batch["label"]}

    def of_training(self, batch: Batch, key: Callable[[str], jax.Array]) -> Cond:
        labels = batch["label"]
        if self.dropout:
            dropped = jax.random.bernoulli(key("label_dropout"), self.dropout, labels.shape)
            labels = jnp.where(dropped, len(self.class_names), labels)
        return {"label": labels}

    def say(self, **said: Sequence[Any]) -> "ClassCondition":
        refuse_others(said, "labels")
        labels = said.get("labels", ())
        wrong = [label for label in labels if not 0 <= label < len(self.class_names)]
        if wrong:
            last = len(self.class_names) - 1
            raise UserError(f"class {wrong[0]} does not exist; this run has classes 0 to {last}")
        return dataclasses.replace(self, labels=tuple(map(int, labels))) if len(labels) else self

    def require(self) -> None:
        if not self.labels:
            raise UserError("guidance needs classes to steer towards; name them")

    def of_images(self, numbers: np.ndarray) -> Cond:
        """Without a request, every class in turn."""
        classes = np.array(self.labels or range(len(self.class_names)), np.int32)
        return {"label": classes[np.asarray(numbers) % len(classes)]}

    def null(self, count: int) -> Cond:
        if not self.can_be_left_out:
            why = "train.label_dropout is 0" if self.null_class else "model.null_class is False"
            raise UserError(f"this run cannot draw images without a class ({why}); name the classes")
        return {"label": np.full(count, len(self.class_names), np.int32)}

    def settings(self) -> dict[str, Any]:
        return {"labels": list(self.labels)}

    def record(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        return dict(self.of_images(numbers) or {})

    def controls(self) -> list[Control]:
        return [Control("label", "Class", self.class_names)]


def check_guidance(condition: Condition, guidance: Guidance) -> None:
    """Raises UserError for guidance that has no effect or is not possible, and for a request that needs guidance if
    there is none."""
    with as_user_errors():
        guidance.check()
    if guidance.is_on and condition.cannot_guide:
        raise UserError(f"guidance_scale is {guidance.scale}; other than 1 {condition.cannot_guide}")
    if condition.only_guided and not guidance.is_on:
        raise UserError(
            f"{condition.only_guided} does nothing at a guidance_scale of 1; set another, such as guidance_scale=2"
        )
