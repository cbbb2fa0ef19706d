import json
import math

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from tiny import small

from ddpm_jax import config as config_lib
from ddpm_jax.config import default_config, differences, fields, from_json, learning_rate, make_optimizer, to_json
from ddpm_jax.diffusion.gaussian import Parameterization
from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.diffusion.samplers import Steps
from ddpm_jax.validation import validate


def test_json_round_trip():
    config = small(
        train__ema_decays=(0.9, 0.99),
        model__attention_levels=(False, True),
        optimizer__options=ConfigDict({"b1": 0.5}),
        diffusion__schedule="cosine",
        diffusion__schedule_options=ConfigDict({"offset": 0.01}),
    )
    again = from_json(to_json(config))
    assert again == config
    assert differences(again, config) == []
    assert again.train.ema_decays == (0.9, 0.99)
    assert isinstance(again.train.ema_decays, tuple)
    assert isinstance(again.model.channel_multipliers, tuple)
    assert again.diffusion.betas == ()
    assert again.optimizer.options.b1 == 0.5
    assert again.optimizer.learning_rate == 2e-4
    validate(again)


def test_json_is_plain():
    text = to_json(default_config())
    assert json.loads(text)["model"]["channel_multipliers"] == [1, 2, 2, 2]
    assert text.endswith("}\n")


def test_a_field_that_an_older_run_lacks_has_its_default():
    text = json.loads(to_json(small(seed=5)))
    del text["train"]["init_from"]
    assert from_json(json.dumps(text)) == small(seed=5)


def test_fields():
    config = small(optimizer__options=ConfigDict({"b1": 0.5}))
    found = dict(fields(config))
    assert found["seed"] == 0
    assert found["model.channel_multipliers"] == (1, 2)
    assert found["optimizer.options"] == {"b1": 0.5}
    assert not any(name in ("data", "optimizer.options.b1") for name in found)


def test_schedule_of_a_config():
    linear = config_lib.make_schedule_from(small(diffusion__num_timesteps=10, diffusion__beta_end=0.5))
    np.testing.assert_allclose(linear.betas, np.linspace(1e-4, 0.5, 10), rtol=1e-6)
    own = config_lib.make_schedule_from(small(diffusion__betas=(0.1, 0.2, 1.0)))
    np.testing.assert_allclose(own.betas, [0.1, 0.2, 1.0], rtol=1e-6)


def test_network_of_a_config():
    def make(**changes):
        return config_lib.make_model(small(**changes), {"class_names": [*"abcdefg"]}).net

    assert make().num_classes is None
    assert make(model__class_conditional=True).num_classes == 7
    assert make().attention_levels is None
    assert make(model__attention_levels=(True, False)).attention_levels == (True, False)
    assert make(model__dtype="bfloat16").dtype == jax.numpy.bfloat16
    assert (make().level_channels, make().head_channels, make().middle_attention_groups) == (None, None, None)
    assert make(model__middle_attention_groups=0).middle_attention_groups == 0
    assert (make().num_timesteps, make(model__time_embedding="learned").num_timesteps) == (None, 1000)
    assert not make().learned_variance
    assert make(diffusion__variance="learned").learned_variance


def test_options_of_loss_and_sampler():
    config = small(diffusion__loss="vlb", diffusion__vlb_weight=0.5, diffusion__clip=False)
    assert config_lib.loss_options(config) == {
        "prediction": "eps",
        "variance": "fixed_large",
        "loss": "vlb",
        "weighting": "none",
        "vlb_weight": 0.5,
    }
    assert config_lib.parameterization(config) == Parameterization("eps", "fixed_large", False, None)
    config = small(diffusion__clip=False, diffusion__dynamic_threshold=0.9)
    assert config_lib.parameterization(config).dynamic_threshold == 0.9
    assert config_lib.parameterization(small(diffusion__clip_range=5.0)).clip_range == 5.0
    assert config_lib.sampling_steps(config) == Steps()
    config = small(sample__spacing_offset=1, sample__stop_at_first=True)
    assert config_lib.sampling_steps(config) == Steps(spacing_offset=1, stop_at_first=True)
    config = small(sample__sampler="ddim", sample__eta=0.3, sample__num_steps=7)
    assert config_lib.sampling_steps(config) == Steps("ddim", 7, eta=0.3)
    guidance = {"guidance_scale": 2.5, "guidance_rescale": 0.7, "guidance_interval": (3, 5)}
    changes = {f"sample__{name}": value for name, value in guidance.items()}
    assert config_lib.guidance(small(**changes)) == Guidance(2.5, 0.7, (3, 5))


# The learning rate and the optimiser.

RATE, WARMUP, STEPS = 0.5, 10, 110


def cosine(x):
    return 0.5 * (1 + math.cos(math.pi * x))


