from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import coefficients

from ddpm_jax.diffusion.gaussian import p_sample
from ddpm_jax.diffusion.samplers import plan, sample
from ddpm_jax.diffusion.schedules import extract, make_betas, make_schedule
from ddpm_jax.diffusion.tables import DEFAULT_SPACING, SAMPLERS, SPACINGS, make_table, spaced_timesteps, with_resampling

T = 1000
LINEAR = make_schedule("linear", T)
BETAS = make_betas("linear", T)


# For a thousand steps of many pixels; other programs of the tests are compiled without optimisation (tests/xla.py).
optimised = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})


@jax.jit
def draws(key):
    """[40, *SHAPE]: the noise that a sampler draws, the initial one first: normal(fold_in(image's key, i))."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(SHAPE[0]))
    draw = lambda k, i: jax.random.normal(jax.random.fold_in(k, i), SHAPE[1:])  # noqa: E731
    return jax.vmap(lambda i: jax.vmap(lambda k: draw(k, i))(keys))(jnp.arange(40))


def replay(betas, timesteps, variance, prediction, model, key, x, clip, threshold=None):
    """Algorithm 2 in float64 NumPy, with the sampler's noise; x None starts from noise as well."""
    noise = np.asarray(draws(key), np.float64)
    x = noise[0] if x is None else x
    a, s, x_0_coef, x_coef, small, beta = coefficients(betas, timesteps)
    path = [x]
    for i, t in enumerate(timesteps):
        output = np.asarray(model(jnp.asarray(x, jnp.float32), jnp.full(len(x), t)), np.float64)
        sigma = np.sqrt(small[i] if variance == "fixed_small" else beta[i])
        if variance == "learned":
            output, v = np.split(output, 2, axis=-1)
            sigma = beta[i] ** ((v + 1) / 4) * small[i] ** ((1 - v) / 4) if i < len(timesteps) - 1 else 0
        x_0 = {
            "eps": lambda: (x - s[i] * output) / a[i],  # noqa: B023
            "x_0": lambda: output,  # noqa: B023
            "v": lambda: a[i] * x - s[i] * output,  # noqa: B023
        }[prediction]()
        if threshold is not None:
            limit = np.maximum(np.quantile(np.abs(x_0), threshold, axis=(1, 2, 3), keepdims=True), 1)
            x_0 = np.clip(x_0, -limit, limit) / limit
        elif clip:
            x_0 = np.clip(x_0, -1, 1)
        x = x_0_coef[i] * x_0 + x_coef[i] * x + (sigma * noise[i + 1] if i < len(timesteps) - 1 else 0)
        path.append(x)
    return path


@jax.jit
def toy_model(x, t):
    """Smooth in x and t, and as large as noise; similar to a trained network's output."""
    return x * jnp.tanh(0.5 + t[:, None, None, None] / 300) + 0.1 * jnp.sin(3 * x)


@jax.jit
def with_interpolation(x, t):
    return jnp.concatenate([toy_model(x, t), jnp.cos(x)], axis=-1)


SHAPE = (3, 4, 4, 2)


