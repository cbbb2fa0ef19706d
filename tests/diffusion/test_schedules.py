import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.schedules import (
    SCHEDULES,
    check_betas,
    extract,
    make_betas,
    make_schedule,
    rescale_to_zero_terminal_snr,
)

NAMES = ["linear", "quadratic", "constant", "jsd", "warmup10", "warmup50", "cosine", "sigmoid"]
FIELDS = [
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_snr",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "log_betas",
    "fixed_large_log_variance",
]
FLOAT32 = 2.0**-24 * 1.01  # relative error of rounding to float32, and a little for the reference's own float64

RELATIVE = "relative"


def cosine_abar(u, offset=0.008):
    return math.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2 / math.cos(offset / (1 + offset) * math.pi / 2) ** 2


def sigmoid_abar(u, start=-3.0, end=3.0, tau=1.0):
    at = lambda x: 0.5 * (1 + math.tanh(x / tau / 2))  # noqa: E731
    return (at(end) - at(start + u * (end - start))) / (at(end) - at(start))


def reference_beta(name, t, T, start=1e-4, end=0.02):
    """beta_t, one number at a time."""
    ramp = lambda n: start + (end - start) * t / (n - 1)  # noqa: E731
    match name:
        case "linear":
            return ramp(T)
        case "quadratic":
            return (math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * t / (T - 1)) ** 2
        case "constant":
            return end
        case "jsd":
            return 1 / (T - t)
        case "warmup10":
            return ramp(T // 10) if t < T // 10 else end
        case "warmup50":
            return ramp(T // 2) if t < T // 2 else end
        case "cosine":
            return min(1 - cosine_abar((t + 1) / T) / cosine_abar(t / T), 0.999)
        case "sigmoid":
            return min(1 - sigmoid_abar((t + 1) / T) / sigmoid_abar(t / T), 0.999)


def reference_arrays(betas):
    """Every array of a schedule, in extended precision, from the definitions."""
    betas = np.asarray(betas, np.longdouble)
    abar = np.cumprod(1 - betas)
    previous = np.concatenate([[1], abar[:-1]])
    variance = betas * (1 - previous) / (1 - abar)
    second = variance[1] if len(betas) > 1 else betas[0]
    with np.errstate(divide="ignore"):
        log_snr = np.log(abar / (1 - abar))
    return {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(abar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
        "log_snr": log_snr,
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.concatenate([[second], variance[1:]])),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - abar),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - abar),
        "log_betas": np.log(betas),
        "fixed_large_log_variance": np.log(np.concatenate([[second], betas[1:]])),
    }


def test_tables_above_are_complete():
    assert list(SCHEDULES) == NAMES
    assert [field.name for field in dataclasses.fields(make_schedule())] == FIELDS


@pytest.mark.parametrize("T", [20, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_betas_follow_their_formula(name, T):
    betas = make_betas(name, T)
    assert betas.dtype == np.float64
    assert betas.shape == (T,)
    # The atol: cosine and sigmoid subtract numbers close to 1 from it.
    np.testing.assert_allclose(betas, [reference_beta(name, t, T) for t in range(T)], rtol=1e-13, atol=4e-13)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("linear", 1e-4, 0.02),
        ("quadratic", 1e-4, 0.02),
        ("constant", 0.02, 0.02),
        ("jsd", 1e-3, 1.0),
        ("warmup10", 1e-4, 0.02),
        ("warmup50", 1e-4, 0.02),
        ("cosine", 4.12842e-05, 0.999),
        ("sigmoid", 3.00279e-04, 0.999),
    ],
)
def test_first_and_last_beta(name, first, last):
    betas = make_betas(name, 1000)
    np.testing.assert_allclose(betas[[0, -1]], [first, last], rtol=2e-6)


def test_end_of_the_original_schedule():
    """abar_T of the paper's linear schedule, and its 'L_T ~ 1e-5 bits/dim'."""
    np.testing.assert_allclose(make_schedule().alphas_cumprod[-1], 4.03582e-05, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {"beta_start": 1e-3, "beta_end": 0.3}),
        ("quadratic", {"beta_start": 1e-3, "beta_end": 0.3}),
        ("constant", {"beta_end": 0.3}),
        ("warmup10", {"beta_start": 1e-3, "beta_end": 0.3}),
    ],
)
def test_start_and_end_are_used(name, options):
    ends = {"start": options.get("beta_start", 0.0), "end": options["beta_end"]}
    expected = [reference_beta(name, t, 50, **ends) for t in range(50)]
    np.testing.assert_allclose(make_betas(name, 50, **options), expected, rtol=1e-13)


