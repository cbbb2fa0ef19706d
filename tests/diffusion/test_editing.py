"""Edits with the exact network for Gaussian data, whose results have a known mean and variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion import editing
from ddpm_jax.diffusion.samplers import sample
from ddpm_jax.diffusion.schedules import extract, make_schedule

LINEAR = make_schedule("linear", 1000)
M, V = 0.1, 0.3
SHAPE = (2, 64, 64, 1)
N = np.prod(SHAPE)
KEY = jax.random.key(0)
QUICK = {"num_steps": 100, "clip": False, "variance": "fixed_small"}


@pytest.fixture
def model(gaussian_model):
    return gaussian_model(LINEAR, M, V)


def data(seed=0, shape=SHAPE):
    return jnp.asarray(M + np.sqrt(V) * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def noise_level(t):
    return float(LINEAR.sqrt_alphas_cumprod[t]), float(LINEAR.sqrt_one_minus_alphas_cumprod[t])


def kept(t):
    """The average share of x_0 - m that remains in a sample of p(x_0 | x_t)."""
    a, s = noise_level(t)
    return a**2 * V / (a**2 * V + s**2)


@pytest.mark.parametrize("t", [100, 300, 600])
def test_variations_keep_what_their_noise_leaves(model, t):
    """x' is drawn from p(x_0 | x_t), so the data's variance is preserved and its covariance with x_0 is known."""
    x_0 = data()
    x = np.asarray(editing.vary(LINEAR, model, KEY, x_0, t, **QUICK), np.float64)
    assert abs(x.mean() - M) < 5 * np.sqrt(V / N)
    assert abs(x.var() / V - 1) < 0.1  # of few steps
    covariance = np.mean((x - M) * (np.asarray(x_0) - M))
    assert abs(covariance / V - kept(t)) < 5 / np.sqrt(N) + 0.03


def test_diffuse_uses_another_stream_than_sampling():
    x_t = editing.diffuse(LINEAR, KEY, jnp.zeros(SHAPE), 999)
    _, s = noise_level(999)
    assert abs(float(x_t.std()) / s - 1) < 5 / np.sqrt(2 * N)
    start = sample(LINEAR, lambda x, t: 0 * x, KEY, SHAPE, num_steps=2, num_snapshots=3, clip=False)[1][0]
    assert abs(np.corrcoef(np.ravel(x_t), np.ravel(start))[0, 1]) < 5 / np.sqrt(N)


def test_interpolation_is_linear_for_a_linear_network(model):
    """With deterministic steps and an affine network, the mixture's result is the mixture of the results."""
    ends = data(1)
    weights = [0.0, 0.25, 0.5, 1.0]
    found = editing.interpolate(LINEAR, model, KEY, *ends, weights, 400, sampler="ddim", num_steps=50, clip=False)
    for weight, x in zip(weights, found, strict=True):
        np.testing.assert_allclose(x, (1 - weight) * found[0] + weight * found[-1], atol=2e-5)
    assert not np.allclose(found[0], found[-1], atol=0.1)


def test_interpolation_mixes_at_t(model):
    """At t = 0 hardly anything changes; at t = T - 1 nothing is left of the two pictures."""
    ends = data(2)
    found = editing.interpolate(LINEAR, model, KEY, *ends, [0.0, 1.0], 0, clip=False)
    np.testing.assert_allclose(found, ends, atol=0.06)
    found = editing.interpolate(LINEAR, model, KEY, *ends, [0.0, 1.0], 999, **QUICK)
    for x, end in zip(found, ends, strict=True):
        assert abs(np.corrcoef(np.ravel(x), np.ravel(end))[0, 1]) < 5 / np.sqrt(N / 2)


def test_slerp():
    a, b = jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])
    np.testing.assert_allclose(editing.slerp(a, b, [0.0, 1.0]), [a, b], atol=1e-6)
    half = np.sqrt(0.5) * 1.5
    np.testing.assert_allclose(editing.slerp(a, b, [0.5]), [[half, half]], atol=1e-6)
    third = editing.slerp(a, b, [1 / 3])[0]
    np.testing.assert_allclose(third, np.array([np.cos(np.pi / 6), np.sin(np.pi / 6)]) * 4 / 3, atol=1e-6)
    np.testing.assert_allclose(editing.slerp(a, 3 * a, [0.5]), [[2.0, 0.0]], atol=1e-6)


def test_noise_keeps_its_size_between_two_noises():
    a, b = np.random.default_rng(0).standard_normal((2, 50, 50))
    assert np.all(np.abs(editing.slerp(jnp.asarray(a), jnp.asarray(b), np.linspace(0, 1, 7)).std((1, 2)) - 1) < 0.05)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_encoded_pictures_come_back(model, prediction):
    x_0 = data(3)

    def network(x, t):
        eps = model(x, t)
        a, s = (extract(c, t, 4) for c in (LINEAR.sqrt_alphas_cumprod, LINEAR.sqrt_one_minus_alphas_cumprod))
        return eps if prediction == "eps" else (eps - s * x) / a

    options = {"num_steps": 200, "prediction": prediction}
    noise = editing.encode(LINEAR, network, x_0, **options)
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
    back = sample(LINEAR, network, KEY, SHAPE, x_t=noise, sampler="ddim", clip=False, **options)
    assert float(jnp.abs(back - x_0).max()) < 0.08


