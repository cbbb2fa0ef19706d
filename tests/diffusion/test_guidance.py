from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from ddpm_jax.diffusion.guidance import between, guided
from ddpm_jax.diffusion.samplers import sample
from ddpm_jax.diffusion.schedules import make_schedule

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((4, 3, 3, 2)), jnp.float32)
T = jnp.array([0, 100, 500, 999])
LABELS, OTHER, NULL = ({"label": jnp.array(labels)} for labels in ([0, 1, 2, 3], [3, 0, 2, 1], [9] * 4))


def network(x, t, cond):
    """Its output depends on all three arguments, and each row only on its own inputs."""
    label, t = (v[:, None, None, None].astype(jnp.float32) for v in (cond["label"], t))
    return jnp.sin(x + label) + t / 1000 * jnp.cos(label)


def network_with_variance(x, t, cond):
    return jnp.concatenate([network(x, t, cond), 2 * network(x, t, cond)], axis=-1)


def test_is_the_mix_of_two_calls():
    found = guided(network, LABELS, NULL, 2.5)(X, T)
    with_label, without = network(X, T, LABELS), network(X, T, NULL)
    np.testing.assert_allclose(found, without + 2.5 * (with_label - without), atol=1e-6)
    np.testing.assert_allclose(guided(network, LABELS, NULL, 1.0)(X, T), with_label, atol=1e-6)
    np.testing.assert_allclose(guided(network, LABELS, NULL, 0.0)(X, T), without, atol=1e-6)


def test_one_scale_an_image():
    scales = jnp.array([0.0, 1.0, 2.0, 5.0])
    found = guided(network, LABELS, NULL, scales)(X, T)
    for i, scale in enumerate(scales):
        np.testing.assert_allclose(found[i], guided(network, LABELS, NULL, scale)(X, T)[i], atol=1e-6)


def test_rescale_brings_the_standard_deviation_back():
    with_label = network(X, T, LABELS)
    plain = guided(network, LABELS, NULL, 4.0)(X, T)
    whole = guided(network, LABELS, NULL, 4.0, rescale=1.0)(X, T)
    np.testing.assert_allclose(whole.std((1, 2, 3)), with_label.std((1, 2, 3)), rtol=1e-5)
    half = guided(network, LABELS, NULL, 4.0, rescale=0.5)(X, T)
    np.testing.assert_allclose(half, (plain + whole) / 2, rtol=1e-4, atol=1e-6)


def test_interval():
    found = guided(network, LABELS, NULL, 3.0, interval=(100, 500))(X, T)
    everywhere, with_label = guided(network, LABELS, NULL, 3.0)(X, T), network(X, T, LABELS)
    np.testing.assert_allclose(found[1:3], everywhere[1:3], atol=1e-6)
    np.testing.assert_allclose(found[::3], with_label[::3], atol=1e-6)


def test_learned_variance_is_the_conditional_one():
    found = guided(network_with_variance, LABELS, NULL, 3.0)(X, T)
    np.testing.assert_allclose(found[..., :2], guided(network, LABELS, NULL, 3.0)(X, T), atol=1e-6)
    np.testing.assert_allclose(found[..., 2:], 2 * network(X, T, LABELS), atol=1e-6)


def test_calls_the_network_once_on_the_doubled_batch():
    shapes = []

    def spy(x, t, cond):
        shapes.append((x.shape, t.shape, cond["label"].shape))
        return network(x, t, cond)

    guided(spy, LABELS, NULL, 2.0)(X, T)
    assert shapes == [((8, 3, 3, 2), (8,), (8,))]


def test_values_compile_nothing_anew():
    traces = []

    def spy(weight, x, t, cond):
        traces.append(None)
        return weight * network(x, t, cond)

    def run(scale, **options):
        model_fn = guided(jax.tree_util.Partial(spy, jnp.float32(0.5)), LABELS, NULL, scale, **options)
        return sample(make_schedule(), model_fn, jax.random.key(0), X.shape, num_steps=4)

    first, traced = run(1.5), len(traces)
    for changed in (run(3.0), run(1.5, rescale=0.7), run(1.5, interval=(300, 700))):
        assert not np.allclose(first, changed)
    assert len(traces) == traced


