"""The agreement of a run's pictures with their prompts, as --mode=evaluate has it."""

import dataclasses

import clips
import numpy as np
import pytest
from tiny import make_run

from ddpm_jax.commands.agreement import clip_scores, numbers_read, open_clip
from ddpm_jax.commands.job import Job
from ddpm_jax.data.dataset import training_images
from ddpm_jax.data.numbers import NumbersSource, in_words
from ddpm_jax.data.pictures import Fit
from ddpm_jax.data.spread import spread_captions
from ddpm_jax.evaluation.agreement import clip_score
from ddpm_jax.interop import transformers
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling import shards

HELD_OUT = (2, 7)


@pytest.fixture(scope="module")
def run():
    """A run of single digits, two of which are held out."""
    run = make_run(devices=1, captions=("one", "three"))
    run.config.data.held_out = HELD_OUT
    return dataclasses.replace(run, dataset=run.dataset | NumbersSource(1, HELD_OUT, Fit(8, 8, 1)).describe())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return transformers.write_clip(folder / "clip", clips.make_clip(folder / "tokenizer"))


@pytest.mark.slow
def test_the_samples_in_shards_are_scored_with_their_prompts(run, folder, tmp_path):
    """The requested samples are scored, and as many evenly spread training images with their captions."""
    rng, clip = np.random.default_rng(0), open_clip(run, str(folder))
    pictures, prompts = rng.integers(0, 256, (6, 8, 8, 1), np.uint8), np.array(["one", "six", "a", "b", "five", "one"])
    for first in (0, 3):
        rows = slice(first, first + 3)
        shards.write(tmp_path, first, first + 2, pictures[rows], {"prompt": prompts[rows]}, {})
    found = clip_scores(run, clip, tmp_path, 5)
    source = training_images(run.config, run.dataset)
    captions = spread_captions(source, 5)
    assert captions[0] == "zero"
    assert captions[-1] == "nine"
    real = np.stack([source[i]["image"] for i in np.linspace(0, len(source) - 1, 5).round().astype(int)])
    expected = [clip_score(clip, pictures[:5], prompts[:5].tolist()), clip_score(clip, real, captions)]
    np.testing.assert_allclose(list(found.values()), [scores.mean() for scores in expected], rtol=1e-6)
    assert list(found) == ["CLIPScore", "CLIPScore of training images"]


@pytest.mark.slow
def test_numbers_are_read_apart_by_whether_they_were_learned(run, tmp_path, monkeypatch):
    """A run whose pictures are the real ones of the learned numbers gets all of these right and no other."""
    source = NumbersSource(1, (), Fit(8, 8, 1))

    def draw(self, count, seed, *, prompts, **options):
        numbers = [i % 10 for i in range(10) if in_words(i) in prompts]
        wanted = [numbers[i % len(numbers)] for i in range(count)]
        shown = [0 if number in HELD_OUT else number for number in wanted]
        return np.stack([source[number + 10 * (i % 50)]["image"] for i, number in enumerate(shown)])

    monkeypatch.setattr(type(run), "sample", draw)
    found = numbers_read(Job(run, tmp_path), 64)
    assert found["numbers read right, captions in the data"] > 0.98
    assert found["numbers read right, held-out captions"] < 0.02
    assert numbers_read(Job(run, tmp_path, options={"prompts": ["one"]}), 64) == {}
    assert numbers_read(Job(make_run(devices=1), tmp_path), 64) == {}


def test_clip_needs_a_run_with_captions(folder):
    with pytest.raises(UserError, match="--clip_model scores pictures with their prompts"):
        open_clip(make_run(devices=1), str(folder))