@pytest.mark.parametrize(
    ("name", "abar", "options"),
    [
        ("cosine", cosine_abar, {"offset": 0.1}),
        ("sigmoid", sigmoid_abar, {"start": -2.0, "end": 4.0, "tau": 0.7}),
    ],
)
def test_options_shape_the_cumulative_product(name, abar, options):
    betas = make_betas(name, 100, max_beta=1.0, **options)
    expected = [abar((t + 1) / 100, **options) for t in range(100)]
    np.testing.assert_allclose(np.cumprod(1 - betas), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(make_betas(name, 100, max_beta=0.05, **options), np.minimum(betas, 0.05))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "jsd"])
def test_arrays_are_the_reference_rounded_to_float32(measure, name, field):
    array = getattr(make_schedule(name, 1000), field)
    assert array.dtype == jnp.float32
    assert array.shape == (1000,)
    expected = reference_arrays(make_betas(name, 1000))[field].astype(np.float64)
    atol = 1e-14 if field == "log_snr" else 0.0  # it crosses zero
    errors = np.maximum(np.abs(np.asarray(array, np.float64) - expected) - atol, 0) / np.maximum(
        np.abs(expected), 1e-30
    )
    measure(
        "`Schedule` arrays of seven schedules, T = 1000",
        "their definitions, extended precision",
        errors.max(),
        FLOAT32,
        RELATIVE,
    )


@pytest.mark.parametrize("field", [field for field in FIELDS if field != "log_snr"])
def test_arrays_of_a_schedule_that_ends_in_pure_noise(measure, field):
    expected = reference_arrays(make_betas("jsd", 1000))[field].astype(np.float64)
    found = np.asarray(getattr(make_schedule("jsd", 1000), field), np.float64)
    errors = np.where(found == expected, 0.0, np.abs(found - expected) / np.maximum(np.abs(expected), 1e-30))
    measure(
        "`Schedule` arrays of jsd, which ends in pure noise",
        "their definitions, extended precision",
        errors.max(),
        FLOAT32,
        RELATIVE,
    )


def test_log_snr_stays_finite_at_pure_noise():
    log_snr = np.asarray(make_schedule("jsd", 10).log_snr)
    assert np.isfinite(log_snr).all()
    assert log_snr[-1] < -1e20
    np.testing.assert_allclose(np.exp(log_snr[:-1]), np.arange(9, 0, -1) / np.arange(1, 10), rtol=1e-6)


def test_variance_keeps_its_precision_for_tiny_betas():
    """Computed as a difference, 1 - abar_t would lose all digits."""
    schedule = make_schedule([1e-18, 1e-18, 2e-18])
    np.testing.assert_allclose(schedule.sqrt_one_minus_alphas_cumprod, np.sqrt([1e-18, 2e-18, 4e-18]), rtol=1e-6)
    np.testing.assert_allclose(schedule.posterior_variance, [0, 0.5e-18, 1e-18], rtol=1e-6)


@pytest.mark.parametrize("as_type", [list, tuple, np.array, jnp.array])
def test_own_betas(as_type):
    betas = [0.125, 0.5, 0.25]  # exact in float32
    schedule = make_schedule(as_type(betas))
    assert schedule.num_timesteps == 3
    for field, expected in reference_arrays(betas).items():
        np.testing.assert_allclose(
            np.asarray(getattr(schedule, field), np.float64), expected.astype(np.float64), rtol=FLOAT32
        )


def test_own_betas_take_the_place_of_the_named_sizes():
    assert make_schedule([0.1, 0.2], num_timesteps=1000).num_timesteps == 2


