"""The files of many images, by their names."""

import numpy as np
import pytest

from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling import shards


def test_files_are_those_of_images_in_their_order(tmp_path):
    for first in (20, 0, 10):
        shards.write(tmp_path, first, first + 9, np.zeros((10, 2, 2, 1), np.uint8), {"label": np.zeros(10)}, {})
    for name in ("images_1-2.npz", "images_000000030-000000039.npz.part", "other.npz"):
        (tmp_path / name).touch()
    assert [(path.parent, first, last) for path, first, last in shards.files(str(tmp_path))] == [
        (tmp_path, 0, 9),
        (tmp_path, 10, 19),
        (tmp_path, 20, 29),
    ]


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 0)])
def test_parts_that_are_none(part):
    shards.check_part((0, 1))
    with pytest.raises(UserError, match=r"--part is .*; accepted: 0/N to N-1/N"):
        shards.check_part(part)