@pytest.mark.parametrize("variance", ["fixed_large", "learned"])
@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.7, "spacing": "quadratic"},
        {"sampler": "dpmpp_2m", "spacing": "logsnr"},
        {"sampler": "dpmpp_2m_sde"},
        {"sampler": "heun", "timesteps": (29, 20, 12, 7, 2), "clip": False},
        {"sampler": "unipc", "order": 3, "clip": False},
        {"sampler": "unipc", "t_end": 4},
        {"sampler": "plms"},
        {"sampler": "plms", "t_end": 4, "clip": False},
        {"sampler": "heun", "levels": "karras", "fractional": True, "spacing": "linspace", "clip": False},
        {"sampler": "ddpm", "t_end": 4},
        {"sampler": "ddim", "eta": 1.0, "resampling": (3, 2)},
    ],
)
def test_sample_runs_the_table(measure, options, variance):
    """Every sampler in a NumPy loop over its table, with the same network and noise."""
    schedule, key = make_schedule("linear", 30, 1e-3, 0.2), jax.random.key(7)
    options = {"num_steps": None if "timesteps" in options or "t_end" in options else 12, **options}
    model = with_interpolation if variance == "learned" else toy_model
    got = sample(schedule, model, key, SHAPE, variance=variance, **options)
    planned = {"spacing": DEFAULT_SPACING[options["sampler"]]} | {k: options[k] for k in PLANNED if k in options}
    levels = plan(schedule, **planned)
    table = make_table(
        options["sampler"], levels, variance=variance, eta=options.get("eta"), order=options.get("order")
    )
    table = with_resampling(table, levels, *options["resampling"]) if "resampling" in options else table
    noise = np.asarray(draws(key), np.float64)
    x, kept, past = noise[0], np.zeros(SHAPE), [np.zeros(SHAPE)] * 3
    for i, t in enumerate(table.t):
        output = np.asarray(model(jnp.asarray(x, jnp.float32), jnp.full(len(x), t)), np.float64)
        output, v = output[..., : SHAPE[-1]], output[..., SHAPE[-1] :]
        x_0 = (x - table.s[i] * output) / table.a[i]
        x_0 = np.clip(x_0, -1, 1) if options.get("clip", True) else x_0
        log_variance = table.log_variance_min[i]
        if v.size:
            log_variance = (v + 1) / 2 * table.log_variance_max[i] + (1 - v) / 2 * table.log_variance_min[i]
        images = [x, kept, x_0, *past]
        past = [table.remembered[i, 0] * x + table.remembered[i, 1] * x_0, *past[:2]]
        x, kept = (sum(map(np.multiply, factors, images)) for factors in (table.next[i], table.kept[i]))
        x = x + np.sqrt(table.noise_scale[i] * np.exp(log_variance) + table.noise_variance[i]) * noise[i + 1]
    measure(f"`sample`, {options['sampler']}: 12 steps", "its table in a float64 loop", np.abs(got - x).max(), 1e-5)


PLANNED = ("num_steps", "spacing", "timesteps", "t_end", "levels", "fractional")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_steps": 1},
        {"variance": "fixed_small", "num_steps": 12},
        {"prediction": "x_0", "num_steps": 12, "clip": False},
        {"prediction": "v"},
        {"num_steps": 12, "dynamic_threshold": 0.9},
        {"variance": "learned", "prediction": "v", "clip": False, "num_steps": 12},
    ],
)
def test_sample_is_the_algorithm_in_a_python_loop(measure, options):
    steps = 30
    schedule, betas = make_schedule("linear", steps, 1e-3, 0.2), make_betas("linear", steps, 1e-3, 0.2)
    key = jax.random.key(7)
    options = {"variance": "fixed_large", "prediction": "eps", "clip": True, **options}
    model = with_interpolation if options["variance"] == "learned" else toy_model
    got = sample(schedule, model, key, SHAPE, **options)
    timesteps = spaced_timesteps(schedule, options.get("num_steps"))
    expected = replay(
        betas,
        timesteps,
        options["variance"],
        options["prediction"],
        model,
        key,
        None,
        options["clip"],
        options.get("dynamic_threshold"),
    )[-1]
    what = "30 and 12 steps; eps, x_0, v; all variances; clipping and dynamic thresholding"
    measure(f"`sample`, ddpm: {what}", "DDPM, algorithm 2, in a float64 loop", np.abs(got - expected).max(), 1.5e-6)


def test_sample_is_p_sample_repeated():
    """With the same noise, given as one key per image and step."""
    steps = 15
    schedule = make_schedule("cosine", steps)
    keys = jax.random.split(jax.random.key(1), SHAPE[0])
    fold = lambda i: jax.vmap(lambda k: jax.random.fold_in(k, i))(keys)  # noqa: E731
    x = x_t = jax.random.normal(jax.random.key(2), SHAPE)
    for i, t in enumerate(reversed(range(steps))):
        x = p_sample(schedule, toy_model, fold(i + 1), x, jnp.full(SHAPE[0], t), variance="fixed_small")
    got = sample(schedule, toy_model, keys, SHAPE, x_t=x_t, variance="fixed_small")
    np.testing.assert_allclose(got, x, atol=1.5e-6)


# Distributions.