def test_nearest_timestep():
    for t in (0, 17, 500, 999):
        a, s = noise_level(t)
        assert editing.nearest_timestep(LINEAR, s / a) == t
    assert editing.nearest_timestep(LINEAR, 0.0) == 0
    assert editing.nearest_timestep(LINEAR, 1e9) == 999


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5, 2.0])
def test_estimate_of_the_noise_in_smooth_pictures(sigma):
    x = np.linspace(-1, 1, 65)
    smooth = np.sin(3 * x)[:, None] * np.cos(2 * x) * np.ones((4, 1, 1))
    noisy = smooth[..., None] + sigma * np.random.default_rng(0).standard_normal((4, 65, 65, 1))
    assert editing.estimate_sigma(noisy) == pytest.approx(sigma, rel=0.05)


def test_denoising_draws_from_the_posterior(model):
    """Given x = x_0 + sigma n: mean m + v / (v + sigma^2) (x - m), variance v sigma^2 / (v + sigma^2)."""
    t = 300
    a, s = noise_level(t)
    sigma = s / a
    x = data(4) + sigma * jnp.asarray(np.random.default_rng(5).standard_normal(SHAPE), jnp.float32)
    clean = np.asarray(editing.denoise(LINEAR, model, KEY, x, t, **QUICK), np.float64)
    left = clean - (M + V / (V + sigma**2) * (np.asarray(x, np.float64) - M))
    variance = V * sigma**2 / (V + sigma**2)
    assert abs(left.mean()) < 5 * np.sqrt(variance / N) + 1e-3
    assert abs(left.var() / variance - 1) < 0.1  # of few steps
    assert abs(np.corrcoef(np.ravel(left), np.ravel(x))[0, 1]) < 5 / np.sqrt(N) + 0.02


@pytest.mark.slow
def test_inpainting_fits_the_known_part():
    """Pairs of pixels with correlation rho, one of them known: the other's mean approaches rho times the known one as
    steps are repeated more often. The known pixel stays as it is."""
    rho, v, pairs = 0.9, 0.2, 4000
    covariance = jnp.array([[v, rho * v], [rho * v, v]])

    def network(x, t):
        a = LINEAR.sqrt_alphas_cumprod[t][0]
        s = LINEAR.sqrt_one_minus_alphas_cumprod[t][0]
        inverse = jnp.linalg.inv(a**2 * covariance + s**2 * jnp.eye(2))
        return s * jnp.einsum("ij,bhjc->bhic", inverse, x)

    known = jnp.full((1, pairs, 2, 1), 0.5)
    mask = jnp.array([False, True])[None, None, :, None]
    errors = []
    for times in (1, 8):
        options = {"jump": 5, "times": times, **QUICK}
        inpaint = lambda key: editing.inpaint(LINEAR, network, key, known, mask, **options)  # noqa: B023, E731
        x = jax.jit(inpaint, compiler_options={"xla_backend_optimization_level": 1})(KEY)  # 800 steps are many
        np.testing.assert_array_equal(x[:, :, 0], known[:, :, 0])
        errors.append(abs(float(x[:, :, 1].mean()) - rho * 0.5))
    assert errors[0] > 0.1
    assert errors[1] < 0.04


def test_inpainting_ignores_what_lies_under_the_mask(model):
    x_0, mask = data(6), jnp.arange(64)[None, :, None, None] < 20
    other = jnp.where(mask, -7.0, x_0)
    first, second = (editing.inpaint(LINEAR, model, KEY, x, mask, num_steps=10) for x in (x_0, other))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(jnp.where(mask, 0.0, first), jnp.where(mask, 0.0, x_0))


@pytest.mark.parametrize("t", [200, 600])
def test_images_that_part_at_t_have_the_posterior_s_spread(model, t):
    options = {**QUICK, "num_steps": 200}
    x = editing.coarse_to_fine(LINEAR, model, KEY, (40, 32, 32, 1), t, **options)
    assert x.shape == (40, 32, 32, 1)
    spread = float(np.var(np.asarray(x, np.float64), axis=0, ddof=1).mean())
    assert spread / V == pytest.approx(1 - kept(t), rel=0.15)


def test_no_image_has_the_noise_of_the_shared_start_again(model):
    """Given x_t, each x_0 is an independent draw; all have the same correlation with x_t."""
    t, shape = 500, (6, 48, 48, 1)
    x = np.asarray(editing.coarse_to_fine(LINEAR, model, KEY, shape, t, **{**QUICK, "num_steps": 200}), np.float64)
    together = np.corrcoef(x.reshape(6, -1))[np.triu_indices(6, 1)]
    assert np.abs(together - kept(t)).max() < 5 / np.sqrt(48 * 48) + 0.03


def test_images_that_part_at_once_share_their_start(model):
    x = editing.coarse_to_fine(LINEAR, model, KEY, (4, 32, 32, 1), 999, num_steps=20, sampler="ddim", clip=False)
    np.testing.assert_allclose(x, jnp.broadcast_to(x[:1], x.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: editing.vary(LINEAR, m, KEY, data(), 1000), "t is 1000; accepted: 0 to 999"),
        (lambda m: editing.denoise(LINEAR, m, KEY, data(), -1), "t is -1; accepted: 0 to 999"),
        (lambda m: editing.coarse_to_fine(LINEAR, m, KEY, SHAPE, 1000), "t is 1000"),
        (lambda m: editing.vary(LINEAR, m, KEY, data(), 10, num_steps=12), "num_steps is 12; accepted: 1 to 11"),
        (lambda m: editing.inpaint(LINEAR, m, KEY, data(), True, times=2, sampler="unipc"), "a sampler that remembers"),
        (lambda m: editing.inpaint(LINEAR, m, KEY, data(), True, t_end=5), "known pixels require"),
        (lambda m: editing.inpaint(LINEAR, m, KEY, data(), True, known_noise=data()[:, 1:]), "known_noise has shape"),
    ],
)
def test_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
