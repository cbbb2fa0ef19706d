import json

import numpy as np
import pytest
from loras import merged
from safetensors import safe_open
from single_files import random, text_shapes, unet_module, unet_shapes

from ddpm_jax.interop import lora
from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.interop.lora import Lora, Update
from ddpm_jax.runtime.errors import UserError

PEERS = "diffusers, PEFT and PyTorch are not installed (pip install -e '.[peers]')"
UNET = unet_shapes(widths=(32, 64), layers=2, context=64)
TEXT = text_shapes()
SHAPES = {"unet": UNET, "text_encoder": TEXT}

BLOCK = "down_blocks.0.attentions.1.transformer_blocks.0"
UNET_MODULES = (
    f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.attn2.to_k",
    f"{BLOCK}.attn2.to_out.0",
    f"{BLOCK}.ff.net.0.proj",
    f"{BLOCK}.ff.net.2",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.1.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.resnets.0.conv_shortcut",
    "down_blocks.1.resnets.0.time_emb_proj",
    "mid_block.attentions.0.proj_out",
    "mid_block.resnets.1.conv2",
    "up_blocks.0.upsamplers.0.conv",
    "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_v",
    "up_blocks.1.resnets.0.conv1",
    "conv_in",
    "conv_out",
    "time_embedding.linear_1",
)
LAYER = "text_model.encoder.layers.1"
TEXT_MODULES = (f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.out_proj", f"{LAYER}.mlp.fc1")
ATTENTIONS = tuple(module for module in UNET_MODULES if ".transformer_blocks." in module and ".ff." not in module)


def make_update(shape, rank, alpha, rng):
    down = rng.standard_normal((rank, *shape[1:])).astype(np.float32)
    up = rng.standard_normal((shape[0], rank, *([1, 1] if len(shape) == 4 else []))).astype(np.float32)
    return Update(down, up, float(alpha))


def make_lora(unet=UNET_MODULES, text=TEXT_MODULES, ranks=(4, 4, 4, 2), alphas=(4.0, 4.0, 1.0)):
    rng = np.random.default_rng(0)

    def changes(modules, shapes):
        return {
            module: make_update(shapes[f"{module}.weight"], ranks[i % len(ranks)], alphas[i % len(alphas)], rng)
            for i, module in enumerate(modules)
        }

    return Lora(changes(unet, UNET), changes(text, TEXT))


def assert_same(found, expected):
    for part in lora.PARTS:
        ours, theirs = getattr(found, part), getattr(expected, part)
        assert ours.keys() == theirs.keys()
        for module, update in theirs.items():
            np.testing.assert_array_equal(ours[module].down, update.down)
            np.testing.assert_array_equal(ours[module].up, update.up)
            assert ours[module].alpha == update.alpha


def peft_tensors(changes, part, ends=("lora_A", "lora_B")):
    result = {}
    for module, update in changes.items():
        result |= {f"{part}.{module}.{end}.weight": value for end, value in zip(ends, update, strict=False)}
    return result


def kohya_tensors(expected, compvis=False, te="lora_te"):
    result = {}
    for part, prefix in (("unet", "lora_unet"), ("text_encoder", te)):
        for module, update in getattr(expected, part).items():
            name = unet_module(module, 2) if compvis and part == "unet" else module
            stem = f"{prefix}_{name.replace('.', '_')}"
            result |= {f"{stem}.lora_down.weight": update.down, f"{stem}.lora_up.weight": update.up}
            result[f"{stem}.alpha"] = np.array(update.alpha, np.float32)
    return result


def processor_tensors(expected, named=True):
    """diffusers' first format, for attention only."""
    text = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    result = {}
    for module, update in expected.unet.items():
        attention, projection = module.removesuffix(".0").rsplit(".", 1)
        stem = f"{'unet.' * named}{attention}.processor.{projection}_lora"
        result |= {f"{stem}.down.weight": update.down, f"{stem}.up.weight": update.up}
    for module, update in expected.text_encoder.items():
        attention, projection = module.rsplit(".", 1)
        stem = f"text_encoder.{attention}.{text[projection]}_lora"
        result |= {f"{stem}.down.weight": update.down, f"{stem}.up.weight": update.up}
    return result


def test_written_and_read(tmp_path):
    expected = make_lora()
    lora.write(tmp_path / "x.safetensors", expected)
    assert_same(lora.read(tmp_path / "x.safetensors", SHAPES), expected)


def test_text_encoder_of_flat_names(tmp_path):
    """The newest transformers has no "text_model." before a text encoder's names."""
    shapes = {**SHAPES, "text_encoder": {name.removeprefix("text_model."): shape for name, shape in TEXT.items()}}
    expected = make_lora()
    lora.write(tmp_path / "x.safetensors", expected)
    found = lora.read(tmp_path / "x.safetensors", shapes)
    assert [f"text_model.{module}" for module in found.text_encoder] == sorted(TEXT_MODULES)
    lora.write(tmp_path / "y.safetensors", found)
    assert_same(lora.read(tmp_path / "y.safetensors", SHAPES), expected)


@pytest.mark.parametrize(("compvis", "te"), [(False, "lora_te"), (True, "lora_te"), (False, "lora_te1")])
def test_kohya(tmp_path, compvis, te):
    expected = make_lora()
    tensors_lib.write(tmp_path / "x.safetensors", kohya_tensors(expected, compvis, te))
    assert_same(lora.read(tmp_path / "x.safetensors", SHAPES), expected)


@pytest.mark.parametrize("kohya", [False, True])
def test_without_alpha_the_scale_is_1(tmp_path, kohya):
    expected = make_lora()
    tensors = peft_tensors(expected.unet, "unet") | peft_tensors(expected.text_encoder, "text_encoder")
    if kohya:
        tensors = {name: value for name, value in kohya_tensors(expected).items() if not name.endswith(".alpha")}
    tensors_lib.write(tmp_path / "x.safetensors", tensors)
    found = lora.read(tmp_path / "x.safetensors", SHAPES)
    assert {update.alpha / len(update.down) for update in found.unet.values()} == {1.0}


@pytest.mark.parametrize("named", [False, True])
def test_first_format_of_diffusers(tmp_path, named):
    expected = make_lora(ATTENTIONS, TEXT_MODULES[:2], ranks=(4,), alphas=(4.0,))
    tensors_lib.write(tmp_path / "x.safetensors", processor_tensors(expected, named))
    assert_same(lora.read(tmp_path / "x.safetensors", SHAPES), expected)


def test_other_names_of_diffusers(tmp_path):
    expected = make_lora(ranks=(4,), alphas=(8.0,))
    tensors = peft_tensors(expected.unet, "unet", ("lora.down", "lora.up"))
    tensors |= peft_tensors(expected.text_encoder, "text_encoder", ("lora_linear_layer.down", "lora_linear_layer.up"))
    for part in lora.PARTS:
        tensors |= {f"{part}.{module}.alpha": np.array(8, np.float32) for module in getattr(expected, part)}
    tensors_lib.write(tmp_path / "x.safetensors", tensors)
    assert_same(lora.read(tmp_path / "x.safetensors", SHAPES), expected)


def test_half_precision(tmp_path):
    expected = make_lora()
    tensors = {name: value.astype(np.float16) for name, value in kohya_tensors(expected).items()}
    tensors_lib.write(tmp_path / "x.safetensors", tensors)
    found = lora.read(tmp_path / "x.safetensors", SHAPES).unet["conv_in"]
    assert found.down.dtype == np.float32
    np.testing.assert_allclose(found.down, expected.unet["conv_in"].down, atol=1e-2)


@pytest.mark.parametrize("to_conv", [False, True])
def test_linear_layers_and_convolutions_of_1x1_are_the_same(tmp_path, to_conv):
    module = f"{BLOCK}.attn1.to_q" if to_conv else "down_blocks.0.attentions.0.proj_in"
    update = make_lora((module,), ()).unet[module]
    down, up = (
        value[..., None, None] if to_conv else value.reshape(value.shape[:2]) for value in (update.down, update.up)
    )
    tensors_lib.write(tmp_path / "x.safetensors", peft_tensors({module: Update(down, up, 1.0)}, "unet"))
    found = lora.read(tmp_path / "x.safetensors", SHAPES).unet
    weights = random({f"{module}.weight": UNET[f"{module}.weight"]})
    expected = merged(weights, {module: update._replace(alpha=4.0)}, 0.5)
    np.testing.assert_array_equal(merged(weights, found, 0.5)[f"{module}.weight"], expected[f"{module}.weight"])


def write_described(path, description):
    tensors = peft_tensors(make_lora(ranks=(4,)).unet, "unet")
    text = description if isinstance(description, str) else json.dumps(description)
    tensors_lib.write(path, tensors, {"lora_adapter_metadata": text})


@pytest.mark.parametrize(
    ("description", "alpha", "others"),
    [
        ({}, 4, {}),
        ({"unet.r": 4, "unet.lora_alpha": 16}, 16, {}),
        ({"unet.lora_alpha": 16, "unet.use_rslora": True}, 32, {}),
        ({"unet.lora_alpha": 16, "unet.alpha_pattern": {"^conv_in": 3}}, 16, {"conv_in": 3}),
        ({"unet.lora_alpha": 16, "unet.alpha_pattern": {"attn1.to_q": 3}}, 16, {f"{BLOCK}.attn1.to_q": 3}),
        ({"unet.lora_alpha": 16, "unet.alpha_pattern": {"^attn1.to_q": 3, "o_q": 4}}, 16, {}),
        ({"text_encoder.lora_alpha": 16}, 4, {}),
    ],
)
def test_alpha_of_the_metadata(tmp_path, description, alpha, others):
    write_described(tmp_path / "x.safetensors", description)
    for module, update in lora.read(tmp_path / "x.safetensors", SHAPES).unet.items():
        assert update.alpha == others.get(module, alpha), module


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ("[", "is not a JSON object"),
        ("[1]", "is not a JSON object"),
        ({"unet.lora_alpha": "x"}, "has 'x'"),
        ({"unet.lora_alpha": True}, "has True"),
        ({"unet.alpha_pattern": {"conv_.*": 1}}, "unet.alpha_pattern"),
        ({"unet.alpha_pattern": [1]}, "unet.alpha_pattern"),
        ({"unet.use_dora": True}, "unet.use_dora is true"),
    ],
)
def test_refused_metadata(tmp_path, description, said):
    write_described(tmp_path / "x.safetensors", description)
    with pytest.raises(UserError) as caught:
        lora.read(tmp_path / "x.safetensors", SHAPES)
    assert said in str(caught.value)


