"""The probability flow for known densities: Gaussians and a mixture, with their exact networks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpm_jax.diffusion import flow
from ddpm_jax.diffusion.gaussian import from_x_0
from ddpm_jax.diffusion.schedules import make_betas, make_schedule, rescale_to_zero_terminal_snr

LINEAR = make_schedule("linear", 1000)
M, V, RHO = 0.1, 0.04, 0.9
LN2 = math.log(2.0)
A_0, S_0 = math.sqrt(1 - 1e-4), math.sqrt(1e-4)  # at t = 0


def scales(schedule, t, ndim):
    """a and s at fractional t, where the flow interpolates log(s / a) linearly."""
    tau = jnp.interp(t.astype(jnp.float32), jnp.arange(schedule.num_timesteps), -0.5 * schedule.log_snr)
    tau = tau.reshape(-1, *(1,) * (ndim - 1))
    return jnp.exp(-0.5 * jnp.logaddexp(0.0, 2 * tau)), jnp.exp(-0.5 * jnp.logaddexp(0.0, -2 * tau))


def correlated(schedule, prediction="eps", learned=False):
    """The exact network of pairs of pixels N(M, V) with correlation RHO, along the covariance's eigenvectors."""

    def model(x, t):
        a, s = scales(schedule, t, x.ndim)
        along = (x - a * M) @ jnp.array([[1.0, 1.0], [1.0, -1.0]]) / 2
        values = V * jnp.array([1 + RHO, 1 - RHO])
        along = a * values / (a**2 * values + s**2) * along
        x_0 = M + along @ jnp.array([[1.0, 1.0], [1.0, -1.0]])
        output = from_x_0(prediction, x_0, x, a, s)
        return jnp.concatenate([output, 0 * output], axis=-1) if learned else output

    return model


def exact_flow(name, x):
    """The flow's end points and log-densities for N(M, C): along C's eigenvectors, x - a M scales like the marginal's
    standard deviation."""
    log_abar = np.cumsum(np.log1p(-make_betas(name, 1000)))[[0, -1]]
    values = V * np.array([1 + RHO, 1 - RHO])
    (a_0, a_T), (variance_0, variance_T) = np.exp(0.5 * log_abar), np.exp(log_abar)[:, None] * (values - 1) + 1
    rotation = np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2)
    scale = np.sqrt(variance_T / variance_0)
    end = a_T * M + (np.asarray(x, np.float64) - a_0 * M) @ rotation * scale @ rotation
    return end, (stats.norm.logpdf(end) + np.log(scale)).sum((1, 2, 3))


def draw_pairs(n):
    x = stats.multivariate_normal(np.full(2, M), V * np.array([[1, RHO], [RHO, 1]])).rvs(2 * n, random_state=0)
    return jnp.asarray(x.reshape(n, 2, 1, 2), jnp.float32)  # pairs along the channels


@pytest.mark.parametrize(("method", "order", "steps"), [("heun", 2, (20, 40, 80)), ("rk4", 4, (10, 20, 40))])
def test_order_of_convergence(method, order, steps):
    """Doubling the number of steps divides the error by 2^order."""
    x = draw_pairs(64)
    errors = []
    for n in steps:
        found = flow.flow_log_density(
            LINEAR, correlated(LINEAR), jax.random.key(0), x, num_steps=n, method=method, divergence="exact"
        )
        errors.append(
            np.sqrt(np.mean((np.asarray(found["log_density"], np.float64) - exact_flow("linear", x)[1]) ** 2))
        )
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, order, atol=0.4, err_msg=str(errors))


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(("prediction", "variance"), [("eps", "fixed_large"), ("x_0", "learned"), ("v", "fixed_small")])
def test_log_density_of_a_gaussian(name, prediction, variance):
    schedule, x = make_schedule(name, 1000), draw_pairs(4)
    model = correlated(schedule, prediction, variance == "learned")
    options = {"prediction": prediction, "variance": variance, "divergence": "exact", "num_steps": 80}
    found = flow.flow_log_density(schedule, model, jax.random.key(0), x, **options)
    end, expected = exact_flow(name, x)
    np.testing.assert_allclose(found["log_density"], expected, atol=2e-4)
    np.testing.assert_allclose(found["x"], end, atol=1e-4)


