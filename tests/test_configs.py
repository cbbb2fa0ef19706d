import json
import math
from functools import cache
from importlib import import_module
from pathlib import Path

import jax
import pytest
from clips import make_clip

from configs import finetune
from ddpm_jax import config as config_lib
from ddpm_jax.interop import transformers
from ddpm_jax.interop.diffusers import autoencoder as autoencoder_lib
from ddpm_jax.runtime import workdir
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.text.tokenizers import Tokenizer
from ddpm_jax.validation import validate

NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py"))
NAMES = [name for name in NAMES if name not in ("__init__", "common", "finetune")]  # which needs an argument
SMALL = ("cifar10", "cifar10_article")
LARGE = ("celebahq256", "lsun_bedroom", "lsun_cat", "lsun_church")


def load(name):
    return import_module(f"configs.{name}").get_config()


@cache
def parameter_shapes(name):
    return config_lib.make_model(load(name)).param_shapes()


@pytest.fixture
def autoencoder(tmp_path):
    """A folder of diffusers with the config file of the autoencoder of the numbers, but without weights."""
    net = config_lib.make_autoencoder(load("numbers_autoencoder"))
    (tmp_path / "autoencoder").mkdir()
    (tmp_path / "autoencoder" / "config.json").write_text(json.dumps(autoencoder_lib.to_fields(net, 0.5)))
    return tmp_path / "autoencoder"


@pytest.fixture
def clip(tmp_path):
    """A transformers folder of a CLIP."""
    return transformers.write_clip(tmp_path / "clip", make_clip(tmp_path / "tokenizer"))


def test_all_are_covered():
    assert set(NAMES) == {
        *SMALL,
        *LARGE,
        "digits",
        "digits_classes",
        "folder",
        "folder_small",
        "numbers",
        "numbers_autoencoder",
        "numbers_base",
        "numbers_clip",
        "numbers_decoder",
        "numbers_latent",
        "numbers_prior",
        "numbers_sr",
        "captions",
        "captions_small",
    }


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in NAMES]
)
def test_config_is_valid(name, autoencoder, clip):
    config = load(name)
    for section, field, folder in (
        ("autoencoder", "source", autoencoder),
        ("prior", "clip", clip),
        ("embedding", "clip", clip),
        ("text", "encoder", clip),
    ):
        if config[section][field].startswith("runs/"):
            config[section][field] = str(folder)
    validate(config, num_devices=1)


def test_the_stages_of_the_cascade_follow_from_each_other():
    base, second = load("numbers_base"), load("numbers_sr")
    assert (base.data.height, base.data.width) == (second.upscale.height, second.upscale.width) == (4, 8)
    assert base.data.held_out == second.data.held_out


def test_the_prior_and_the_decoder_share_a_clip():
    prior, decoder = load("numbers_prior"), load("numbers_decoder")
    assert prior.prior.clip == decoder.embedding.clip == prior.text.encoder == decoder.text.encoder
    assert (decoder.text.dropout, decoder.embedding.dropout) == (0.5, 0.1)  # as in the paper


@pytest.mark.parametrize("name", NAMES)
def test_each_call_gives_a_config_of_its_own(name):
    load(name).model.channels = 7
    assert load(name).model.channels != 7


