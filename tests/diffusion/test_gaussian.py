import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion import gaussian
from ddpm_jax.diffusion.schedules import make_betas, make_schedule

LINEAR = make_schedule("linear", 1000)
BETAS = make_betas("linear", 1000)
ABAR = np.cumprod(1 - BETAS)
ABAR_PREVIOUS = np.append(1.0, ABAR[:-1])
POSTERIOR_VARIANCE = BETAS * (1 - ABAR_PREVIOUS) / (1 - ABAR)
TIMES = np.array([0, 1, 10, 250, 500, 999])


def images(seed, batch=6, channels=3):
    """x_0 in [-1, 1] and noise, float32 values stored as float64."""
    rng = np.random.default_rng(seed)
    shape = (batch, 4, 5, channels)
    x_0 = rng.uniform(-1, 1, shape).astype(np.float32).astype(np.float64)
    return x_0, rng.standard_normal(shape).astype(np.float32).astype(np.float64)


def column(values):
    return np.asarray(values, np.float64).reshape(-1, 1, 1, 1)


def single(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


# The forward process.


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_steps_compose_to_the_closed_form(measure, name):
    """q_step is A x + B z; the factor of x_0 and the variance follow from A and B of each step."""
    schedule = make_schedule(name, 1000)
    t = jnp.arange(1000)
    one, zero = jnp.ones(1000), jnp.zeros(1000)
    A = np.asarray(gaussian.q_step(schedule, one, t, zero), np.float64)
    B = np.asarray(gaussian.q_step(schedule, zero, t, one), np.float64)
    variance, variances = 0.0, []
    for step_a, step_b in zip(A, B, strict=True):
        variance = step_a**2 * variance + step_b**2
        variances.append(variance)
    factors, squares = gaussian.q_sample(schedule, one, t, zero), gaussian.q_sample(schedule, zero, t, one) ** 2
    np.testing.assert_allclose(factors, np.cumprod(A), rtol=2e-4, atol=1e-7)
    what, against = "`q_sample`: factor of x_0, and variance", "1000 `q_step`s composed"
    measure(f"{what}; linear and cosine", against, np.abs(factors - np.cumprod(A)).max(), 1e-5)
    measure(
        f"{what}, relative; linear and cosine",
        against,
        np.abs(squares / np.array(variances) - 1).max(),
        2e-6,
        "relative",
    )


def test_steps_compose_to_the_closed_form_by_monte_carlo(measure):
    """Mean and variance of 100,000 chains within 5 standard errors, of which the mean has sqrt(variance / n) and the
    variance sqrt(2 / n) of itself."""
    n, T = 100_000, 40
    schedule = make_schedule("linear", T, 1e-3, 0.1)
    x_0 = 0.8

    def step(x, t):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(3), t), x.shape)
        x = gaussian.q_step(schedule, x, jnp.full(n, t), noise)
        return x, (x.mean(), x.var())

    _, (mean, variance) = jax.jit(lambda: jax.lax.scan(step, jnp.full(n, x_0), jnp.arange(T)))()
    abar = np.cumprod(1 - make_betas("linear", T, 1e-3, 0.1))
    what, against = "100,000 chains of 40 `q_step`s", "DDPM, eq. 4"
    errors = np.abs(mean - np.sqrt(abar) * x_0) / np.sqrt((1 - abar) / n)
    measure(f"{what}: mean", against, errors.max(), 5, "standard errors")
    errors = np.abs(variance / (1 - abar) - 1) / np.sqrt(2 / n)
    measure(f"{what}: variance", against, errors.max(), 5, "standard errors")


def test_q_sample(measure):
    x_0, noise = images(0)
    got = gaussian.q_sample(LINEAR, *single(x_0), jnp.array(TIMES), *single(noise))
    expected = column(np.sqrt(ABAR[TIMES])) * x_0 + column(np.sqrt(1 - ABAR[TIMES])) * noise
    measure("`q_sample`", "DDPM, eq. 4, float64", np.abs(got - expected).max(), 6e-7)


