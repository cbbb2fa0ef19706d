import json

import numpy as np
import pytest
from single_files import autoencoder_shapes, checkpoint, random, text_shapes, unet_shapes

from ddpm_jax.interop import single_file, transformers
from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.runtime.errors import UserError

PEERS = "diffusers and PyTorch are not installed (pip install -e '.[peers]')"


def parts(version="1.x", **unet):
    """The network's, the autoencoder's and the text encoder's tensors."""
    unet = {"linear": version == "2.x", "widths": (64, 128), **unet}
    layers = 23 if version == "2.x" else 2
    return random(unet_shapes(**unet), 1), random(autoencoder_shapes(), 2), random(text_shapes(layers=layers), 3)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("old_attention", [False, True])
@pytest.mark.parametrize(
    ("version", "options"),
    [("1.x", {}), ("1.x", {"layers": 2, "widths": (32, 64, 64), "in_channels": 9}), ("2.x", {"context": 32})],
)
def test_tensors(tmp_path, version, options, old_attention):
    path, expected = tmp_path / "x.safetensors", parts(version, **options)
    tensors_lib.write(path, checkpoint(*expected, version=version, old_attention=old_attention))
    found = single_file.read(path)
    assert (found.version, found.in_channels) == (version, options.get("in_channels", 4))
    for part, tensors in zip((found.unet, found.autoencoder, found.text_encoder), expected, strict=True):
        assert_same(part, tensors)


def test_precision_is_kept(tmp_path):
    tensors = {name: value.astype(np.float16) for name, value in checkpoint(*parts()).items()}
    tensors_lib.write(tmp_path / "x.safetensors", tensors)
    assert {value.dtype for value in single_file.read(tmp_path / "x.safetensors").unet.values()} == {np.dtype("f2")}


IGNORED = {
    "model_ema.decay": (),
    "model_ema.diffusion_modelinput_blocks00weight": (3,),
    "sqrt_one_minus_alphas_cumprod": (5,),
    "betas": (5,),
    "posterior_mean_coef1": (5,),
    "first_stage_model.loss.logvar": (),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
}


def test_ignored_tensors(tmp_path):
    expected = parts()
    tensors_lib.write(tmp_path / "x.safetensors", checkpoint(*expected) | random(IGNORED))
    found = single_file.read(tmp_path / "x.safetensors")
    assert_same(found.unet, expected[0])
    assert_same(found.text_encoder, expected[2])


def test_unused_tensors_of_openclip(tmp_path):
    """The 24th layer, the projection and its training parameters."""
    expected = parts("2.x")
    last = random({k.replace(".22.", ".23."): v.shape for k, v in expected[2].items() if ".layers.22." in k})
    tensors = checkpoint(*expected[:2], expected[2] | last, version="2.x")
    unused = {"text_projection": (64, 64), "logit_scale": ()}
    tensors |= {f"cond_stage_model.model.{name}": value for name, value in random(unused).items()}
    assert any(".resblocks.23." in name for name in tensors)
    tensors_lib.write(tmp_path / "x.safetensors", tensors)
    assert_same(single_file.read(tmp_path / "x.safetensors").text_encoder, expected[2])


def test_text_encoder_of_older_names(tmp_path):
    expected = parts()
    tensors = {name.replace(".text_model.", "."): value for name, value in checkpoint(*expected).items()}
    tensors_lib.write(tmp_path / "x.safetensors", tensors)
    assert_same(single_file.read(tmp_path / "x.safetensors").text_encoder, expected[2])


@pytest.mark.parametrize(
    ("version", "prediction", "heads", "sides", "activation"),
    [
        ("1.x", None, 8, (64, 128), "quick_gelu"),
        ("1.x", "v_prediction", 8, (64, 128), "quick_gelu"),
        ("2.x", "epsilon", [1, 2], (64, 128), "gelu"),
        ("2.x", "v_prediction", [1, 2], (96, 192), "gelu"),
    ],
)
def test_fields(tmp_path, version, prediction, heads, sides, activation):
    tensors_lib.write(tmp_path / "x.safetensors", checkpoint(*parts(version, layers=2, context=32), version=version))
    fields = single_file.read(tmp_path / "x.safetensors").fields(prediction)
    assert json.loads(json.dumps(fields)) == fields
    unet, vae, text = fields["unet"], fields["vae"], fields["text_encoder"]
    assert unet["block_out_channels"] == [64, 128]
    assert unet["down_block_types"] == ["CrossAttnDownBlock2D", "DownBlock2D"]
    assert unet["up_block_types"] == ["UpBlock2D", "CrossAttnUpBlock2D"]
    assert (unet["layers_per_block"], unet["transformer_layers_per_block"], unet["cross_attention_dim"]) == (2, 1, 32)
    assert unet["attention_head_dim"] == heads
    assert unet["use_linear_projection"] == (version == "2.x")
    assert (unet["sample_size"], vae["sample_size"]) == sides
    assert (vae["block_out_channels"], vae["layers_per_block"], vae["latent_channels"]) == ([32, 64], 1, 4)
    assert text["hidden_act"] == activation
    assert fields["scheduler"]["prediction_type"] == (prediction or "epsilon")