@pytest.mark.parametrize("name", NAMES)
def test_one_timestep(name):
    """The only step yields x_0 directly; the log-variance, which has no neighbour, is that of beta."""
    schedule = make_schedule(name, 1)
    beta = np.float64(make_betas(name, 1)[0])
    assert schedule.num_timesteps == 1
    for field, expected in {
        "alphas_cumprod": 1 - beta,
        "alphas_cumprod_prev": 1,
        "posterior_variance": 0,
        "posterior_mean_coef1": 1,
        "posterior_mean_coef2": 0,
        "posterior_log_variance_clipped": np.log(beta),
        "fixed_large_log_variance": np.log(beta),
    }.items():
        np.testing.assert_allclose(np.asarray(getattr(schedule, field), np.float64), [expected], rtol=FLOAT32)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, 0.0, 0.2], r"betas\[1\] is 0;"),
        ([-0.1, 0.2], r"betas\[0\] is -0.1;"),
        ([0.1, 0.2, 1.5], r"betas\[2\] is 1.5;"),
        ([0.1, math.nan], r"betas\[1\] is nan;"),
        ([math.inf], r"betas\[0\] is inf;"),
        ([0.1, 2.0, -1.0], r"betas\[1\] is 2; .*above 0 and at most 1"),
        ([[0.1, 0.2]], r"not of shape \(1, 2\)"),
        (0.1, r"not of shape \(\)"),
        ([], r"not of shape \(0,\)"),
    ],
)
def test_refused_betas(betas, message):
    for function in (check_betas, make_schedule):
        with pytest.raises(ValueError, match=message):
            function(betas)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "cosin"}, "schedule is 'cosin'; accepted: linear, quadratic, .*sigmoid"),
        ({"schedule": "linear", "offset": 0.1}, r"schedule 'linear' does not take .*'offset'"),
        ({"schedule": "cosine", "tau": 0.1}, r"schedule 'cosine' does not take .*'tau'"),
        ({"num_timesteps": 0}, "num_timesteps is 0; accepted: 1 or more"),
        ({"num_timesteps": -3}, "num_timesteps is -3; accepted: 1 or more"),
        ({"beta_end": 1.5}, r"betas\[\d+\] is .* at most 1"),
        ({"beta_start": 0.0}, r"betas\[0\] is 0"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(**arguments)


def test_rescaling_to_a_zero_terminal_snr():
    """sqrt(abar) is transformed affinely such that it ends at 0 and keeps its start."""
    betas = make_betas("linear", 1000)
    before = np.sqrt(np.cumprod(1 - betas))
    after = np.sqrt(np.cumprod(1 - rescale_to_zero_terminal_snr(betas)))
    slope = before[0] / (before[0] - before[-1])
    np.testing.assert_allclose(after, slope * (before - before[-1]), atol=1e-12)
    assert after[-1] == 0
    with pytest.raises(ValueError, match="at least two timesteps"):
        rescale_to_zero_terminal_snr([0.5])


def test_beta_of_one_is_accepted():
    np.testing.assert_array_equal(make_schedule([0.5, 1.0]).alphas_cumprod, [0.5, 0.0])


def test_passes_through_jit():
    schedule = make_schedule("cosine", 30)
    returned = jax.jit(lambda s: s)(schedule)
    assert returned.num_timesteps == 30
    jax.tree.map(np.testing.assert_array_equal, returned, schedule)


def test_vmap_over_schedules():
    schedules = [make_schedule(name, 12) for name in ("linear", "cosine", "jsd")]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *schedules)
    got = jax.vmap(lambda s, t: extract(s.betas, t, 1)[0] * s.num_timesteps)(stacked, jnp.array([[0], [5], [11]]))
    np.testing.assert_allclose(got, [s.betas[t] * 12 for s, t in zip(schedules, (0, 5, 11), strict=True)], rtol=1e-7)


def test_scan_over_timesteps():
    schedule = make_schedule("cosine", 40)
    step = lambda abar, row: (abar * (1 - row.betas),) * 2  # noqa: E731
    _, products = jax.lax.scan(step, 1.0, schedule)
    np.testing.assert_allclose(products, schedule.alphas_cumprod, rtol=2e-5)


@pytest.mark.parametrize(("t", "ndim", "shape"), [([2, 0], 4, (2, 1, 1, 1)), ([2, 0], 1, (2,)), (2, 4, ())])
def test_extract(t, ndim, shape):
    got = extract(np.array([10.0, 20.0, 30.0]), jnp.array(t), ndim)
    assert got.shape == shape
    np.testing.assert_array_equal(got.ravel(), np.array([10.0, 20.0, 30.0])[t].ravel())
