from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.models.clip import TextEncoder
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime import parallel
from ddpm_jax.sampling.captions import CaptionCondition
from ddpm_jax.sampling.condition import ClassCondition, NoCondition
from ddpm_jax.sampling.decoder import Pixels
from ddpm_jax.sampling.generate import Model
from ddpm_jax.text.encoders import TrainedTexts
from ddpm_jax.text.tokenizers import Tokenizer
from ddpm_jax.training.objectives import Diffusion
from ddpm_jax.training.state import create_state
from ddpm_jax.training.step import Metrics, make_train_step, step_arguments

SHAPE, BATCH, STEPS = (8, 8, 2), 16, 10
PLAIN = NoCondition()
WIDE = {"channels": 48, "dropout": 0.0}
CLASSES = ClassCondition("abc", labels=(1,))
CAPTIONS = ("a red apple", "two green pears", "a plum", "plums")


# Images have these in turn; some are dropped.
ENCODER = TextEncoder(280, max_length=8, width=16, num_layers=1, num_heads=2)
CAPTIONED = CaptionCondition(TrainedTexts(Tokenizer.train(CAPTIONS, 280, 8), ENCODER), 0.3, CAPTIONS)
CONDITIONS = {"nothing": PLAIN, "captions": CAPTIONED}


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
    """State and metrics after some steps on the first devices, with this condition."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]).reshape(-1, fsdp), ("data", "fsdp"))
    captioned = isinstance(condition, CaptionCondition)
    net = UNet(
        channel_multipliers=(1,),
        num_res_blocks=int(not captioned),  # less to compile
        attention_resolutions=(),
        middle_attention=captioned,
        num_groups=4,
        **{"channels": 8, "dropout": 0.2, **(net_options or {}), **condition.network_options()},
    )
    model = Model(condition, condition.network(net), make_schedule("linear", 100), Pixels(SHAPE, flip))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    def create():
        return create_state(model.init_params(0), optimizer, (0.9,), **(state_options or {})), Metrics.zero()

    shapes = jax.eval_shape(create)
    shardings = parallel.state_shardings(mesh, shapes)
    state, metrics = jax.jit(create, out_shardings=shardings, compiler_options=parallel.run_once_options())()
    at_once = options.get("steps_per_dispatch", 1)
    chosen = {name: options.pop(name) for name in ("timestep_sampler", "loss_options") if name in options}
    objective = Diffusion(model, **chosen)
    step = make_train_step(objective, optimizer, mesh, seed=0, **options)
    lowered = step.lower(*step_arguments(objective, shapes[0], mesh, BATCH, at_once))
    compiled = lowered.compile(compiler_options=parallel.run_once_options())
    rng = np.random.default_rng(0)
    for _ in range(0, steps, at_once):
        stack = [
            {
                "image": rng.integers(0, 256, (BATCH, *SHAPE), np.uint8) if images is None else images,
                **(condition.of_images(np.arange(BATCH)) or {}),
            }
            for _ in range(at_once)
        ]
        batch = stack[0] if at_once == 1 else jax.tree.map(lambda *values: np.stack(values), *stack)
        batch = jax.device_put(batch, parallel.batch_sharding(mesh, axis=int(at_once > 1)))
        state, metrics = compiled(state, metrics, batch)
    lies = jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), state, shardings[0])
    assert all(jax.tree.leaves(lies))
    return jax.device_get(state), jax.device_get(metrics)


def relative_difference(a, b):
    square = lambda x: sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in jax.tree.leaves(x))  # noqa: E731
    return (square(jax.tree.map(np.subtract, a, b)) / square(b)) ** 0.5


@pytest.mark.eight
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
def whole():
    """Runs on one device by condition, without dropout, large enough for some parameters to be sharded."""
    return cache(lambda name: run(1, steps=4, net_options=WIDE, condition=CONDITIONS[name])[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("condition", "devices", "fsdp", "remat", "options"),
    [
        pytest.param("nothing", 8, 4, "blocks", {}, marks=pytest.mark.eight),
        ("nothing", 1, 1, "norms", {}),
        pytest.param("nothing", 4, 2, "none", {"accumulation": 2, "steps_per_dispatch": 2}, marks=pytest.mark.eight),
        pytest.param("captions", 8, 4, "none", {"accumulation": 2}, marks=pytest.mark.eight),
    ],
)
def test_other_ways_give_the_same_parameters(whole, condition, devices, fsdp, remat, options):
    options = {"net_options": WIDE | {"remat": remat}, "condition": CONDITIONS[condition], **options}
    state, metrics = run(devices, fsdp=fsdp, steps=4, **options)
    plain = whole(condition)
    assert relative_difference(state.params, plain.params) < 1e-5
    assert relative_difference(state.ema, plain.ema) < 1e-5
    assert int(metrics.steps) == int(state.step) == 4


@pytest.mark.slow
def test_an_encoder_learns_along(whole):
    """All of its parameters that the captions use, and their moving average."""
    state, start = whole("captions"), run(1, steps=0, net_options=WIDE, condition=CAPTIONED)[0]
    before, after, average = (tree["encoder"] for tree in (start.params, state.params, state.ema["0.9"]))
    moved = jax.tree.map(np.subtract, after, before)
    tokens = CAPTIONED.texts.arrays(["", *CAPTIONS])
    used = np.unique(tokens["ids"][tokens["ids_mask"]])
    embedding = np.any(moved["tokens"]["embedding"] != 0, axis=1)
    assert np.flatnonzero(embedding).tolist() == used.tolist()
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(moved))
    for first, last, mean in zip(*map(jax.tree.leaves, (before, after, average)), strict=True):
        assert 0 < np.abs(mean - first).sum() < np.abs(last - first).sum()


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
    before, after = (run(1, steps=steps, condition=CLASSES)[0].params["label"]["embedding"] for steps in (0, 2))
    assert np.any(after != before, axis=1).tolist() == [False, True, False, False]


@pytest.mark.slow
def test_dropped_labels_train_the_null_class():
    before = run(1, steps=0, condition=CLASSES)[0].params["label"]["embedding"]
    for share, changed in ((0.5, [False, True, False, True]), (1.0, [False, False, False, True])):
        after = run(1, steps=2, condition=replace(CLASSES, dropout=share))[0].params["label"]["embedding"]
        assert np.any(after != before, axis=1).tolist() == changed


@pytest.mark.slow
def test_further_steps_compile_nothing_anew():
    mesh = parallel.make_mesh()
    net = UNet(channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4)
    optimizer = optax.adam(1e-3)
    model = Model(NoCondition(), net, make_schedule("linear", 10), Pixels(SHAPE))
    step = make_train_step(Diffusion(model), optimizer, mesh, seed=0)
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