@pytest.mark.parametrize(
    ("variance", "num_steps", "discretisation"),
    [("fixed_large", None, 0.01), ("fixed_small", None, -0.03), ("fixed_large", 50, 0.2)],
)
def test_gaussian_data(measure, gaussian_model, variance, num_steps, discretisation):
    """With the exact eps every step is linear: mean and variance follow a recursion, which all pixels obey within five
    standard errors, and which ends near the data's own: above it with the large variance, below with the small."""
    m, v, n = 0.2, 0.09, 256 * 256
    model = gaussian_model(LINEAR, m, v)
    options = {"variance": variance, "num_steps": num_steps, "clip": False}
    x = optimised(lambda key: sample(LINEAR, model, key, (1, 256, 256, 1), **options))(jax.random.key(3))
    timesteps = spaced_timesteps(LINEAR, num_steps)
    mean, var = 0.0, 1.0
    for a, s, x_0_coef, x_coef, small, beta in zip(*coefficients(BETAS, timesteps), strict=True):
        gain = a * v / (a**2 * v + s**2)  # x_0_hat = m + gain (x - a m)
        noise = 0.0 if small == 0 else {"fixed_small": small, "fixed_large": beta}[variance]
        mean = x_0_coef * (m + gain * (mean - a * m)) + x_coef * mean
        var = (x_0_coef * gain + x_coef) ** 2 * var + noise
    what, against = "Gaussian data, exact network, 1000 and 50 steps", "closed form of the result"
    measure(f"{what}: mean", against, abs(x.mean() - mean) / np.sqrt(var / n), 5, "standard errors")
    measure(f"{what}: variance", against, abs(x.var() / var - 1) / np.sqrt(2 / n), 5, "standard errors")
    assert abs(mean - m) < 1e-3
    assert 0 < (var / v - 1) / discretisation < 1


@pytest.mark.slow
def test_gaussian_with_a_covariance(measure):
    """Pairs of pixels of correlation 0.8, by the exact network: along both eigenvectors of the covariance the result's
    variance follows the recursion of a single pixel."""
    v, rho, n = 0.2, 0.8, 40_000
    covariance = jnp.array([[v, rho * v], [rho * v, v]])

    def model(x, t):
        a, s = LINEAR.sqrt_alphas_cumprod[t[0]], LINEAR.sqrt_one_minus_alphas_cumprod[t[0]]
        inverse = jnp.linalg.inv(a**2 * covariance + s**2 * jnp.eye(2))
        return s * jnp.einsum("ij,bhjc->bhic", inverse, x)

    x = optimised(lambda key: sample(LINEAR, model, key, (1, n, 2, 1), clip=False))(jax.random.key(6))
    x = np.asarray(x, np.float64)[0, :, :, 0]
    along = []
    for eigenvalue in (v * (1 + rho), v * (1 - rho)):
        var = 1.0
        for a, s, x_0_coef, x_coef, small, beta in zip(*coefficients(BETAS, spaced_timesteps(LINEAR)), strict=True):
            gain = a * eigenvalue / (a**2 * eigenvalue + s**2)
            var = (x_0_coef * gain + x_coef) ** 2 * var + (beta if small > 0 else 0.0)
        assert abs(var / eigenvalue - 1) < 0.05
        along.append(var)
    expected = np.array([[along[0] + along[1], along[0] - along[1]], [along[0] - along[1], along[0] + along[1]]]) / 2
    errors = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / n)
    what, against = "pairs of correlated pixels, exact network, 1000 steps", "closed form of the result"
    measure(f"{what}: covariance", against, (np.abs(np.cov(x.T) - expected) / errors).max(), 5, "standard errors")
    errors = np.sqrt(np.diag(expected) / n)
    measure(f"{what}: mean", against, (np.abs(x.mean(0)) / errors).max(), 5, "standard errors")