@pytest.mark.parametrize("version", ["1.x", "2.x"])
def test_text_encoder_opens(tmp_path, version):
    tensors_lib.write(tmp_path / "x.safetensors", checkpoint(*parts(version), version=version))
    found = single_file.read(tmp_path / "x.safetensors")
    net = transformers.to_module(found.fields("epsilon")["text_encoder"])
    params = transformers.to_params(found.path, found.text_encoder, net)
    assert net.num_layers == len([name for name in params["transformer"] if name.startswith("block_")])


def refusal(path, tensors):
    tensors_lib.write(path, tensors)
    with pytest.raises(UserError) as caught:
        single_file.read(path).fields("epsilon")
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


OTHERS = {
    "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": "is Stable Diffusion 3;",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "is Flux;",
    "double_blocks.0.img_attn.qkv.weight": "is Flux;",
    "lora_unet_input_blocks_1_1_proj_in.lora_down.weight": "is a LoRA",
    "unet.mid_block.attentions.0.proj_in.lora_A.weight": "is a LoRA",
    "control_model.input_hint_block.0.weight": "is a ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "is a ControlNet",
    "down_blocks.0.resnets.0.conv1.weight": "is a part of a diffusers folder",
    "emb_params": "is a textual inversion",
    "encoder.conv_in.weight": "is not a Stable Diffusion checkpoint",
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_models(tmp_path, name):
    assert OTHERS[name] in refusal(tmp_path / "x.safetensors", {name: np.zeros((2, 2), np.float32)})


IN = "model.diffusion_model.input_blocks."


@pytest.mark.parametrize(
    ("version", "change", "said"),
    [
        ("1.x", {"conditioner.embedders.0.x.weight": (1,)}, "is Stable Diffusion XL;"),
        ("1.x", {"control_model.input_blocks.0.0.weight": (1,)}, "is a ControlNet;"),
        ("1.x", {"cond_stage_model.transformer.": None}, "has no text encoder"),
        ("1.x", {"first_stage_model.": None}, "has no autoencoder"),
        ("1.x", {"cond_stage_model.model.ln_final.weight": (64,)}, "has two text encoders"),
        ("1.x", {f"{IN}0.0.weight": (64, 7, 3, 3)}, "takes 7 channels; accepted: 4, or 9"),
        ("1.x", {f"{IN}0.0.weight": None}, f"has no tensor '{IN}0.0.weight'"),
        ("1.x", {"noise": (1,)}, "has a tensor 'noise'"),
        ("1.x", {"model.diffusion_model.label_emb.weight": (2, 2)}, "'model.diffusion_model.label_emb.weight'"),
        ("1.x", {f"{IN}1.0.in_layers.7.weight": (2,)}, f"'{IN}1.0.in_layers.7.weight'"),
        ("1.x", {f"{IN}1.2.norm.weight": (2,)}, f"'{IN}1.2.norm.weight'"),
        ("1.x", {"model.diffusion_model.middle_block.3.norm.weight": (2,)}, "middle_block.3.norm"),
        ("1.x", {f"{IN}{'9' * 5000}.0.op.weight": (2,)}, "which no Stable Diffusion"),
        ("1.x", {f"{IN}9999.0.in_layers.0.weight": (2,)}, "has no tensor 'down_blocks.2"),
        ("1.x", {"first_stage_model.decoder.up.0.attn.0.q.weight": (2,)}, "decoder.up.0.attn.0.q.weight"),
        ("1.x", {"first_stage_model.decoder.mid.attn_1.z.weight": (2,)}, "mid.attn_1.z.weight"),
        ("1.x", {"first_stage_model.quantize.weight": (2,)}, "quantize.weight"),
        ("1.x", {f"{IN}1.1.": None, "model.diffusion_model.output": None, "attn2": None}, "no attention to a text"),
        ("2.x", {"cond_stage_model.model.visual.proj": (2,)}, "'cond_stage_model.model.visual.proj'"),
        ("2.x", {"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": (7,)}, "a multiple of 3"),
        ("2.x", {f"{IN}1.0.in_layers.2.weight": (72, 64, 3, 3)}, "accepted for 2.x: multiples of 64"),
        ("2.x", {"cond_stage_model.model.token_embedding.weight": (9, 65)}, "accepted: a multiple of 64"),
    ],
)
def test_refused_tensors(tmp_path, version, change, said):
    tensors = checkpoint(*parts(version), version=version)
    for name, shape in change.items():
        if shape is None:
            tensors = {found: value for found, value in tensors.items() if name not in found}
        else:
            tensors |= random({name: shape})
    assert said in refusal(tmp_path / "x.safetensors", tensors)


def test_prediction_type_of_2(tmp_path):
    tensors_lib.write(tmp_path / "x.safetensors", checkpoint(*parts("2.x"), version="2.x"))
    found = single_file.read(tmp_path / "x.safetensors")
    for prediction in (None, "sample"):
        with pytest.raises(UserError, match="accepted: 'epsilon', 'v_prediction'"):
            found.fields(prediction)


# Against diffusers.


def their_models(version, in_channels=4):
    """Narrow models with random weights, and the corresponding configs of the folder."""
    torch = pytest.importorskip("torch", reason=PEERS)
    diffusers = pytest.importorskip("diffusers", reason=PEERS)
    hf = pytest.importorskip("transformers", reason=PEERS)
    torch.manual_seed(0)
    heads = {"1.x": 8, "2.x": [1, 2, 2, 2]}[version]
    unet = diffusers.UNet2DConditionModel(
        in_channels=in_channels,
        block_out_channels=(64, 128, 128, 128),
        layers_per_block=2,
        cross_attention_dim=64,
        attention_head_dim=heads,
        use_linear_projection=version == "2.x",
        sample_size=64,
    )
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        sample_size=512,
    )
    config = hf.CLIPTextConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=23 if version == "2.x" else 3,
        num_attention_heads=1,
        hidden_act="gelu" if version == "2.x" else "quick_gelu",
    )
    return unet, autoencoder, hf.CLIPTextModel(config)


