import jax
import numpy as np

from ddpm_jax.sampling.decoder import Pixels, random_flip

PICTURES = np.random.default_rng(1).integers(0, 256, (400, 4, 6, 3), np.uint8)


def test_pictures_there_and_back():
    decoder = Pixels((4, 6, 3))
    assert decoder.shape == decoder.picture_shape == (4, 6, 3)
    x_0 = decoder.encode(PICTURES)
    assert (x_0.dtype, x_0.min(), x_0.max()) == (np.float32, -1.0, 1.0)
    np.testing.assert_array_equal(decoder.decode(x_0), PICTURES)
    np.testing.assert_array_equal(decoder.decode(jax.numpy.asarray(x_0)), PICTURES)


def test_batches_are_scaled_as_pictures_are():
    keys = []
    x_0 = Pixels((4, 6, 3)).of_batch({"image": jax.numpy.asarray(PICTURES)}, keys.append)
    np.testing.assert_allclose(x_0, Pixels((4, 6, 3)).encode(PICTURES), atol=2e-7)
    assert not keys  # nothing is drawn without flips


def test_batches_are_flipped_by_the_step_s_key():
    batch = {"image": jax.numpy.asarray(PICTURES)}
    keys = {"flip": jax.random.key(0)}
    decoder = Pixels((4, 6, 3), flip=True)
    expected = decoder.encode(np.asarray(random_flip(keys["flip"], batch["image"])))
    np.testing.assert_allclose(decoder.of_batch(batch, keys.__getitem__), expected, atol=2e-7)


def test_flips_mirror_about_half_of_the_images():
    flipped = np.asarray(random_flip(jax.random.key(0), PICTURES))
    same = np.all(flipped == PICTURES, axis=(1, 2, 3))
    mirrored = np.all(flipped == PICTURES[:, :, ::-1], axis=(1, 2, 3))
    assert np.all(same ^ mirrored)
    assert abs(mirrored.sum() - 200) < 40  # four standard deviations
