from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpm_jax.diffusion import losses
from ddpm_jax.diffusion.gaussian import convert_prediction, q_sample
from ddpm_jax.diffusion.schedules import extract, make_betas, make_schedule

T = 1000
LINEAR = make_schedule("linear", T)
BETAS = make_betas("linear", T)
ABAR = np.cumprod(1 - BETAS)
ABAR_PREVIOUS = np.append(1.0, ABAR[:-1])
POSTERIOR_VARIANCE = BETAS * (1 - ABAR_PREVIOUS) / (1 - ABAR)
COEF1 = BETAS * np.sqrt(ABAR_PREVIOUS) / (1 - ABAR)
COEF2 = (1 - ABAR_PREVIOUS) * np.sqrt(1 - BETAS) / (1 - ABAR)
LN2 = np.log(2.0)
TIMES = np.array([0, 1, 10, 250, 500, 999])
LEVELS = np.arange(256) / 127.5 - 1


def single(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def column(values):
    return np.asarray(values, np.float64).reshape(-1, 1, 1, 1)


def batch(seed, channels=3):
    """8-bit x_0, noise and something for the network to say, float32 values held as float64."""
    rng = np.random.default_rng(seed)
    shape = (len(TIMES), 4, 4, channels)
    x_0 = (rng.integers(0, 256, shape) / 127.5 - 1).astype(np.float32).astype(np.float64)
    return (x_0, *(rng.standard_normal(shape).astype(np.float32).astype(np.float64) for _ in range(2)))


def noised(x_0, noise):
    return column(np.sqrt(ABAR[TIMES])) * x_0 + column(np.sqrt(1 - ABAR[TIMES])) * noise


def kl(mean_1, variance_1, mean_2, variance_2):
    return 0.5 * (np.log(variance_2 / variance_1) + (variance_1 + (mean_1 - mean_2) ** 2) / variance_2 - 1)


def decoder_log_likelihood(x, mean, scale):
    """The difference of two values of the distribution function, taken in the tail where it is exact."""
    x, mean, scale = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (x, mean, scale)))
    lower = np.where(x < -0.999, -np.inf, (x - mean - 1 / 255) / scale)
    upper = np.where(x > 0.999, np.inf, (x - mean + 1 / 255) / scale)
    lower, upper = np.where(x > mean, -upper, lower), np.where(x > mean, -lower, upper)
    log_upper, log_lower = stats.norm.logcdf(upper), stats.norm.logcdf(lower)
    with np.errstate(divide="ignore"):
        return log_upper + np.log(-np.expm1(log_lower - log_upper))


# The discretised Gaussian.

log_likelihood = jax.jit(losses.discretized_gaussian_log_likelihood)
gradient_by_mean, gradient_by_scale = (
    jax.jit(jax.vmap(jax.grad(losses.discretized_gaussian_log_likelihood, i))) for i in (1, 2)
)


