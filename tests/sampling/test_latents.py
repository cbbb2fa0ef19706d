"""Latents of a small autoencoder with random weights."""

import dataclasses
import math
from functools import cache, partial

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny import near

from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.runtime import images, parallel
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling import latents as latents_lib
from ddpm_jax.sampling.latents import Latents

NET = Autoencoder(channels=1, latent_channels=3, widths=(4, 8), num_res_blocks=1, num_groups=2, middle_attention=False)
PICTURES = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 1), np.uint8)
NUMBERS = np.arange(10)


@cache
def params():
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(NET.init, jax.random.key(0), images.to_float(PICTURES[:1]))["params"]

    def draw(leaf):
        fan_in = math.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 9
        return (rng.standard_normal(leaf.shape) / math.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map(draw, shapes)


def latents(**options):
    return Latents((4, 6, 1), NET, params, **{"scaling_factor": 0.5, **options})


@cache
def expected():
    """Mean and standard deviation of the pictures' latents and of their mirror images', [2, 2, 10, 2, 3, 3]."""
    apply = jax.jit(lambda x: NET.apply({"params": params()}, x, method="encode"))
    both = [apply(images.to_float(pictures)) for pictures in (PICTURES, PICTURES[:, :, ::-1])]
    return np.array([(mean, np.exp(log_variance / 2)) for mean, log_variance in both])


def keys_of(seed):
    return lambda name: jax.random.fold_in(jax.random.key(seed), len(name))


def batch_of(decoder, numbers=NUMBERS):
    return decoder.read({"index": numbers, "image": PICTURES[numbers]})


def test_shapes():
    decoder = latents()
    assert (decoder.shape, decoder.picture_shape) == ((2, 3, 3), (4, 6, 1))
    for flip in (False, True):
        decoder = latents(flip=flip)
        (wanted,) = decoder.reads.values()
        assert wanted.shape == (1 + flip, 2, 2, 3, 3)
        found = batch_of(decoder)["posterior"]
        assert (found.shape, found.dtype) == ((10, *wanted.shape), wanted.dtype)
        drawn = decoder.of_batch({"posterior": found}, keys_of(0))
        assert (drawn.shape, drawn.dtype) == ((10, 2, 3, 3), np.float32)


def test_pictures_become_the_scaled_mean():
    for factor in (0.5, 0.18215):
        found = latents(scaling_factor=factor).encode(PICTURES)
        np.testing.assert_allclose(found, factor * expected()[0, 0], atol=1e-5)


def test_latents_become_pictures():
    x_0 = np.random.default_rng(2).standard_normal((4, 2, 3, 3)).astype(np.float32)
    found = latents(scaling_factor=0.25).decode(x_0)
    pictures = jax.jit(lambda z: NET.apply({"params": params()}, z, method="decode"))(x_0 / 0.25)
    assert found.dtype == np.uint8
    assert near(found, images.to_uint8(np.asarray(pictures)))
    assert np.std(found) > 10
    stages = latents(scaling_factor=0.25).decode(x_0.reshape(2, 2, 2, 3, 3))
    assert near(stages.reshape(found.shape), found)
    assert stages.shape == (2, 2, 4, 6, 1)


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_any_number_at_a_time(monkeypatch, at_once):
    """The last chunk is filled up, and what it is filled with is left out."""
    whole = latents()
    mean, pictures = whole.encode(PICTURES), whole.decode(expected()[0, 0])
    calls = []
    monkeypatch.setattr(latents_lib, "_PIXELS", at_once * 4 * 6)
    monkeypatch.setattr(latents_lib, "_apply", lambda *arguments: calls.append(arguments) or apply(*arguments))
    decoder = latents()
    np.testing.assert_allclose(decoder.encode(PICTURES), mean, atol=1e-5)
    assert near(decoder.decode(expected()[0, 0]), pictures)
    encoded = [1] * 10  # on a CPU
    assert [len(call[-1]) for call in calls] == encoded + [min(at_once, 10)] * math.ceil(10 / at_once)


apply = latents_lib._apply


def test_one_device_and_eight():
    """Latents are decoded on the devices that they lie on."""
    found = []
    for devices in (1, 8):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        x_0 = parallel.place(np.resize(expected()[0, 0], (16, 2, 3, 3)), sharding=parallel.batch_sharding(mesh))
        found.append(latents().decode(x_0))
    assert near(*found)
    assert near(found[0][:10], latents().decode(expected()[0, 0]))


def test_parameters_are_read_when_they_are_needed_and_once():
    opened = []
    decoder = dataclasses.replace(latents(), open_params=lambda: opened.append(1) or params())
    decoder.encode_mask(np.ones((1, 4, 6, 1), bool))
    assert not opened
    decoder.encode(PICTURES)
    decoder.encode(PICTURES)
    assert len(opened) == 1


def test_masks():
    mask = np.zeros((2, 4, 6, 1), bool)
    mask[0, 1, 4] = mask[1, 2:] = True
    wanted = np.zeros((2, 2, 3, 1), bool)
    wanted[0, 0, 2] = wanted[1, 1] = True
    np.testing.assert_array_equal(latents().encode_mask(mask), wanted)


def test_other_sizes():
    decoder = latents().of_size(8, 2)
    assert (decoder.picture_shape, decoder.shape) == ((8, 2, 1), (4, 1, 3))
    assert decoder.encode(np.zeros((1, 8, 2, 1), np.uint8)).shape == (1, 4, 1, 3)
    for size in ((8, 3), (7, 8), (0, 8), (-2, 8)):
        with pytest.raises(UserError, match=f"height and width are {size[0]} and {size[1]}; accepted: multiples of 2"):
            latents().of_size(*size)


# Training.


@pytest.mark.parametrize("flip", [False, True])
def test_a_posterior_is_computed_once(monkeypatch, flip):
    computed, original = [], Latents._posterior
    monkeypatch.setattr(Latents, "_posterior", lambda self, x, *of: computed.append(len(x)) or original(self, x, *of))
    decoder = latents(flip=flip)
    first = batch_of(decoder, np.array([4, 2, 4]))["posterior"]
    second = batch_of(decoder, np.array([2, 7]))["posterior"]
    assert computed == [2, 2, 1, 1] if flip else [2, 1]
    np.testing.assert_allclose(first, expected()[: 1 + flip, :, [4, 2, 4]].transpose(2, 0, 1, 3, 4, 5), atol=1e-5)
    np.testing.assert_array_equal(second[0], first[1])
    np.testing.assert_array_equal(batch_of(decoder, np.array([7]))["posterior"][0], second[1])
    assert len(computed) == 2 * (1 + flip)
    none = latents(flip=flip, cache_bytes=0)
    np.testing.assert_allclose(batch_of(none)["posterior"], batch_of(latents(flip=flip))["posterior"], atol=1e-5)
    assert len(none._cache) == 1


def test_a_posterior_does_not_depend_on_the_batch():
    """A resumed run first needs a picture in a different batch, and continues bit for bit."""
    net = dataclasses.replace(NET, channels=3)
    pictures = np.random.default_rng(3).integers(0, 256, (16, 12, 12, 3), np.uint8)
    weights = jax.jit(net.init)(jax.random.key(0), images.to_float(pictures[:1]))["params"]

    def read(*batches):
        decoder = Latents((12, 12, 3), net, lambda: weights, 1.0)
        for numbers in batches:
            found = decoder.read({"index": np.array(numbers), "image": pictures[numbers]})["posterior"]
        return found[np.argsort(batches[-1])]

    whole = read(list(range(16)))
    np.testing.assert_array_equal(read(list(range(15, -1, -1))), whole)
    np.testing.assert_array_equal(read([3, 8, 2], list(range(16))), whole)


def test_on_an_accelerator_whole_batches_by_one_program(monkeypatch):
    """Even where some of a batch's posteriors are cached."""
    calls = []
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(latents_lib, "_apply", lambda *arguments: calls.append(arguments) or apply(*arguments))
    decoder = latents()
    for numbers in ([4, 2, 7], [2, 7, 0], [1, 8, 9]):
        batch_of(decoder, np.array(numbers))
    assert [len(call[-1]) for call in calls] == [3, 3, 3]


def test_draws_are_the_posterior_s():
    """Many of one picture have its mean and standard deviation, scaled."""
    posterior = np.repeat(batch_of(latents())["posterior"][3:4], 4000, axis=0)
    drawn = np.asarray(latents().of_batch({"posterior": posterior}, keys_of(0)))
    mean, deviation = expected()[0, :, 3]
    assert np.all(np.abs(drawn.mean(0) - 0.5 * mean) < 5 * 0.5 * deviation / 4000**0.5)
    np.testing.assert_allclose(drawn.std(0), 0.5 * deviation, rtol=0.08)


def test_draws_are_functions_of_the_key():
    decoder = latents(flip=True)
    batch = batch_of(decoder)
    draw = lambda seed: np.asarray(decoder.of_batch(batch, keys_of(seed)))  # noqa: E731
    np.testing.assert_array_equal(draw(0), draw(0))
    assert np.all(draw(0) != draw(1))
    doubled = dataclasses.replace(decoder, scaling_factor=1.0).of_batch(batch, keys_of(0))
    np.testing.assert_allclose(doubled, 2 * draw(0), rtol=1e-6)


def test_a_mirrored_draw_is_the_mirror_image_s():
    """About half are, by the key; a picture's noise is the same either way."""
    key = {"flip": jax.random.key(3), "posterior": jax.random.key(4)}.__getitem__
    batch = jax.tree.map(partial(np.resize, new_shape=(400, 2, 2, 2, 3, 3)), batch_of(latents(flip=True)))
    drawn = np.asarray(latents(flip=True).of_batch(batch, key)) / 0.5
    noise = np.asarray(jax.random.normal(key("posterior"), drawn.shape))
    plain, mirrored = (
        np.all(np.abs(drawn - (batch["posterior"][:, i, 0] + batch["posterior"][:, i, 1] * noise)) < 1e-4, (1, 2, 3))
        for i in range(2)
    )
    assert np.all(plain ^ mirrored)
    assert abs(mirrored.sum() - 200) < 40  # four standard deviations