@pytest.mark.parametrize("name", ["cifar10", *LARGE])
def test_recipe_of_the_paper(name):
    config = load(name)
    large = name in LARGE
    assert config.data.source == "tfds"
    assert (config.data.height, config.data.width, config.data.channels) == ((256, 256, 3) if large else (32, 32, 3))
    model = config.model
    assert model.channels == 128
    assert model.channel_multipliers == ((1, 1, 2, 2, 4, 4) if large else (1, 2, 2, 2))
    assert model.num_res_blocks == 2
    assert model.attention_resolutions == (16,)
    assert model.attention_levels == ()
    assert model.middle_attention
    assert model.num_heads == 1
    assert model.num_groups == 32
    assert (model.downsample, model.upsample, model.scale_shift) == ("conv", "nearest", False)
    assert not model.class_conditional
    assert model.dropout == (0.0 if large else 0.1)
    assert config.train.batch_size == (64 if large else 128)
    assert config.train.ema_decays == (0.9999,)
    optimizer = config.optimizer
    assert optimizer.name == "adam"
    assert dict(optimizer.options) == {}  # optax's eps is the 1e-8 of the original
    assert optimizer.learning_rate == (2e-5 if large else 2e-4)
    assert (optimizer.warmup_steps, optimizer.decay, optimizer.grad_clip) == (5000, "constant", 1.0)
    diffusion = config.diffusion
    assert (diffusion.schedule, diffusion.num_timesteps) == ("linear", 1000)
    assert (diffusion.beta_start, diffusion.beta_end, diffusion.betas) == (1e-4, 0.02, ())
    assert (diffusion.prediction, diffusion.loss, diffusion.weighting) == ("eps", "simple", "none")
    assert diffusion.timestep_sampler == "uniform"
    assert diffusion.variance == ("fixed_small" if large else "fixed_large")
    assert diffusion.clip
    assert (config.sample.sampler, config.sample.num_steps) == ("ddpm", 0)


@pytest.mark.parametrize(
    ("name", "dataset", "steps", "flip"),
    [
        ("cifar10", "cifar10", 800_000, True),
        ("cifar10_article", "cifar10", 800_000, True),
        ("celebahq256", "celeb_a_hq/256", 500_000, True),
        ("lsun_bedroom", "lsun/bedroom", 2_400_000, False),
        ("lsun_cat", "lsun/cat", 1_800_000, True),
        ("lsun_church", "lsun/church_outdoor", 1_200_000, True),
    ],
)
def test_dataset_steps_and_flips(name, dataset, steps, flip):
    config = load(name)
    assert (config.data.name, config.data.split) == (dataset, "train")
    assert (config.train.num_steps, config.data.flip) == (steps, flip)


@pytest.mark.parametrize("name", ["celebahq256", "lsun_bedroom", "lsun_cat", "lsun_church"])
def test_the_datasets_exist(name):
    import tensorflow_datasets as tfds

    data = load(name).data
    builder_class, configuration = tfds.builder_cls(data.name.split("/")[0]), data.name.split("/")[1]
    assert configuration in builder_class.builder_configs


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cifar10", 35_746_307),
        pytest.param("celebahq256", 113_673_219, marks=pytest.mark.slow),
        pytest.param("lsun_church", 113_673_219, marks=pytest.mark.slow),
    ],
)
def test_parameter_count_of_the_original(name, count):
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(name))) == count


def test_the_network_of_the_article():
    """Widths 64, 128, 256 and 1024, two blocks a level, attention on the two coarsest, transposed convolutions."""
    params = parameter_shapes("cifar10_article")
    widths = [params[f"down_{level}_{i}_res"]["conv_1"]["kernel"].shape[-1] for level in range(4) for i in range(2)]
    assert widths == [64, 64, 128, 128, 256, 256, 1024, 1024]
    assert "down_0_2_res" not in params
    assert [f"down_{level}_0_attention" in params for level in range(4)] == [False, False, True, True]
    assert params["conv_in"]["kernel"].shape == (3, 3, 3, 64)
    assert load("cifar10_article").model.upsample == "transposed"
    upsample = jax.tree.leaves(params["up_1_upsample"])
    assert (4, 4, 128, 128) in [leaf.shape for leaf in upsample]


def test_digits_is_small():
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes("digits")))
    assert 0.6e6 < count < 0.8e6
    config = load("digits")
    assert (config.data.source, config.data.height, config.data.width, config.data.channels) == ("digits", 8, 8, 1)
    assert not config.data.flip


def test_folder_on_a_laptop():
    config = load("folder_small")
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes("folder_small")))
    assert count == 1_744_259
    assert (config.data.source, config.data.path, config.data.flip) == ("folder", "", True)
    assert (config.data.height, config.data.width, config.data.channels) == (16, 16, 3)