@pytest.mark.parametrize(
    ("decay", "remaining"), [("constant", lambda x: 1.0), ("cosine", cosine), ("linear", lambda x: 1 - x)]
)
@pytest.mark.parametrize("warmup", [WARMUP, 0])
@pytest.mark.parametrize("set_by", ["train__num_steps", "optimizer__decay_steps"])
def test_learning_rate(decay, remaining, warmup, set_by):
    options = {"optimizer__learning_rate": RATE, "optimizer__warmup_steps": warmup, "optimizer__decay": decay}
    rate = learning_rate(small(**options, **{"train__num_steps": 7 * STEPS, set_by: STEPS}))
    for step in (0, 1, 3, 9):
        expected = RATE * step / warmup if warmup else RATE * remaining(step / STEPS)
        np.testing.assert_allclose(rate(step), expected, rtol=1e-5)
    for step in (10, 11, 35, 60, 109, 110, 500):
        x = min((step - warmup) / (STEPS - warmup), 1.0)
        np.testing.assert_allclose(rate(step), RATE * remaining(x), rtol=1e-5, atol=1e-7)


PARAMS = {"a": np.array([3.0, -1.0]), "b": np.array([[0.5]])}
GRADS = {"a": np.array([6.0, 0.0]), "b": np.array([[-8.0]])}  # of norm 10


def updates(optimizer, steps=3):
    """The parameters after some steps with the same gradient."""
    params = PARAMS
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(steps):
        change, state = update(GRADS, state, params)
        params = {name: params[name] + change[name] for name in params}
    return params


def assert_params_equal(ours, theirs):
    for name in PARAMS:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adam", {}),
        ("adam", {"b1": 0.5, "eps": 1.0}),
        ("adamw", {"weight_decay": 0.5}),
        ("sgd", {}),
        ("sgd", {"momentum": 0.9, "nesterov": True}),
        ("lion", {"b1": 0.8}),
        ("rmsprop", {}),
    ],
)
def test_any_optimizer_of_optax(name, options):
    config = small(
        optimizer__name=name,
        optimizer__options=ConfigDict(options),
        optimizer__learning_rate=0.1,
        optimizer__warmup_steps=0,
        optimizer__grad_clip=0.0,
    )
    assert_params_equal(updates(make_optimizer(config)), updates(getattr(optax, name)(0.1, **options)))


@pytest.mark.parametrize(("clip", "factor"), [(0.0, 1.0), (1.0, 0.1), (5.0, 0.5), (20.0, 1.0)])
def test_gradient_is_clipped_by_its_global_norm(clip, factor):
    config = small(
        optimizer__name="sgd",
        optimizer__learning_rate=0.1,
        optimizer__warmup_steps=0,
        optimizer__grad_clip=clip,
    )
    expected = {name: PARAMS[name] - 0.1 * factor * GRADS[name] for name in PARAMS}
    assert_params_equal(updates(make_optimizer(config), steps=1), expected)


def test_optimizer_follows_the_learning_rate():
    config = small(
        optimizer__name="sgd", optimizer__learning_rate=0.1, optimizer__warmup_steps=4, optimizer__grad_clip=0.0
    )
    expected = {name: PARAMS[name] - 0.1 * (0 + 0.25 + 0.5) * GRADS[name] for name in PARAMS}
    assert_params_equal(updates(make_optimizer(config), steps=3), expected)


# What may change when a run is resumed.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train__num_steps", 7),
        ("log__every_steps", 7),
        ("log__tensorboard", False),
        ("checkpoint__every_minutes", 7.0),
        ("checkpoint__keep", 7),
        ("sample__num_images", 7),
        ("sample__batch_size", 7),
        ("data__cache_gib", 7.0),
        ("data__num_workers", 7),
        ("data__data_dir", "elsewhere"),
        ("data__path", "elsewhere"),
    ],
)
def test_fields_that_may_change(field, value):
    assert differences(small(), small(**{field: value})) == []


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("seed", 7, "seed: 0 -> 7"),
        ("train__batch_size", 7, "train.batch_size: 128 -> 7"),
        ("train__ema_decays", (0.5,), "train.ema_decays: (0.9999,) -> (0.5,)"),
        ("data__height", 16, "data.height: 8 -> 16"),
        ("data__flip", False, "data.flip: True -> False"),
        ("model__dtype", "bfloat16", "model.dtype: 'float32' -> 'bfloat16'"),
        ("diffusion__betas", (0.1,), "diffusion.betas: () -> (0.1,)"),
        ("optimizer__options", ConfigDict({"b1": 0.5}), "optimizer.options: {} -> {'b1': 0.5}"),
        ("optimizer__decay_steps", 7, "optimizer.decay_steps: 0 -> 7"),
        ("new", 7, "new: None -> 7"),
    ],
)
def test_fields_that_may_not_change(field, value, expected):
    assert differences(small(), small(**{field: value, "log__every_steps": 7})) == [expected]
    assert len(differences(small(**{field: value}), small())) == 1


def test_all_differences_are_named_in_order():
    changed = small(seed=1, model__dropout=0.5, data__flip=False)
    assert [line.split(":")[0] for line in differences(small(), changed)] == ["data.flip", "model.dropout", "seed"]
