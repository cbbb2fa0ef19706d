"""Invalid configs, each refused in one sentence."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5s
from tiny import small

from ddpm_jax.config import default_config, differences, from_json, to_json
from ddpm_jax.interop import transformers
from ddpm_jax.models.clip import CLIPTextEncoder
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.text.tokenizers import Tokenizer
from ddpm_jax.validation import validate


def refusal(config, num_devices=1):
    with pytest.raises(UserError) as caught:
        validate(config, num_devices)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_are_valid():
    validate(default_config(), num_devices=8)
    validate(small())


def test_lists_count_as_tuples():
    config = default_config()
    config.train.ema_decays = [0.9]
    assert differences(from_json(to_json(config)), config) == []
    validate(small(model__channel_multipliers=[1, 2]))


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
    validate(small(optimizer__learning_rate=1, model__dropout=0))


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
            "weighting is 'p2', which weights the squared error, but loss 'vlb' has no squared error",
        ),
        ({"diffusion__vlb_weight": -1.0}, "config.diffusion.vlb_weight is -1.0; at least 0"),
        ({"checkpoint__every_minutes": math.nan}, "config.checkpoint.every_minutes is nan; at least 0"),
        (
            {"evaluate__features": "digits", "evaluate__every_steps": 1},
            "'digits', which judges 8x8x1 images, or several side by side, but these are 8x8x3",
        ),
        (
            {"evaluate__features": "nope", "evaluate__every_steps": 1},
            "config.evaluate.features is 'nope'; accepted: digits, inception, or the file",
        ),
        ({"diffusion__timestep_sampler": "even"}, "accepted: uniform, stratified, importance"),
        ({"diffusion__schedule": "bogus"}, "schedule is 'bogus'; accepted: linear"),
        ({"diffusion__schedule_options": {"offset": 0.1}}, "schedule 'linear' does not take the options"),
        ({"diffusion__num_timesteps": 0, "log__sample_steps": 0}, "num_timesteps is 0; at least 1"),
        ({"diffusion__beta_start": 0.0}, "config.diffusion.beta_start is 0.0; accepted: above 0 and at most 1"),
        ({"diffusion__beta_end": 1.5}, "config.diffusion.beta_end is 1.5; accepted: above 0 and at most 1"),
        ({"diffusion__beta_end": math.nan}, "config.diffusion.beta_end is nan; accepted: above 0 and at most 1"),
        ({"diffusion__betas": (0.1, 1.5), "log__sample_steps": 2}, "betas[1] is 1.5; every beta must be"),
        ({"diffusion__betas": (0.0, 0.5), "log__sample_steps": 2}, "betas[0] is 0; every beta must be"),
        ({"diffusion__betas": (0.1, math.nan), "log__sample_steps": 2}, "betas[1] is nan; every beta must be"),
        ({"diffusion__clip_range": 0.0}, "config.diffusion.clip_range is 0.0; accepted: above 0"),
        ({"diffusion__dynamic_threshold": 1.1}, "config.diffusion.dynamic_threshold is 1.1; accepted: 0 to 1"),
        (
            {"text__encoder": "trained", "model__class_conditional": True},
            "config.text.encoder is 'trained' and config.model.class_conditional is True; accepted: captions or",
        ),
        (
            {"data__caption": "text"},
            "config.data.caption is 'text', which is for config.data.source='tfds' and a config.text.encoder",
        ),
        (
            {"data__caption": "text", "text__encoder": "trained", "data__source": "folder"},
            "config.data.caption is 'text', which is for config.data.source='tfds'",
        ),
        ({"text__vocab_size": 258}, "config.text.vocab_size is 258; at least 259"),
        ({"text__dropout": 1.5}, "config.text.dropout is 1.5; accepted: 0 to 1"),
        ({"text__num_heads": 5, "text__encoder": "trained"}, "num_heads 5 does not divide the width 64"),
        ({"text__max_length": 2, "text__encoder": "trained"}, "has max_length 2; accepted: more than the 2 tokens"),
        ({"text__encoder": "none/here"}, "'none/here"),
        ({"text__encoder": "trained", "text__tokenizer": "none/here"}, "'none/here' cannot be read: No such file"),
        (
            {"text__encoder": "trained", "text__dropout": 0.0, "sample__guidance_scale": 2.0},
            "guidance_scale is 2.0; other than 1 it needs a run with a text.dropout above 0",
        ),
        ({"model__dtype": "float16"}, "config.model.dtype is 'float16'; accepted: float32, bfloat16"),
        ({"model__channels": 48}, "48 channels cannot be normalised in 32 groups"),
        ({"model__num_groups": 5}, "cannot be normalised in 5 groups"),
        ({"model__num_heads": 3}, "num_heads 3 does not divide the 64 channels"),
        ({"model__attention_patch_size": 3}, "attention_patch_size 3 does not divide a 4x4 level"),
        ({"model__attention_levels": (True,)}, "attention_levels has 1 entries for 2 levels"),
        ({"model__channel_multipliers": ()}, "config.model.channel_multipliers is ()"),
        ({"model__channel_multipliers": (0, 1)}, "accepted: integers of 1 or more"),
        ({"model__level_channels": (32, 0)}, "config.model.level_channels is (32, 0); accepted: integers of 1 or more"),
        ({"model__level_channels": (32, 48)}, "48 channels cannot be normalised in 32 groups"),
        ({"model__head_channels": -1}, "config.model.head_channels is -1; at least 0"),
        ({"model__head_channels": 65}, "head_channels 65 is more than the 64 channels"),
        ({"model__middle_attention_groups": -2}, "config.model.middle_attention_groups is -2; at least -1"),
        ({"model__norm_epsilon": 0.0}, "config.model.norm_epsilon is 0.0; accepted: above 0"),
        ({"model__activation": "elu"}, "activation is 'elu'; accepted: swish, gelu, mish, relu"),
        ({"model__time_embedding": "fourier"}, "time_embedding is 'fourier'; accepted: sinusoids, learned"),
        ({"model__time_frequency_shift": 2.0}, "config.model.time_frequency_shift is 2.0; accepted: 0 to 1"),
        ({"model__downsample_padding": "valid"}, "downsample_padding is 'valid'; accepted: same, symmetric"),
        ({"model__downsample_levels": ("conv",) * 2}, "downsample_levels has 2 entries for 1 halvings"),
        (
            {"model__class_conditional": True, "model__null_class": False, "train__label_dropout": 0.1},
            "label_dropout needs a null class; accepted with model.null_class=False: 0",
        ),
        (
            {"model__class_conditional": True, "model__null_class": False, "sample__guidance_scale": 2.0},
            "guidance_scale is 2.0; other than 1 it needs a network with a null class",
        ),
        ({"sample__levels": "even"}, "levels is 'even'; accepted: linspace, karras, logsnr"),
        ({"sample__fractional": True}, "fractional timesteps need levels"),
        ({"sample__spacing_offset": -1}, "config.sample.spacing_offset is -1; at least 0"),
        ({"model__dropout": 1.0}, "config.model.dropout is 1.0; accepted: 0 to below 1"),
        ({"model__dropout": -0.1}, "config.model.dropout is -0.1"),
        ({"model__downsample": "stride"}, "downsample is 'stride'; accepted: conv, avg_pool, max_pool"),
        ({"model__upsample": "linear"}, "upsample is 'linear'; accepted: nearest, transposed"),
        ({"model__remat": "all"}, "remat is 'all'; accepted: none, norms, blocks"),
        ({"data__height": 9}, "an image of 9x8 cannot be halved 1 times"),
        ({"data__width": 0}, "config.data.width is 0; at least 1"),
        ({"optimizer__name": "adamm"}, "Did you mean 'adam'?"),
        ({"optimizer__name": "zzzz"}, "'zzzz', which is not an optimiser of optax"),
        ({"optimizer__name": "clip"}, "'clip', which is not an optimiser of optax"),
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
        (
            {"model__masked_picture": True},
            "model.masked_picture is True, but the run diffuses no latents; accepted: with",
        ),
        ({"train__label_dropout": 0.1}, "label_dropout is for config.model.class_conditional=True"),
        ({"sample__guidance_rescale": 0.5}, "need a guidance_scale other than 1"),
        ({"sample__guidance_rescale": 1.5}, "guidance_rescale is 1.5; accepted: 0 to 1"),
        ({"sample__guidance_interval": (500, 100)}, "accepted: the lowest and the highest timestep"),
        ({"seed": -1}, "config.seed is -1"),
        ({"seed": 2**32}, "config.seed is 4294967296; accepted: 0 to 4294967295"),
        ({"train__label_dropout": 1.5}, "config.train.label_dropout is 1.5; accepted: 0 to 1"),
        ({"sample__guidance_interval": (3,)}, "guidance_interval is (3,); accepted: the lowest and"),
        ({"diffusion__zero_terminal_snr": True}, "'eps' does not determine the image at the last timestep"),
        ({"diffusion__betas": (0.1, 1.0), "log__sample_steps": 2}, "'eps' does not determine the image at the last"),
        ({"sample__num_steps": 1001}, "config.sample.num_steps is 1001; accepted: 1001 or more timesteps, or"),
        ({"sample__num_steps": -1}, "config.sample.num_steps is -1"),
        ({"log__sample_steps": 1001}, "or a config.log.sample_steps of at most 1000"),
        ({"diffusion__num_timesteps": 1}, "config.diffusion.num_timesteps is 1 and config.log.sample_steps is 250"),
        ({"diffusion__num_timesteps": 0}, "config.diffusion.num_timesteps is 0; at least 1"),
        ({"diffusion__num_timesteps": -1}, "config.diffusion.num_timesteps is -1; at least 1"),
        ({"diffusion__betas": (0.1,) * 9}, "config.diffusion.betas has 9 values and config.log.sample_steps is 250"),
    ],
)
def test_wrong_values(changes, expected):
    assert expected in refusal(small(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"model__channel_multipliers": (1.5, 2)},
        {"model__channel_multipliers": ("1", "2")},
        {"model__level_channels": (32.0, 64)},
        {"model__downsample_levels": (1,)},
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
        validate(config, devices)
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
        {"model__class_conditional": True, "model__null_class": False},
        {"model__level_channels": (32, 96), "model__head_channels": 24, "model__middle_attention_groups": 0},
        {"model__downsample_levels": ("residual",), "model__time_embedding": "learned", "model__activation": "mish"},
        {"sample__spacing": "leading", "sample__spacing_offset": 1, "sample__stop_at_first": True},
        {"model__dtype": "bfloat16", "model__remat": "blocks"},
        {"data__channels": 1},
        {"sample__num_steps": 1000, "log__sample_steps": 1000},
    ],
)
def test_right_values(changes):
    validate(small(**changes))


class TestFrozenEncoder:
    """A folder that has both halves, but they do not fit together."""

    @pytest.fixture
    def folder(self, tmp_path):
        net = CLIPTextEncoder(270, max_length=8, width=8, num_layers=1, num_heads=2, mlp_width=8)
        params = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"],
        )
        return transformers.write(tmp_path / "encoder", net, params)

    def write(self, folder, vocab_size=270, max_length=8):
        tokenizer = Tokenizer.train([str(i) for i in range(100)], vocab_size, max_length)
        (folder / "tokenizer.json").write_text(tokenizer.to_json())
        return {"text__encoder": str(folder), "text__max_length": 0}

    def test_fits(self, folder):
        validate(small(**self.write(folder)))

    @pytest.mark.parametrize("sizes", [{"vocab_size": 271}, {"max_length": 9}])
    def test_with_fewer_tokens_or_positions_than_the_tokenizer(self, folder, sizes):
        found = refusal(small(**self.write(folder, **sizes)))
        own = {"vocab_size": 270, "max_length": 8, **sizes}
        assert found == (
            f"the tokenizer has {own['vocab_size']} tokens and texts of {own['max_length']}; accepted: at most the "
            f"270 tokens and texts of 8 of the encoder {str(folder)!r}"
        )

    def test_t5_takes_texts_of_any_length(self, tmp_path):
        folder = t5s.write_t5(tmp_path / "t5")
        for length in (0, 16, 900):
            validate(small(text__encoder=str(folder), text__max_length=length))
        few = transformers.write(tmp_path / "few", t5s.NET.clone(vocab_size=9), t5s.random_params(t5s.NET))
        (few / "spiece.model").write_bytes(t5s.spiece())
        found = refusal(small(text__encoder=str(few), text__max_length=16))
        assert found == (
            f"the tokenizer has {len(t5s.PIECES) + 100} tokens and texts of 16; accepted: at most the 9 tokens of the "
            f"encoder {str(few)!r}"
        )

    def test_without_a_tokenizer(self, folder):
        assert "has no tokenizer; accepted: tokenizer.json, or " in refusal(small(text__encoder=str(folder)))

    def test_with_a_broken_config(self, folder):
        changes = self.write(folder)
        (folder / "config.json").write_text("{")
        assert "config.json' is not valid JSON" in refusal(small(**changes))