def test_shifts_the_mean_of_gaussian_classes():
    """Two classes N(+-m, v) and their mixture: at scale 1 samples of a class have its mean, at 3 they overshoot it."""
    schedule, m, v, n = make_schedule(), 0.4, 0.04, 64 * 64

    def exact(x, t, cond):
        """E[eps | x_t] of class 0, class 1 or the mixture."""
        a, s = (
            array[t][:, None, None, None]
            for array in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
        )
        var = a**2 * v + s**2
        each = [s * (x - a * mean) / var for mean in (m, -m)]
        share = jax.nn.sigmoid(2 * a * m * x / var)
        label = cond["label"][:, None, None, None]
        return jnp.where(label == 0, each[0], jnp.where(label == 1, each[1], share * each[0] + (1 - share) * each[1]))

    shape, label, null = (1, 64, 64, 1), {"label": jnp.array([0])}, {"label": jnp.array([2])}
    means = []
    for scale in (1.0, 3.0):
        model_fn = guided(exact, label, null, scale)
        x = sample(schedule, model_fn, jax.random.key(1), shape, num_steps=100, sampler="dpmpp_2m", clip=False)
        means.append(float(x.mean()))
    assert means[0] == pytest.approx(m, abs=5 * np.sqrt(v / n) + 0.01)
    assert means[1] > m + 0.03


class TestBetween:
    """Interpolation between two conditions."""

    def test_both_ends_are_the_network_s_own(self):
        share = jnp.array([0.0, 1.0, 0.0, 1.0])
        found = between(network, X, T, (LABELS, OTHER, share))
        first, second = network(X, T, LABELS), network(X, T, OTHER)
        np.testing.assert_allclose(found[::2], first[::2], atol=1e-6)
        np.testing.assert_allclose(found[1::2], second[1::2], atol=1e-6)

    def test_is_linear_in_the_share_of_each_image(self):
        share = jnp.array([0.25, 0.5, 0.75, 2.0])
        found = between(network_with_variance, X, T, (LABELS, OTHER, share))
        first, second = (network_with_variance(X, T, labels) for labels in (LABELS, OTHER))
        weights = share[:, None, None, None]
        np.testing.assert_allclose(found, (1 - weights) * first + weights * second, atol=1e-5)

    def test_guidance_goes_from_the_null_to_the_interpolation(self):
        share = jnp.array([0.0, 0.25, 0.5, 1.0])
        way = Partial(between, network)
        found = guided(way, (LABELS, OTHER, share), (NULL, NULL, share), 3.0)(X, T)
        without = network(X, T, NULL)
        expected = without + 3.0 * (between(network, X, T, (LABELS, OTHER, share)) - without)
        np.testing.assert_allclose(found, expected, atol=1e-5)

    def test_of_two_gaussians_is_the_score_of_their_geometric_mixture(self):
        """N(m, v) and N(n, u) at every t: precision and mean of p ** (1 - w) q ** w in closed form."""
        schedule, (m, v), (n, u) = make_schedule(), (0.5, 0.04), (-0.3, 0.2)
        a, s = (
            np.asarray(array, np.float64)[np.asarray(T)][:, None, None, None]
            for array in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
        )
        share = np.array([0.2, 0.9, 0.5, 0.7])
        w = share[:, None, None, None]
        precisions = [1 / (a**2 * variance + s**2) for variance in (v, u)]
        precision = (1 - w) * precisions[0] + w * precisions[1]
        mean = ((1 - w) * precisions[0] * a * m + w * precisions[1] * a * n) / precision
        gaussian = partial(exact_of_gaussians, schedule, jnp.array([[m, v], [n, u]]))
        found = between(gaussian, X, T, ({"label": jnp.zeros(4, int)}, {"label": jnp.ones(4, int)}, jnp.array(share)))
        np.testing.assert_allclose(found, s * precision * (np.asarray(X, np.float64) - mean), rtol=1e-4, atol=1e-5)

    def test_samples_of_two_gaussians_lie_between_them(self):
        """With the same variance, the mixture is N((1 - w) m + w n, v); noise keeps it, so samples have it exactly."""
        schedule, m, n, v, size = make_schedule(), 0.5, -0.3, 0.04, 64 * 64
        share = jnp.array([0.0, 0.25, 1.0])
        network = Partial(exact_of_gaussians, schedule, jnp.array([[m, v], [n, v]]))
        cond = {"label": jnp.zeros(3, int)}, {"label": jnp.ones(3, int)}, share
        model_fn = Partial(between, network, cond=cond)
        options = {"num_steps": 100, "sampler": "dpmpp_2m", "clip": False}
        x = sample(schedule, model_fn, jax.random.key(1), (3, 64, 64, 1), **options)
        means, variances = np.asarray(x.mean((1, 2, 3))), np.asarray(x.var((1, 2, 3)))
        np.testing.assert_allclose(means, (1 - share) * m + share * n, atol=5 * (v / size) ** 0.5 + 0.01)
        np.testing.assert_allclose(variances, v, rtol=5 * (2 / size) ** 0.5 + 0.05)


def exact_of_gaussians(schedule, moments, x, t, cond):
    """E[eps | x_t] for the data N(mean, variance) of each label."""
    a, s = (
        array[t][:, None, None, None]
        for array in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
    )
    mean, variance = (moments[cond["label"], i][:, None, None, None] for i in range(2))
    return s * (x - a * mean) / (a**2 * variance + s**2)