def test_delta():
    """Against the product written out, for matrices and filters; several LoRAs in sequence."""
    expected, weights = make_lora(), random(UNET)
    changed = merged(weights, expected.unet, 0.7)
    assert changed.keys() == {f"{module}.weight" for module in UNET_MODULES}
    for module, (down, up, alpha) in expected.unet.items():
        subscripts = "dr,rc->dc" if down.ndim == 2 else "drxy,rchw->dchw"
        product = np.einsum(subscripts, up.astype(np.float64), down)
        weight = weights[f"{module}.weight"]
        np.testing.assert_allclose(
            changed[f"{module}.weight"], weight + 0.7 * alpha / len(down) * product, atol=1e-5, err_msg=module
        )
    back = merged({**weights, **changed}, expected.unet, -0.7)
    for name, value in back.items():
        np.testing.assert_allclose(value, weights[name], atol=1e-5)


STEM = f"unet.{BLOCK}.attn1.to_q"
DOWN, UP = np.zeros((4, 32), np.float32), np.zeros((32, 4), np.float32)
GOOD = {f"{STEM}.lora_A.weight": DOWN, f"{STEM}.lora_B.weight": UP}
CONV = "unet.conv_in"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{STEM}.hada_w1_a": DOWN}, f"'{STEM}.hada_w1_a' in 'x' belongs to LoHa"),
        ({"lora_unet_conv_in.lokr_w1": DOWN}, "belongs to LoKr"),
        ({**GOOD, "lora_unet_conv_in.dora_scale": DOWN}, "'lora_unet_conv_in.dora_scale' in 'x' belongs to DoRA"),
        ({**GOOD, f"{STEM}.lora_magnitude_vector": DOWN}, "belongs to DoRA"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": DOWN}, "belongs to an SDXL LoRA"),
        ({"text_encoder_2.x.lora_A.weight": DOWN}, "belongs to an SDXL LoRA"),
        ({"lora_unet_conv_in.lora_mid.weight": DOWN}, "a LoRA with a core"),
        ({**GOOD, f"{STEM}.lora_B.bias": UP}, f"'{STEM}.lora_B.bias' in 'x' does not belong to a LoRA"),
        ({**GOOD, "unet.conv_in.weight": UP}, "'unet.conv_in.weight' in 'x' does not belong to a LoRA"),
        ({"unet.down_blocks.7.resnets.0.conv1.lora_A.weight": DOWN}, "that the model's unet does not have"),
        ({"unet.conv_norm_out.lora_A.weight": DOWN}, "that the model's unet does not have"),
        ({"transformer.blocks.0.lora_A.weight": DOWN}, "that the model's unet does not have"),
        ({"text_encoder.text_model.embeddings.token_embedding.lora_A.weight": DOWN}, "model's text_encoder does not"),
        ({"lora_unet_down_blocks_9_x.lora_down.weight": DOWN}, "that the model's unet does not have"),
        ({"lora_unet_input_blocks_1_3_proj_in.lora_down.weight": DOWN}, "that the model's unet does not have"),
        ({"lora_te_text_model_encoder_layers_9_mlp_fc1.alpha": DOWN}, "model's text_encoder does not"),
        ({f"{STEM}.lora_A.weight": DOWN}, f"'{STEM}.lora_A.weight' in 'x' has no counterpart, the 'up'"),
        ({f"{STEM}.lora_B.weight": UP}, f"'{STEM}.lora_B.weight' in 'x' has no counterpart, the 'down'"),
        ({f"{STEM}.alpha": np.float32(1)}, f"'{STEM}.alpha' in 'x' has no counterpart, the 'down'"),
        ({**GOOD, f"{STEM}.lora.down.weight": DOWN}, "are for the same module"),
        ({**GOOD, f"{STEM}.lora_A.weight": DOWN[:, :31]}, "has shape (4, 31); accepted: (r, 32)"),
        ({**GOOD, f"{STEM}.lora_A.weight": DOWN[:0]}, "has shape (0, 32)"),
        ({**GOOD, f"{STEM}.lora_A.weight": DOWN[0]}, "has shape (32,)"),
        ({**GOOD, f"{STEM}.lora_B.weight": UP[:31]}, "has shape (31, 4); accepted: (32, 4)"),
        ({**GOOD, f"{STEM}.lora_B.weight": UP[:, :3]}, "has shape (32, 3); accepted: (32, 4)"),
        ({**GOOD, f"{STEM}.lora_B.weight": UP[..., None]}, "has shape (32, 4, 1)"),
        ({**GOOD, f"{STEM}.lora_A.weight": DOWN.astype(np.int8)}, "is int8; accepted: floating-point"),
        ({**GOOD, f"{STEM}.alpha": np.zeros(2, np.float32)}, "has shape (2,); accepted: one finite number"),
        ({**GOOD, f"{STEM}.alpha": np.float32(np.nan)}, "accepted: one finite number"),
        (
            {f"{CONV}.lora_A.weight": np.zeros((4, 4, 1, 1), np.float32), f"{CONV}.lora_B.weight": UP},
            "has shape (4, 4, 1, 1); accepted: (r, 4, 3, 3)",
        ),
        (
            {
                f"{CONV}.lora_A.weight": np.zeros((4, 4, 3, 3), np.float32),
                f"{CONV}.lora_B.weight": np.zeros((32, 4, 3, 3), np.float32),
            },
            "has shape (32, 4, 3, 3); accepted: (32, 4)",
        ),
        ({}, "has no tensors"),
    ],
)
def test_refused_files(tmp_path, monkeypatch, tensors, said):
    monkeypatch.chdir(tmp_path)
    tensors_lib.write(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    with pytest.raises(UserError) as caught:
        lora.read("x.safetensors", SHAPES)
    assert said in str(caught.value).replace("x.safetensors", "x")
    assert "\n" not in str(caught.value)


# Against diffusers and PEFT.


@pytest.fixture
def pipeline():
    torch = pytest.importorskip("torch", reason=PEERS)
    diffusers = pytest.importorskip("diffusers", reason=PEERS)
    hf = pytest.importorskip("transformers", reason=PEERS)
    pytest.importorskip("peft", reason=PEERS)
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
    )
    text = hf.CLIPTextModel(
        hf.CLIPTextConfig(
            vocab_size=50, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1
        )
    )
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(),
        text_encoder=text,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
    )