@pytest.mark.parametrize("num_steps", [2, 5, 30])
def test_learned_variance_makes_any_number_of_steps_exact(gaussian_model, num_steps):
    """For Gaussian data q(x_s | x_t) is Gaussian, of variance posterior + c^2 Var[x_0 | x_t]. A network predicting it
    carries the exact marginal of x_t to the exact marginal of E[x_0 | x at t = 0]."""
    m, v, n = -0.1, 0.25, 256 * 256
    timesteps = spaced_timesteps(LINEAR, num_steps)
    a, s, x_0_coef, _, small, beta = coefficients(BETAS, timesteps)
    exact = small + x_0_coef**2 * v * s**2 / (a**2 * v + s**2)
    interpolation = np.zeros(T)
    interpolation[timesteps[:-1]] = 2 * np.log(exact / np.where(small > 0, small, 1))[:-1]
    interpolation[timesteps[:-1]] /= np.log(beta[:-1] / small[:-1])
    interpolation[timesteps[:-1]] -= 1
    interpolation = jnp.asarray(interpolation, jnp.float32)
    mean_model = gaussian_model(LINEAR, m, v)

    def model(x, t):
        return jnp.concatenate([mean_model(x, t), jnp.broadcast_to(extract(interpolation, t, 4), x.shape)], axis=-1)

    shape = (1, 256, 256, 1)
    z = np.random.default_rng(0).standard_normal(shape)
    x_t = jnp.asarray(a[0] * m + np.sqrt(a[0] ** 2 * v + s[0] ** 2) * z, jnp.float32)
    x = sample(LINEAR, model, jax.random.key(4), shape, x_t=x_t, num_steps=num_steps, variance="learned", clip=False)
    assert interpolation.max() <= 1
    assert interpolation.min() >= -1
    var = (a[-1] * v) ** 2 / (a[-1] ** 2 * v + s[-1] ** 2)
    assert abs(x.mean() - m) < 5 * np.sqrt(var / n)
    assert abs(x.var() / var - 1) < 5 * np.sqrt(2 / n)


@pytest.mark.slow
def test_mixture_of_two(measure):
    """Mean, variance and the weights of both modes, from the exact score of a mixture."""
    weights, means, v, n = np.array([0.3, 0.7]), np.array([-0.6, 0.4]), 0.02, 96 * 96
    log_weights, centres = jnp.log(jnp.asarray(weights, jnp.float32)), jnp.asarray(means, jnp.float32)

    def model(x, t):
        a = extract(LINEAR.sqrt_alphas_cumprod, t, 5)
        s = extract(LINEAR.sqrt_one_minus_alphas_cumprod, t, 5)
        var = a**2 * v + s**2
        difference = x[..., None] - a * centres
        share = jax.nn.softmax(log_weights - difference**2 / (2 * var), axis=-1)
        return jnp.sum(share * s * difference / var, axis=-1)

    x = optimised(lambda key: sample(LINEAR, model, key, (1, 96, 96, 1), clip=False))(jax.random.key(5))
    x = np.asarray(x, np.float64).ravel()
    right = x > -0.1
    mean = weights @ means
    var = v + weights @ (means - mean) ** 2
    fourth = weights @ ((means - mean) ** 4 + 6 * v * (means - mean) ** 2 + 3 * v**2)
    what, against = "mixture of two Gaussians, exact network, 1000 steps", "the mixture"
    measure(f"{what}: share of a mode", against, abs(right.mean() - 0.7) / np.sqrt(0.21 / n), 5, "standard errors")
    measure(f"{what}: mean", against, abs(x.mean() - mean) / np.sqrt(var / n), 5, "standard errors")
    measure(f"{what}: variance", against, abs(x.var() - var) / np.sqrt((fourth - var**2) / n), 5, "standard errors")
    for mode, centre in ((~right, -0.6), (right, 0.4)):
        assert abs(x[mode].mean() - centre) < 5 * np.sqrt(v / mode.sum())
        # The discretisation of time leaves 1 to 2 in 100.
        assert abs(x[mode].var() / v - 1) < 5 * np.sqrt(2 / mode.sum()) + 0.02


# Options.


