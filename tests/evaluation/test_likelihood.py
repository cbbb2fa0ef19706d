"""The likelihood of sets of images: closed forms for Gaussian networks, and invariances."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import special, stats

from ddpm_jax.data.sources import open_source
from ddpm_jax.diffusion.bound import term_proposal
from ddpm_jax.diffusion.gaussian import Parameterization
from ddpm_jax.diffusion.schedules import make_betas, make_schedule
from ddpm_jax.evaluation import likelihood, plots
from ddpm_jax.evaluation.likelihood import Examples, Statistics
from ddpm_jax.models import layers
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.errors import UserError

T, M, V, LN2 = 20, 0.1, 0.04, math.log(2.0)
BETAS = make_betas("linear", T, 1e-3, 0.3)
SCHEDULE = make_schedule("linear", T, 1e-3, 0.3)
ABAR = np.cumprod(1 - BETAS)
PREVIOUS = np.append(1.0, ABAR[:-1])
EIGHT = parallel.make_mesh()
ONE = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
SHARDS = {"batch_size": 8}


def exact(x, t):
    """E[eps | x_t] of pixels N(M, V), at fractional t too."""
    tau = jnp.interp(t.astype(jnp.float32), jnp.arange(T), -0.5 * SCHEDULE.log_snr).reshape(-1, 1, 1, 1)
    a, s = jnp.exp(-0.5 * jnp.logaddexp(0.0, 2 * tau)), jnp.exp(-0.5 * jnp.logaddexp(0.0, -2 * tau))
    return s * (x - a * M) / (a**2 * V + s**2)


EXACT = jax.tree_util.Partial(exact)


def draw_pictures(n, seed=0, shape=(4, 4, 1)):
    """uint8 draws of N(M, V), which 8 bits hardly clip."""
    x = M + math.sqrt(V) * np.random.default_rng(seed).standard_normal((n, *shape))
    return np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)


PICTURES = draw_pictures(20)
EVALUATIONS = {
    "bound": (likelihood.evaluate_bound, {}),
    "estimate": (likelihood.estimate_bound, {"num_terms": 4}),
    "flow": (likelihood.evaluate_flow, {"num_steps": 3}),
}


@pytest.fixture(scope="module", params=EVALUATIONS)
def evaluation(request):
    """(the function with its options, its result over PICTURES on eight devices)."""
    function, options = EVALUATIONS[request.param]

    def evaluate(images=PICTURES, mesh=EIGHT, first=0, num_images=None, **rest):
        examples = Examples(images, None, first, num_images)
        return function(SCHEDULE, EXACT, examples, mesh, **{"seed": 3, "batch_size": 8, **options, **rest})

    return evaluate, evaluate()


class TestStatistics:
    VALUES = np.random.default_rng(0).standard_normal((50, 3)) * 1e-3 + 100

    def test_are_numpy_s(self):
        found = Statistics.of(self.VALUES)
        np.testing.assert_allclose(found.mean, self.VALUES.mean(0), rtol=1e-14)
        np.testing.assert_allclose(found.standard_error, self.VALUES.std(0, ddof=1) / np.sqrt(50), rtol=1e-9)
        np.testing.assert_allclose(found.rms, np.sqrt((self.VALUES**2).mean(0)), rtol=1e-14)

    @pytest.mark.parametrize("cuts", [[25], [1, 2, 49]])
    def test_add_up(self, cuts):
        first, *rest = (Statistics.of(part) for part in np.split(self.VALUES, cuts))
        for part in rest:
            first = first + part
        whole = Statistics.of(self.VALUES)
        assert first.count == 50
        np.testing.assert_allclose(first.mean, whole.mean, rtol=1e-14)
        np.testing.assert_allclose(first.scatter, whole.scatter, rtol=1e-8)

    def test_one_image_has_no_standard_error(self):
        assert Statistics.of(self.VALUES[:1]).to_json()["standard_error"] is None


def close(first, second, rtol=1e-6):
    for name, value in vars(first).items():
        other = getattr(second, name)
        assert value.count == other.count
        # Rounding is relative to the parts that a number is a small difference of.
        np.testing.assert_allclose(value.mean, other.mean, rtol=rtol, atol=rtol, err_msg=name)
        np.testing.assert_allclose(value.scatter, other.scatter, rtol=100 * rtol, atol=100 * rtol, err_msg=name)


@pytest.mark.slow
def test_devices_and_batches_change_nothing(evaluation):
    """20 images in batches of 8, the last one padded; of 20 on one device; and of an iterable in uneven portions."""
    evaluate, whole = evaluation
    close(evaluate(mesh=ONE, batch_size=20), whole, rtol=2e-6)
    close(evaluate(iter([PICTURES[:3], PICTURES[3:19], PICTURES[19:]])), whole)


def test_parts_add_up(evaluation):
    """By the images' numbers; the estimate of both with one proposal."""
    evaluate, whole = evaluation
    options = {"proposal": term_proposal(np.ones(T))} if "kl_variance" in vars(whole) else {}
    whole = evaluate(**options) if options else whole
    sum_ = evaluate(PICTURES[:8], **options) + evaluate(PICTURES[8:], first=8, **options)
    close(sum_, whole, rtol=1e-8)


