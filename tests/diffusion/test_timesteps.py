from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpm_jax.diffusion.timesteps import LossHistory, sample_timesteps


@pytest.mark.parametrize("steps", [2, 7, 1000])
def test_uniform_timesteps(steps):
    t, weights = sample_timesteps(jax.random.key(0), 50 * steps, steps)
    assert t.dtype == jnp.int32
    np.testing.assert_array_equal(weights, np.ones(50 * steps))
    counts = np.bincount(t, minlength=steps)
    assert t.min() >= 0
    assert len(counts) == steps
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(("size", "steps"), [(1, 10), (8, 1000), (7, 3)])
def test_stratified_timesteps(size, steps):
    """On the circle of timesteps, neighbours are T / B apart, rounded; each draw alone is uniform."""
    draw = lambda key: sample_timesteps(key, size, steps, "stratified")  # noqa: E731
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
    return LossHistory(
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
    t, weights = sample_timesteps(jax.random.key(2), n, steps, "importance", history)
    assert t.dtype == jnp.int32
    np.testing.assert_allclose(weights, 1 / (steps * p[t]), rtol=1e-6)
    assert stats.chisquare(np.bincount(t, minlength=steps), n * p / p.sum()).pvalue > 1e-3
    f = np.cos(np.arange(steps)) + np.arange(steps)
    products = np.asarray(weights, np.float64) * f[t]
    assert abs(products.mean() - f.mean()) < 5 * products.std() / np.sqrt(n)
    assert abs(f[t].mean() - f.mean()) > 20 * f[t].std() / np.sqrt(n)  # which the weights are needed for


def test_importance_is_uniform_until_every_timestep_has_ten_losses():
    history = warm_history(12)
    history = LossHistory(history.losses, history.counts.at[5].set(9))
    np.testing.assert_allclose(history.probabilities(), 1 / 12, rtol=1e-7)
    _, weights = sample_timesteps(jax.random.key(3), 100, 12, "importance", history)
    np.testing.assert_allclose(weights, 1, rtol=1e-6)


@pytest.mark.parametrize(("size", "steps"), [(1, 3), (8, 5), (40, 3), (64, 1)])
def test_loss_history_is_a_deque_a_timestep(size, steps):
    """Even for batches in which timesteps repeat, some more than 10 times, and in the deque's order."""
    rng = np.random.default_rng(size)
    history = LossHistory.create(steps)
    update = jax.jit(LossHistory.update)
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
        sample_timesteps(jax.random.key(0), 4, 10, method)