def test_q_posterior_is_bayes_rule(measure):
    """The product of N(x_s; sqrt(abar_s) x_0, 1 - abar_s) and N(x_t; sqrt(alpha) x_s, beta) as functions of x_s."""
    t = TIMES[1:]
    x_0, x_t = images(1, len(t))
    precision = 1 / (1 - ABAR_PREVIOUS[t]) + (1 - BETAS[t]) / BETAS[t]
    weighted = column(np.sqrt(ABAR_PREVIOUS[t]) / (1 - ABAR_PREVIOUS[t])) * x_0
    weighted = weighted + column(np.sqrt(1 - BETAS[t]) / BETAS[t]) * x_t
    mean, variance, log_variance = gaussian.q_posterior(LINEAR, *single(x_0, x_t), jnp.array(t))
    assert variance.shape == log_variance.shape == (len(t), 1, 1, 1)
    against = "Bayes' rule for two Gaussians, float64"
    measure("`q_posterior`: mean", against, np.abs(mean - weighted / column(precision)).max(), 6e-7)
    errors = np.abs(variance * column(precision) - 1)
    measure("`q_posterior`: variance", against, errors.max(), 2e-7, "relative")
    errors = np.abs(log_variance / column(-np.log(precision)) - 1)
    measure("`q_posterior`: log-variance", against, errors.max(), 2e-7, "relative")


def test_q_posterior_of_the_first_step_is_x_0():
    x_0, x_t = single(*images(2, 1))
    mean, variance, log_variance = gaussian.q_posterior(LINEAR, x_0, x_t, jnp.array([0]))
    np.testing.assert_array_equal(mean, x_0)
    assert variance.item() == 0
    np.testing.assert_allclose(log_variance.item(), np.log(POSTERIOR_VARIANCE[1]), rtol=2e-7)


# What the output means.


def meanings(seed):
    x_0, eps = images(seed)
    a, s = column(np.sqrt(ABAR[TIMES])), column(np.sqrt(1 - ABAR[TIMES]))
    return a * x_0 + s * eps, {"eps": eps, "x_0": x_0, "v": a * eps - s * x_0}, a, s


@pytest.mark.parametrize(("source", "target"), list(itertools.product(["eps", "x_0", "v"], repeat=2)))
def test_conversions(measure, source, target):
    """A step of float32 is amplified by 1 / a on the way from eps, by 1 / s on the way to eps or v."""
    x_t, values, a, s = meanings(4)
    got = gaussian.convert_prediction(LINEAR, *single(values[source], x_t), jnp.array(TIMES), source, target)
    amplification = np.ones_like(a)
    if source != target:
        amplification = (1 / a if source == "eps" else 1) * (1 / s if target != "x_0" else 1)
    error = np.abs(np.asarray(got, np.float64) - values[target]) / amplification
    measure(
        "conversions between eps, x_0 and v, times a and s where they divide",
        "x_t = a x_0 + s eps, v = a eps - s x_0, float64",
        error.max(),
        2e-6,
    )


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(["eps", "x_0", "v"], 2)))
def test_conversions_round_trip(source, target):
    x_t, values, a, s = meanings(5)
    x_t, output = single(x_t, values[source])
    t = jnp.array(TIMES)
    there = gaussian.convert_prediction(LINEAR, output, x_t, t, source, target)
    back = gaussian.convert_prediction(LINEAR, there, x_t, t, target, source)
    assert np.max(np.abs(back - output) * np.minimum(a, s)) < 2e-6


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_to_x_0_and_from_x_0_at_given_factors(prediction):
    x_t, output = 0.7, -0.4
    a, s = 0.6, 0.8
    expected = {"eps": (0.7 + 0.32) / 0.6, "x_0": -0.4, "v": 0.42 + 0.32}[prediction]
    x_0 = gaussian.to_x_0(prediction, jnp.float32(output), jnp.float32(x_t), a, s)
    np.testing.assert_allclose(x_0, expected, rtol=3e-7)
    np.testing.assert_allclose(gaussian.from_x_0(prediction, x_0, jnp.float32(x_t), a, s), output, rtol=1e-6)