@pytest.mark.parametrize("mean", [-1.0, -0.5, 0.0, 0.003, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("scale", [1e-3, 3e-3, 0.01, 0.1, 1.0, 5.0])
def test_discretized_gaussian_follows_scipy(measure, mean, scale):
    x, mean, log_scale = single(LEVELS, mean, np.log(scale))
    got = log_likelihood(x, mean, log_scale)
    exact = decoder_log_likelihood(x, mean, np.exp(np.float64(log_scale)))
    # Rounding x - mean and 1 / scale moves the bin's edges by 2e-7 / scale, and the log-density there has that slope.
    # A wide Gaussian's bin is a small difference of two values of the distribution function.
    slope = np.abs(np.asarray(x, np.float64) - mean) / scale + 1
    bound = 4e-7 * slope * (slope + 1 / scale) + 1.5e-4 * scale
    errors = np.abs(got - exact)
    likely = exact > -20
    against = "differences of SciPy's normal distribution function, float64"
    measure(
        "discretised Gaussian, all bins, as a share of what float32 allows there", against, (errors / bound).max(), 1
    )
    if likely.any() and 0.01 <= scale <= 1:
        measure("its log-likelihood where above -20, scales 0.01 to 1", against, errors[likely].max(), 2e-3, "nats")


@pytest.mark.parametrize("mean", [-1.2, -1.0, 0.0, 0.31, 1.0])
@pytest.mark.parametrize("scale", [1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0])
def test_bins_sum_to_one(mean, scale):
    x, mean, log_scale = single(LEVELS, mean, np.log(scale))
    got = np.asarray(log_likelihood(x, mean, log_scale), np.float64)
    np.testing.assert_allclose(np.exp(got).sum(), 1, atol=4e-7 if scale < 1 else 6e-6)


@pytest.mark.parametrize("log_scale", [-30.0, -12.0, -7.0, -2.0, 0.0, 3.0])
def test_discretized_gaussian_has_finite_values_and_gradients(log_scale):
    x, mean = (v.ravel() for v in np.meshgrid(LEVELS, [-3.0, -1.0, -0.2, 0.0, 0.5, 1.0, 3.0]))
    arguments = single(x, mean, np.full_like(x, log_scale))
    for function in (log_likelihood, gradient_by_mean, gradient_by_scale):
        assert np.isfinite(function(*arguments)).all()


@pytest.mark.parametrize("scale", [0.02, 0.2])
def test_discretized_gaussian_gradients_follow_differences(scale):
    x, mean = LEVELS[::15], 0.21
    arguments = single(x, np.full_like(x, mean), np.full_like(x, np.log(scale)))
    h = 1e-6
    low, high = decoder_log_likelihood(x, mean - h, scale), decoder_log_likelihood(x, mean + h, scale)
    difference = (high - low) / (2 * h)
    np.testing.assert_allclose(gradient_by_mean(*arguments), difference, rtol=3e-4)
    low, high = (decoder_log_likelihood(x, mean, scale * np.exp(d)) for d in (-h, h))
    difference = (high - low) / (2 * h)
    np.testing.assert_allclose(gradient_by_scale(*arguments), difference, rtol=3e-4)


# The bound's terms.


@pytest.mark.parametrize("mean_2", [-2.0, 0.0, 0.3])
@pytest.mark.parametrize("log_variance_2", [-9.0, 0.0, 2.0])
def test_normal_kl(mean_2, log_variance_2):
    mean_1, log_variance_1 = (v.ravel() for v in np.meshgrid([-1.0, 0.0, 0.31], [-9.0, -3.0, 0.0, 1.5]))
    got = losses.normal_kl(*single(mean_1, log_variance_1, mean_2, log_variance_2))
    expected = kl(mean_1, np.exp(log_variance_1), mean_2, np.exp(log_variance_2))
    np.testing.assert_allclose(got, expected, rtol=6e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("T", [10, 1000])
def test_prior_bpd(measure, name, T):
    x_0, *_ = batch(0)
    abar = np.prod(1 - make_betas(name, T))
    expected = kl(np.sqrt(abar) * x_0, 1 - abar, 0.0, 1.0).mean((1, 2, 3)) / LN2
    got = losses.prior_bpd(make_schedule(name, T), *single(x_0))
    assert got.shape == (len(x_0),)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=3e-8)
    measure(
        "L_T in bits/dim", "the divergence of two Gaussians, float64", np.abs(got - expected).max(), 1e-5, "bits/dim"
    )


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_vb_terms(measure, prediction, variance, clip):
    """All t in one batch: the decoder's where t = 0, a divergence of two Gaussians elsewhere."""
    x_0, noise, other = batch(1)
    x_t = noised(x_0, noise)
    a, s = column(np.sqrt(ABAR[TIMES])), column(np.sqrt(1 - ABAR[TIMES]))
    predicted = x_0 + 0.3 * s * other
    output = {"eps": (x_t - a * predicted) / s, "x_0": predicted, "v": (a * x_t - predicted) / s}[prediction]
    small = np.where(TIMES == 0, POSTERIOR_VARIANCE[1], POSTERIOR_VARIANCE[TIMES])
    model_variance = {"fixed_small": small, "fixed_large": np.where(TIMES == 0, small, BETAS[TIMES])}.get(variance)
    if variance == "learned":
        v = np.tanh(other)
        output = np.concatenate([output, v], axis=-1)
        model_variance = column(BETAS[TIMES]) ** ((v + 1) / 2) * column(small) ** ((1 - v) / 2)
    else:
        model_variance = np.broadcast_to(column(model_variance), x_0.shape)

    predicted = np.clip(predicted, -1, 1) if clip else predicted
    difference = column(COEF1[TIMES]) * (x_0 - predicted)
    expected = kl(0.0, column(small), difference, model_variance).mean((1, 2, 3))
    mean_0 = predicted[0]  # at t = 0 the posterior's mean is x_0
    expected[0] = -decoder_log_likelihood(x_0[0], mean_0, np.sqrt(model_variance[0])).mean()
    got = losses.vb_term_bpd(
        LINEAR, *single(output, x_0, x_t), jnp.array(TIMES), prediction=prediction, variance=variance, clip=clip
    )
    # At large t the divergence is small, and what remains of nearly equal means and variances.
    assert np.all(np.abs(got * LN2 / expected - 1) < [1e-6, 1e-5, 1e-5, 1.2e-4, 3e-4, 1e-3])
    measure(
        "L_0 and L_{t-1} in bits/dim; eps, x_0, v; all variances",
        "the decoder's likelihood and the divergence of two Gaussians, float64",
        np.abs(got / (expected / LN2) - 1).max(),
        1e-3,
        "relative",
    )


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_bound_of_gaussian_data_under_the_exact_model(measure, gaussian_model, variance):
    """x_0 - E[x_0 | x_t] is Gaussian of variance w = v s^2 / (a^2 v + s^2), which the posterior's coefficient brings to
    the means: so KL_t has the mean (posterior / p - 1 - log(posterior / p) + c^2 w / p) / 2. Of its estimate from n
    numbers, c^2 w / p has the standard error sqrt(2 / n)."""
    m, v, steps, n = 0.1, 0.04, 25, 128 * 32 * 32
    betas = make_betas("linear", steps, 1e-3, 0.3)
    schedule = make_schedule("linear", steps, 1e-3, 0.3)
    x_0 = (m + np.sqrt(v) * np.random.default_rng(2).standard_normal((128, 32, 32, 1))).astype(np.float32)
    got = losses.variational_bound(
        schedule, gaussian_model(schedule, m, v), jax.random.key(1), jnp.asarray(x_0), variance=variance
    )
    abar = np.cumprod(1 - betas)
    previous = np.append(1.0, abar[:-1])
    w = v * (1 - abar) / (abar * v + 1 - abar)
    posterior = (betas * (1 - previous) / (1 - abar))[1:]
    p = posterior if variance == "fixed_small" else betas[1:]
    c = betas * np.sqrt(previous) / (1 - abar)
    squared = (c**2 * w)[1:] / p
    expected = 0.5 * (posterior / p - 1 - np.log(posterior / p) + squared) / LN2
    terms = np.asarray(got["terms"], np.float64)
    assert terms.shape == got["x_0_mse"].shape == (steps, 128)
    errors = np.maximum(np.abs(terms.mean(1)[1:] - expected) - 1e-6, 0) / (np.sqrt(2 / n) * 0.5 * squared / LN2)
    what, against = "Gaussian data, exact network", "closed form of the bound"
    measure(f"{what}: each L_{{t-1}} in bits/dim", against, errors.max(), 5, "standard errors")
    errors = np.abs(got["x_0_mse"].mean(1) / w - 1) / np.sqrt(2 / n)
    measure(f"{what}: error of the predicted x_0 at each t", against, errors.max(), 5, "standard errors")
    prior = kl(np.sqrt(abar[-1]) * x_0.astype(np.float64), 1 - abar[-1], 0.0, 1.0).mean((1, 2, 3)) / LN2
    np.testing.assert_allclose(got["prior"], prior, rtol=1e-5)
    np.testing.assert_allclose(got["total"], terms.sum(0) + got["prior"], rtol=1e-6)


def test_bound_is_made_of_vb_terms():
    """Terms, their order and the decoder term, with the noise that the bound draws: fold_in(key, t)."""
    steps = 6
    schedule = make_schedule("cosine", steps)
    x_0 = jnp.asarray(batch(3)[0], jnp.float32)
    model = lambda x, t: jnp.concatenate([jnp.sin(x) + t[:, None, None, None] / 10, jnp.cos(x)], axis=-1)  # noqa: E731
    options = {"prediction": "v", "variance": "learned", "clip": True}
    got = losses.variational_bound(schedule, model, jax.random.key(4), x_0, **options)
    for step in range(steps):
        t = jnp.full(len(x_0), step)
        x_t = q_sample(schedule, x_0, t, jax.random.normal(jax.random.fold_in(jax.random.key(4), step), x_0.shape))
        term = losses.vb_term_bpd(schedule, model(x_t, t), x_0, x_t, t, **options)
        np.testing.assert_allclose(got["terms"][step], term, rtol=2e-5)
        predicted = convert_prediction(schedule, model(x_t, t)[..., :3], x_t, t, "v", "x_0")
        np.testing.assert_allclose(got["x_0_mse"][step], ((predicted - x_0) ** 2).mean((1, 2, 3)), rtol=2e-5)


def test_bound_with_a_key_an_image_and_in_segments():
    """An image's terms do not depend on the others; chosen timesteps, and the progress between segments."""
    schedule, told = make_schedule("cosine", 30), []
    x_0, keys = single(batch(3)[0])[0], jax.random.split(jax.random.key(5), len(TIMES))
    model = lambda x, t: jnp.sin(x) + t[:, None, None, None] / 10  # noqa: E731
    whole = losses.variational_bound(schedule, model, keys, x_0, progress=lambda *n: told.append(n))
    assert told == [(15, 30), (30, 30)]
    alone = losses.variational_bound(schedule, model, keys[2:3], x_0[2:3])
    for name, value in alone.items():
        np.testing.assert_allclose(value[..., 0], whole[name][..., 2], rtol=2e-5)
    some = losses.bound_terms(schedule, model, keys, x_0, [29, 4])
    np.testing.assert_allclose(some["terms"], whole["terms"][np.array([29, 4])], rtol=2e-5)
    assert np.all(whole["clipped_x_0_mse"] <= whole["x_0_mse"] * (1 + 1e-6))


@pytest.mark.parametrize(("rows", "most"), [(1, 25), (25, 25), (26, 25), (101, 25), (7, 1)])
def test_segments_are_of_one_length(rows, most):
    parts = losses.segments(rows, most)
    assert len({len(chosen) for _, chosen in parts}) == 1
    assert len(parts[0][1]) <= most
    joined = np.concatenate([chosen for _, chosen in parts])
    np.testing.assert_array_equal(joined[:rows], np.arange(rows))
    assert np.all(joined[rows:] == rows - 1)
    assert [first for first, _ in parts] == [i * len(parts[0][1]) for i in range(len(parts))]


# A few terms instead of all.

FEW = make_schedule("linear", 100, 1e-3, 0.15)


@jax.tree_util.Partial
def slightly_wrong(x, t):
    """The exact eps of N(0.1, 0.04), but for a hundredth."""
    a, s = (extract(array, t, x.ndim) for array in (FEW.sqrt_alphas_cumprod, FEW.sqrt_one_minus_alphas_cumprod))
    return 1.01 * s * (x - a * 0.1) / (a**2 * 0.04 + s**2)


@pytest.fixture(scope="module")
def all_terms():
    """float64 [T, 1000], of one picture under `slightly_wrong`, and its L_T."""
    every = losses.variational_bound(FEW, slightly_wrong, jax.random.key(1), copies(1000), variance="fixed_small")
    return np.asarray(every["terms"], np.float64), every["prior"][0]


def copies(n):
    """[n, 2, 2, 1], all the same picture."""
    levels = np.array([120, 140, 155, 190]).reshape(1, 2, 2, 1)
    return jnp.asarray(np.repeat(levels / 127.5 - 1, n, axis=0), jnp.float32)


@pytest.mark.parametrize(("way", "num_terms"), [("uniform", 8), ("pilot", 2), ("own curve", 8)])
def test_sampled_bound_is_unbiased_and_knows_its_variance(all_terms, way, num_terms):
    """Of one picture, over the draws of t and noise, against all terms averaged over the noise."""
    n, (terms, prior) = 16_000, all_terms
    if way == "uniform":
        proposal = losses.term_proposal(np.ones(100))
    elif way == "pilot":
        x_0, timesteps = copies(16), losses.pilot_timesteps(FEW, 16)
        pilot = losses.bound_terms(FEW, slightly_wrong, jax.random.key(2), x_0, timesteps, variance="fixed_small")
        proposal = losses.pilot_proposal(FEW, pilot["terms"], 16)
    else:
        proposal = losses.term_proposal(np.sqrt((terms**2).mean(1)))
    found = losses.sampled_bound(
        FEW,
        slightly_wrong,
        jax.random.key(3),
        copies(n),
        proposal=proposal,
        num_terms=num_terms,
        variance="fixed_small",
    )
    found = {name: np.asarray(value, np.float64) for name, value in found.items()}
    for name, exact in (("kl", terms[1:].sum(0)), ("decoder", terms[0])):
        error = np.sqrt(found[name].var() / n + exact.var() / exact.size)
        assert abs(found[name].mean() - exact.mean()) < 5 * error
    np.testing.assert_allclose(found["prior"], prior, rtol=1e-6)
    np.testing.assert_allclose(found["total"], found["prior"] + found["decoder"] + found["kl"], rtol=1e-6)
    spread = found["kl_variance"].std() / np.sqrt(n) + found["kl"].var() * np.sqrt(8 / n)
    assert abs(found["kl_variance"].mean() - found["kl"].var()) < 5 * spread


def test_importance_lowers_the_variance(gaussian_model):
    """By far, with the linear schedule's steep curve; one learnt by 16 calls is nearly as good as the whole."""
    model, variances = gaussian_model(LINEAR, 0.1, 0.04), {}
    every = losses.bound_terms(LINEAR, model, jax.random.key(1), copies(64))
    pilot = losses.bound_terms(LINEAR, model, jax.random.key(2), copies(16), losses.pilot_timesteps(LINEAR, 16))
    proposals = {
        "uniform": losses.term_proposal(np.ones(T)),
        "curve": losses.term_proposal(np.sqrt((np.asarray(every["terms"], np.float64) ** 2).mean(1))),
        "pilot": losses.pilot_proposal(LINEAR, pilot["terms"], 16),
    }
    for name, proposal in proposals.items():
        found = losses.sampled_bound(LINEAR, model, jax.random.key(3), copies(4000), proposal=proposal)
        variances[name] = np.asarray(found["kl"], np.float64).var()
    assert variances["curve"] < 0.2 * variances["uniform"]
    assert variances["pilot"] < 1.3 * variances["curve"]


def test_sampled_bound_of_an_image_is_its_own():
    keys = jax.random.split(jax.random.key(4), 6)
    proposal = losses.term_proposal(np.ones(100))
    whole = losses.sampled_bound(FEW, slightly_wrong, keys, copies(6), proposal=proposal)
    alone = losses.sampled_bound(FEW, slightly_wrong, keys[3:4], copies(1), proposal=proposal)
    for name, value in alone.items():
        np.testing.assert_allclose(value[0], whole[name][3], rtol=1e-5)


def test_term_proposal():
    np.testing.assert_allclose(losses.term_proposal([9.0, 3.0, 1.0], 0.2), [0, 0.7, 0.3])
    np.testing.assert_allclose(losses.term_proposal([9.0, 0.0, 0.0]), [0, 0.5, 0.5])
    probabilities = losses.term_proposal(warm_history(12).probabilities())
    assert probabilities.sum() == pytest.approx(1)
    assert np.all(probabilities[1:] > 0.1 / 12)
    for T, calls in ((2, 8), (12, 8), (1000, 32)):
        timesteps = losses.pilot_timesteps(make_schedule("linear", T), calls)
        assert len(timesteps) <= calls
        assert timesteps[0] == 1
        assert timesteps[-1] == T - 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: losses.term_proposal([1.0, np.nan]), "must be finite, at least 0"),
        (lambda: losses.term_proposal([1.0, -1.0]), "must be finite, at least 0"),
        (lambda: losses.term_proposal(np.ones(3), 0.0), "uniform is 0.0; accepted: above 0 to 1"),
        (lambda: sampled(num_terms=3), "num_terms is 3; accepted: even numbers of 2 or more"),
        (lambda: sampled(proposal=np.ones(7)), r"the proposal has shape \(7,\); accepted: \(100,\)"),
        (lambda: sampled(proposal=np.eye(100)[1]), "above 0 from entry 1 on"),
        (lambda: sampled(variance="fixed"), "variance is 'fixed'"),
        (lambda: losses.pilot_timesteps(make_schedule("constant", 1)), "no term to draw"),
    ],
)
def test_refused_draws_of_terms(function, message):
    with pytest.raises(ValueError, match=message):
        function()


