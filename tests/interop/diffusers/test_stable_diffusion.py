"""Whole narrow Stable Diffusion pipelines with random weights, against diffusers' own; and broken folders."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from stable_diffusions import SCHEDULE, SCHEDULER, save
from theirs import to_numpy, to_torch

import ddpm_jax
from ddpm_jax.interop import workdirs
from ddpm_jax.interop.diffusers.fields import WEIGHTS
from ddpm_jax.runtime.errors import UserError

WHY = "diffusers, transformers and PyTorch are not installed (pip install -e '.[peers]')"
torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("diffusers", reason=WHY)
pytest.importorskip("transformers", reason=WHY)
pytestmark = pytest.mark.peers

PROMPTS, NEGATIVE, STEPS, GUIDANCE = ["a red bicycle", "the sea"], ["blue", ""], 20, 7.5
LEADING = {**SCHEDULE, "timestep_spacing": "leading"}
# The scheduler, its fields, and how the networks differ.
PIPELINES = {
    "PNDM": ("PNDMScheduler", SCHEDULER, {}),
    "DDIM": ("DDIMScheduler", {**SCHEDULE, "set_alpha_to_one": False, "clip_sample": False}, {}),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", SCHEDULE, {}),
    "UniPC": ("UniPCMultistepScheduler", SCHEDULE, {}),
    "Euler": ("EulerDiscreteScheduler", LEADING, {}),
    "Heun": ("HeunDiscreteScheduler", LEADING, {}),
    "v, zero terminal SNR": (
        "DDIMScheduler",
        {
            **SCHEDULE,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "set_alpha_to_one": False,
            "clip_sample": False,
        },
        {},
    ),
    "like 2.x": (
        "PNDMScheduler",
        SCHEDULER,
        {
            "use_linear_projection": True,
            "attention_head_dim": (2, 4),
            "upcast_attention": True,
            "text_encoder": {"hidden_act": "gelu"},
        },
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines(measure, tmp_path, name):
    """Prompts, negative prompts, guidance and 20 steps from the same latents, to latents and pictures."""
    kind, fields, networks = PIPELINES[name]
    theirs = save(tmp_path / "theirs", kind, fields, **networks)
    start = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    call = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    call["latents"] = to_torch(start)
    their_latents = theirs(**call, output_type="latent").images
    with torch.no_grad():  # as the pipeline itself makes pictures of them
        decoded = theirs.vae.decode(their_latents / theirs.vae.config.scaling_factor).sample
    their_pictures = np.round(theirs.image_processor.postprocess(decoded, output_type="np") * 255)
    their_latents = to_numpy(their_latents)

    run = ddpm_jax.load(workdirs.import_weights(str(tmp_path / "theirs"), tmp_path / "run"))
    request = run.request(prompts=PROMPTS, negative_prompts=NEGATIVE, num_steps=STEPS)
    assert request.guidance.scale == GUIDANCE
    model, numbers = run.model, np.arange(2)
    model_fn = model.model_fn(
        run.params, request.condition.of_images(numbers), request.condition.null(2), request.guidance
    )
    latents = ddpm_jax.sample(
        run.schedule, model_fn, jax.random.key(0), start.shape, x_t=jnp.asarray(start), **request.keywords()
    )
    what, against = "whole pipelines of Stable Diffusion, narrow, by six schedulers", "diffusers and transformers"
    error = np.abs(np.asarray(latents) - their_latents).max() / np.abs(their_latents).max()
    measure(f"latents, {what}", against, error, 1e-5, "relative")
    pictures = model.decoder.decode(latents)
    assert pictures.dtype == np.uint8
    assert np.std(their_pictures) > 5
    error = np.abs(pictures - their_pictures).max()
    measure(f"pictures, {what}", against, error, 1, "of 255")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "theirs"
    save(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "theirs")


def test_an_imported_pipeline_is_a_run(folder, tmp_path):
    """It samples after the folder is gone, at other sizes too, and each picture depends only on its number."""
    run = ddpm_jax.load(workdirs.import_weights(str(folder), tmp_path / "run"))
    shutil.rmtree(folder)
    run = ddpm_jax.load(tmp_path / "run")
    assert (run.shape, run.model.decoder.shape) == ((16, 16, 3), (8, 8, 4))
    assert (run.config.sample.sampler, run.config.sample.guidance_scale, run.config.diffusion.clip) == (
        *("plms", GUIDANCE),
        False,
    )
    images = run.sample(3, prompts=["a", "b"], num_steps=2)
    again = run.sample(indices=[2], prompts=["a"], num_steps=2)
    assert np.abs(images[2:].astype(int) - again).max() <= 1
    assert run.sample(1, prompts=["a"], num_steps=2, height=24, width=16).shape == (1, 24, 16, 3)


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(folder, tmp_path):
    """The message about the folder; nothing is left behind."""
    with pytest.raises(UserError) as caught:
        workdirs.import_weights(str(folder), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["theirs"], "something half-made is left"
    return str(caught.value)


@pytest.mark.parametrize("part", ["unet", "scheduler", "vae", "text_encoder", "tokenizer"])
def test_a_part_that_is_missing(folder, tmp_path, part):
    shutil.rmtree(folder / part)
    assert f"{str(folder)!r} has no {part}/" in refused(folder, tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("kind", ["config", "weights"])
def test_a_file_that_is_missing(folder, tmp_path, part, kind):
    file = next((folder / part).glob("*.safetensors" if kind == "weights" else "config.json"))
    file.unlink()
    assert (str(folder / part) if kind == "weights" else str(file)) in refused(folder, tmp_path)


@pytest.mark.parametrize(
    ("part", "file", "name"),
    [
        ("unet", WEIGHTS[0], "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
        ("vae", WEIGHTS[0], "quant_conv.weight"),
        ("vae", WEIGHTS[0], "decoder.up_blocks.1.resnets.0.conv1.weight"),
        ("text_encoder", "model.safetensors", "final_layer_norm.bias"),
    ],
)
def test_a_tensor_of_another_shape(folder, tmp_path, part, file, name):
    def grow(tensors):
        found = name if name in tensors else f"text_model.{name}"  # as older transformers have it
        tensors[found] = np.concatenate([tensors[found]] * 2)

    change_tensors(folder / part / file, grow)
    said = refused(folder, tmp_path)
    assert name in said
    assert "has shape" in said
    assert str(folder / part / file) in said


def test_a_tensor_that_is_missing(folder, tmp_path):
    change_tensors(folder / "vae" / WEIGHTS[0], lambda tensors: tensors.pop("post_quant_conv.bias"))
    assert "has no tensor 'post_quant_conv.bias'" in refused(folder, tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_cut_off(folder, tmp_path, part):
    (file,) = (folder / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    said = refused(folder, tmp_path)
    assert said.startswith(f"{str(file)!r} cannot be read: ")


@pytest.mark.parametrize(
    ("part", "whose"),
    [
        ("text_encoder_2", "Stable Diffusion XL"),
        ("text_encoder_3", "Stable Diffusion 3"),
        ("transformer", "Stable Diffusion 3"),
        ("prior", "unCLIP"),
    ],
)
@pytest.mark.parametrize("there", ["named", "folder"])
def test_parts_of_other_pipelines(folder, tmp_path, part, whose, there):
    if there == "named":
        change_json(folder / "model_index.json", **{part: ["transformers", "Some"]})
    else:
        (folder / part).mkdir()
    said = refused(folder, tmp_path)
    assert f"has {part!r}, " in said
    assert whose in said
    assert said.endswith("accepted: Stable Diffusion 1 and 2")


def test_parts_that_are_named_and_empty(folder, tmp_path):
    """diffusers writes [null, null] for parts that a pipeline omits."""
    change_json(folder / "model_index.json", text_encoder_2=[None, None], safety_checker=["stable_diffusion", "Some"])
    told = []
    workdirs.import_weights(str(folder), tmp_path / "run", tell=told.append)
    assert told == ["the safety checker is ignored: the run does not check its pictures"]


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLPipeline"},
            "_class_name is 'StableDiffusionXLPipeline'",
        ),
        ("vae/config.json", {"latent_channels": 3}, "out_channels is 4 in {unet}, but latent_channels is 3 in {vae}"),
        (
            "unet/config.json",
            {"cross_attention_dim": 32},
            "cross_attention_dim is 32 in {unet}, but hidden_size is 24 in {text_encoder}; accepted: the same",
        ),
        ("unet/config.json", {"in_channels": 5}, "in_channels is 5 in {unet}; accepted: 4, 9"),
        ("unet/config.json", {"layers_per_block": "x"}, "layers_per_block is 'x' in {unet}; accepted: 'whole numbers"),
        ("unet/config.json", {"block_out_channels": 16}, "has an invalid value"),
        ("vae/config.json", {"layers_per_block": "x"}, "layers_per_block is 'x' in {vae}; accepted: whole numbers"),
        ("vae/config.json", {"down_block_types": ["Some"] * 2}, "down_block_types is ['Some', 'Some'] in {vae}"),
        ("scheduler/scheduler_config.json", {"_class_name": "Some"}, "_class_name is 'Some' in {scheduler}"),
        ("text_encoder/config.json", {"hidden_act": "mish"}, "hidden_act is 'mish' in {text_encoder}"),
    ],
)
def test_configs_that_do_not_fit(folder, tmp_path, file, fields, said):
    change_json(folder / file, **fields)
    paths = {part: repr(str(folder / part / "config.json")) for part in ("unet", "vae", "text_encoder")}
    paths["scheduler"] = repr(str(folder / "scheduler" / "scheduler_config.json"))
    assert said.format(**paths) in refused(folder, tmp_path)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"])
def test_broken_json(folder, tmp_path, file):
    (folder / file).write_text("{")
    refused(folder, tmp_path)