def test_density_of_a_mixture():
    """Two narrow peaks, whose field is far from linear: compares with SciPy's density and an integral of 1."""
    peaks, width = np.array([-0.6, 0.5]), 0.1
    share = np.array([0.3, 0.7])

    def model(x, t):
        a, s = scales(LINEAR, t, x.ndim)
        log_weights = [
            jnp.log(w) - 0.5 * (x - a * m) ** 2 / (a**2 * width**2 + s**2) for w, m in zip(share, peaks, strict=True)
        ]
        weights = jax.nn.softmax(jnp.stack(log_weights), axis=0)
        gain = a * width**2 / (a**2 * width**2 + s**2)
        x_0 = sum(w * (m + gain * (x - a * m)) for w, m in zip(weights, peaks, strict=True))
        return (x - a * x_0) / s

    x = np.linspace(-1.3, 1.2, 501)
    found = flow.flow_log_density(
        LINEAR, model, jax.random.key(0), jnp.asarray(x, jnp.float32).reshape(-1, 1, 1, 1), num_steps=60
    )
    deviation = np.sqrt(A_0**2 * width**2 + S_0**2)
    expected = sum(w * stats.norm(A_0 * m, deviation).pdf(x) for w, m in zip(share, peaks, strict=True))
    density = np.exp(np.asarray(found["log_density"], np.float64))
    np.testing.assert_allclose(density, expected, atol=0.01, rtol=0.01)
    assert np.trapezoid(density, x) == pytest.approx(1, abs=2e-3)


def test_hutchinson_is_unbiased_and_drawn_per_image():
    n = 1000
    x = jnp.repeat(draw_pairs(1), n, axis=0)
    keys = jax.random.split(jax.random.key(1), n)
    options = {"num_steps": 5, "method": "heun"}
    exact = flow.flow_log_density(LINEAR, correlated(LINEAR), keys[0], x[:1], divergence="exact", **options)
    drawn = flow.flow_log_density(LINEAR, correlated(LINEAR), keys, x, **options)["log_density"]
    values = np.asarray(drawn, np.float64)
    assert values.std() > 0.1
    assert abs(values.mean() - exact["log_density"][0]) < 5 * values.std() / np.sqrt(n)
    alone = flow.flow_log_density(LINEAR, correlated(LINEAR), keys[7:9], x[:2], **options)["log_density"]
    np.testing.assert_allclose(alone, drawn[7:9], rtol=1e-5, atol=1e-5)


