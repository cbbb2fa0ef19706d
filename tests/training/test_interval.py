import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.runtime.errors import UserError
from ddpm_jax.training.batches import Waited
from ddpm_jax.training.interval import DivergedError, Interval, means
from ddpm_jax.training.step import Metrics


def test_means_of_steps_and_of_the_quarters_that_were_drawn():
    metrics = Metrics.zero()
    metrics = metrics.add(0, jnp.array([1.0, 3.0]), jnp.float32(0.5), jnp.array([0, 3]))
    metrics = metrics.add(1, jnp.array([2.0, 6.0]), jnp.float32(1.5), jnp.array([0, 0]))
    assert means(metrics) == {"loss": 3.0, "loss_t_quarter_1": 3.0, "loss_t_quarter_4": 3.0, "grad_norm": 1.0}


def test_of_no_steps_there_are_none():
    assert means(Metrics.zero()) == {}


@pytest.mark.parametrize(("loss", "grad_norm"), [(np.nan, 1.0), (1.0, np.inf)])
def test_the_first_step_that_is_not_finite_is_named(loss, grad_norm):
    metrics = Metrics.zero()
    for step, found in enumerate((1.0, loss, np.nan), 6):
        metrics = metrics.add(step, jnp.full(2, found), jnp.float32(grad_norm if step == 7 else 1), None)
    said = f"^training diverged at step 8: loss {loss:g}, gradient norm {grad_norm:g};"
    with pytest.raises(DivergedError, match=said):
        means(metrics)
    assert issubclass(DivergedError, UserError)


def test_speed_is_of_the_steps_since_the_interval_began():
    batches = Waited(iter([{}, {}]))
    next(batches)
    assert batches.waited > 0
    interval = Interval(10, 8, batches)
    assert batches.waited == 0
    next(batches)
    speed = interval.speed(14)
    assert speed["images_per_second"] == 8 * speed["steps_per_second"] > 0
    assert 0 < speed["input_wait"] < 1
    interval.begin(14)
    assert interval.speed(14)["steps_per_second"] == 0