def test_start_from_an_image():
    """Like the end of algorithm 2: all steps or some of them, from t_start on."""
    steps = 40
    schedule, betas = make_schedule("linear", steps, 1e-3, 0.2), make_betas("linear", steps, 1e-3, 0.2)
    key = jax.random.key(9)
    x_t = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    for t_start, num_steps in ((11, None), (30, 4), (0, None)):
        got = sample(schedule, toy_model, key, SHAPE, x_t=jnp.asarray(x_t), t_start=t_start, num_steps=num_steps)
        timesteps = spaced_timesteps(schedule, num_steps, last=t_start)
        assert timesteps[0] == t_start
        path = replay(betas, timesteps, "fixed_large", "eps", toy_model, key, x_t.astype(np.float64), True)
        np.testing.assert_allclose(got, path[-1], atol=1.5e-6)


def test_an_image_does_not_depend_on_the_batch():
    schedule, key = make_schedule("linear", 20, 1e-3, 0.3), jax.random.key(11)
    few = sample(schedule, toy_model, key, (2, *SHAPE[1:]))
    many = sample(schedule, toy_model, key, (7, *SHAPE[1:]))
    np.testing.assert_allclose(few, many[:2], atol=1e-6)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.array([5, 1]))
    np.testing.assert_allclose(sample(schedule, toy_model, keys, (2, *SHAPE[1:])), many[jnp.array([5, 1])], atol=1e-6)
    assert np.min(np.std(many, axis=0)) > 1e-3


@pytest.mark.parametrize("num_snapshots", [4, 21])
def test_snapshots(num_snapshots):
    """The intermediate images of the loop, evenly spaced."""
    steps = 20
    schedule, betas = make_schedule("linear", steps, 1e-3, 0.3), make_betas("linear", steps, 1e-3, 0.3)
    key = jax.random.key(12)
    x, snapshots = sample(schedule, toy_model, key, SHAPE, num_snapshots=num_snapshots)
    np.testing.assert_allclose(x, sample(schedule, toy_model, key, SHAPE), atol=1e-6)
    assert snapshots.shape == (num_snapshots, *SHAPE)
    np.testing.assert_array_equal(snapshots[-1], x)
    path = replay(betas, spaced_timesteps(schedule), "fixed_large", "eps", toy_model, key, None, True)
    wanted = [int(np.floor(i * steps / (num_snapshots - 1))) for i in range(num_snapshots)]
    np.testing.assert_allclose(snapshots, np.stack(path)[wanted], atol=1.5e-6)


@pytest.mark.parametrize("num_snapshots", [2, 3, 7])
def test_snapshots_of_x_0(num_snapshots):
    """The network's predictions: at the first call (of seven), evenly spaced, and at the last."""
    options = {"num_steps": 7, "sampler": "ddim", "snapshots_of": "x_0"}
    x, snapshots = sample(LINEAR, toy_model, jax.random.key(1), SHAPE, num_snapshots=num_snapshots, **options)
    _, every = sample(LINEAR, toy_model, jax.random.key(1), SHAPE, num_snapshots=7, **options)
    np.testing.assert_allclose(every[-1], x, atol=1e-6)
    calls = [int(np.floor((i + 1) * 7 / num_snapshots)) - 1 for i in range(num_snapshots)]
    np.testing.assert_allclose(snapshots, every[np.array(calls)], atol=1e-6)
    assert np.abs(every).max() <= 1


def test_stopping_on_the_way_and_going_on():
    """From T - 1 to 300, then to the end: the same timesteps and, for a deterministic sampler, the same image."""
    options = {"sampler": "ddim", "clip": False}
    whole = sample(LINEAR, toy_model, jax.random.key(2), SHAPE, timesteps=[999, 700, 500, 300, 100, 0], **options)
    half = sample(LINEAR, toy_model, jax.random.key(2), SHAPE, timesteps=[999, 700, 500], t_end=300, **options)
    rest = sample(LINEAR, toy_model, jax.random.key(2), SHAPE, x_t=half, timesteps=[300, 100, 0], **options)
    np.testing.assert_allclose(rest, whole, rtol=1e-5, atol=1e-5)
    assert not np.allclose(half, whole, atol=1e-2)