# Variances.


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_fixed_variances(measure, variance):
    """At t = 0 the small variance is 0 and the large one beta_0, but both logarithms are the posterior's at t = 1."""
    x_0, x_t = single(*images(6))
    p = gaussian.p_mean_variance(LINEAR, x_0, x_t, jnp.array(TIMES), prediction="x_0", variance=variance)
    expected = {"fixed_small": POSTERIOR_VARIANCE, "fixed_large": BETAS}[variance][TIMES]
    log_expected = np.log(np.where(TIMES == 0, POSTERIOR_VARIANCE[1], expected))
    assert p.variance[0].item() == np.float32(expected[0])
    errors = [np.abs(p.variance[1:] / column(expected[1:]) - 1), np.abs(p.log_variance / column(log_expected) - 1)]
    worst = max(error.max() for error in errors)
    measure(
        "fixed variances, small and large, and their logarithms", "DDPM, section 3.2, float64", worst, 1e-7, "relative"
    )


@pytest.mark.parametrize("interpolation", [-1.0, -0.3, 0.0, 0.5, 1.0, 1.7])
def test_learned_variance(measure, interpolation):
    """-1 is the posterior's variance, 1 is beta, and in between (or beyond) a geometric mean."""
    x_0, x_t = single(*images(7))
    output = jnp.concatenate([x_0, jnp.full_like(x_0, interpolation)], axis=-1)
    p = gaussian.p_mean_variance(LINEAR, output, x_t, jnp.array(TIMES), prediction="x_0", variance="learned")
    small = np.where(TIMES == 0, POSTERIOR_VARIANCE[1], POSTERIOR_VARIANCE[TIMES])
    f = (interpolation + 1) / 2
    expected = np.broadcast_to(column(BETAS[TIMES] ** f * small ** (1 - f)), x_0.shape)
    np.testing.assert_allclose(p.log_variance, np.log(expected), rtol=3e-7)
    measure(
        "learned variance", "Improved DDPM, eq. 15, float64", np.abs(p.variance / expected - 1).max(), 3e-6, "relative"
    )
    fixed = gaussian.p_mean_variance(LINEAR, x_0, x_t, jnp.array(TIMES), prediction="x_0")
    np.testing.assert_array_equal(p.mean, fixed.mean)


def test_learned_variance_takes_the_second_half_of_the_channels():
    x_0, x_t = single(*images(8, channels=2))
    v = jnp.linspace(-1, 1, x_0.size).reshape(x_0.shape)
    output = jnp.concatenate([x_0, v], axis=-1)
    p = gaussian.p_mean_variance(LINEAR, output, x_t, jnp.array(TIMES), prediction="x_0", variance="learned")
    np.testing.assert_array_equal(p.x_0, x_0)
    t = 3
    span = np.log(BETAS[TIMES[t]] / POSTERIOR_VARIANCE[TIMES[t]])
    expected = np.log(POSTERIOR_VARIANCE[TIMES[t]]) + (np.asarray(v[t], np.float64) + 1) / 2 * span
    np.testing.assert_allclose(p.log_variance[t], expected, rtol=3e-7)


