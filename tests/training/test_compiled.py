"""A small step, compiled by a thread."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.training.compiled import CompiledStep


def shapes(length):
    return jnp.zeros(3), jnp.zeros(()), {"image": jnp.zeros((length, 3))}


def compiling_step(traced, length=4):
    """A step that adds the sum of the batch; `traced` is called with each batch while it is traced."""

    def step(state, metrics, batch):
        traced(batch["image"])
        return state + jnp.sum(batch["image"], axis=0), metrics + 1

    return CompiledStep(jax.jit(step), jax.eval_shape(lambda: shapes(length)))


def test_steps_of_any_length():
    """Another length is traced and compiled when it comes."""
    lengths = []
    step = compiling_step(lambda images: lengths.append(len(images)))
    assert step.wait() >= 0
    state, metrics, _ = shapes(0)
    for length in (4, 4, 3, 4, 3):
        state, metrics = step(state, metrics, {"image": jnp.ones((length, 3))})
    assert lengths == [4, 3]
    assert metrics == 5
    np.testing.assert_array_equal(state, [18.0] * 3)


def test_an_error_reaches_the_caller(monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    step = compiling_step(lambda _: None)
    with pytest.raises(RuntimeError, match="no such instruction"):
        step.wait()


@pytest.mark.parametrize(("backend", "in_thread"), [("cpu", True), ("tpu", True), ("gpu", False)])
def test_a_gpu_compiles_when_nothing_else_runs(monkeypatch, backend, in_thread):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    threads = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            threads.append(threading.current_thread())

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        compiling_step(lambda _: None).wait()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert [thread is not threading.main_thread() for thread in threads] == [in_thread]
