import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime import parallel
from ddpm_jax.sampling.condition import ClassCondition, NoCondition
from ddpm_jax.sampling.decoder import Pixels
from ddpm_jax.sampling.generate import Model
from ddpm_jax.training.state import create_state
from ddpm_jax.training.step import Metrics, make_train_step

SHAPE, BATCH, STEPS = (8, 8, 2), 16, 10
PLAIN = NoCondition()
WIDE = {"channels": 48, "dropout": 0.0}


def run(
    num_devices,
    *,
    fsdp=1,
    steps=STEPS,
    images=None,
    condition=PLAIN,
    flip=False,
    net_options=None,
    state_options=None,
    **options,
):
    """State and metrics after some steps on the first devices; images of the class 1 where there are classes."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]).reshape(-1, fsdp), ("data", "fsdp"))
    net = UNet(
        channel_multipliers=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        middle_attention=False,
        num_groups=4,
        **{"channels": 8, "dropout": 0.2, **(net_options or {}), **condition.network_options()},
    )
    model = Model(condition, net, make_schedule("linear", 100), Pixels(SHAPE, flip))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    def create():
        return create_state(model.init_params(0), optimizer, (0.9,), **(state_options or {})), Metrics.zero()

    shardings = parallel.state_shardings(mesh, jax.eval_shape(create))
    state, metrics = jax.jit(create, out_shardings=shardings, compiler_options=parallel.run_once_options())()
    at_once = options.get("steps_per_dispatch", 1)
    step = make_train_step(model, optimizer, mesh, seed=0, **options)
    rng = np.random.default_rng(0)
    compiled = None
    for _ in range(0, steps, at_once):
        stack = [
            {
                "image": rng.integers(0, 256, (BATCH, *SHAPE), np.uint8) if images is None else images,
                **{name: np.ones(BATCH, np.int32) for name in condition.reads},
            }
            for _ in range(at_once)
        ]
        batch = stack[0] if at_once == 1 else jax.tree.map(lambda *values: np.stack(values), *stack)
        arguments = state, metrics, jax.device_put(batch, parallel.batch_sharding(mesh, axis=int(at_once > 1)))
        compiled = compiled or step.lower(*arguments).compile(compiler_options=parallel.run_once_options())
        state, metrics = compiled(*arguments)
    lies = jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), state, shardings[0])
    assert all(jax.tree.leaves(lies))
    return jax.device_get(state), jax.device_get(metrics)


def relative_difference(a, b):
    square = lambda x: sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in jax.tree.leaves(x))  # noqa: E731
    return (square(jax.tree.map(np.subtract, a, b)) / square(b)) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("timestep_sampler", ["uniform", "importance"])
def test_eight_devices_give_the_parameters_of_one(timestep_sampler):
    history = {"num_timesteps": 100} if timestep_sampler == "importance" else {}
    results = [run(devices, flip=True, timestep_sampler=timestep_sampler, state_options=history) for devices in (1, 8)]
    (one, one_metrics), (eight, eight_metrics) = results
    assert relative_difference(eight.params, one.params) < 1e-5
    assert relative_difference(eight.ema, one.ema) < 1e-5
    np.testing.assert_allclose(eight_metrics.loss, one_metrics.loss, rtol=1e-5)
    # The step trains: without an update the difference would be nil for any number of devices.
    assert relative_difference(one.params, run(1, steps=0)[0].params) > 1e-3


@pytest.fixture(scope="module")
def plain():
    """A run of one device, without dropout, large enough for some of its parameters to be divided."""
    return run(1, steps=4, net_options=WIDE)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "fsdp", "remat", "options"),
    [
        (8, 4, "blocks", {}),
        (1, 1, "norms", {}),
        (4, 2, "none", {"accumulation": 2, "steps_per_dispatch": 2}),
    ],
)
def test_other_ways_give_the_same_parameters(plain, devices, fsdp, remat, options):
    state, metrics = run(devices, fsdp=fsdp, steps=4, net_options=WIDE | {"remat": remat}, **options)
    assert relative_difference(state.params, plain.params) < 1e-5
    assert relative_difference(state.ema, plain.ema) < 1e-5
    assert int(metrics.steps) == int(state.step) == 4


@pytest.mark.slow
def test_metrics_sum_up_the_steps():
    _, metrics = run(8, steps=3)
    assert int(metrics.steps) == 3
    assert int(metrics.quarter_count.sum()) == 3 * BATCH
    np.testing.assert_allclose(metrics.quarter_loss.sum() / BATCH, metrics.loss, rtol=1e-5)
    assert int(metrics.bad_step) == -1


def test_metrics_keep_the_first_bad_step():
    metrics, quarter = Metrics.zero(), jnp.zeros(2, jnp.int32)
    for step, (loss, norm) in enumerate([(1.0, 1.0), (np.nan, 2.0), (1.0, np.inf)]):
        metrics = metrics.add(jnp.int32(step), jnp.full(2, loss), jnp.float32(norm), quarter)
    assert int(metrics.bad_step) == 1
    assert np.isnan(metrics.bad_loss)
    assert float(metrics.bad_grad_norm) == 2.0


@pytest.mark.slow
def test_labels_reach_the_network():
    before, after = (
        run(1, steps=steps, condition=ClassCondition("abc"))[0].params["label"]["embedding"] for steps in (0, 2)
    )
    assert np.any(after != before, axis=1).tolist() == [False, True, False, False]


@pytest.mark.slow
def test_dropped_labels_train_the_null_class():
    before = run(1, steps=0, condition=ClassCondition("abc"))[0].params["label"]["embedding"]
    for share, changed in ((0.5, [False, True, False, True]), (1.0, [False, False, False, True])):
        after = run(1, steps=2, condition=ClassCondition("abc", share))[0].params["label"]["embedding"]
        assert np.any(after != before, axis=1).tolist() == changed


@pytest.mark.slow
def test_further_steps_compile_nothing_anew():
    mesh = parallel.make_mesh()
    net = UNet(channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4)
    optimizer = optax.adam(1e-3)
    model = Model(NoCondition(), net, make_schedule("linear", 10), Pixels(SHAPE))
    step = make_train_step(model, optimizer, mesh, seed=0)
    create = jax.jit(
        lambda: (create_state(model.init_params(0), optimizer, (0.9,)), Metrics.zero()),
        out_shardings=parallel.replicated(mesh),
        compiler_options=parallel.run_once_options(),
    )
    state, metrics = create()
    batch = {"image": np.zeros((BATCH, *SHAPE), np.uint8)}
    batch = jax.device_put(batch, parallel.batch_sharding(mesh))
    for _ in range(3):
        state, metrics = step(state, metrics, batch)
    assert step._cache_size() == 1
