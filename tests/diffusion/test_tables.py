"""The samplers' coefficients, in float64, against the papers' algorithms written as loops, and their convergence."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from references import coefficients

from ddpm_jax.diffusion import tables
from ddpm_jax.diffusion.schedules import make_betas, make_schedule
from ddpm_jax.diffusion.tables import Levels, ddim_inverse, ddpm, make_table, spaced_timesteps, with_resampling

T = 1000
LINEAR = make_schedule("linear", T)
DETERMINISTIC = {"ddim": {}, "dpmpp_2m": {}, "heun": {}, "unipc": {"order": 2}, "plms": {}}


def replay(table, x, denoise, noise=lambda i: 0.0):
    """Runs a table in a NumPy loop, with `denoise` (x, a, s) -> D; returns the intermediate images."""
    kept, past, path = np.zeros_like(x), [np.zeros_like(x)] * 3, [x]
    for i in range(len(table.t)):
        x_0 = denoise(x, table.a[i], table.s[i])
        images = [x, kept, x_0, *past]
        past = [table.remembered[i, 0] * x + table.remembered[i, 1] * x_0, *past[:2]]
        x, kept = (
            sum(f * image for f, image in zip(factors, images, strict=True))
            for factors in (table.next[i], table.kept[i])
        )
        x = x + np.sqrt(table.noise_scale[i] * np.exp(table.log_variance_min[i]) + table.noise_variance[i]) * noise(i)
        path.append(x)
    return path


def mixture(x, a, s, weights=(0.3, 0.7), means=(-0.6, 0.4), v=0.05):
    """E[x_0 | x_t = x] of a mixture of Gaussians, in float64."""
    var = a**2 * v + s**2
    difference = x[..., None] - a * np.array(means)
    share = np.log(weights) - difference**2 / (2 * var)
    share = np.exp(share - share.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    return (share * (np.array(means) + a * v / var * difference)).sum(-1)


def noise_levels(name, timesteps):
    """a, s at the timesteps and at the clean image, from the betas."""
    abar = np.append(np.cumprod(1 - make_betas(name, T))[np.asarray(timesteps)], 1.0)
    return np.sqrt(abar), np.sqrt(1 - abar)


# Timesteps.


def test_linspace():
    np.testing.assert_array_equal(spaced_timesteps(LINEAR), np.arange(1000)[::-1])
    np.testing.assert_array_equal(spaced_timesteps(LINEAR, 5), [999, 749, 500, 250, 0])
    np.testing.assert_array_equal(spaced_timesteps(LINEAR, 4, last=300), [300, 200, 100, 0])
    np.testing.assert_array_equal(spaced_timesteps(LINEAR, None, last=3), [3, 2, 1, 0])
    np.testing.assert_array_equal(spaced_timesteps(LINEAR, 1), [999])
    np.testing.assert_array_equal(spaced_timesteps(LINEAR, 1, last=0), [0])


def test_other_spacings():
    np.testing.assert_array_equal(spaced_timesteps(LINEAR, 5, "leading"), [800, 600, 400, 200, 0])
    np.testing.assert_array_equal(spaced_timesteps(LINEAR, 5, "trailing"), [999, 799, 599, 399, 199])
    np.testing.assert_array_equal(spaced_timesteps(LINEAR, 4, "quadratic"), [999, 444, 111, 0])


def test_leading_with_an_offset():
    """The offset applies as long as the timesteps stay within the schedule."""
    np.testing.assert_array_equal(spaced_timesteps(LINEAR, 4, "leading", offset=1), [751, 501, 251, 1])
    np.testing.assert_array_equal(spaced_timesteps(LINEAR, 500, "leading", offset=9)[[0, -1]], [999, 1])
    np.testing.assert_array_equal(spaced_timesteps(LINEAR, None, "leading", offset=1), np.arange(1000)[::-1])
    np.testing.assert_array_equal(spaced_timesteps(LINEAR, 5, offset=1), spaced_timesteps(LINEAR, 5))


def test_leaving_out_the_lowest():
    np.testing.assert_array_equal(spaced_timesteps(LINEAR, 4, skip_lowest=True), [999, 749, 500, 250])
    found = spaced_timesteps(LINEAR, 3, "leading", offset=1, skip_lowest=True)
    np.testing.assert_array_equal(found, [751, 501, 251])
    np.testing.assert_array_equal(spaced_timesteps(LINEAR, None, skip_lowest=True), np.arange(1000)[::-1])


@pytest.mark.parametrize("name", ["linear", "quadratic"])
@pytest.mark.parametrize(
    ("spacing", "measure"), [("logsnr", lambda a, s: np.log(s / a)), ("karras", lambda a, s: (s / a) ** (1 / 7))]
)
def test_spacings_by_noise_level(name, spacing, measure):
    """The chosen timesteps' levels are evenly spaced, to within half the distance of neighbouring timesteps."""
    chosen = spaced_timesteps(make_schedule(name, T), 12, spacing)
    assert (chosen[0], chosen[-1]) == (999, 0)
    a, s = noise_levels(name, np.arange(T))
    level = measure(a[:-1], s[:-1])
    wanted = np.linspace(level[999], level[0], 12)
    around = np.maximum(np.abs(np.gradient(level)), np.abs(np.append(np.diff(level), 0)))[chosen]
    assert np.all(np.abs(level[chosen] - wanted) <= np.maximum(0.75 * around, 1e-9))