def test_progress_and_json(evaluation):
    evaluate, whole = evaluation
    told = []
    evaluate(iter([PICTURES]), progress=lambda *n: told.append(n), num_images=20)
    done, totals = zip(*told, strict=True)
    assert len(set(totals)) == 1
    assert done[-1] == totals[0]
    assert list(done) == sorted(set(done))
    assert len(done) >= 3
    found = json.loads(json.dumps(whole.to_json(), allow_nan=False))
    assert found["num_images"] == 20
    assert found["total"]["mean"] == pytest.approx(float(whole.total.mean))
    json.dumps(evaluate(PICTURES[:1]).to_json(), allow_nan=False)


def test_seeds_draw_different_noise(evaluation):
    evaluate, whole = evaluation
    assert evaluate(seed=4).total.mean != whole.total.mean


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_bound_of_a_gaussian_network(variance):
    """Given x_0, the error of the predicted x_0 is Gaussian: its KL terms and L_0 in closed form or by quadrature."""
    pictures = draw_pictures(256, seed=1, shape=(8, 8, 1))
    found = likelihood.evaluate_bound(
        SCHEDULE,
        EXACT,
        Examples(pictures),
        EIGHT,
        output=Parameterization(variance=variance, clip=False),
        seed=1,
        batch_size=256,
    )
    x_0 = pictures / 127.5 - 1
    a, s = np.sqrt(ABAR), np.sqrt(1 - ABAR)
    small = BETAS * (1 - PREVIOUS) / (1 - ABAR)
    small[0] = small[1]
    p = small if variance == "fixed_small" else np.append(small[0], BETAS[1:])
    coef = BETAS * np.sqrt(PREVIOUS) / (1 - ABAR)
    gain = a * V / (a**2 * V + s**2)
    # x_0 - prediction = bias + spread eps, pixel by pixel.
    n = x_0.size
    for t in range(1, T):
        bias, spread = (1 - gain[t] * a[t]) * (x_0 - M), gain[t] * s[t]
        squares = bias**2 + spread**2
        factor = 0.5 * coef[t] ** 2 / p[t] / LN2
        expected = 0.5 * (small[t] / p[t] - 1 - np.log(small[t] / p[t])) / LN2 + factor * squares.mean()
        deviation = np.sqrt((2 * spread**4 + 4 * bias**2 * spread**2).mean() / n)
        assert abs(found.terms.mean[t] - expected) < 5 * factor * deviation + 1e-6
        assert abs((found.distortion[t] / 127.5) ** 2 - squares.mean()) < 5 * deviation + 1e-6
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    mean = M + gain[0] * (a[0] * (x_0[..., None] - M) + s[0] * nodes)
    scale = np.sqrt(p[0])
    inside = stats.norm.cdf((x_0[..., None] + 1 / 255 - mean) / scale) - stats.norm.cdf(
        (x_0[..., None] - 1 / 255 - mean) / scale
    )
    logs = -np.log(np.maximum(inside, 1e-300)) / LN2
    weights = weights / weights.sum()
    decoder = (logs * weights).sum(-1)
    deviation = np.sqrt(((logs**2 * weights).sum(-1) - decoder**2).mean() / n)
    assert abs(found.decoder.mean - decoder.mean()) < 5 * deviation
    prior = 0.5 * (ABAR[-1] * x_0**2 - ABAR[-1] - np.log1p(-ABAR[-1])).mean() / LN2
    np.testing.assert_allclose(found.prior.mean, prior, rtol=1e-4)
    np.testing.assert_allclose(found.total.mean, found.prior.mean + found.kl.mean + found.decoder.mean, rtol=1e-6)


