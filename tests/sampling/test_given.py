"""What runs are given: a picture and a mask, for latents of a small autoencoder with random weights."""

from functools import cache

import jax
import numpy as np
import pytest

from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.runtime import images
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.given import MaskedPicture
from ddpm_jax.sampling.latents import Latents

NET = Autoencoder(channels=1, latent_channels=3, widths=(4, 8), num_res_blocks=1, num_groups=2, middle_attention=False)
PICTURES = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 1), np.uint8)
MASKS = np.zeros((10, 4, 6, 1), bool)
MASKS[:, 1:4, 2:5] = True


@cache
def latents():
    params = NET.init(jax.random.key(0), images.to_float(PICTURES[:1]))["params"]
    return Latents((4, 6, 1), NET, lambda: params, scaling_factor=0.5)


@pytest.fixture
def given():
    return MaskedPicture((2, 3, 3), 2)


@pytest.mark.slow
def test_mask_and_masked_latents(given):
    """The mask has the pixel at the upper left of each latent; the latents are those of a picture with a grey part."""
    values = given.of_pictures(latents(), PICTURES, MASKS)
    assert (values.shape, values.dtype) == ((10, 2, 3, 4), np.float32)
    np.testing.assert_array_equal(values[0, ..., 0], [[0, 0, 0], [0, 1, 1]])
    grey = images.to_float(PICTURES) * ~MASKS
    encode = jax.jit(lambda x: NET.apply({"params": latents().open_params()}, x, method="encode"))
    mean, _ = encode(grey)
    np.testing.assert_allclose(values[..., 1:], 0.5 * mean, atol=1e-6)
    assert not np.allclose(values[..., 1:], latents().encode(PICTURES), atol=1e-2)


def test_nothing_under_the_mask_is_seen(given):
    other = np.where(MASKS, 255 - PICTURES, PICTURES)
    values, others = (given.of_pictures(latents(), pictures, MASKS) for pictures in (PICTURES, other))
    np.testing.assert_array_equal(values, others)
    nothing = np.zeros_like(MASKS)
    seen = given.of_pictures(latents(), PICTURES, nothing)
    np.testing.assert_allclose(seen[..., 1:], latents().encode(PICTURES), atol=1e-6)
    assert not seen[..., 0].any()


def test_network_is_given_it_as_it_is(given):
    values = given.check(given.of_pictures(latents(), PICTURES, MASKS))
    cond = given.of_images(values, 0, np.arange(10))
    assert {name: value.shape[1:] for name, value in cond.items()} == {name: x.shape for name, x in given.cond.items()}
    np.testing.assert_array_equal(given.null(cond)["image"], cond["image"])  # guidance leaves it where it is


def test_other_sizes(given):
    assert given.of_size(8, 4).shape == (4, 2, 4)


def test_what_cannot_be_given(given):
    with pytest.raises(UserError, match=r"have shape \(1, 2, 3, 3\); accepted: \(N, 2, 3, 4\)"):
        given.check(np.zeros((1, 2, 3, 3)))
    for training in (lambda: given.of_examples({}), lambda: given.of_training({}, None)):
        with pytest.raises(UserError, match="needs the picture and a mask; accepted: --mode=inpaint"):
            training()
