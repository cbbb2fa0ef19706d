"""The retrieval tasks for a CLIP; `agreement.retrieval` is tested with the rest of that module."""

import clips
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from ddpm_jax.data.numbers import NumbersSource, in_words, numbers_of
from ddpm_jax.data.pictures import Fit
from ddpm_jax.data.sources import open_source
from ddpm_jax.evaluation.retrieval import answers, questions

HELD_OUT = (23, 42, 97)


def test_of_numbers_the_held_out_ones_too():
    source = NumbersSource(2, HELD_OUT, Fit(8, 16, 1))
    learned, held_out = questions(source, 50)
    every, others = ([in_words(number) for number in numbers] for numbers in (numbers_of(2), HELD_OUT))
    assert learned.among == {"data among all captions": every}
    assert held_out.among == {"held out among one another": others, "held out among all captions": every}
    assert not set(learned.captions) & set(others)
    assert set(held_out.captions) == set(others)
    assert learned.pictures.shape == held_out.pictures.shape == (50, 8, 16, 1)


@pytest.fixture
def source(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 12, 12, 3), np.uint8)
    np.savez(tmp_path / "images.npz", image=images, caption=["a plum", "two pears", "a plum"] * 2)
    return open_source("array", path=str(tmp_path / "images.npz"), height=12, width=12, channels=3, captions=True)


def test_of_other_pictures_their_own_captions(source, tmp_path):
    (asked,) = questions(source, 100)
    assert asked.captions == ["a plum", "two pears", "a plum"] * 2
    assert asked.among == {"data": ["a plum", "two pears"]}
    mesh, told = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,)), []
    found = answers(clips.make_clip(tmp_path / "clip"), [asked], mesh, batch_size=4, progress=lambda *n: told.append(n))
    assert found.keys() == {"data"}
    assert found["data"] in np.arange(7) / 6
    assert told == [(6, 6)]
