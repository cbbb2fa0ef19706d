import json
import math

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.config import default_config, differences, fields, from_json, learning_rate, make_optimizer, to_json
from ddpm_jax.errors import UserError


def small(**changes):
    """A config whose network is traced in a blink, with fields set as {"section__field": value}, whatever the type."""
    config = default_config()
    config.data.update(height=8, width=8)
    config.model.update(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,))
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        place = config[section] if section else config
        with config.unlocked():
            if field in place:
                del place[field]  # else the value would be converted to the type of the old one
            place[field] = value
    return config


def refusal(config, num_devices=1):
    with pytest.raises(UserError) as caught:
        config_lib.validate(config, num_devices)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_are_valid():
    config_lib.validate(default_config(), num_devices=8)
    config_lib.validate(small())


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
    config_lib.validate(again)


def test_json_is_plain():
    text = to_json(default_config())
    assert json.loads(text)["model"]["channel_multipliers"] == [1, 2, 2, 2]
    assert text.endswith("}\n")


def test_lists_count_as_tuples():
    config = default_config()
    config.train.ema_decays = [0.9]
    assert differences(from_json(to_json(config)), config) == []
    config_lib.validate(small(model__channel_multipliers=[1, 2]))


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


@pytest.mark.parametrize(
    ("field", "near"),
    [("data__heigth", "data.height"), ("optimizer__learning_rat", "optimizer.learning_rate"), ("seeds", "seed")],
)
def test_unknown_field_suggests_a_known_one(field, near):
    text = refusal(small(**{field: 3}))
    assert repr(field.replace("__", ".")) in text
    assert f"Did you mean {near!r}?" in text


@pytest.mark.parametrize("field", ["seed", "model.dropout", "optimizer.options"])
def test_missing_field(field):
    config = small()
    section, _, name = field.rpartition(".")
    with config.unlocked():
        del (config[section] if section else config)[name]
    assert f"{field!r} is missing" in refusal(config)


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("seed", "0", "int"),
        ("seed", True, "int"),
        ("train__batch_size", 128.0, "int"),
        ("train__batch_size", True, "int"),
        ("optimizer__learning_rate", "1e-4", "float"),
        ("optimizer__learning_rate", True, "float"),
        ("data__flip", 1, "bool"),
        ("data__name", 3, "str"),
        ("data__name", None, "str"),
        ("model__channel_multipliers", 2, "tuple"),
        ("model__channel_multipliers", "12", "tuple"),
        ("optimizer__options", 3, "dict"),
    ],
)
def test_wrong_type(field, value, accepted):
    text = refusal(small(**{field: value}))
    assert f"config.{field.replace('__', '.')} is {value!r}" in text
    assert f"of type {accepted}" in text