def sampled(**options):
    options = {"proposal": losses.term_proposal(np.ones(100)), **options}
    return losses.sampled_bound(FEW, lambda x, t: x, jax.random.key(0), copies(2), **options)


# The training loss.


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_simple_loss_is_the_mse_of_its_target(prediction):
    x_0, noise, output = batch(5)
    a, s = column(np.sqrt(ABAR[TIMES])), column(np.sqrt(1 - ABAR[TIMES]))
    target = {"eps": noise, "x_0": x_0, "v": a * noise - s * x_0}[prediction]
    seen = []

    def model(x, t):
        seen.append((x, t))
        return jnp.asarray(output, jnp.float32)

    x, z = single(x_0, noise)
    got = losses.training_loss(LINEAR, model, jax.random.key(0), x, t=jnp.array(TIMES), noise=z, prediction=prediction)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, ((output - target) ** 2).mean((1, 2, 3)), rtol=3e-6)
    np.testing.assert_allclose(seen[0][0], noised(x_0, noise), atol=6e-7)
    np.testing.assert_array_equal(seen[0][1], TIMES)


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("weighting", ["none", "min_snr", "p2", "truncated_snr"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_weights(name, weighting, prediction):
    """The papers' own formulas for each prediction."""
    snr = lambda abar: abar / (1 - abar)  # noqa: E731
    values = snr(np.cumprod(1 - make_betas(name, T)))
    of_x_0 = {
        "min_snr": np.minimum(values, 5),
        "p2": values / (1 + values),
        "truncated_snr": np.maximum(values, 1),
    }
    own = {
        ("min_snr", "eps"): np.minimum(1, 5 / values),  # Hang et al. 2023, section 3.4
        ("min_snr", "v"): np.minimum(values, 5) / (values + 1),
        ("p2", "eps"): 1 / (1 + values),  # Choi et al. 2022, eq. 8
        ("p2", "v"): values / (1 + values) ** 2,
        ("truncated_snr", "eps"): np.maximum(1, 1 / values),
        ("truncated_snr", "v"): np.maximum(values, 1) / (1 + values),
    }
    expected = np.ones(T)
    if weighting != "none":
        expected = own.get((weighting, prediction), of_x_0[weighting])
    got = losses.loss_weight(make_schedule(name, T), jnp.arange(T), prediction, weighting)
    np.testing.assert_allclose(got, expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("weighting", "prediction"),
    [
        ("min_snr", "eps"),
        ("p2", "eps"),
        ("min_snr", "v"),
        ("p2", "v"),
        ("truncated_snr", "x_0"),
        ("truncated_snr", "v"),
    ],
)
def test_weights_are_finite_at_pure_noise(weighting, prediction):
    """As min(1, 5 / snr) and 1 / (1 + snr) are 1 for an snr of 0, the last of the "jsd" schedule."""
    assert np.isfinite(losses.loss_weight(make_schedule("jsd", 5), jnp.arange(5), prediction, weighting)).all()


@pytest.mark.parametrize("weighting", ["min_snr", "p2", "truncated_snr"])
def test_weights_multiply_the_loss(weighting):
    x_0, noise, output = single(*batch(6))
    t, key = jnp.array(TIMES), jax.random.key(0)
    model = lambda x, t: output  # noqa: E731
    plain = losses.training_loss(LINEAR, model, key, x_0, t=t, noise=noise, prediction="v")
    got = losses.training_loss(LINEAR, model, key, x_0, t=t, noise=noise, prediction="v", weighting=weighting)
    np.testing.assert_allclose(got, plain * losses.loss_weight(LINEAR, t, "v", weighting), rtol=1e-6)


@pytest.mark.parametrize("weighting", ["none", "p2"])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_hybrid_trains_the_mean_by_the_simple_loss_and_the_variance_by_the_bound(prediction, weighting):
    x_0, noise, other = batch(7)
    output = jnp.asarray(np.concatenate([other, np.tanh(other[..., ::-1])], axis=-1), jnp.float32)
    x, z = single(x_0, noise)
    t, key, lam = jnp.array(TIMES), jax.random.key(0), 0.02

    def loss(output, channels=6, **options):
        value = losses.training_loss(
            LINEAR, lambda x, t: output[..., :channels], key, x, t=t, noise=z, prediction=prediction, **options
        )
        return value.sum(), value

    grad = jax.grad(loss, has_aux=True)
    hybrid, hybrid_value = grad(output, variance="learned", loss="hybrid", vlb_weight=lam, weighting=weighting)
    simple, simple_value = grad(output, channels=3, weighting=weighting)
    vlb, vlb_value = grad(output, variance="learned", loss="vlb")
    np.testing.assert_allclose(hybrid_value, simple_value + lam * vlb_value, rtol=1e-5)
    np.testing.assert_allclose(hybrid[..., :3], simple[..., :3], rtol=1e-6)
    np.testing.assert_allclose(hybrid[..., 3:], lam * vlb[..., 3:], rtol=1e-5, atol=2e-8)
    assert np.abs(vlb[..., :3]).max() > 0
    assert np.abs(vlb[..., 3:]).max() > 0


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_vlb_loss_is_the_term_times_the_timesteps(variance):
    x_0, noise, output = single(*batch(8))
    if variance == "learned":
        output = jnp.concatenate([output, jnp.tanh(output)], axis=-1)
    t = jnp.array(TIMES)
    got = losses.training_loss(
        LINEAR, lambda x, t: output, jax.random.key(0), x_0, t=t, noise=noise, loss="vlb", variance=variance
    )
    x_t = q_sample(LINEAR, x_0, t, noise)
    np.testing.assert_allclose(got, T * losses.vb_term_bpd(LINEAR, output, x_0, x_t, t, variance=variance), rtol=1e-5)


@pytest.mark.parametrize("loss", ["vlb", "hybrid"])
def test_losses_with_the_bound_have_finite_gradients_at_every_t(loss):
    """Also where the other branch, of the decoder, is far out of its range."""
    t = jnp.arange(T)
    x_0 = jnp.asarray(np.random.default_rng(9).choice(LEVELS, (T, 2, 2, 1)), jnp.float32)
    noise = jax.random.normal(jax.random.key(0), x_0.shape)

    def total(output):
        return losses.training_loss(
            LINEAR, lambda x, t: output, jax.random.key(0), x_0, t=t, noise=noise, loss=loss, variance="learned"
        ).sum()

    for output in (0.0, 5.0):
        assert np.isfinite(jax.jit(jax.grad(total))(jnp.full((T, 2, 2, 2), output))).all()


def test_t_and_noise_are_drawn_from_the_key():
    """A network that says t for x_0 = 0 has the loss t^2, one that says 0 for the noise has its mean square."""
    n, steps = 40_000, 10
    schedule = make_schedule("linear", steps)
    x_0 = jnp.zeros((n, 2, 2, 1))
    says_t = lambda x, t: jnp.broadcast_to(t[:, None, None, None], x.shape) * 1.0  # noqa: E731
    squares = losses.training_loss(schedule, says_t, jax.random.key(1), x_0, prediction="x_0")
    counts = np.bincount(np.sqrt(squares).astype(int), minlength=steps)
    assert len(counts) == steps
    assert stats.chisquare(counts).pvalue > 1e-3
    mean_squares = losses.training_loss(schedule, lambda x, t: 0 * x, jax.random.key(1), x_0)
    assert stats.kstest(4 * np.asarray(mean_squares), stats.chi2(4).cdf).pvalue > 1e-3
    again = losses.training_loss(schedule, lambda x, t: 0 * x, jax.random.key(1), x_0)
    other = losses.training_loss(schedule, lambda x, t: 0 * x, jax.random.key(2), x_0)
    np.testing.assert_array_equal(mean_squares, again)
    assert not np.allclose(mean_squares, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hybrid"}, "loss 'hybrid' trains a learned variance; variance is 'fixed_large'"),
        ({"variance": "learned"}, "loss 'simple' does not train a learned variance"),
        ({"loss": "mse"}, "loss is 'mse'; accepted: simple, hybrid, vlb"),
        ({"prediction": "score"}, " is 'score'; accepted: eps, x_0, v"),
        ({"variance": "fixed"}, "variance is 'fixed'; accepted: fixed_small, fixed_large, learned"),
        ({"weighting": "snr"}, "weighting is 'snr'; accepted: none, min_snr, p2, truncated_snr"),
        ({"loss": "hybrid", "variance": "learned"}, "even number of output channels, not 3"),
    ],
)
def test_refused_options(options, message):
    x_0, _, _ = single(*batch(10))
    with pytest.raises(ValueError, match=message):
        losses.training_loss(LINEAR, lambda x, t: x, jax.random.key(0), x_0, **options)


def test_refused_output_shape():
    """Broadcasting would make a wrong loss of one output channel for three."""
    with pytest.raises(ValueError, match=r"the network gives \(6, 4, 4, 1\) for images of shape \(6, 4, 4, 3\)"):
        losses.training_loss(LINEAR, lambda x, t: x[..., :1], jax.random.key(0), single(*batch(10))[0])


def test_bound_refuses_unknown_options():
    x_0 = jnp.zeros((1, 2, 2, 1))
    for options in ({"prediction": "score"}, {"variance": "fixed"}):
        with pytest.raises(ValueError, match="accepted: "):
            losses.variational_bound(LINEAR, lambda x, t: x, jax.random.key(0), x_0, **options)


# How t is drawn.


@pytest.mark.parametrize("steps", [2, 7, 1000])
def test_uniform_timesteps(steps):
    t, weights = losses.sample_timesteps(jax.random.key(0), 50 * steps, steps)
    assert t.dtype == jnp.int32
    np.testing.assert_array_equal(weights, np.ones(50 * steps))
    counts = np.bincount(t, minlength=steps)
    assert t.min() >= 0
    assert len(counts) == steps
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(("size", "steps"), [(1, 10), (8, 1000), (7, 3)])
def test_stratified_timesteps(size, steps):
    """Around the circle of timesteps, any two neighbours are T / B apart, rounded; each place alone is uniform."""
    draw = lambda key: losses.sample_timesteps(key, size, steps, "stratified")  # noqa: E731
    t, weights = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 5000))
    assert t.dtype == jnp.int32
    assert t.min() >= 0
    assert t.max() < steps
    np.testing.assert_array_equal(weights, np.ones((5000, size)))
    gaps = np.diff(np.concatenate([t, t[:, :1]], axis=1), axis=1) % steps
    wanted = {int(np.floor(steps / size)) % steps, int(np.ceil(steps / size)) % steps}
    assert set(np.unique(gaps)) <= wanted
    for place in {0, size - 1}:
        counts = np.bincount(np.asarray(t[:, place]) * 10 // steps if steps > 10 else t[:, place])
        assert stats.chisquare(counts).pvalue > 1e-3


def warm_history(steps, seed=0):
    rng = np.random.default_rng(seed)
    return losses.LossHistory(
        jnp.asarray(rng.uniform(0.1, 3, (steps, 10)) * np.linspace(0.2, 2, steps)[:, None], jnp.float32),
        jnp.full(steps, 10, jnp.int32),
    )


def test_probabilities():
    """Improved DDPM, eq. 18, with a thousandth of the uniform distribution."""
    history = warm_history(12)
    weights = np.sqrt((np.asarray(history.losses, np.float64) ** 2).mean(1))
    expected = 0.999 * weights / weights.sum() + 0.001 / 12
    np.testing.assert_allclose(history.probabilities(), expected, rtol=1e-6)
    np.testing.assert_allclose(history.probabilities(0.5), 0.5 * weights / weights.sum() + 0.5 / 12, rtol=1e-6)


def test_importance_is_unbiased():
    """Drawn as often as p says, weighted by 1 / (T p)."""
    steps, n = 12, 60_000
    history = warm_history(steps)
    p = np.asarray(history.probabilities(), np.float64)
    t, weights = losses.sample_timesteps(jax.random.key(2), n, steps, "importance", history)
    assert t.dtype == jnp.int32
    np.testing.assert_allclose(weights, 1 / (steps * p[t]), rtol=1e-6)
    assert stats.chisquare(np.bincount(t, minlength=steps), n * p / p.sum()).pvalue > 1e-3
    f = np.cos(np.arange(steps)) + np.arange(steps)
    products = np.asarray(weights, np.float64) * f[t]
    assert abs(products.mean() - f.mean()) < 5 * products.std() / np.sqrt(n)
    assert abs(f[t].mean() - f.mean()) > 20 * f[t].std() / np.sqrt(n)  # which the weights are needed for


def test_importance_is_uniform_until_every_timestep_has_ten_losses():
    history = warm_history(12)
    history = losses.LossHistory(history.losses, history.counts.at[5].set(9))
    np.testing.assert_allclose(history.probabilities(), 1 / 12, rtol=1e-7)
    _, weights = losses.sample_timesteps(jax.random.key(3), 100, 12, "importance", history)
    np.testing.assert_allclose(weights, 1, rtol=1e-6)


@pytest.mark.parametrize(("size", "steps"), [(1, 3), (8, 5), (40, 3), (64, 1)])
def test_loss_history_is_a_deque_a_timestep(size, steps):
    """With batches in which timesteps repeat, some more than 10 times; in the deque's order, too."""
    rng = np.random.default_rng(size)
    history = losses.LossHistory.create(steps)
    update = jax.jit(losses.LossHistory.update)
    deques, counts = [deque(maxlen=10) for _ in range(steps)], np.zeros(steps, int)
    for i in range(25):
        t = rng.integers(0, steps, size)
        values = (100 * i + np.arange(size)).astype(np.float32)
        history = update(history, jnp.asarray(t), jnp.asarray(values))
        for step, value in zip(t, values, strict=True):
            deques[step].append(value)
            counts[step] += 1
        np.testing.assert_array_equal(history.counts, counts)
        for step in range(steps):
            row, count = np.asarray(history.losses[step]), counts[step]
            oldest_first = np.roll(row, -(count % 10)) if count >= 10 else row[:count]
            np.testing.assert_array_equal(oldest_first, deques[step])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("random", "timestep sampler is 'random'; accepted: uniform, stratified, importance"),
        ("importance", "timestep sampler 'importance' needs a LossHistory"),
    ],
)
def test_refused_timestep_samplers(method, message):
    with pytest.raises(ValueError, match=message):
        losses.sample_timesteps(jax.random.key(0), 4, 10, method)


def test_divergence_of_the_exact_model_is_zero():
    """With x_0 predicted exactly and the posterior's variance, every divergence is zero."""
    x_0, noise, _ = single(*batch(11))
    t = jnp.array(TIMES[1:])
    x_0, x_t = x_0[1:], q_sample(LINEAR, x_0[1:], t, noise[1:])
    term = losses.vb_term_bpd(LINEAR, x_0, x_0, x_t, t, prediction="x_0", variance="fixed_small")
    np.testing.assert_allclose(term, 0, atol=1e-7)
