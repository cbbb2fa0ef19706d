import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paper import ABAR, BETAS, LEVELS, LINEAR, TIMES, T, batch, column, noised, single
from scipy import stats

from ddpm_jax.diffusion import bound
from ddpm_jax.diffusion.gaussian import convert_prediction, q_sample
from ddpm_jax.diffusion.schedules import extract, make_betas, make_schedule
from ddpm_jax.diffusion.timesteps import LossHistory

ABAR_PREVIOUS = np.append(1.0, ABAR[:-1])
POSTERIOR_VARIANCE = BETAS * (1 - ABAR_PREVIOUS) / (1 - ABAR)
COEF1 = BETAS * np.sqrt(ABAR_PREVIOUS) / (1 - ABAR)
LN2 = np.log(2.0)


def kl(mean_1, variance_1, mean_2, variance_2):
    return 0.5 * (np.log(variance_2 / variance_1) + (variance_1 + (mean_1 - mean_2) ** 2) / variance_2 - 1)


def decoder_log_likelihood(x, mean, scale):
    """The difference of two CDF values, computed in the tail where it is exact."""
    x, mean, scale = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (x, mean, scale)))
    lower = np.where(x < -0.999, -np.inf, (x - mean - 1 / 255) / scale)
    upper = np.where(x > 0.999, np.inf, (x - mean + 1 / 255) / scale)
    lower, upper = np.where(x > mean, -upper, lower), np.where(x > mean, -lower, upper)
    log_upper, log_lower = stats.norm.logcdf(upper), stats.norm.logcdf(lower)
    with np.errstate(divide="ignore"):
        return log_upper + np.log(-np.expm1(log_lower - log_upper))


# The discretised Gaussian.

log_likelihood = jax.jit(bound.discretized_gaussian_log_likelihood)
gradient_by_mean, gradient_by_scale = (
    jax.jit(jax.vmap(jax.grad(bound.discretized_gaussian_log_likelihood, i))) for i in (1, 2)
)