# Clipping.


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_mean_is_the_posterior_of_the_predicted_x_0(prediction, clip):
    x_t, values, a, s = meanings(9)
    wild = 3 * values["x_0"]
    output = {"eps": (x_t - a * wild) / s, "x_0": wild, "v": (a * x_t - wild) / s}[prediction]
    p = gaussian.p_mean_variance(
        LINEAR, *single(output, x_t), jnp.array(TIMES), prediction=prediction, clip=clip, variance="fixed_small"
    )
    expected = np.clip(wild, -1, 1) if clip else wild
    scale = 1 / a if prediction == "eps" else np.ones_like(a)
    assert np.max(np.abs(p.x_0 - expected) / scale) < 3e-6
    coef1 = BETAS * np.sqrt(ABAR_PREVIOUS) / (1 - ABAR)
    coef2 = (1 - ABAR_PREVIOUS) * np.sqrt(1 - BETAS) / (1 - ABAR)
    mean = column(coef1[TIMES]) * expected + column(coef2[TIMES]) * x_t
    assert np.max(np.abs(p.mean - mean) / scale) < 3e-6


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("clip", [True, False])
def test_dynamic_thresholding(quantile, clip):
    """Images within [-1, 1] stay as they are; the others are clipped to their own quantile and divided by it."""
    x = np.random.default_rng(0).standard_normal((5, 6, 6, 3)) * column([0.2, 0.5, 1, 2, 10])
    x = x.astype(np.float32).astype(np.float64)
    s = column([max(1.0, np.quantile(np.abs(image), quantile)) for image in x])
    got = gaussian.clip_x_0(*single(x), clip, quantile)
    # float32 places the quantile within 1e-5 of a step between two neighbouring values.
    np.testing.assert_allclose(got, np.clip(x, -s, s) / s, atol=4e-6)
    assert np.max(np.abs(got)) <= 1


def test_clip_range():
    x_0, x_t = single(*images(11))
    options = {"prediction": "x_0", "clip_range": 2.5}
    p = gaussian.p_mean_variance(LINEAR, 4 * x_0, x_t, jnp.array(TIMES), **options)
    np.testing.assert_array_equal(p.x_0, np.clip(4 * x_0, -2.5, 2.5))
    assert jnp.abs(p.x_0).max() == 2.5
    p = gaussian.p_mean_variance(LINEAR, 4 * x_0, x_t, jnp.array(TIMES), clip=False, **options)
    np.testing.assert_array_equal(p.x_0, 4 * x_0)
    step = gaussian.p_sample(LINEAR, lambda x, t: 4 * x_0, jax.random.key(0), x_t, jnp.zeros_like(TIMES), **options)
    np.testing.assert_allclose(step, np.clip(4 * x_0, -2.5, 2.5), atol=1e-5)


def test_limit_of_dynamic_thresholding():
    x_0 = jnp.array([[3.0, -1.2, 0.5, 0.1], [1.1, -0.2, 0.3, 0.0]]).reshape(2, 2, 2, 1)
    found = gaussian.clip_x_0(x_0, dynamic_threshold=1.0, threshold_limit=1.5)
    expected = np.array([[1.5, -1.2, 0.5, 0.1], [1.1, -0.2, 0.3, 0.0]]) / [[1.5], [1.1]]
    np.testing.assert_allclose(found.reshape(2, 4), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"threshold_limit is 0.5; accepted: 1 or more, or None"):
        gaussian.Parameterization(threshold_limit=0.5).check()


def test_dynamic_thresholding_reaches_the_mean():
    x_0, x_t = single(*images(10))
    p = gaussian.p_mean_variance(LINEAR, 4 * x_0, x_t, jnp.array(TIMES), prediction="x_0", dynamic_threshold=0.9)
    np.testing.assert_array_equal(p.x_0, gaussian.clip_x_0(4 * x_0, True, 0.9))
    np.testing.assert_array_equal(p.mean, gaussian.q_posterior(LINEAR, p.x_0, x_t, jnp.array(TIMES))[0])


# Sampling one step.


def linear_model(x, t):
    return 0.3 * x + t.reshape(-1, 1, 1, 1) / 1000


