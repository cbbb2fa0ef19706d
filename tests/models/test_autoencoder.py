import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models.autoencoder import Autoencoder

SMALL = Autoencoder(channels=2, latent_channels=3, widths=(8, 12), num_res_blocks=1, num_groups=4)
PICTURES = np.random.default_rng(0).standard_normal((2, 8, 12, 2)).astype(np.float32)


def shapes_of(net, pictures=PICTURES):
    return jax.eval_shape(net.init, jax.random.key(0), pictures)["params"]


def randomised(net):
    """Parameters with no (almost) zero layer, scaled to keep activations near 1."""
    rng = np.random.default_rng(1)

    def draw(leaf):
        fan_in = math.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4
        return (rng.standard_normal(leaf.shape) / math.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map(draw, shapes_of(net))


def test_parameters_of_stable_diffusion():
    shapes = shapes_of(Autoencoder(), np.zeros((1, 8, 8, 3), np.float32))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 83_653_863


def test_parts():
    """The decoder has one more block per level; nothing depends on a timestep."""
    shapes = shapes_of(SMALL)
    assert sorted(shapes) == ["decoder", "encoder", "post_quant_conv", "quant_conv"]
    outer, middle = ["conv_in", "conv_out"], ["middle_0_attention", "middle_0_res", "middle_1_res", "norm_out"]
    down = ["down_0_0_res", "down_0_downsample", "down_1_0_res"]
    up = ["up_0_0_res", "up_0_1_res", "up_1_0_res", "up_1_1_res", "up_1_upsample"]
    assert sorted(shapes["encoder"]) == outer + down + middle
    assert sorted(shapes["decoder"]) == outer + middle + up
    assert sorted(shapes["decoder"]["up_0_0_res"]) == ["conv_0", "conv_1", "norm_0", "norm_1", "shortcut"]
    bare = SMALL.clone(middle_attention=False, use_quant_conv=False, use_post_quant_conv=False)
    shapes = shapes_of(bare)
    assert sorted(shapes) == ["decoder", "encoder"]
    assert not any("attention" in name for half in shapes.values() for name in half)


@pytest.mark.parametrize(("widths", "dtype"), [((8,), jnp.float32), ((8, 12), jnp.bfloat16), ((4, 8, 12), jnp.float32)])
def test_shapes(widths, dtype):
    net = SMALL.clone(widths=widths, dtype=dtype)
    assert net.downscaling == 2 ** (len(widths) - 1)
    params = {"params": shapes_of(net)}
    latents = (2, 8 // net.downscaling, 12 // net.downscaling, 3)
    for found in jax.eval_shape(lambda params: net.apply(params, PICTURES, method="encode"), params):
        assert (found.shape, found.dtype) == (latents, jnp.float32)
    found = jax.eval_shape(lambda params: net.apply(params, jnp.zeros(latents), method="decode"), params)
    assert (found.shape, found.dtype) == (PICTURES.shape, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_log_variance_is_clipped():
    params = randomised(SMALL)
    params["quant_conv"]["bias"] = np.array([0, 0, 0, 100, -100, 0], np.float32)
    encode = jax.jit(lambda params: SMALL.apply({"params": params}, PICTURES, method="encode"))
    _, log_variance = encode(params)
    assert (log_variance[..., 0] == 20).all()
    assert (log_variance[..., 1] == -30).all()
    assert np.abs(log_variance[..., 2]).max() < 20


@pytest.mark.slow
def test_both_halves_in_one_call_and_their_gradient():
    params = randomised(SMALL)

    @jax.jit
    def whole(params):
        mean, log_variance = SMALL.apply({"params": params}, PICTURES, method="encode")
        return SMALL.apply({"params": params}, mean, method="decode"), log_variance

    mean, decoded = SMALL.apply({"params": params}, PICTURES)
    np.testing.assert_allclose(decoded, whole(params)[0], atol=1e-4)
    np.testing.assert_allclose(mean, SMALL.apply({"params": params}, PICTURES, method="encode")[0], atol=1e-5)
    gradients = jax.jit(jax.grad(lambda params: sum(jnp.sum(x**2) for x in whole(params))))(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0, path


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (1, 8, 7, 2), "pictures of 8x7 cannot be halved 1 times: .* divisible by 2"),
        ("encode", (1, 7, 8, 2), "pictures of 7x8 cannot be halved"),
        ("encode", (1, 8, 8, 3), r"pictures must be \[B, H, W, 2\], not of shape \(1, 8, 8, 3\)"),
        ("encode", (8, 8, 2), r"pictures must be \[B, H, W, 2\], not of shape \(8, 8, 2\)"),
        ("decode", (1, 4, 4, 4), r"latents must be \[B, H, W, 3\], not of shape \(1, 4, 4, 4\)"),
    ],
)
def test_refused_sizes(method, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: SMALL.init(jax.random.key(0), jnp.zeros(shape), method=method))


def test_refused_widths():
    with pytest.raises(ValueError, match="6 channels cannot be normalised in 4 groups"):
        shapes_of(SMALL.clone(widths=(8, 6)))