def test_plan():
    np.testing.assert_array_equal(plan(LINEAR, num_steps=3).t, [999, 500, 0, -1])
    np.testing.assert_array_equal(plan(LINEAR, num_steps=3, t_end=399).t, [999, 799, 599, 399])
    np.testing.assert_array_equal(plan(LINEAR, num_steps=3, spacing="leading", t_end=399).t, [999, 799, 599, 399])
    np.testing.assert_array_equal(plan(LINEAR, timesteps=[7, 3]).t, [7, 3, -1])
    leading = {"spacing": "leading", "spacing_offset": 1, "stop_at_first": True}
    np.testing.assert_array_equal(plan(LINEAR, num_steps=2, **leading).t, [501, 1, 0])
    # A call at timestep 0 would change nothing.
    np.testing.assert_array_equal(plan(LINEAR, num_steps=3, stop_at_first=True).t, [999, 500, 0])
    np.testing.assert_array_equal(plan(LINEAR, num_steps=3, t_end=399, stop_at_first=True).t, [999, 799, 599, 399])
    np.testing.assert_array_equal(plan(LINEAR, num_steps=2, skip_lowest=True).t, [999, 500, -1])
    with pytest.raises(ValueError, match="stop_at_first ends at timestep 0, where sampling starts"):
        plan(LINEAR, timesteps=[0], stop_at_first=True)


def test_plan_between_timesteps():
    even = {"num_steps": 3, "levels": "linspace"}
    np.testing.assert_array_equal(plan(LINEAR, **even, fractional=True).t, [999, 499.5, 0, -1])
    np.testing.assert_array_equal(plan(LINEAR, **even).t, [999, 500, 0, -1])
    np.testing.assert_array_equal(plan(LINEAR, **even, stop_at_first=True).t, [999, 500, 0])
    np.testing.assert_array_equal(plan(LINEAR, **even, t_start=500, t_end=99, fractional=True).t[[0, -1]], [500, 99])
    with pytest.raises(ValueError, match="timesteps have noise levels of their own, but levels is 'karras'"):
        plan(LINEAR, timesteps=[5, 3], levels="karras")
    with pytest.raises(ValueError, match="fractional timesteps need levels; accepted: linspace"):
        plan(LINEAR, fractional=True)
    with pytest.raises(ValueError, match="levels is 'even'; accepted: linspace, karras, logsnr"):
        plan(LINEAR, levels="even")
    with pytest.raises(ValueError, match="stop_at_first ends at timestep 0, where sampling starts"):
        plan(LINEAR, t_start=0, levels="karras", stop_at_first=True)


