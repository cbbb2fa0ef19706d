"""How pictures are enlarged for a run that is given them."""

import numpy as np
import pytest

from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.runtime import images
from ddpm_jax.sampling.given import LowResolution

SCHEDULE = make_schedule("linear", 10)


def enlarged(picture, shape, how):
    """A picture [h, w, C] without noise, enlarged to `shape`."""
    given = LowResolution(picture.shape, shape, SCHEDULE, most=0.0, level=0.0, enlarging=how)
    return given.of_images(picture[None], 0, np.arange(1))["image"][0]


def test_corners():
    """Linear between pixels, of which the corners are the picture's own; a ramp stays one."""
    picture = np.random.default_rng(0).integers(0, 256, (3, 2, 3), np.uint8)
    found, values = enlarged(picture, (9, 5, 3), "corners"), images.to_float(picture)
    np.testing.assert_allclose(found[::8, ::4], values[::2], atol=1e-6)
    np.testing.assert_allclose(found[::4, 2], values.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(found[2], (found[0] + found[4]) / 2, atol=1e-6)


@pytest.mark.parametrize("how", ["linear", "cubic"])
def test_plain_pictures_stay_plain(how):
    picture = np.full((4, 4, 3), 51, np.uint8)
    np.testing.assert_allclose(enlarged(picture, (8, 8, 3), how), images.to_float(picture)[0, 0, 0], atol=1e-6)


def test_pillow_s_cubic_filter():
    from PIL import Image

    values = np.random.default_rng(0).integers(0, 256, (6, 5), np.uint8)
    expected = np.asarray(Image.fromarray(values.astype(np.float32)).resize((20, 24), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(
        enlarged(values[..., None], (24, 20, 1), "cubic")[..., 0], expected / 127.5 - 1, atol=1e-5
    )
