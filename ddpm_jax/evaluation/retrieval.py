"""Caption retrieval: how often a CLIP ranks a picture's own caption first."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from ddpm_jax.data.numbers import NumbersSource, in_words
from ddpm_jax.data.source import Source
from ddpm_jax.data.spread import spread, spread_captions
from ddpm_jax.evaluation.agreement import retrieval
from ddpm_jax.interop.transformers import CLIP
from ddpm_jax.sampling.clip import embed_pictures, embed_texts


@dataclasses.dataclass(frozen=True)
class Question:
    """A retrieval task: pictures whose captions are to be found.

    Attributes:
      pictures: uint8 [N, H, W, C].
      captions: each picture's own caption.
      among: for each result, by name, the captions to choose from, which are distinct and include the pictures' own.
    """

    pictures: np.ndarray
    captions: Sequence[str]
    among: dict[str, Sequence[str]]


def questions(source: Source, count: int) -> list[Question]:
    """The retrieval tasks for a CLIP that was trained on a source.

    Args:
      source: with captions. Pictures are spread evenly over it, and their first captions are the choices. If it is a
        source of numbers, the choices are all numbers with as many digits, and there are also tasks for the held-out
        numbers: among one another, and among all.
      count: number of pictures in each task.
    """
    batch, captions = spread(source, count), spread_captions(source, count)
    if not isinstance(source, NumbersSource) or not source.held_out:
        return [Question(batch["image"], captions, {"data": list(dict.fromkeys(captions))})]
    held_out = NumbersSource(source.num_digits, source.numbers, source.fit)
    every, others = ([in_words(number) for number in sorted(n)] for n in (_all_numbers(source), held_out.numbers))
    return [
        Question(batch["image"], captions, {"data among all captions": every}),
        Question(
            spread(held_out, count)["image"],
            spread_captions(held_out, count),
            {"held out among one another": others, "held out among all captions": every},
        ),
    ]


def _all_numbers(source: NumbersSource) -> list[int]:
    return [*source.numbers, *source.held_out]


def answers(
    clip: CLIP,
    asked: Sequence[Question],
    mesh: Mesh,
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """The share of pictures whose own caption is ranked first, by the names in the tasks' `among`.

    Args:
      clip: of `ddpm_jax.load_clip`.
      asked: of `questions`.
      mesh, batch_size: as in `embed_pictures`.
      progress: called with how many pictures are encoded, and how many there are.
    """
    total, done = sum(len(question.pictures) for question in asked), 0
    found: dict[str, float] = {}
    for question in asked:
        units = embed_pictures(clip, question.pictures, mesh=mesh, batch_size=batch_size)
        done += len(units)
        if progress:
            progress(done, total)
        for name, texts in question.among.items():
            places = {text: place for place, text in enumerate(texts)}
            own = np.array([places[caption] for caption in question.captions])
            similarities = units @ embed_texts(clip, texts, mesh=mesh, batch_size=batch_size).T
            found[name] = retrieval(similarities, own)
    return found