def test_rate_and_distortion():
    """The rate starts at L_T, spends every KL term from the last on, and ends at all but L_0."""
    found = likelihood.evaluate_bound(SCHEDULE, EXACT, Examples(PICTURES), EIGHT, **SHARDS)
    terms = found.terms.mean
    for t in range(T):
        assert found.rate[t] == pytest.approx(found.prior.mean + terms[t + 1 :].sum(), rel=1e-12)
    assert found.rate[0] == pytest.approx(found.prior.mean + found.kl.mean, rel=1e-6)
    assert np.all(np.diff(found.rate) < 0)
    assert found.distortion[0] < found.distortion[-1]
    json_ = found.to_json()
    assert len(json_["rate"]) == len(json_["distortion"]) == len(json_["terms"]["mean"]) == T


@pytest.mark.slow
def test_estimate_agrees_with_the_bound_and_estimates_its_error():
    """Over many draws, the mean is that of all terms, and the spread matches the reported error."""
    pictures = draw_pictures(64, seed=2)
    whole = likelihood.evaluate_bound(SCHEDULE, EXACT, Examples(pictures), ONE, batch_size=64)

    def estimate(i, pictures=pictures):  # different numbers, different noise
        options = {"proposal": whole.proposal(), "num_terms": 4, "batch_size": 64}
        return likelihood.estimate_bound(SCHEDULE, EXACT, Examples(pictures, first=1000 * i), ONE, **options)

    found = [estimate(i) for i in range(60)]
    kl = np.array([estimate.kl.mean for estimate in found])
    # The sum of all T terms is also noisy, about as much as T draws; one estimate makes four.
    error = np.sqrt(kl.var(ddof=1) * (1 / len(kl) + 4 / T))
    assert abs(kl.mean() - whole.kl.mean) < 5 * error
    said = np.sqrt(np.mean([estimate.draw_error**2 for estimate in found]))
    assert kl.std(ddof=1) == pytest.approx(said, rel=5 / np.sqrt(2 * 59))
    # The standard error of the total, with different images each time.
    others = [estimate(i, draw_pictures(64, seed=100 + i)) for i in range(60)]
    totals = np.array([estimate.total.mean for estimate in others])
    said = np.sqrt(np.mean([estimate.total.standard_error**2 for estimate in others]))
    assert totals.std(ddof=1) == pytest.approx(said, rel=5 / np.sqrt(2 * 59))


@pytest.mark.slow
def test_the_flow_s_bound_lies_below_the_variational_one():
    """20 steps of ancestral sampling lose what the flow with small steps does not; that one is close to the entropy."""
    pictures = draw_pictures(256, seed=3)
    bound = likelihood.evaluate_bound(SCHEDULE, EXACT, Examples(pictures), ONE, batch_size=256)
    flow = likelihood.evaluate_flow(SCHEDULE, EXACT, Examples(pictures), ONE, batch_size=256, num_steps=10)
    error = np.hypot(bound.total.standard_error, flow.total.standard_error)
    assert bound.total.mean - flow.total.mean > 5 * error
    # The entropy of the Gaussian in bins of 2 / 255, which no code can beat.
    entropy = 0.5 * np.log2(2 * np.pi * np.e * V) + np.log2(127.5)
    assert abs(flow.total.mean - entropy - 0.01) < 0.01 + 4 * flow.total.standard_error


