from collections import Counter

import numpy as np
import pytest

from ddpm_jax.data import digits
from ddpm_jax.data.numbers import NumbersSource, in_words, numbers_of
from ddpm_jax.data.pictures import Fit
from ddpm_jax.data.sources import open_source
from ddpm_jax.runtime.errors import UserError

FIT = Fit(8, 16, 1)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (20, "twenty"),
        (42, "forty-two"),
        (100, "one hundred"),
        (305, "three hundred and five"),
        (1042, "one thousand and forty-two"),
        (21_300, "twenty-one thousand three hundred"),
        (999_999, "nine hundred and ninety-nine thousand nine hundred and ninety-nine"),
    ],
)
def test_in_words(number, words):
    assert in_words(number) == words


def test_no_two_numbers_have_the_same_words():
    assert len({in_words(number) for number in range(20_000)}) == 20_000


def test_each_picture_shows_its_caption():
    """Both halves are pictures of the digits named by the caption."""
    source = NumbersSource(2, (42,), FIT)
    pictures, labels = digits.load()
    of = {picture.tobytes(): int(label) for picture, label in zip(pictures, labels, strict=True)}
    by_words = {in_words(number): number for number in numbers_of(2)}
    for index in range(0, len(source), 97):
        example = source[index]
        (caption,) = source.captions[index]
        halves = [np.ascontiguousarray(half) for half in np.split(example["image"], 2, axis=1)]
        assert 10 * of[halves[0].tobytes()] + of[halves[1].tobytes()] == by_words[caption]


def test_every_number_but_those_held_out_comes_equally_often():
    source = NumbersSource(2, (42, 17), FIT)
    assert len(source.captions) == len(source)
    captions = Counter(caption for (caption,) in source.captions)
    assert set(captions.values()) == {len(source) // 88}
    assert set(captions) == {in_words(number) for number in numbers_of(2)} - {"forty-two", "seventeen"}


def test_examples_are_the_same_everywhere_and_differ_from_one_another():
    first, again = NumbersSource(2, (), FIT), NumbersSource(2, (), FIT)
    np.testing.assert_array_equal(first[5]["image"], again[5]["image"])
    assert first.describe() == again.describe()
    assert first.describe()["fingerprint"] != NumbersSource(2, (42,), FIT).describe()["fingerprint"]
    same_number = [first[5 + 90 * i]["image"].tobytes() for i in range(10)]
    assert len(set(same_number)) == 10


def test_of_three_digits_and_of_another_size():
    source = open_source("numbers", num_digits=3, held_out=(), height=4, width=12, channels=1)
    assert source[17]["image"].shape == source.shape == (4, 12, 1)
    assert source.captions[17] == ("one hundred and seventeen",)


@pytest.mark.parametrize(
    ("num_digits", "held_out", "said"),
    [
        (0, (), "data.num_digits is 0; accepted: 1 to 4"),
        (2, (7,), "data.held_out has 7; accepted: 10 to 99"),
        (1, range(10), "data.held_out leaves no number"),
    ],
)
def test_refused(num_digits, held_out, said):
    with pytest.raises(UserError, match=said):
        NumbersSource(num_digits, held_out, FIT)