@pytest.mark.parametrize("mean", [-1.0, -0.5, 0.0, 0.003, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("scale", [1e-3, 3e-3, 0.01, 0.1, 1.0, 5.0])
def test_discretized_gaussian_follows_scipy(measure, mean, scale):
    x, mean, log_scale = single(LEVELS, mean, np.log(scale))
    got = log_likelihood(x, mean, log_scale)
    exact = decoder_log_likelihood(x, mean, np.exp(np.float64(log_scale)))
    # Rounding x - mean and 1 / scale moves the bin's edges by 2e-7 / scale, and the log-density there has that slope.
    # A wide Gaussian's bin is a small difference of two CDF values.
    slope = np.abs(np.asarray(x, np.float64) - mean) / scale + 1
    allowed = 4e-7 * slope * (slope + 1 / scale) + 1.5e-4 * scale
    errors = np.abs(got - exact)
    likely = exact > -20
    against = "differences of SciPy's normal distribution function, float64"
    measure(
        "discretised Gaussian, all bins, as a share of what float32 allows there", against, (errors / allowed).max(), 1
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
    got = bound.normal_kl(*single(mean_1, log_variance_1, mean_2, log_variance_2))
    expected = kl(mean_1, np.exp(log_variance_1), mean_2, np.exp(log_variance_2))
    np.testing.assert_allclose(got, expected, rtol=6e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("T", [10, 1000])
def test_prior_bpd(measure, name, T):
    x_0, *_ = batch(0)
    abar = np.prod(1 - make_betas(name, T))
    expected = kl(np.sqrt(abar) * x_0, 1 - abar, 0.0, 1.0).mean((1, 2, 3)) / LN2
    got = bound.prior_bpd(make_schedule(name, T), *single(x_0))
    assert got.shape == (len(x_0),)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=3e-8)
    measure(
        "L_T in bits/dim", "the divergence of two Gaussians, float64", np.abs(got - expected).max(), 1e-5, "bits/dim"
    )


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_vb_terms(measure, prediction, variance, clip):
    """All t in one batch: the decoder term where t = 0, a divergence of two Gaussians elsewhere."""
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
    got = bound.vb_term_bpd(
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


def test_divergence_of_the_exact_model_is_zero():
    """With x_0 predicted exactly and the posterior's variance, every divergence is zero."""
    x_0, noise, _ = single(*batch(11))
    t = jnp.array(TIMES[1:])
    x_0, x_t = x_0[1:], q_sample(LINEAR, x_0[1:], t, noise[1:])
    term = bound.vb_term_bpd(LINEAR, x_0, x_0, x_t, t, prediction="x_0", variance="fixed_small")
    np.testing.assert_allclose(term, 0, atol=1e-7)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_bound_of_gaussian_data_under_the_exact_model(measure, gaussian_model, variance):
    """x_0 - E[x_0 | x_t] is Gaussian of variance w = v s^2 / (a^2 v + s^2), which the posterior's coefficient brings to
    the means: so KL_t has the mean (posterior / p - 1 - log(posterior / p) + c^2 w / p) / 2. In its estimate from n
    numbers, c^2 w / p has the standard error sqrt(2 / n)."""
    m, v, steps, n = 0.1, 0.04, 25, 128 * 32 * 32
    betas = make_betas("linear", steps, 1e-3, 0.3)
    schedule = make_schedule("linear", steps, 1e-3, 0.3)
    x_0 = (m + np.sqrt(v) * np.random.default_rng(2).standard_normal((128, 32, 32, 1))).astype(np.float32)
    got = bound.variational_bound(
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
    """Checks the terms, their order and the decoder term, with the noise that the bound draws: fold_in(key, t)."""
    steps = 6
    schedule = make_schedule("cosine", steps)
    x_0 = jnp.asarray(batch(3)[0], jnp.float32)
    model = lambda x, t: jnp.concatenate([jnp.sin(x) + t[:, None, None, None] / 10, jnp.cos(x)], axis=-1)  # noqa: E731
    options = {"prediction": "v", "variance": "learned", "clip": True}
    got = bound.variational_bound(schedule, model, jax.random.key(4), x_0, **options)
    for step in range(steps):
        t = jnp.full(len(x_0), step)
        x_t = q_sample(schedule, x_0, t, jax.random.normal(jax.random.fold_in(jax.random.key(4), step), x_0.shape))
        term = bound.vb_term_bpd(schedule, model(x_t, t), x_0, x_t, t, **options)
        np.testing.assert_allclose(got["terms"][step], term, rtol=2e-5)
        predicted = convert_prediction(schedule, model(x_t, t)[..., :3], x_t, t, "v", "x_0")
        np.testing.assert_allclose(got["x_0_mse"][step], ((predicted - x_0) ** 2).mean((1, 2, 3)), rtol=2e-5)


@pytest.mark.slow
def test_bound_with_a_key_an_image_and_in_segments():
    """An image's terms do not depend on the other images; also checks chosen timesteps and progress calls."""
    schedule, told = make_schedule("cosine", 30), []
    x_0, keys = single(batch(3)[0])[0], jax.random.split(jax.random.key(5), len(TIMES))
    model = lambda x, t: jnp.sin(x) + t[:, None, None, None] / 10  # noqa: E731
    whole = bound.variational_bound(schedule, model, keys, x_0, progress=lambda *n: told.append(n))
    assert told == [(15, 30), (30, 30)]
    alone = bound.variational_bound(schedule, model, keys[2:3], x_0[2:3])
    for name, value in alone.items():
        np.testing.assert_allclose(value[..., 0], whole[name][..., 2], rtol=2e-5)
    some = bound.bound_terms(schedule, model, keys, x_0, [29, 4])
    np.testing.assert_allclose(some["terms"], whole["terms"][np.array([29, 4])], rtol=2e-5)
    assert np.all(whole["clipped_x_0_mse"] <= whole["x_0_mse"] * (1 + 1e-6))


@pytest.mark.parametrize(("rows", "most"), [(1, 25), (25, 25), (26, 25), (101, 25), (7, 1)])
def test_segments_are_of_one_length(rows, most):
    parts = bound.segments(rows, most)
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
    """The exact eps of N(0.1, 0.04), with an error of one hundredth."""
    a, s = (extract(array, t, x.ndim) for array in (FEW.sqrt_alphas_cumprod, FEW.sqrt_one_minus_alphas_cumprod))
    return 1.01 * s * (x - a * 0.1) / (a**2 * 0.04 + s**2)


@pytest.fixture(scope="module")
def all_terms():
    """The terms of one picture under `slightly_wrong`, float64 [T, 1000], and its L_T."""
    every = bound.variational_bound(FEW, slightly_wrong, jax.random.key(1), copies(1000), variance="fixed_small")
    return np.asarray(every["terms"], np.float64), every["prior"][0]


def copies(n):
    """[n, 2, 2, 1], all the same picture."""
    levels = np.array([120, 140, 155, 190]).reshape(1, 2, 2, 1)
    return jnp.asarray(np.repeat(levels / 127.5 - 1, n, axis=0), jnp.float32)


@pytest.mark.parametrize(("way", "num_terms"), [("uniform", 8), ("pilot", 2), ("own curve", 8)])
def test_sampled_bound_is_unbiased_and_estimates_its_variance(all_terms, way, num_terms):
    """For one picture: estimates over draws of t and noise, against all terms averaged over the noise."""
    n, (terms, prior) = 16_000, all_terms
    if way == "uniform":
        proposal = bound.term_proposal(np.ones(100))
    elif way == "pilot":
        x_0, timesteps = copies(16), bound.pilot_timesteps(FEW, 16)
        pilot = bound.bound_terms(FEW, slightly_wrong, jax.random.key(2), x_0, timesteps, variance="fixed_small")
        proposal = bound.pilot_proposal(FEW, pilot["terms"], 16)
    else:
        proposal = bound.term_proposal(np.sqrt((terms**2).mean(1)))
    found = bound.sampled_bound(
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
    """By far, with the linear schedule's steep curve; a proposal from 16 calls is nearly as good as the exact one."""
    model, variances = gaussian_model(LINEAR, 0.1, 0.04), {}
    every = bound.bound_terms(LINEAR, model, jax.random.key(1), copies(64))
    pilot = bound.bound_terms(LINEAR, model, jax.random.key(2), copies(16), bound.pilot_timesteps(LINEAR, 16))
    proposals = {
        "uniform": bound.term_proposal(np.ones(T)),
        "curve": bound.term_proposal(np.sqrt((np.asarray(every["terms"], np.float64) ** 2).mean(1))),
        "pilot": bound.pilot_proposal(LINEAR, pilot["terms"], 16),
    }
    for name, proposal in proposals.items():
        found = bound.sampled_bound(LINEAR, model, jax.random.key(3), copies(4000), proposal=proposal)
        variances[name] = np.asarray(found["kl"], np.float64).var()
    assert variances["curve"] < 0.2 * variances["uniform"]
    assert variances["pilot"] < 1.3 * variances["curve"]


def test_sampled_bound_of_an_image_is_its_own():
    keys = jax.random.split(jax.random.key(4), 6)
    proposal = bound.term_proposal(np.ones(100))
    whole = bound.sampled_bound(FEW, slightly_wrong, keys, copies(6), proposal=proposal)
    alone = bound.sampled_bound(FEW, slightly_wrong, keys[3:4], copies(1), proposal=proposal)
    for name, value in alone.items():
        np.testing.assert_allclose(value[0], whole[name][3], rtol=1e-5)


def test_term_proposal():
    np.testing.assert_allclose(bound.term_proposal([9.0, 3.0, 1.0], 0.2), [0, 0.7, 0.3])
    np.testing.assert_allclose(bound.term_proposal([9.0, 0.0, 0.0]), [0, 0.5, 0.5])
    history = LossHistory(jnp.linspace(0.2, 2, 12)[:, None] * jnp.ones(10), jnp.full(12, 10))
    probabilities = bound.term_proposal(history.probabilities())
    assert probabilities.sum() == pytest.approx(1)
    assert np.all(probabilities[1:] > 0.1 / 12)
    for steps, calls in ((2, 8), (12, 8), (1000, 32)):
        timesteps = bound.pilot_timesteps(make_schedule("linear", steps), calls)
        assert len(timesteps) <= calls
        assert timesteps[0] == 1
        assert timesteps[-1] == steps - 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: bound.term_proposal([1.0, np.nan]), "must be finite numbers of at least 0"),
        (lambda: bound.term_proposal([1.0, -1.0]), "must be finite numbers of at least 0"),
        (lambda: bound.term_proposal(np.ones(3), 0.0), "uniform is 0.0; accepted: above 0, at most 1"),
        (lambda: sampled(num_terms=3), "num_terms is 3; accepted: even numbers from 2"),
        (lambda: sampled(proposal=np.ones(7)), r"the proposal has shape \(7,\); accepted: \(100,\)"),
        (lambda: sampled(proposal=np.eye(100)[1]), "above 0 from entry 1 on"),
        (lambda: sampled(variance="fixed"), "variance is 'fixed'"),
        (lambda: bound.pilot_timesteps(make_schedule("constant", 1)), "no KL terms to draw"),
    ],
)
def test_refused_draws_of_terms(function, message):
    with pytest.raises(ValueError, match=message):
        function()


def sampled(**options):
    options = {"proposal": bound.term_proposal(np.ones(100)), **options}
    return bound.sampled_bound(FEW, lambda x, t: x, jax.random.key(0), copies(2), **options)


def test_bound_refuses_unknown_options():
    x_0 = jnp.zeros((1, 2, 2, 1))
    for options in ({"prediction": "score"}, {"variance": "fixed"}):
        with pytest.raises(ValueError, match="accepted: "):
            bound.variational_bound(LINEAR, lambda x, t: x, jax.random.key(0), x_0, **options)