@pytest.mark.slow
def test_the_flow_s_bound_lies_below_the_variational_one_on_digits():
    """A model of digits whose density is known: Gaussians around 400 of them."""
    source = open_source("digits", height=8, width=8, channels=1)
    digits = np.stack([source[i]["image"] for i in range(464)])
    known, held_out, variance = digits[:400], digits[400:], 0.05
    centres = (known.reshape(400, -1) / 127.5 - 1.0).astype(np.float32)

    def network(x, t):
        tau = jnp.interp(t.astype(jnp.float32), jnp.arange(T), -0.5 * SCHEDULE.log_snr)[:, None]
        a, s = jnp.exp(-0.5 * jnp.logaddexp(0.0, 2 * tau)), jnp.exp(-0.5 * jnp.logaddexp(0.0, -2 * tau))
        y, total = x.reshape(len(x), -1), a**2 * variance + s**2
        distances = jnp.sum((y[:, None] - a[:, None] * centres) ** 2, axis=-1)
        nearest = jax.nn.softmax(-0.5 * distances / total) @ centres
        return (s * (y - a * nearest) / total).reshape(x.shape)

    model_fn = jax.tree_util.Partial(network)
    bound = likelihood.evaluate_bound(SCHEDULE, model_fn, Examples(held_out), ONE)
    flow = likelihood.evaluate_flow(SCHEDULE, model_fn, Examples(held_out), ONE, num_steps=20, divergence="exact")
    # The exact probability of the images; the outermost bins extend to infinity, as in the decoder.
    levels = held_out.reshape(64, 1, -1).astype(np.float64)
    upper = np.where(levels == 255, np.inf, (levels + 0.5) / 127.5 - 1.0)
    lower = np.where(levels == 0, -np.inf, (levels - 0.5) / 127.5 - 1.0)
    inside = np.diff(special.ndtr((np.stack([lower, upper]) - centres) / math.sqrt(variance)), axis=0)[0]
    log_probability = special.logsumexp(np.log(np.maximum(inside, 1e-300)).sum(-1), axis=1) - np.log(400)
    least = np.mean(-log_probability / (64 * LN2))
    assert least < flow.total.mean < bound.total.mean


@pytest.mark.eight
@pytest.mark.slow
def test_labels_reach_the_network():
    """A network that adds its class to the exact noise: each image by its own label, in whatever batch."""

    def model(x, t, cond):
        return exact(x, t) + 0.1 * cond["label"].reshape(-1, 1, 1, 1)

    examples = Examples(PICTURES, {"label": np.arange(20) % 3})
    found = likelihood.evaluate_bound(SCHEDULE, model, examples, EIGHT, **SHARDS)
    parts = []
    for first in range(3):
        constant = jax.tree_util.Partial(model, cond={"label": jnp.full(8, first)})
        parts += [
            likelihood.evaluate_bound(SCHEDULE, constant, Examples(PICTURES[i : i + 1], first=i), EIGHT, **SHARDS)
            for i in range(first, 20, 3)
        ]
    np.testing.assert_allclose(np.mean([part.total.mean for part in parts]), found.total.mean, rtol=1e-6)
    for count, word in ((19, "but more images"), (21, "for 20 images")):
        examples = Examples(PICTURES, {"label": np.zeros(count, np.int32)})
        with pytest.raises(UserError, match=f"there are {count} conditions {word}"):
            likelihood.evaluate_bound(SCHEDULE, model, examples, EIGHT, **SHARDS)