def weights_of(pipeline):
    """Copies of the tensors of both parts."""
    return {part: {k: v.numpy().copy() for k, v in getattr(pipeline, part).state_dict().items()} for part in lora.PARTS}


def shapes_of(weights):
    return {part: {name: value.shape for name, value in tensors.items()} for part, tensors in weights.items()}


def compare_merged(measure, what, pipeline, path, weight, **options):
    """The weights of both parts with a file fused, by diffusers and by us."""
    before = weights_of(pipeline)
    changes = lora.read(path, shapes_of(before))
    pipeline.load_lora_weights(path.parent, weight_name=path.name, **options)
    pipeline.fuse_lora(lora_scale=weight)
    pipeline.unload_lora_weights()
    after = weights_of(pipeline)
    errors, moved = [0.0], 0
    for part in lora.PARTS:
        ours = before[part] | merged(before[part], getattr(changes, part), weight)
        assert ours.keys() == after[part].keys()
        for name, value in after[part].items():
            errors.append(np.abs(ours[name] - value).max())
            moved += not np.array_equal(value, before[part][name])
    assert moved == len(changes.unet) + len(changes.text_encoder)
    measure(f"weights with a LoRA, {what}", "diffusers and PEFT", max(errors), 1e-6)


@pytest.mark.peers
def test_our_file_in_diffusers(measure, pipeline, tmp_path):
    """Ranks and alphas differ between the modules; filters of 3 x 3 among them."""
    lora.write(tmp_path / "x.safetensors", make_lora())
    compare_merged(measure, "our file", pipeline, tmp_path / "x.safetensors", 0.7)


