import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paper import ABAR, LEVELS, LINEAR, TIMES, T, batch, column, noised, single
from scipy import stats

from ddpm_jax.diffusion import losses
from ddpm_jax.diffusion.bound import vb_term_bpd
from ddpm_jax.diffusion.gaussian import q_sample
from ddpm_jax.diffusion.schedules import make_betas, make_schedule


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
    """min(1, 5 / snr) and 1 / (1 + snr) are 1 at an snr of 0, the last one in the "jsd" schedule."""
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
    np.testing.assert_allclose(got, T * vb_term_bpd(LINEAR, output, x_0, x_t, t, variance=variance), rtol=1e-5)


@pytest.mark.parametrize("loss", ["vlb", "hybrid"])
def test_losses_with_the_bound_have_finite_gradients_at_every_t(loss):
    """Even where the other branch, the decoder's, is far out of range."""
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
    """A network that predicts t for x_0 = 0 has the loss t^2; one that predicts 0 for the noise has its mean square."""
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
    """Broadcasting would compute a wrong loss if there is one output channel instead of three."""
    with pytest.raises(ValueError, match=r"output has shape \(6, 4, 4, 1\), but the images have shape \(6, 4, 4, 3\)"):
        losses.training_loss(LINEAR, lambda x, t: x[..., :1], jax.random.key(0), single(*batch(10))[0])