def test_an_int_is_a_float():
    config_lib.validate(small(optimizer__learning_rate=1, model__dropout=0))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"diffusion__prediction": "epsilon"}, "config.diffusion.prediction is 'epsilon'; accepted: eps, x_0, v"),
        ({"diffusion__variance": "fixed"}, "accepted: fixed_small, fixed_large, learned"),
        ({"diffusion__loss": "l2"}, "accepted: simple, hybrid, vlb"),
        ({"diffusion__loss": "hybrid"}, "loss 'hybrid' trains a learned variance"),
        ({"diffusion__variance": "learned"}, "'simple' does not train a learned variance"),
        ({"diffusion__weighting": "snr"}, "Did you mean 'min_snr'?"),
        (
            {"diffusion__loss": "vlb", "diffusion__variance": "learned", "diffusion__weighting": "p2"},
            "weighting 'p2' is of the squared error, which loss 'vlb' does not have",
        ),
        ({"diffusion__vlb_weight": -1.0}, "config.diffusion.vlb_weight is -1.0; at least 0"),
        ({"checkpoint__every_minutes": math.nan}, "config.checkpoint.every_minutes is nan; at least 0"),
        ({"evaluate__features": "digits"}, "'digits', which judges images of 8x8x1, and these are 8x8x3"),
        (
            {"evaluate__features": "nope"},
            "config.evaluate.features is 'nope'; accepted: digits, inception, or the file",
        ),
        ({"diffusion__timestep_sampler": "even"}, "accepted: uniform, stratified, importance"),
        ({"diffusion__schedule": "bogus"}, "schedule is 'bogus'; accepted: linear"),
        ({"diffusion__schedule_options": {"offset": 0.1}}, "schedule 'linear' does not take the options"),
        ({"diffusion__num_timesteps": 0, "log__sample_steps": 0}, "num_timesteps is 0; at least 1"),
        ({"diffusion__beta_start": 0.0}, "betas[0] is 0; every beta must be"),
        ({"diffusion__beta_end": 1.5}, "every beta must be finite, above 0 and at most 1"),
        ({"diffusion__betas": (0.1, 1.5), "log__sample_steps": 2}, "betas[1] is 1.5; every beta must be"),
        ({"diffusion__betas": (0.0, 0.5), "log__sample_steps": 2}, "betas[0] is 0; every beta must be"),
        ({"diffusion__betas": (0.1, math.nan), "log__sample_steps": 2}, "betas[1] is nan; every beta must be"),
        ({"diffusion__dynamic_threshold": 1.1}, "config.diffusion.dynamic_threshold is 1.1; accepted: 0 to 1"),
        ({"model__dtype": "float16"}, "config.model.dtype is 'float16'; accepted: float32, bfloat16"),
        ({"model__channels": 48}, "48 channels cannot be normalised in 32 groups"),
        ({"model__num_groups": 5}, "cannot be normalised in 5 groups"),
        ({"model__num_heads": 3}, "num_heads 3 does not divide the 64 channels"),
        ({"model__attention_patch_size": 3}, "attention_patch_size 3 does not divide a 4x4 level"),
        ({"model__attention_levels": (True,)}, "attention_levels has 1 entries for 2 levels"),
        ({"model__channel_multipliers": ()}, "config.model.channel_multipliers is ()"),
        ({"model__channel_multipliers": (0, 1)}, "accepted: integers of 1 or more"),
        ({"model__dropout": 1.0}, "config.model.dropout is 1.0; accepted: 0 to below 1"),
        ({"model__dropout": -0.1}, "config.model.dropout is -0.1"),
        ({"model__downsample": "stride"}, "downsample is 'stride'; accepted: conv, avg_pool, max_pool"),
        ({"model__upsample": "linear"}, "upsample is 'linear'; accepted: nearest, transposed"),
        ({"model__remat": "all"}, "remat is 'all'; accepted: none, norms, blocks"),
        ({"data__height": 9}, "an image of 9x8 cannot be halved 1 times"),
        ({"data__width": 0}, "config.data.width is 0; at least 1"),
        ({"optimizer__name": "adamm"}, "Did you mean 'adam'?"),
        ({"optimizer__name": "zzzz"}, "'zzzz', which is no optimiser of optax"),
        ({"optimizer__name": "clip"}, "'clip', which is no optimiser of optax"),
        ({"optimizer__options": {"weight_decya": 0.1}, "optimizer__name": "adamw"}, "Did you mean 'weight_decay'?"),
        ({"optimizer__options": {"momentum": 0.9}}, "'momentum', which optax.adam does not take"),
        ({"optimizer__decay": "step"}, "accepted: constant, cosine, linear"),
        ({"train__ema_decays": ()}, "config.train.ema_decays is (); accepted: one or more values"),
        ({"train__ema_decays": (0.9, 1.0)}, "from 0 to below 1"),
        ({"train__batch_size": 0}, "config.train.batch_size is 0; at least 1"),
        ({"train__num_steps": 0}, "config.train.num_steps is 0; at least 1"),
        ({"log__every_steps": 0}, "config.log.every_steps is 0; at least 1"),
        ({"checkpoint__keep": 0}, "config.checkpoint.keep is 0; at least 1"),
        ({"sample__sampler": "ancestral"}, "config.sample.sampler is 'ancestral'; accepted: ddpm"),
        ({"sample__eta": 0.5}, "sampler 'ddpm' takes no eta; accepted: ddim"),
        ({"sample__sampler": "ddim", "sample__eta": 2.0}, "eta is 2.0; accepted: 0 to 1"),
        ({"sample__sampler": "unipc", "sample__order": 4}, "order is 4; accepted: 1, 2, 3"),
        ({"sample__spacing": "karas"}, "Did you mean 'karras'?"),
        ({"sample__guidance_scale": 2.0}, "needs a run with model.class_conditional and a train.label_dropout above 0"),
        ({"sample__guidance_scale": 2.0, "model__class_conditional": True}, "a train.label_dropout above 0"),
        ({"train__label_dropout": 0.1}, "label_dropout is for config.model.class_conditional=True"),
        ({"sample__guidance_rescale": 0.5}, "need a guidance_scale other than 1"),
        ({"sample__guidance_rescale": 1.5}, "guidance_rescale is 1.5; accepted: 0 to 1"),
        ({"sample__guidance_interval": (500, 100)}, "accepted: the lowest and the highest timestep"),
        ({"seed": -1}, "config.seed is -1"),
        ({"seed": 2**32}, "config.seed is 4294967296; accepted: 0 to 4294967295"),
        ({"train__label_dropout": 1.5}, "config.train.label_dropout is 1.5; accepted: 0 to 1"),
        ({"sample__guidance_interval": (3,)}, "guidance_interval is (3,); accepted: the lowest and"),
        ({"diffusion__zero_terminal_snr": True}, "'eps' says nothing at the last timestep"),
        ({"diffusion__betas": (0.1, 1.0), "log__sample_steps": 2}, "'eps' says nothing at the last timestep"),
        ({"sample__num_steps": 1001}, "config.sample.num_steps is 1001; accepted: up to the 1000 timesteps"),
        ({"sample__num_steps": -1}, "config.sample.num_steps is -1"),
        ({"log__sample_steps": 1001}, "config.log.sample_steps is 1001; accepted: up to the 1000 timesteps"),
        ({"diffusion__num_timesteps": 100}, "config.log.sample_steps is 250; accepted: up to the 100 timesteps"),
        ({"diffusion__betas": (0.1,) * 9}, "config.log.sample_steps is 250; accepted: up to the 9 timesteps"),
    ],
)
def test_wrong_values(changes, expected):
    assert expected in refusal(small(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"model__channel_multipliers": (1.5, 2)},
        {"model__channel_multipliers": ("1", "2")},
        {"train__ema_decays": ("0.9",)},
        {"data__channels": 0},
        {"optimizer__options": {"learning_rate": 1e-3}},
    ],
)
def test_no_other_error_than_a_sentence(changes):
    (field,) = changes
    assert field.rpartition("__")[-1] in refusal(small(**changes))


