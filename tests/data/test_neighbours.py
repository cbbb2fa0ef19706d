import numpy as np
import pytest

from ddpm_jax.data import neighbours


class Images:
    """A source of given images."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": 0}


@pytest.mark.parametrize("block", [7 * 60, 1 << 20])
def test_nearest_by_brute_force(monkeypatch, block):
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", block)
    rng = np.random.default_rng(0)
    images, pictures = rng.integers(0, 256, (60, 5, 4, 3), np.uint8), rng.integers(0, 256, (6, 5, 4, 3), np.uint8)
    pictures[2] = images[41]
    told = []
    found, distances = neighbours.nearest(pictures, Images(images), 3, lambda *position: told.append(position))
    exact = np.sqrt(((pictures[:, None].astype(float) - images) ** 2).mean((2, 3, 4)))
    np.testing.assert_array_equal(found, np.argsort(exact, axis=1)[:, :3])
    np.testing.assert_allclose(distances, np.sort(exact, axis=1)[:, :3], atol=1e-2)
    assert found[2, 0] == 41
    assert told[-1] == (60, 60)


def test_mirror_images_count_if_requested():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (20, 5, 4, 3), np.uint8)
    mirrored = images[7:8, :, ::-1]
    assert neighbours.nearest(mirrored, Images(images), mirrored=True)[0][0, 0] == 7
    assert neighbours.nearest(mirrored, Images(images))[1][0, 0] > 10