def test_start_of_the_first_level_s_size():
    options = {"num_steps": 1, "sampler": "ddim", "t_end": 99, "clip": False}
    still = lambda x, t: 0 * x  # noqa: E731
    plain, scaled = (
        sample(LINEAR, still, jax.random.key(0), SHAPE, t_start=None, scaled_start=scaled, **options)
        for scaled in (False, True)
    )
    np.testing.assert_allclose(scaled, plain * LINEAR.sqrt_one_minus_alphas_cumprod[999], rtol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_plans_start_and_end_where_requested(spacing):
    """They start at the timestep of x_t, whatever the spacing, and make num_steps calls before t_end."""
    for t_start in (999, 300, 4):
        levels = plan(LINEAR, num_steps=4, spacing=spacing, t_start=t_start)
        assert (levels.t[0], len(levels.t), levels.t[-1]) == (t_start, 5, -1)
        levels = plan(LINEAR, num_steps=3, spacing=spacing, t_start=t_start, t_end=1)
        assert (levels.t[0], len(levels.t), levels.t[-1]) == (t_start, 4, 1)
        assert np.all(np.diff(levels.t) < 0)


def test_known_pixels_are_put_in_place():
    """The network sees q(x_t | known) there, and the result holds them as they are."""
    seen = []
    known, mask = jnp.full((1, 64, 64, 1), 0.3), jnp.arange(64)[None, :, None, None] < 32

    def model(x, t):
        jax.debug.callback(lambda x, t: seen.append((np.asarray(x), int(t[0]))), x, t, ordered=True)
        return 0 * x

    x = sample(LINEAR, model, jax.random.key(3), known.shape, num_steps=5, known=(known, mask))
    jax.effects_barrier()
    assert [t for _, t in seen] == [999, 749, 500, 250, 0]
    n = 32 * 64
    for x_t, t in seen:
        a, s = float(LINEAR.sqrt_alphas_cumprod[t]), float(LINEAR.sqrt_one_minus_alphas_cumprod[t])
        part = x_t[:, :32]
        assert abs(part.mean() - a * 0.3) < 5 * s / np.sqrt(n)
        assert abs(part.std() / s - 1) < 5 / np.sqrt(2 * n)
    np.testing.assert_array_equal(x[:, :32], known[:, :32])


def test_known_pixels_of_one_noise():
    """The network sees the known image with that noise at every step but the first, which starts from the noise."""
    seen = []
    known, mask = jnp.full(SHAPE, 0.3), jnp.arange(SHAPE[2])[None, None, :, None] < 2
    noise = jax.random.normal(jax.random.key(7), SHAPE)

    def model(x, t):
        jax.debug.callback(lambda x, t: seen.append((np.asarray(x), int(t[0]))), x, t, ordered=True)
        return 0 * x

    options = {"num_steps": 5, "known": (known, mask), "known_noise": noise}
    x = sample(LINEAR, model, jax.random.key(3), SHAPE, **options)
    jax.effects_barrier()
    np.testing.assert_array_equal(seen[0][0], noise)
    for x_t, t in seen[1:]:
        expected = LINEAR.sqrt_alphas_cumprod[t] * known + LINEAR.sqrt_one_minus_alphas_cumprod[t] * noise
        np.testing.assert_allclose(x_t[:, :, :2], expected[:, :, :2], atol=1e-6)
        assert np.abs(x_t - expected)[:, :, 2:].max() > 0.01
    np.testing.assert_array_equal(x[:, :, :2], known[:, :, :2])
    with pytest.raises(ValueError, match="known_noise is the noise of known pixels; give known as well"):
        sample(LINEAR, model, jax.random.key(3), SHAPE, known_noise=noise)


def test_progress_is_reported_on_the_way():
    told = []
    options = {"num_steps": 47, "progress": lambda *position: told.append(position)}
    first = sample(LINEAR, toy_model, jax.random.key(4), SHAPE, **options)
    assert told == [(done, 47) for done in (10, 20, 30, 40, 47)]
    np.testing.assert_array_equal(first, sample(LINEAR, toy_model, jax.random.key(4), SHAPE, num_steps=47))


@pytest.mark.parametrize(("of", "before"), [("x", 1), ("x_0", 0)])
def test_watching_sees_what_the_snapshots_keep(of, before):
    seen = []
    options = {"num_steps": 7, "snapshots_of": of}
    watched = sample(LINEAR, toy_model, jax.random.key(4), SHAPE, watch=lambda *told: seen.append(told), **options)
    plain, snapshots = sample(LINEAR, toy_model, jax.random.key(4), SHAPE, num_snapshots=7 + before, **options)
    assert [(done, calls) for done, calls, _ in seen] == [(2, 7), (4, 7), (6, 7), (7, 7)]
    for done, _, image in seen:
        np.testing.assert_allclose(image, snapshots[done - 1 + before], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(watched, plain, rtol=1e-5, atol=1e-6)


def test_what_a_watcher_raises_ends_the_sampling():
    seen = []

    def stop(done, calls, image):
        seen.append(done)
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        sample(LINEAR, toy_model, jax.random.key(4), SHAPE, num_steps=20, watch=stop)
    assert seen == [2]


def test_within_an_outer_jit():
    """With traced arguments the whole table runs at once, with the same result."""
    model = lambda weight: jax.tree_util.Partial(lambda w, x, t: w * x, weight)  # noqa: E731
    options = {"num_steps": 13, "num_snapshots": 4}
    inner = jax.jit(lambda weight, key: sample(LINEAR, model(weight), key, SHAPE, **options))
    for ours, alone in zip(
        inner(0.5, jax.random.key(4)),
        sample(LINEAR, model(0.5), jax.random.key(4), SHAPE, **options),
        strict=True,
    ):
        np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-6)


def test_clip_bounds_the_result():
    wild = lambda x, t: -5 * x  # noqa: E731
    clipped = sample(LINEAR, wild, jax.random.key(0), SHAPE, num_steps=10)
    assert np.max(np.abs(clipped)) == 1
    assert np.max(np.abs(sample(LINEAR, wild, jax.random.key(0), SHAPE, num_steps=10, clip=False))) > 1


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 0.6},
        {"t_start": 100},
        {"schedule": make_schedule("cosine", T)},
        {"variance": "fixed_small"},
        {"spacing": "quadratic"},
        {"timesteps": [999, 600, 500, 20, 3], "num_steps": None},
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.7},
        {"sampler": "unipc", "order": 3},
        {"sampler": "plms"},
        {"num_steps": 23},
        {"sampler": "heun", "num_steps": 100},
    ],
)
def test_what_does_not_retrace(change):
    traces = []

    def apply(weight, x, t):
        traces.append(None)
        return weight * x

    def run(weight=0.5, schedule=LINEAR, **options):
        model = jax.tree_util.Partial(apply, jnp.float32(weight))
        options = {"num_steps": 5, "x_t": jnp.ones(SHAPE), **options}
        return sample(schedule, model, jax.random.key(0), SHAPE, **options)

    first, traced = run(), len(traces)
    assert traced >= 1
    assert not np.allclose(first, run(**change))
    assert len(traces) == traced