@pytest.mark.parametrize(
    ("batch_size", "devices", "fits"), [(60, 8, False), (64, 8, True), (60, 4, True), (4, 8, False)]
)
def test_batch_is_divided_over_the_devices(batch_size, devices, fits):
    config = small(train__batch_size=batch_size)
    if fits:
        config_lib.validate(config, devices)
    else:
        text = refusal(config, devices)
        assert f"config.train.batch_size is {batch_size}; it must be divisible by the {devices} devices" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"diffusion__variance": "learned", "diffusion__loss": "hybrid"},
        {"diffusion__variance": "learned", "diffusion__loss": "vlb"},
        {"diffusion__loss": "vlb"},
        {"diffusion__prediction": "v", "diffusion__weighting": "min_snr"},
        {"diffusion__betas": (0.1, 0.2, 0.9), "log__sample_steps": 3, "sample__num_steps": 3},
        {"diffusion__zero_terminal_snr": True, "diffusion__prediction": "v"},
        {"sample__sampler": "ddim", "sample__eta": 0.5, "sample__spacing": "quadratic", "sample__num_steps": 20},
        {"sample__sampler": "unipc", "sample__order": 3},
        {"model__class_conditional": True, "train__label_dropout": 0.1, "sample__guidance_scale": 2.0},
        {"diffusion__schedule": "cosine", "diffusion__schedule_options": {"offset": 0.01}},
        {"model__attention_levels": (True, False)},
        {"model__class_conditional": True},
        {"model__dtype": "bfloat16", "model__remat": "blocks"},
        {"data__channels": 1},
        {"sample__num_steps": 1000, "log__sample_steps": 1000},
    ],
)
def test_right_values(changes):
    config_lib.validate(small(**changes))


def test_schedule_of_a_config():
    linear = config_lib.make_schedule_from(small(diffusion__num_timesteps=10, diffusion__beta_end=0.5))
    np.testing.assert_allclose(linear.betas, np.linspace(1e-4, 0.5, 10), rtol=1e-6)
    own = config_lib.make_schedule_from(small(diffusion__betas=(0.1, 0.2, 1.0)))
    np.testing.assert_allclose(own.betas, [0.1, 0.2, 1.0], rtol=1e-6)


def test_network_of_a_config():
    def make(**changes):
        return config_lib.make_model(small(**changes), num_classes=7)

    assert make().num_classes is None
    assert make(model__class_conditional=True).num_classes == 7
    assert make().attention_levels is None
    assert make(model__attention_levels=(True, False)).attention_levels == (True, False)
    assert make(model__dtype="bfloat16").dtype == jax.numpy.bfloat16
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
    options = {"sampler": "ddpm", "prediction": "eps", "variance": "fixed_large", "clip": False}
    options |= {"num_steps": None, "spacing": None, "eta": None, "order": None}
    assert config_lib.sampling_options(config) == options | {"dynamic_threshold": None}
    config = small(diffusion__clip=False, diffusion__dynamic_threshold=0.9)
    assert config_lib.sampling_options(config) == options | {"dynamic_threshold": 0.9}
    config = small(sample__sampler="ddim", sample__eta=0.3, sample__num_steps=7)
    found = config_lib.sampling_options(config)
    assert (found["sampler"], found["eta"], found["num_steps"]) == ("ddim", 0.3, 7)
    guidance = {"guidance_scale": 2.5, "guidance_rescale": 0.7, "guidance_interval": (3, 5)}
    changes = {f"sample__{name}": value for name, value in guidance.items()}
    assert config_lib.guidance_options(small(**changes)) == guidance


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


# What may change when a run goes on.


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