def test_folder_of_ones_own():
    config = load("folder")
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes("folder")))
    assert count == 20_118_915
    assert (config.data.source, config.data.path) == ("folder", "")
    assert (config.data.height, config.data.width, config.data.channels) == (64, 64, 3)


def test_numbers():
    config = load("numbers")
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes("numbers"))) == 864_065
    assert (config.data.source, config.data.height, config.data.width) == ("numbers", 8, 16)
    assert len(config.data.held_out) == 16
    assert (config.text.encoder, config.text.dropout) == ("trained", 0.1)


@pytest.mark.parametrize(("name", "plain"), [("captions", "folder"), ("captions_small", "folder_small")])
def test_captioned_pictures_of_ones_own(name, plain):
    """The pictures of the config without captions, but never mirrored."""
    data, without = load(name).data.to_dict(), load(plain).data.to_dict()
    assert data == {**without, "flip": False}
    assert load(name).text.encoder == "trained"
    assert {"encoder", "net"} == set(parameter_shapes(name))


def test_numbers_in_latents(autoencoder):
    """The first config's autoencoder makes the latents that the second one's network diffuses."""
    first, second, plain = (load(name) for name in ("numbers_autoencoder", "numbers_latent", "numbers"))
    assert second.autoencoder.source == "runs/numbers_autoencoder"
    assert first.data == second.data == plain.data
    net = config_lib.make_autoencoder(first)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.numpy.zeros((1, 8, 16, 1)))["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 209_061
    assert (first.train.objective, first.text.encoder) == ("autoencoder", "")
    second.autoencoder.source = str(autoencoder)
    model = config_lib.make_model(second)
    assert model.decoder.shape == (4, 8, 4)
    assert (second.diffusion.clip, second.text.encoder) == (False, "trained")
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.param_shapes()))
    assert count == 897_668


def test_fine_tuning_of_a_run(tmp_path):
    """Its network and diffusion, on a folder of pictures."""
    config = load("digits")
    workdir.record(tmp_path, config, {"fingerprint": "x", "class_names": None})
    found = finetune.get_config(str(tmp_path))
    assert found.model == config.model
    assert found.diffusion == config.diffusion
    assert found.train.init_from == str(tmp_path)
    assert (found.data.source, found.data.path, found.data.height, found.data.flip) == ("folder", "", 8, False)
    assert (found.text.encoder, found.text.tokenizer, found.autoencoder.source) == ("", "", "")
    found.lora.rank = 4
    validate(found, num_devices=1)


def test_fine_tuning_of_a_run_with_frozen_parts(tmp_path, autoencoder):
    """They are those of the run's workdir, and so is the tokenizer of a frozen encoder."""
    config, tokenizer = load("numbers_latent"), Tokenizer.train(["forty-two"], 270, 8)
    run = tmp_path / "run"
    run.mkdir()
    workdir.record(run, config, {"fingerprint": "x", "tokenizer": tokenizer.to_json()})
    autoencoder.rename(run / workdir.AUTOENCODER)
    found, description = finetune.get_config(str(run)), workdir.read_dataset(run)
    assert found.autoencoder.source == str(run / workdir.AUTOENCODER)
    assert (found.text.encoder, found.text.tokenizer) == ("trained", "")
    config.autoencoder.source = found.autoencoder.source
    shapes = [config_lib.make_model(one, description).param_shapes() for one in (config, found)]
    assert shapes[0] == shapes[1]
    (run / workdir.TEXT_ENCODER).mkdir()
    text = finetune.get_config(str(run)).text
    assert (text.encoder, text.tokenizer) == (str(run / workdir.TEXT_ENCODER), str(run / workdir.TOKENIZER))


def test_fine_tuning_of_nothing(tmp_path):
    with pytest.raises(UserError, match=r"needs a workdir to start from: --config=configs/finetune.py:runs/sd"):
        finetune.get_config()
    with pytest.raises(UserError, match="holds no run"):
        finetune.get_config(str(tmp_path))