@pytest.mark.slow
def test_flow_of_convolutions():
    """Through the UNet's convolution, which has a gradient in reverse mode only: Hutchinson's mean over the images is
    the exact divergence."""
    keys = jax.random.split(jax.random.key(0), 2)
    kernels = [
        0.3 * jax.random.normal(key, shape) for key, shape in zip(keys, [(3, 3, 1, 8), (3, 3, 8, 1)], strict=True)
    ]

    def model(x, t):
        hidden = jnp.tanh(layers.conv(x, kernels[0], ((1, 1), (1, 1))) + t.reshape(-1, 1, 1, 1) / T)
        return layers.conv(hidden, kernels[1], ((1, 1), (1, 1)))

    model_fn = jax.tree_util.Partial(model)
    options = {"num_steps": 2, "method": "heun", "batch_size": 256}
    drawn, whole = (
        likelihood.evaluate_flow(
            SCHEDULE, model_fn, Examples(draw_pictures(256)), ONE, divergence=divergence, **options
        )
        for divergence in ("hutchinson", "exact")
    )
    # Both use the same images and noise, so that only the divergence differs.
    np.testing.assert_allclose(drawn.decoder.mean, whole.decoder.mean, rtol=1e-5)
    spread = np.sqrt(max(drawn.flow.scatter - whole.flow.scatter, drawn.flow.scatter / 10)) / 255**0.5 / 16
    assert 0 < abs(drawn.flow.mean - whole.flow.mean) < 5 * spread


@pytest.mark.parametrize("function", [function for function, _ in EVALUATIONS.values()])
@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (PICTURES / 255.0, {}, r"the images are float64 of shape \(\d+, 4, 4, 1\); accepted: uint8 of shape"),
        (PICTURES[0], {}, r"the images are uint8 of shape \(4, 4, 1\); accepted"),
        ([PICTURES, draw_pictures(2, shape=(5, 5, 1))], {}, r"uint8 of shape \(2, 5, 5, 1\); accepted"),
        (PICTURES[:0], {}, "a likelihood needs at least 1 image"),
        (iter([]), {}, "a likelihood needs at least 1 image"),
        (PICTURES, {"batch_size": 0}, "batch_size is 0; accepted: 1 or more"),
        (PICTURES, {"output": Parameterization("score")}, "prediction is 'score'"),
        ([PICTURES], {"progress": print}, "progress over an iterable of images needs num_images"),
    ],
)
def test_refused(function, images, options, message):
    with pytest.raises(UserError, match=message):
        function(SCHEDULE, EXACT, Examples(images), EIGHT, **{**SHARDS, **options})


def test_refused_number_of_terms():
    with pytest.raises(UserError, match="num_terms is 3; accepted: even numbers"):
        likelihood.estimate_bound(
            SCHEDULE, EXACT, Examples(PICTURES), EIGHT, num_terms=3, proposal=np.ones(T), **SHARDS
        )


def test_a_network_that_gives_nan_is_named():
    """The message names the image and the timestep."""
    broken = lambda x, t: jnp.where(t.reshape(-1, 1, 1, 1) == 7, jnp.nan, exact(x, t))  # noqa: E731
    with pytest.raises(
        UserError, match=r"image 5 is not finite \('total'\)|image 5 is not finite \('terms' at t = 7\)"
    ):
        likelihood.evaluate_bound(SCHEDULE, broken, Examples(PICTURES, first=5), EIGHT, **SHARDS)


@pytest.mark.parametrize("images", [1, 20])
def test_pictures_of_the_curves(tmp_path, images):
    bound = likelihood.evaluate_bound(SCHEDULE, EXACT, Examples(PICTURES[:images]), EIGHT, **SHARDS)
    for save in (plots.save_terms, plots.save_rate_distortion):
        path = save(tmp_path / "new" / f"{save.__name__}.png", bound)
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    assert len(list((tmp_path / "new").iterdir())) == 2
