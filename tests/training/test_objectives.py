import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.models import lora
from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime.parallel import run_once_options
from ddpm_jax.sampling.condition import NoCondition
from ddpm_jax.sampling.decoder import Pixels
from ddpm_jax.sampling.generate import Model
from ddpm_jax.training.objectives import Diffusion, Reconstruction

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 2), np.uint8)
BATCH = {"image": jnp.asarray(PICTURES)}


def key(name):
    return jax.random.fold_in(jax.random.key(0), len(name))


def randomised(shapes, seed=1):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = math.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 9
        return (rng.standard_normal(leaf.shape) / math.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map(draw, shapes)


def compiled(function):
    return jax.jit(function, compiler_options=run_once_options())


# An autoencoder.

NET = Autoencoder(channels=2, latent_channels=3, widths=(4, 8), num_res_blocks=1, num_groups=2, middle_attention=False)
OBJECTIVE = Reconstruction(NET, Pixels((4, 6, 2)), kl_weight=0.3)


@cache
def net_params():
    return randomised(jax.eval_shape(lambda: OBJECTIVE.init_params(0)))


@cache
def posterior():
    """Mean and log-variance of the pictures' latents, float64."""
    x = OBJECTIVE.examples(BATCH, key, None)["x"]
    found = compiled(lambda x: NET.apply({"params": net_params()}, x, method="encode"))(x)
    return tuple(np.asarray(array, np.float64) for array in found)


@cache
def losses(kl_weight):
    objective = dataclasses.replace(OBJECTIVE, kl_weight=kl_weight)
    examples = objective.examples(BATCH, key, None)
    return np.asarray(compiled(objective.losses)(net_params(), None, examples, key("dropout")), np.float64)


def test_examples_of_pictures():
    examples = OBJECTIVE.examples(BATCH, key, None)
    assert OBJECTIVE.num_timesteps is None
    assert {name: value.shape for name, value in examples.items()} == {
        "x": (3, 4, 6, 2),
        "noise": (3, 2, 3, 3),
        "weight": (3,),
    }
    np.testing.assert_allclose(examples["x"], PICTURES / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(examples["weight"], 1)
    again = OBJECTIVE.examples(BATCH, key, None)
    jax.tree.map(np.testing.assert_array_equal, examples, again)


@pytest.mark.slow
def test_loss_of_a_reconstruction():
    """The pixels' mean absolute error for a draw, and the divergence; in float64 except for the network."""
    mean, log_variance = posterior()
    noise = np.asarray(OBJECTIVE.examples(BATCH, key, None)["noise"], np.float64)
    z = (mean + np.exp(log_variance / 2) * noise).astype(np.float32)
    decoded = np.asarray(compiled(lambda z: NET.apply({"params": net_params()}, z, method="decode"))(z), np.float64)
    error = np.abs(decoded - (PICTURES / 127.5 - 1)).mean((1, 2, 3))
    divergence = (0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)).mean((1, 2, 3))
    np.testing.assert_allclose(losses(0.3), error + 0.3 * divergence, rtol=1e-5)
    np.testing.assert_allclose(losses(0.0), error, rtol=1e-5)


def test_divergence_is_the_integral():
    """The integral of q log(q / p) for each latent, by the trapezoidal rule."""
    mean, log_variance = (array.ravel() for array in posterior())
    z = np.linspace(-12, 12, 20_001)[:, None]
    assert np.abs(mean).max() + 6 * np.exp(log_variance / 2).max() < 12
    log_q = -0.5 * ((z - mean) ** 2 / np.exp(log_variance) + log_variance)
    density = np.exp(log_q) / np.sqrt(2 * np.pi)
    integral = np.trapezoid(density * (log_q + 0.5 * z**2), z, axis=0).reshape(3, -1).mean(1)
    np.testing.assert_allclose((losses(1.0) - losses(0.0)), integral, rtol=1e-4)


@pytest.mark.slow
def test_every_parameter_of_an_autoencoder_learns():
    examples = OBJECTIVE.examples(BATCH, key, None)
    loss = lambda params: OBJECTIVE.losses(params, None, examples, key("dropout")).mean()  # noqa: E731
    for path, gradient in jax.tree_util.tree_leaves_with_path(compiled(jax.grad(loss))(net_params())):
        assert np.all(np.isfinite(gradient))
        assert np.any(gradient != 0), path


# Adapters.

UNET = UNet(channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4)
PLAIN = Diffusion(Model(NoCondition(), UNET, make_schedule("linear", 20), Pixels((4, 6, 2))))
ADAPTED = dataclasses.replace(PLAIN, lora_rank=2, lora_scale=0.7)


@cache
def base():
    return randomised(PLAIN.model.param_shapes())


@cache
def value_and_gradient(of):
    """The mean loss of some examples with adapters, and its gradient by "adapters" or "base"."""
    examples = ADAPTED.examples(BATCH, key, None)

    def loss(adapters, base):
        return ADAPTED.losses(adapters, base, examples, key("dropout")).mean()

    return compiled(jax.value_and_grad(loss, ("adapters", "base").index(of)))


@pytest.mark.slow
def test_only_adapters_are_trained():
    """Only the adapters of attention are initialised and have a gradient."""
    start = ADAPTED.init_params(3)
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)  # noqa: E731
    assert shapes(start) == shapes(lora.init(base(), 2, jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, ADAPTED.init_params(3), start)
    assert list(start) == ["middle_0_attention"]
    _, gradients = value_and_gradient("adapters")(start, base())
    assert shapes(gradients) == shapes(start)
    for layer in gradients["middle_0_attention"].values():
        assert not np.any(layer["down"])  # while `up` is zero
        assert np.any(layer["up"])
    _, gradients = value_and_gradient("adapters")(randomised(start), base())
    assert all(np.any(gradient) for gradient in jax.tree.leaves(gradients))


def test_loss_is_that_of_the_merged_network():
    examples, adapters = PLAIN.examples(BATCH, key, None), randomised(ADAPTED.init_params(0))
    plain = compiled(PLAIN.losses)
    for factors, merged in (
        (ADAPTED.init_params(0), base()),
        (adapters, lora.merge(base(), adapters, 0.7)),
    ):
        expected = plain(merged, None, examples, key("dropout")).mean()
        np.testing.assert_allclose(value_and_gradient("adapters")(factors, base())[0], expected, rtol=1e-6)


@pytest.mark.slow
def test_gradient_of_the_factors_follows_from_that_of_the_kernel():
    """d/d up = scale down^T G and d/d down = scale G up^T, with the kernel's gradient G."""
    adapters = randomised(ADAPTED.init_params(0))
    _, by_adapters = value_and_gradient("adapters")(adapters, base())
    _, by_base = value_and_gradient("base")(adapters, base())
    for name, layer in adapters["middle_0_attention"].items():
        found, kernel = by_adapters["middle_0_attention"][name], by_base["middle_0_attention"][name]["kernel"]
        np.testing.assert_allclose(found["up"], 0.7 * layer["down"].T @ kernel, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found["down"], 0.7 * kernel @ layer["up"].T, rtol=1e-3, atol=1e-6)


def test_a_network_without_attention():
    model = dataclasses.replace(PLAIN.model, net=UNET.clone(middle_attention=False))
    with pytest.raises(ValueError, match="a network with attention"):
        dataclasses.replace(ADAPTED, model=model).init_params(0)