@pytest.mark.parametrize("spacing", tables.SPACINGS)
def test_timesteps_descend_and_never_repeat(spacing):
    schedule = make_schedule("linear", 60, 1e-4, 0.3)
    for last in (59, 17):
        for num_steps in range(1, last + 2):
            timesteps = spaced_timesteps(schedule, num_steps, spacing, last)
            assert timesteps.dtype == np.int32
            assert len(timesteps) == num_steps
            assert np.all(np.diff(timesteps) < 0)
            assert timesteps[0] <= last
            assert timesteps[-1] >= 0


def test_noise_levels_of_a_schedule_that_ends_in_pure_noise():
    schedule = make_schedule("jsd", 50)
    assert spaced_timesteps(schedule, 10, "logsnr")[0] == 49
    assert spaced_timesteps(schedule, 10, "karras")[-1] == 0


# Noise levels between timesteps.


@pytest.mark.parametrize("how", tables.LEVELS)
def test_levels_between_timesteps(how):
    """They are evenly spaced as requested, and their timesteps are where the schedule has these levels."""
    levels = Levels.between(LINEAR, np.array([951, 500, 400, 300, 1]), None, how)
    a, _ = noise_levels("linear", [951, 1])
    np.testing.assert_allclose(levels.a[[0, -2, -1]], [a[0], a[1], 1.0], rtol=1e-6)
    np.testing.assert_array_equal(levels.t[[0, -1]], [951, -1])
    sigma = (levels.s / levels.a)[:-1]
    even = {"linspace": levels.t[:-1], "karras": sigma ** (1 / 7), "logsnr": np.log(sigma)}[how]
    np.testing.assert_allclose(np.diff(even), (even[-1] - even[0]) / 4)
    of_all = noise_levels("linear", np.arange(T))
    of_all = np.log(of_all[1][:-1] / of_all[0][:-1])
    np.testing.assert_allclose(np.log(sigma), np.interp(levels.t[:-1], np.arange(T), of_all), atol=1e-5)
    whole = Levels.between(LINEAR, np.array([951, 500, 400, 300, 1]), None, how, fractional=False)
    assert whole.t.dtype == np.int32
    np.testing.assert_array_equal(whole.t, np.round(levels.t))
    np.testing.assert_array_equal(whole.log_abar, levels.log_abar)


def test_where_levels_between_timesteps_end():
    timesteps = np.array([999, 500, 0])
    np.testing.assert_array_equal(Levels.between(LINEAR, timesteps, 0, "linspace").t, [999, 499.5, 0])
    timesteps = np.array([999, 500, 1])
    np.testing.assert_array_equal(Levels.between(LINEAR, timesteps, 0, "linspace").t, [999, 500, 1, 0])
    pure = make_schedule("jsd", 50)
    assert Levels.between(pure, np.array([49, 20, 0]), None, "karras").log_abar[0] == -24 * np.log(2)