def test_one_timestep():
    """With T = 1, the only step yields x_0."""
    x = sample(make_schedule([0.5]), lambda x, t: 0 * x + 0.25, jax.random.key(0), SHAPE, prediction="x_0")
    np.testing.assert_array_equal(x, np.full(SHAPE, 0.25))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler"}, f"sampler is 'euler'; accepted: {', '.join(SAMPLERS)}"),
        ({"prediction": "score"}, "prediction is 'score'; accepted: eps, x_0, v"),
        ({"variance": "fixed"}, "variance is 'fixed'; accepted: fixed_small, fixed_large, learned"),
        ({"variance": "learned"}, "even number of output channels, not 3"),
        ({"num_steps": 1001}, "num_steps is 1001; accepted: 1 to 1000"),
        ({"num_steps": 0}, "num_steps is 0; accepted: 1 to 1000"),
        ({"x_t": np.zeros((2, 4, 4, 3)), "t_start": 9, "num_steps": 11}, "num_steps is 11; accepted: 1 to 10"),
        ({"x_t": np.zeros((2, 4, 4, 3)), "t_start": 1000}, "starting timestep is 1000; accepted: 0 to 999"),
        ({"x_t": np.zeros((2, 4, 4, 3)), "t_start": -1}, "starting timestep is -1; accepted: 0 to 999"),
        ({"x_t": np.zeros((2, 4, 4, 1))}, r"x_t has shape \(2, 4, 4, 1\), but shape is \(2, 4, 4, 3\)"),
        ({"t_start": 500}, "t_start is 500, but there is no x_t"),
        ({"num_snapshots": 1}, "num_snapshots is 1; accepted: 0, or 2 to 1001"),
        ({"num_snapshots": 5, "num_steps": 2}, "num_snapshots is 5; accepted: 0, or 2 to 3"),
        ({"num_snapshots": 3, "num_steps": 2, "snapshots_of": "x_0"}, "num_snapshots is 3; accepted: 0, or 2 to 2"),
        ({"clip_range": 0.0}, "clip_range is 0.0; accepted: above 0"),
        ({"dynamic_threshold": 2.0}, "dynamic_threshold is 2.0; accepted: above 0, at most 1, or None"),
        ({"timesteps": []}, r"the timesteps are \[\]; accepted: descending"),
        ({"snapshots_of": "eps"}, "snapshots_of is 'eps'; accepted: x, x_0"),
        ({"timesteps": [5, 3], "num_steps": 3}, "timesteps replace num_steps and t_start"),
        ({"t_end": 999}, "t_end is 999; accepted: 0 to 998"),
        ({"t_end": 900, "num_steps": 100}, "num_steps is 100; accepted: 1 to 99"),
        ({"eta": 0.5}, "sampler 'ddpm' takes no eta"),
        ({"sampler": "heun", "resampling": (2, 2)}, "a sampler that remembers nothing"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        sample(LINEAR, lambda x, t: x, jax.random.key(0), (2, 4, 4, 3), **options)
