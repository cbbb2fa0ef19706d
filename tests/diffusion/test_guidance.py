import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.guidance import guided
from ddpm_jax.diffusion.samplers import sample
from ddpm_jax.diffusion.schedules import make_schedule

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((4, 3, 3, 2)), jnp.float32)
T = jnp.array([0, 100, 500, 999])
LABELS, NULL = {"label": jnp.array([0, 1, 2, 3])}, {"label": jnp.full(4, 9)}


def network(x, t, cond):
    """Its output depends on all three, and each row on its own inputs alone."""
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
    """Two classes N(+-m, v) and their mixture: at scale 1 samples of a class have its mean, at 3 they lie further."""
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