def to_numpy(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def text_tensors(model):
    """With the tensor names of all releases but the newest."""
    return {f"text_model.{name.removeprefix('text_model.')}": value for name, value in to_numpy(model).items()}


@pytest.mark.peers
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(("version", "in_channels"), [("1.x", 4), ("1.x", 9), ("2.x", 4)])
def test_against_the_converters_of_diffusers(measure, tmp_path, version, in_channels, suffix):
    """diffusers' converters give the same bytes for a file with CompVis' names and the older autoencoder's shapes."""
    unet, autoencoder, text = their_models(version, in_channels)
    import torch
    from diffusers.loaders import single_file_utils as theirs

    tensors = checkpoint(to_numpy(unet), to_numpy(autoencoder), text_tensors(text), version=version, old_attention=True)
    if version == "2.x":  # what diffusers leaves out
        block = {k.replace(".22.", ".23."): v for k, v in tensors.items() if ".resblocks.22." in k}
        tensors |= block | {"cond_stage_model.model.text_projection": np.eye(64, dtype=np.float32)}
    path = tmp_path / f"x{suffix}"
    as_torch = {name: torch.tensor(value) for name, value in tensors.items()}
    if suffix == ".ckpt":
        torch.save({"state_dict": as_torch, "epoch": 3, "global_step": 875_000}, path)
    else:
        tensors_lib.write(path, tensors)
    found = single_file.read(path)
    if version == "1.x":
        their_text = theirs.convert_ldm_clip_checkpoint(dict(as_torch))
    else:
        their_text = theirs.convert_open_clip_checkpoint(text, dict(as_torch))
    expected = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(as_torch), unet.config),
        "autoencoder": theirs.convert_ldm_vae_checkpoint(dict(as_torch), autoencoder.config),
        "text_encoder": their_text,
    }
    for part, converted in expected.items():
        ours = getattr(found, part)
        assert ours.keys() == converted.keys()
        different = [k for k, v in converted.items() if v.numpy().tobytes() != ours[k].tobytes()]
        what = f"tensors that differ, {part} of a single file of Stable Diffusion {version}"
        measure(what, "diffusers' converters", len(different), 0)


@pytest.mark.peers
@pytest.mark.parametrize("version", ["1.x", "2.x"])
def test_fields_open_in_diffusers(version, tmp_path):
    """The models that the fields describe take the tensors, and have the settings of those that made them."""
    models = their_models(version)
    import diffusers
    import torch
    import transformers as hf

    unet, autoencoder, text = models
    tensors = checkpoint(to_numpy(unet), to_numpy(autoencoder), text_tensors(text), version=version)
    tensors_lib.write(tmp_path / "x.safetensors", tensors)
    found = single_file.read(tmp_path / "x.safetensors")
    fields = found.fields("epsilon")
    opened = (
        diffusers.UNet2DConditionModel.from_config(fields["unet"]),
        diffusers.AutoencoderKL.from_config(fields["vae"]),
    )
    for ours, theirs, part in zip(opened, models[:2], (found.unet, found.autoencoder), strict=True):
        ours.load_state_dict({name: torch.tensor(value) for name, value in part.items()})
        assert {k: (list(v) if isinstance(v, tuple) else v) for k, v in ours.config.items() if k[0] != "_"} == {
            k: (list(v) if isinstance(v, tuple) else v) for k, v in theirs.config.items() if k[0] != "_"
        }
    ours = hf.CLIPTextModel(hf.CLIPTextConfig(**fields["text_encoder"]))
    assert {k.removeprefix("text_model.") for k in ours.state_dict()} == {
        k.removeprefix("text_model.") for k in found.text_encoder
    }
    for name in ("hidden_act", "num_attention_heads", "layer_norm_eps", "max_position_embeddings"):
        assert getattr(ours.config, name) == getattr(text.config, name)
    scheduler = getattr(diffusers, fields["scheduler"]["_class_name"]).from_config(fields["scheduler"])
    assert scheduler.config.prediction_type == "epsilon"