@pytest.mark.parametrize(
    ("prediction", "variance"),
    [("eps", "fixed_small"), ("x_0", "fixed_large"), ("v", "fixed_large"), ("eps", "learned")],
)
def test_p_sample_is_mean_plus_sigma_noise_but_the_mean_at_0(prediction, variance):
    _, x_t = single(*images(11))
    model = linear_model
    if variance == "learned":
        model = lambda x, t: jnp.concatenate([linear_model(x, t), jnp.tanh(x)], axis=-1)  # noqa: E731
    key, t = jax.random.key(5), jnp.array(TIMES)
    p = gaussian.p_mean_variance(LINEAR, model(x_t, t), x_t, t, prediction=prediction, variance=variance)
    got = gaussian.p_sample(LINEAR, model, key, x_t, t, prediction=prediction, variance=variance)
    sigma = np.where(column(TIMES) == 0, 0, np.exp(0.5 * np.asarray(p.log_variance, np.float64)))
    expected = p.mean + sigma * np.asarray(jax.random.normal(key, x_t.shape), np.float64)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    np.testing.assert_allclose(got[0], p.mean[0], atol=2e-7)


def test_p_sample_with_one_key_an_example_ignores_the_rest_of_the_batch():
    _, x_t = single(*images(12))
    keys, t = jax.random.split(jax.random.key(6), len(TIMES)), jnp.array(TIMES)
    together = gaussian.p_sample(LINEAR, linear_model, keys, x_t, t)
    for i in range(len(TIMES)):
        alone = gaussian.p_sample(LINEAR, linear_model, keys[i : i + 1], x_t[i : i + 1], t[i : i + 1])
        np.testing.assert_allclose(together[i], alone[0], atol=3e-7)


def test_normal_with_one_key_and_with_many():
    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_array_equal(gaussian.normal(keys[0], (2, 5)), jax.random.normal(keys[0], (2, 5)))
    many = gaussian.normal(keys, (3, 5))
    np.testing.assert_array_equal(many, jnp.stack([jax.random.normal(key, (5,)) for key in keys]))


def test_new_weights_do_not_retrace():
    traces = []

    def apply(weight, x, t):
        traces.append(None)
        return weight * x

    _, x_t = single(*images(13))
    t, key = jnp.array(TIMES), jax.random.key(0)
    results = [
        gaussian.p_sample(LINEAR, jax.tree_util.Partial(apply, jnp.float32(weight)), key, x_t, t)
        for weight in (0.0, 0.5, 0.7)
    ]
    assert len(traces) == 1
    assert not np.allclose(results[1], results[2])
    gaussian.p_sample(make_schedule("cosine", 1000), jax.tree_util.Partial(apply, jnp.float32(1)), key, x_t, t)
    assert len(traces) == 1  # nor does another schedule of the same length


# Refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "noise"}, "prediction is 'noise'; accepted: eps, x_0, v"),
        ({"variance": "large"}, "variance is 'large'; accepted: fixed_small, fixed_large, learned"),
        ({"variance": "learned"}, "even number of output channels, not 3"),
    ],
)
@pytest.mark.parametrize("function", ["p_mean_variance", "p_sample"])
def test_refused_options(function, options, message):
    _, x_t = single(*images(14))
    t = jnp.array(TIMES)
    call = {
        "p_sample": lambda: gaussian.p_sample(LINEAR, linear_model, jax.random.key(0), x_t, t, **options),
        "p_mean_variance": lambda: gaussian.p_mean_variance(LINEAR, x_t, x_t, t, **options),
    }[function]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("source", "target", "name"), [("x0", "eps", "x0"), ("eps", "x0", "x0"), ("score", "v", "score")]
)
def test_refused_conversions(source, target, name):
    x = jnp.zeros((1, 2, 2, 1))
    with pytest.raises(ValueError, match=f"is '{name}'; accepted: eps, x_0, v"):
        gaussian.convert_prediction(LINEAR, x, x, jnp.array([0]), source, target)
