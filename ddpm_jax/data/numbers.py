"""The built-in captioned data set: handwritten digits side by side, captioned with the number in words."""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ddpm_jax.data import digits
from ddpm_jax.data.pictures import Fit
from ddpm_jax.data.source import description
from ddpm_jax.runtime.errors import UserError

MOST_DIGITS = 4
_EXAMPLES = 200  # of each number
_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """A number from 0 to 999,999 in English: "forty-two", "three hundred and five"."""
    if number < 20:
        return _SMALL[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens] + (f"-{_SMALL[ones]}" if ones else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    many, rest = divmod(number, size)
    joint = " and " if size == 100 or rest < 100 else " "
    return f"{in_words(many)} {name}" + (f"{joint}{in_words(rest)}" if rest else "")


def numbers_of(num_digits: int) -> range:
    """The numbers with this many digits."""
    return range(10 ** (num_digits - 1) if num_digits > 1 else 0, 10**num_digits)


class NumbersSource:
    """Pictures of numbers, made of scikit-learn's digits side by side, with the numbers' English names as captions.

    An example's number follows from its index, and its handwriting from a generator seeded with the index, so the data
    set is the same everywhere.

    Args:
      num_digits: of each number.
      held_out: numbers left out of the data set, to test how a network generalises to their captions.
      fit: the size of the images; a number is 8 pixels high and 8 wide for each digit.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, num_digits: int, held_out: Sequence[int], fit: Fit):
        if not 1 <= num_digits <= MOST_DIGITS:
            raise UserError(f"data.num_digits is {num_digits}; accepted: 1 to {MOST_DIGITS}")
        there = numbers_of(num_digits)
        wrong = [number for number in held_out if number not in there]
        if wrong:
            raise UserError(f"data.held_out has {wrong[0]}; accepted: {there[0]} to {there[-1]}")
        self.numbers = sorted(set(there) - set(held_out))
        if not self.numbers:
            raise UserError("data.held_out leaves no number to train on")
        self.num_digits, self.held_out = num_digits, sorted(set(held_out))
        self.fit, self.shape = fit, fit.shape
        self._pictures, labels = digits.load()
        self._of_digit = [np.flatnonzero(labels == digit) for digit in range(10)]

    def __len__(self) -> int:
        return _EXAMPLES * len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self.numbers[index % len(self.numbers)]
        draws = np.random.Philox(np.random.SeedSequence([index])).random_raw(self.num_digits)
        chosen = [
            self._of_digit[int(digit)][int(draw % len(self._of_digit[int(digit)]))]
            for digit, draw in zip(f"{number:0{self.num_digits}}", draws, strict=True)
        ]
        image = np.concatenate(self._pictures[chosen], axis=1)
        if image.shape != self.shape:
            image = self.fit(Image.fromarray(image.squeeze(-1)))
        return {"image": image, "label": 0}

    @functools.cached_property
    def captions(self) -> Sequence[tuple[str, ...]]:
        """The number of each image in words."""
        return _EXAMPLES * [(in_words(number),) for number in self.numbers]

    def describe(self) -> dict[str, Any]:
        identity = f"numbers {self.num_digits} {self.held_out} {self.shape} {_EXAMPLES}"
        fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        return description(self, "numbers", fingerprint, num_digits=self.num_digits, held_out=self.held_out)