@pytest.mark.peers
def test_second_lora_on_top(measure, pipeline, tmp_path):
    lora.write(tmp_path / "x.safetensors", make_lora())
    compare_merged(measure, "our file", pipeline, tmp_path / "x.safetensors", 0.7)
    compare_merged(measure, "our file", pipeline, tmp_path / "x.safetensors", -0.2)


@pytest.mark.peers
@pytest.mark.parametrize("compvis", [False, True])
def test_kohya_in_diffusers(measure, pipeline, tmp_path, compvis):
    unet = UNET_MODULES
    if compvis:  # diffusers takes such names for SDXL's, whose every doubling lies behind an attention
        unet = tuple(name for name in unet if name != "up_blocks.0.upsamplers.0.conv")
    expected = make_lora(unet, ranks=(4,), alphas=(2.0,))
    tensors_lib.write(tmp_path / "x.safetensors", kohya_tensors(expected, compvis))
    options = {"unet_config": pipeline.unet.config} if compvis else {}
    compare_merged(measure, "kohya's file", pipeline, tmp_path / "x.safetensors", 0.7, **options)


@pytest.mark.peers
def test_first_format_in_diffusers(measure, pipeline, tmp_path):
    expected = make_lora(ATTENTIONS, TEXT_MODULES[:2], ranks=(4,), alphas=(4.0,))
    tensors_lib.write(tmp_path / "x.safetensors", processor_tensors(expected))
    compare_merged(measure, "diffusers' first format", pipeline, tmp_path / "x.safetensors", 1.0)


@pytest.mark.peers
@pytest.mark.parametrize("described", [False, True])
def test_file_of_diffusers(measure, pipeline, tmp_path, described):
    """As a training script saves it."""
    import peft

    chosen = {"unet": ["to_q", "to_out.0", "conv1", "proj_in"], "text_encoder": ["q_proj", "fc1"]}
    options = {}
    for part, modules in chosen.items():
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, init_lora_weights=False)
        model = peft.inject_adapter_in_model(config, getattr(pipeline, part))
        options[f"{part}_lora_layers"] = {k: v for k, v in model.state_dict().items() if "lora_" in k}
        if described:
            options[f"{part}_lora_adapter_metadata"] = {"r": 4, "lora_alpha": 8, "target_modules": modules}
    for part in lora.PARTS:
        layers = options[f"{part}_lora_layers"]
        options[f"{part}_lora_layers"] = {name.replace(".default", ""): value for name, value in layers.items()}
    pipeline.save_lora_weights(tmp_path, **options)
    pipeline.unload_lora_weights()
    path = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(path, "numpy") as file:
        assert ("lora_adapter_metadata" in file.metadata()) == described
    compare_merged(measure, "diffusers' file", pipeline, path, 0.5)