def test_the_bound_of_single_pixels(gaussian_model):
    """By quadrature over x at t = 0: the bound's mean over q, and -log P itself, which is lower."""
    schedule, levels, n = make_schedule("linear", 50, 1e-3, 0.3), np.array([0, 90, 140, 255]), 4000
    a, s = math.sqrt(1 - 1e-3), math.sqrt(1e-3)
    x_0 = levels / 127.5 - 1
    batch = jnp.asarray(np.repeat(x_0, n).reshape(-1, 1, 1, 1), jnp.float32)

    def model(x, t):
        a, s = scales(schedule, t, x.ndim)
        return s * (x - a * M) / (a**2 * V + s**2)

    found = flow.flow_bound(
        schedule, model, jax.random.key(0), batch, num_steps=40, variance="fixed_small", method="rk4"
    )
    values = {name: np.asarray(array, np.float64).reshape(4, n) for name, array in found.items()}
    np.testing.assert_allclose(values["total"], values["flow"] + values["decoder"], rtol=1e-5)

    betas = make_betas("linear", 50, 1e-3, 0.3)
    scale = math.sqrt(betas[1] * betas[0] / (1 - (1 - betas[0]) * (1 - betas[1])))
    deviation = math.sqrt(a**2 * V + s**2)

    def log_decoder(x, x_0):
        mean = M + a * V / (a**2 * V + s**2) * (x - a * M)
        upper = stats.norm.cdf((x_0 + 1 / 255 - mean) / scale) if x_0 < 0.999 else 1.0
        lower = stats.norm.cdf((x_0 - 1 / 255 - mean) / scale) if x_0 > -0.999 else 0.0
        return np.log(np.maximum(upper - lower, 1e-300))

    for i, value in enumerate(x_0):
        x = np.linspace(a * value - 8 * s, a * value + 8 * s, 20_001)
        q = stats.norm(a * value, s)
        log_p = stats.norm(a * M, deviation).logpdf(x)
        decoder = log_decoder(x, value)
        mean = np.trapezoid(q.pdf(x) * (q.logpdf(x) - log_p - decoder), x) / LN2
        exact = -np.log(np.trapezoid(np.exp(log_p + decoder), x)) / LN2
        total = values["total"][i]
        assert abs(total.mean() - mean) < 5 * total.std() / np.sqrt(n) + 1e-4 * abs(mean)
        assert mean >= exact


@pytest.mark.parametrize(("at_once", "told"), [(1, 52), (25, 3)])
def test_a_scan_of_calls_is_the_same_as_single_ones(monkeypatch, at_once, told):
    """And progress is called in between."""
    x, seen = draw_pairs(2), []
    monkeypatch.setattr(flow, "_calls_at_once", lambda: 52)
    arguments = (LINEAR, correlated(LINEAR), jax.random.key(0), x)
    whole = flow.flow_log_density(*arguments, num_steps=13)
    monkeypatch.setattr(flow, "_calls_at_once", lambda: at_once)
    parts = flow.flow_log_density(*arguments, num_steps=13, progress=lambda *n: seen.append(n))
    np.testing.assert_allclose(parts["log_density"], whole["log_density"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(parts["x"], whole["x"], rtol=1e-5, atol=1e-6)
    assert seen[-1] == (52, 52)
    assert len(seen) == told


def test_table():
    """Every call is within the network's timesteps, the steps are even in log-SNR, and the factors are at most 1."""
    for method, stages in (("heun", 2), ("rk4", 4)):
        table = flow.flow_table(LINEAR, 7, method, "v")
        assert len(table.t) == 7 * stages
        assert table.t[0] == 0
        assert table.t[-1] == 999
        assert table.last.sum() == 7
        range_ = 0.5 * float(LINEAR.log_snr[0] - LINEAR.log_snr[-1])
        assert table.weight.sum() == pytest.approx(range_, rel=1e-5)
        for prediction in ("eps", "x_0", "v"):
            factors = flow.flow_table(LINEAR, 7, method, prediction)
            assert max(np.abs(factors.of_x).max(), np.abs(factors.of_output).max()) <= 1


def test_pure_noise_is_left_out():
    schedule = make_schedule(rescale_to_zero_terminal_snr(make_betas("linear", 100)))
    table = flow.flow_table(schedule, 3)
    assert table.t[-1] == 98
    assert np.isfinite(table.weight).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "euler"}, "method is 'euler'; accepted: heun, rk4"),
        ({"divergence": "skilling"}, "divergence is 'skilling'; accepted: hutchinson, exact"),
        ({"prediction": "score"}, "prediction is 'score'"),
        ({"variance": "fixed"}, "variance is 'fixed'"),
        ({"num_steps": 0}, "num_steps is 0; accepted: 1 or more"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        flow.flow_bound(LINEAR, lambda x, t: x, jax.random.key(0), jnp.zeros((1, 2, 2, 1)), **options)


def test_one_timestep_has_no_flow():
    with pytest.raises(ValueError, match="at least two timesteps"):
        flow.flow_table(make_schedule("constant", 1), 3)