# Ancestral sampling.


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
@pytest.mark.parametrize("name", ["linear", "cosine", "jsd"])
def test_ddpm_of_every_timestep_is_the_schedule(name, variance):
    schedule = make_schedule(name, T)
    table = ddpm(Levels.of(schedule, spaced_timesteps(schedule)), variance)
    backwards = lambda array: np.asarray(array, np.float64)[::-1]  # noqa: E731
    small, large = backwards(schedule.posterior_log_variance_clipped), backwards(schedule.log_betas)
    np.testing.assert_array_equal(table.t, np.arange(T)[::-1])
    for got, expected in [
        (table.a, schedule.sqrt_alphas_cumprod),
        (table.s, schedule.sqrt_one_minus_alphas_cumprod),
        (table.next[:, tables.D], schedule.posterior_mean_coef1),
        (table.next[:, tables.X], schedule.posterior_mean_coef2),
    ]:
        # The table starts from float32 betas; what that costs 1 - beta at the cosine's last, 0.999, shows there.
        np.testing.assert_allclose(got, backwards(expected), rtol=2e-5 if name == "cosine" else 1e-6, atol=1e-12)
    minimum = large if variance == "fixed_large" else small
    maximum = small if variance == "fixed_small" else large
    np.testing.assert_allclose(table.log_variance_min, minimum, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(table.log_variance_max, maximum, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(table.noise_scale, np.arange(T)[::-1] > 0)


@pytest.mark.parametrize("timesteps", [[999, 500, 250, 10, 0], list(range(999, -1, -37)), [700, 3], [999], [0]])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ddpm_of_a_sub_sequence(measure, name, timesteps):
    table = ddpm(Levels.of(make_schedule(name, T), timesteps), "learned")
    a, s, x_0_coef, x_coef, small, beta = coefficients(make_betas(name, T), timesteps)
    small[-1] = small[-2] if len(small) > 1 else beta[-1]
    np.testing.assert_array_equal(table.t, timesteps)
    for got, expected in [
        (table.a, a),
        (table.s, s),
        (table.next[:, tables.D], x_0_coef),
        (table.next[:, tables.X], x_coef),
        (np.exp(table.log_variance_min), small),
        (np.exp(table.log_variance_max), beta),
    ]:
        # The schedule's float32 betas: 6e-8 of each, of the last cosine's 1 - beta = 0.001 that is 6e-5.
        np.testing.assert_allclose(got, expected, rtol=1e-6 if name == "linear" else 1e-4, atol=1e-15)
        if name == "linear":
            errors = np.abs(got - expected) / np.maximum(np.abs(expected), 1e-15)
            measure("ddpm on sub-sequences", "Improved DDPM, section 4, float64", errors.max(), 1e-6, "relative")
    np.testing.assert_array_equal(table.noise_scale, [1.0] * (len(timesteps) - 1) + [0.0])


# All methods.


@pytest.mark.parametrize("sampler", tables.SAMPLERS)
@pytest.mark.parametrize("timesteps", [[999, 500, 250, 10, 0], [999], [42, 7]])
def test_last_step_gives_x_0_itself(sampler, timesteps):
    S = len(timesteps)
    table = make_table(sampler, Levels.of(LINEAR, timesteps))
    assert len(table.t) == {"heun": 2 * S - 1, "plms": S + (S > 1)}.get(sampler, S)
    if sampler == "plms" and S > 1:
        return  # which steps by the eps of several calls there, too
    expected = np.zeros(6)
    expected[tables.D] = 1.0
    np.testing.assert_allclose(table.next[-1], expected, atol=1e-12)
    assert (table.noise_scale[-1], table.noise_variance[-1]) == (0, 0)


@pytest.mark.parametrize("sampler", tables.SAMPLERS)
def test_consistency(sampler):
    """If every prediction is the same x_0, x_t = a x_0 + s eps keeps its eps: deterministic methods end each step at
    a_next x_0 + s_next eps, and stochastic ones keep the share a_next of x_0."""
    for schedule, timesteps in ((LINEAR, [999, 700, 420, 111, 30, 5]), (make_schedule("cosine", T), [900, 300, 20])):
        levels = Levels.of(schedule, timesteps, end=0)
        table = make_table(sampler, levels)
        for x_0, eps in ((1.0, 0.0), (0.0, 1.0), (0.7, -1.3)):
            if eps and sampler not in DETERMINISTIC:
                continue
            path = replay(table, np.array(levels.a[0] * x_0 + levels.s[0] * eps), lambda x, a, s: np.array(x_0))  # noqa: B023
            steps = {"heun": path[::2], "plms": [path[0], *path[2:]]}.get(sampler, path)
            np.testing.assert_allclose(steps, levels.a * x_0 + levels.s * eps, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ddim_is_the_paper_s_step(measure, name, eta):
    """Equations 12 and 16, in a loop."""
    timesteps = [999, 600, 300, 80, 2]
    a, s = noise_levels(name, timesteps)
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal(50), rng.standard_normal((5, 50))
    path = replay(
        make_table("ddim", Levels.of(make_schedule(name, T), timesteps), eta=eta), x, mixture, noise.__getitem__
    )
    for i in range(5):
        x_0 = mixture(x, a[i], s[i])
        eps = (x - a[i] * x_0) / s[i]
        abar, abar_next = a[i] ** 2, a[i + 1] ** 2
        sigma = eta * np.sqrt((1 - abar_next) / (1 - abar)) * np.sqrt(1 - abar / abar_next)
        x = np.sqrt(abar_next) * x_0 + np.sqrt(1 - abar_next - sigma**2) * eps + sigma * noise[i]
        np.testing.assert_allclose(path[i + 1], x, rtol=1e-4 if name == "cosine" else 1e-6, atol=1e-6)
        measure("ddim, eta 0, 0.4, 1", "DDIM, eqs. 12 and 16, in a float64 loop", np.abs(path[i + 1] - x).max(), 1e-4)


def test_ddim_of_eta_1_is_ddpm_with_the_small_variance():
    levels = Levels.of(LINEAR, [999, 700, 350, 90, 10, 0])
    ddim, small = make_table("ddim", levels, eta=1.0), ddpm(levels, "fixed_small")
    np.testing.assert_allclose(ddim.next, small.next, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ddim.noise_variance, small.noise_scale * np.exp(small.log_variance_min), rtol=1e-9)


def test_heun_is_edm_s_algorithm(measure):
    """Algorithm 1 without churn, on x / a with sigma = s / a."""
    timesteps = [999, 800, 500, 200, 50, 3]
    a, s = noise_levels("linear", timesteps)
    sigma = s / a
    x = np.random.default_rng(1).standard_normal(50)
    path = replay(make_table("heun", Levels.of(LINEAR, timesteps)), x, mixture)
    y = x / a[0]

    def derivative(y, i):
        return (y - mixture(a[i] * y, a[i], s[i])) / sigma[i]

    for i in range(6):
        d = derivative(y, i)
        following = y + (sigma[i + 1] - sigma[i]) * d
        if sigma[i + 1]:
            following = y + (sigma[i + 1] - sigma[i]) * (d + derivative(following, i + 1)) / 2
        y = following
        errors = np.abs(path[min(2 * i + 2, 11)] - a[i + 1] * y)
        measure("heun", "EDM, algorithm 1, in a float64 loop", errors.max(), 1e-5)


@pytest.mark.parametrize("stochastic", [False, True])
def test_dpmpp_2m_is_the_paper_s_algorithm(measure, stochastic):
    timesteps = [999, 800, 500, 200, 50, 3]
    a, s = noise_levels("linear", timesteps)
    rng = np.random.default_rng(2)
    x, noise = rng.standard_normal(50), rng.standard_normal((6, 50)) * stochastic
    name = "dpmpp_2m_sde" if stochastic else "dpmpp_2m"
    path = replay(make_table(name, Levels.of(LINEAR, timesteps)), x, mixture, noise.__getitem__)
    lambdas, before = np.log(a[:-1] / s[:-1]), None
    for i in range(5):
        x_0, h = mixture(x, a[i], s[i]), lambdas[i + 1] - lambdas[i]
        r = 1.0 if i == 0 else (lambdas[i] - lambdas[i - 1]) / h
        D = x_0 if before is None else (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * before
        if stochastic:
            x = s[i + 1] / s[i] * np.exp(-h) * x + a[i + 1] * (1 - np.exp(-2 * h)) * D
            x = x + s[i + 1] * np.sqrt(1 - np.exp(-2 * h)) * noise[i]
        else:
            x = s[i + 1] / s[i] * x - a[i + 1] * (np.exp(-h) - 1) * D
        before = x_0
        measure(name, "DPM-Solver++, algorithm 2, in a float64 loop", np.abs(path[i + 1] - x).max(), 1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize("to_clean", [True, False])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_plms_is_the_paper_s_algorithm(measure, num_steps, to_clean, prediction):
    """Equations 9 and 12 over lists of eps, or of v, with the start of Stable Diffusion's sampler."""
    timesteps = np.linspace(999, 40, num_steps).round().astype(int)
    a, s = noise_levels("linear", timesteps if to_clean else [*timesteps, 0])
    x = np.random.default_rng(3).standard_normal(50)
    levels = Levels.of(LINEAR, timesteps, None if to_clean else 0)
    path = replay(make_table("plms", levels, prediction=prediction), x, mixture)

    def output(x, i):
        x_0 = mixture(x, a[i], s[i])
        eps = (x - a[i] * x_0) / s[i]
        return eps if prediction == "eps" else a[i] * eps - s[i] * x_0

    def transferred(x, e, i):
        e = e if prediction == "eps" else a[i] * e + s[i] * x
        now, after = a[i] ** 2, a[i + 1] ** 2
        below = np.sqrt(now) * (np.sqrt((1 - after) * now) + np.sqrt((1 - now) * after))
        return a[i + 1] / a[i] * x - (after - now) / below * e

    before, found = [], [x]
    for i in range(num_steps):
        e = output(x, i)
        if i == 0:
            combined = e
            if num_steps > 1:
                euler = transferred(x, e, 0)
                found.append(euler)
                combined = (e + output(euler, 1)) / 2
        elif i == 1:
            combined = (3 * e - before[-1]) / 2
        elif i == 2:
            combined = (23 * e - 16 * before[-1] + 5 * before[-2]) / 12
        else:
            combined = (55 * e - 59 * before[-1] + 37 * before[-2] - 9 * before[-3]) / 24
        x = transferred(x, combined, i)
        before.append(e)
        found.append(x)
    errors = np.abs(np.array(path) - np.array(found))
    measure("plms", "PNDM, eqs. 9 and 12, in a float64 loop", errors.max(), 1e-5)


@pytest.mark.parametrize(
    ("sampler", "options", "order"),
    [
        ("ddim", {}, 1),
        ("dpmpp_2m", {}, 2),
        ("heun", {}, 2),
        ("unipc", {"order": 1}, 2),
        ("unipc", {"order": 2}, 3),
        ("unipc", {"order": 3}, 4),
    ],
)
def test_error_falls_with_the_order(measure, sampler, options, order):
    """On the exact score of a mixture, from high noise to low. UniPC's corrector gives one order more than its name."""
    schedule = make_schedule("cosine", 20001)
    x = np.random.default_rng(0).standard_normal(200)

    def solve(sampler, num_steps, **options):
        timesteps = spaced_timesteps(schedule, num_steps + 1, "logsnr", 18000)
        levels = Levels.of(schedule, timesteps[:-1], int(timesteps[-1]))
        return replay(make_table(sampler, levels, **options), x, mixture)[-1]

    exact = solve("unipc", 2000, order=3)
    errors = [np.sqrt(np.mean((solve(sampler, n, **options) - exact) ** 2)) for n in (32, 64, 128)]
    label = f"{sampler} of order {options['order']}" if options else sampler
    for coarse, fine in pairwise(errors):
        missing = max(order - np.log2(coarse / fine), 0)
        measure(
            f"{label}: shortfall from convergence order {order}", "its probability flow, 32 to 128 steps", missing, 0.5
        )


def gaussian_result(table, m, v):
    """Mean and variance of a table's result with the exact score of N(m, v): every row is linear, so the weights of the
    start's and each row's noise in all images can be computed exactly."""
    rows = len(table.t)
    x, kept, past = np.eye(rows + 2)[0], np.zeros(rows + 2), [np.zeros(rows + 2)] * 3  # the last entry: the mean
    for i in range(rows):
        gain = table.a[i] * v / (table.a[i] ** 2 * v + table.s[i] ** 2)
        x_0 = gain * x
        x_0[-1] += m - gain * table.a[i] * m
        images = np.array([x, kept, x_0, *past])
        past = [table.remembered[i] @ images[[tables.X, tables.D]], *past[:2]]
        x, kept = table.next[i] @ images, table.kept[i] @ images
        x[i + 1] += np.sqrt(table.noise_scale[i] * np.exp(table.log_variance_min[i]) + table.noise_variance[i])
    return x[-1], x[:-1] @ x[:-1]


@pytest.mark.parametrize("spacing", ["linspace", "logsnr"])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddpm", {"variance": "fixed_small"}),
        ("ddpm", {"variance": "fixed_large"}),
        ("ddim", {"eta": 0.0}),
        ("ddim", {"eta": 0.5}),
        ("ddim", {"eta": 1.0}),
        ("dpmpp_2m", {}),
        ("dpmpp_2m_sde", {}),
        ("heun", {}),
        ("unipc", {}),
        ("plms", {}),
    ],
)
def test_marginals_of_gaussian_data(sampler, options, spacing):
    """The result's mean and variance converge to the data's with the number of steps, at least at first order."""
    m, v = -0.2, 0.3
    schedule = make_schedule("linear", 10_000, 1e-5, 2e-3)
    errors = []
    for num_steps in (100, 200, 400):
        levels = Levels.of(schedule, spaced_timesteps(schedule, num_steps, spacing))
        mean, variance = gaussian_result(make_table(sampler, levels, **options), m, v)
        assert abs(mean - m) < 0.01
        errors.append(abs(variance / v - 1))
    assert errors[0] < (0.5 if options.get("variance") == "fixed_large" else 0.2)
    for coarse, fine in pairwise(errors):
        assert fine < 0.6 * coarse + 1e-4


def test_analytic_variance_keeps_gaussian_data_at_any_number_of_steps():
    """The error of the predicted x_0 has the same variance everywhere there, so the step's variance is exact."""
    m, v = -0.2, 0.3
    abar = np.cumprod(1 - make_betas("linear", T))
    x_0_mse = v * (1 - abar) / (abar * v + 1 - abar)
    for num_steps in (2, 5, 50):
        levels = Levels.of(LINEAR, spaced_timesteps(LINEAR, num_steps))
        mean, variance = gaussian_result(make_table("ddpm", levels, x_0_mse=x_0_mse), m, v)
        _, plain = gaussian_result(make_table("ddpm", levels, variance="fixed_small"), m, v)
        # The start is not quite of mean 0 and variance 1, and the last step gives D, which varies less than x_0.
        assert abs(mean - m) < 1e-3
        assert abs(variance / v - 1) < 1e-3 < 0.01 < abs(plain / v - 1)


@pytest.mark.parametrize("sampler", tables.SAMPLERS)
def test_pure_noise_at_the_start_gives_finite_tables(sampler):
    schedule = make_schedule("jsd", 50)
    assert float(schedule.alphas_cumprod[-1]) == 0
    table = make_table(sampler, Levels.of(schedule, spaced_timesteps(schedule, 10)))
    for column in (table.next, table.kept, table.a, table.s, table.noise_scale, table.noise_variance):
        assert np.all(np.isfinite(column))
    for column in dataclasses.astuple(ddim_inverse(Levels.of(schedule, spaced_timesteps(schedule, 10)))):
        assert np.all(np.isfinite(column))
    rng = np.random.default_rng(0)
    x = replay(table, rng.standard_normal(4000), mixture, lambda i: rng.standard_normal(4000))[-1]
    assert abs(x.mean() - 0.1) < 0.05


def test_inverse_undoes_ddim():
    """For a mixture's probability flow, to within the discretisation error of both directions."""
    x = np.random.default_rng(0).uniform(-1, 1, 100)
    errors = []
    for num_steps in (50, 100, 200):
        levels = Levels.of(LINEAR, spaced_timesteps(LINEAR, num_steps))
        noise = replay(ddim_inverse(levels), x, mixture)[-1]
        assert 0.3 < noise.std() < 2
        errors.append(np.abs(replay(make_table("ddim", levels), noise, mixture)[-1] - x).max())
    assert errors[0] < 0.3
    assert errors[0] / errors[1] > 1.4
    assert errors[1] / errors[2] > 1.4


def test_resampling_repeats_rows_and_adds_the_noise_between():
    levels = Levels.of(LINEAR, [900, 700, 500, 300, 100])
    table = make_table("ddim", levels, eta=1.0)
    again = with_resampling(table, levels, jump=2, times=3)
    np.testing.assert_array_equal(again.t, [900, 700] * 3 + [500, 300] * 3 + [100] * 3)
    # A row that leads back: its own step, then q(x_noisier | x).
    abar = levels.a**2
    share = abar[0] / abar[2]
    np.testing.assert_allclose(again.next[1], np.sqrt(share) * table.next[1])
    np.testing.assert_allclose(again.noise_variance[1], share * table.noise_variance[1] + 1 - share)
    for row, source in ((0, 0), (5, 1), (14, 4)):
        np.testing.assert_array_equal(again.next[row], table.next[source])
        np.testing.assert_allclose(again.noise_variance[row], table.noise_variance[source], rtol=1e-12)


def test_resampling_keeps_the_marginals():
    """Repeating steps after adding their noise adds no more than the steps' own error."""
    m, v = -0.2, 0.3
    for num_steps, error in ((100, 0.2), (400, 0.08)):
        levels = Levels.of(LINEAR, spaced_timesteps(LINEAR, num_steps))
        for jump, times in ((1, 1), (10, 4)):
            table = with_resampling(make_table("ddim", levels, eta=1.0), levels, jump, times)
            mean, variance = gaussian_result(table, m, v)
            assert abs(mean - m) < 0.01
            assert abs(variance / v - 1) < error


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_table("euler", Levels.of(LINEAR, [0])), "sampler is 'euler'; accepted: ddpm, ddim"),
        (lambda: make_table("ddpm", Levels.of(LINEAR, [0]), variance="small"), "variance is 'small'; accepted"),
        (lambda: make_table("ddpm", Levels.of(LINEAR, [0]), eta=0.5), "sampler 'ddpm' takes no eta; accepted: ddim"),
        (lambda: make_table("ddim", LEVELS, x_0_mse=np.ones(T)), "sampler 'ddim' takes no x_0_mse; accepted: ddpm"),
        (lambda: make_table("ddim", Levels.of(LINEAR, [0]), order=3), "sampler 'ddim' takes no order; accepted: unipc"),
        (lambda: make_table("ddim", Levels.of(LINEAR, [0]), eta=1.5), "eta is 1.5; accepted: 0 to 1"),
        (lambda: make_table("unipc", Levels.of(LINEAR, [0]), order=4), "order is 4; accepted: 1, 2, 3"),
        (lambda: spaced_timesteps(LINEAR, 5, "even"), "spacing is 'even'; accepted: linspace, leading"),
        (lambda: Levels.of(LINEAR, [5, 5, 0]), r"the timesteps are \[5, 5, 0\]; accepted: descending"),
        (lambda: Levels.of(LINEAR, [5.5, 0.0]), "accepted: descending integers"),
        (lambda: Levels.of(LINEAR, []), "accepted: descending integers"),
        (lambda: Levels.of(LINEAR, [1000, 3]), "the timesteps are 1000 to 3; accepted: 999 to 0"),
        (lambda: Levels.of(LINEAR, [10, -3]), "the timesteps are 10 to -3; accepted: 999 to 0"),
        (lambda: Levels.of(LINEAR, [10, 5], 7), r"the timesteps are \[10, 5, 7\]; accepted: descending"),
        (
            lambda: Levels.between(LINEAR, np.array([9, 0]), None, "even"),
            "levels is 'even'; accepted: linspace, karras",
        ),
        (lambda: ddim_inverse(Levels.of(LINEAR, [999])), "encoding needs at least 2 timesteps"),
        (lambda: with_resampling(make_table("unipc", LEVELS), LEVELS, 1, 2), "a sampler that remembers nothing"),
        (lambda: with_resampling(make_table("plms", LEVELS), LEVELS, 1, 2), "a sampler that remembers nothing"),
        (lambda: with_resampling(make_table("heun", LEVELS), LEVELS, 1, 2), "a sampler that remembers nothing"),
        (lambda: with_resampling(make_table("ddpm", LEVELS), LEVELS, 0, 2), "jump and times are 0 and 2"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


LEVELS = Levels.of(LINEAR, [900, 500, 100])
