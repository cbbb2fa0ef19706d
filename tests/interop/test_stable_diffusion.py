"""Stable Diffusion's runs, without PyTorch: exported, and imported from single files."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import single_files
from clips import VOCAB_SIZE
from folders import PARTS, part
from PIL import Image
from safetensors.numpy import load_file, save_file
from single_files import TEXT, UNET, small
from tiny import make_run, near

import ddpm_jax
from configs import finetune
from ddpm_jax import config as config_lib
from ddpm_jax.interop import workdirs
from ddpm_jax.interop.diffusers import adapters, folder, stable_diffusion
from ddpm_jax.pipeline import compose, load
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.workdir import read_config, read_dataset

pytestmark = pytest.mark.slow


def assert_same_files(first, second):
    for name, file in PARTS.items():
        assert (first / name / file).read_bytes() == (second / name / file).read_bytes(), name
    files = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
    tokenizer = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
    for name in ("model_index.json", *files, *(f"tokenizer/{name}" for name in tokenizer)):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def opened(run):
    """The parameters of the text encoder and the autoencoder."""
    return jax.tree.leaves((run.condition.texts.open_params(), run.model.decoder.open_params()))


def assert_same_runs(first, second):
    """They are equal except for the names of their sources."""
    found, expected = load(first), load(second)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(a, b)
    named = {"text.encoder", "autoencoder.source"}
    assert {name.partition(":")[0] for name in config_lib.differences(found.config, expected.config)} <= named
    assert found.dataset["diffusers"] == expected.dataset["diffusers"]
    assert found.dataset["tokenizer"] == expected.dataset["tokenizer"]
    for a, b in zip(*(opened(run) for run in (found, expected)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_exported_holds_the_tensors(exported):
    for name, expected in (
        ("unet", small(UNET, 0)),
        ("text_encoder", small(TEXT, 2)),
    ):
        found = part(exported, name)
        assert found.keys() == expected.keys()
        assert all(value.tobytes() == expected[tensor].tobytes() for tensor, value in found.items())


def test_there_and_back(imported, exported, tmp_path):
    """A folder and a single file are the same run, and its folder is the same to the byte."""
    again = workdirs.import_weights(str(exported), tmp_path / "run")
    assert_same_runs(again, imported)
    assert_same_files(workdirs.export_weights(load(again), tmp_path / "again"), exported)


def test_a_file_with_our_own_names_holds_the_frozen_parts(imported, tmp_path):
    file = workdirs.export_weights(load(imported), tmp_path / "x.safetensors")
    again = workdirs.import_weights(str(file), tmp_path / "run")
    assert_same_runs(again, imported)
    assert load_file(workdirs.export_weights(load(again), tmp_path / "y.safetensors")).keys() == load_file(file).keys()
    for name in ("text_encoder", "autoencoder"):
        for written in (imported / name).iterdir():
            assert (again / name / written.name).read_bytes() == written.read_bytes()


def test_second_version(tokens, tmp_path):
    """--prediction is required, and prompts are padded with "!"."""
    save_file(single_files.tensors("2.x"), tmp_path / "model.safetensors")
    source = str(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="use --prediction=eps for a 512-pixel model, --prediction=v for a 768-pixel"):
        workdirs.import_weights(source, tmp_path / "run", tokenizer=tokens)
    path = workdirs.import_weights(source, tmp_path / "run", tokenizer=tokens, prediction="v")
    run = load(path)
    assert run.config.diffusion.prediction == "v"
    assert run.shape == (192, 192, 3)
    assert run.condition.texts.tokenizer.encode([""]).ids[0].tolist() == [512, 513, *[0] * 18]
    again = workdirs.import_weights(str(workdirs.export_weights(run, tmp_path / "again")), tmp_path / "back")
    assert_same_runs(again, path)
    assert read_dataset(again)["diffusers"]["linear_projections"]


def test_tokenizer_of_the_hub(file, tokens, tmp_path, monkeypatch):
    located = []

    def locate(name, choose):
        located.append((name, choose(["vocab.json", "merges.txt", "tokenizer.json", "pytorch_model.bin"])))
        return tokens

    monkeypatch.setattr(folder, "locate", locate)
    run = load(workdirs.import_weights(str(file), tmp_path / "run"))
    assert located == [("openai/clip-vit-large-patch14", ["vocab.json", "merges.txt"])]
    assert run.condition.texts.tokenizer.max_length == 20

    def fails(name, choose):
        raise UserError(f"{name!r} cannot be had")

    monkeypatch.setattr(folder, "locate", fails)
    with pytest.raises(
        UserError, match=r"has no tokenizer, and .* cannot be had; use --tokenizer with a folder that has CLIP's"
    ):
        workdirs.import_weights(str(file), tmp_path / "other")


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        ("nowhere", "'nowhere' cannot be read"),
        (".", "'.' has no tokenizer; accepted: tokenizer.json, or vocab.json and merges.txt"),
    ],
)
def test_an_invalid_tokenizer(file, tmp_path, monkeypatch, tokenizer, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        workdirs.import_weights(str(file), tmp_path / "run", tokenizer=tokenizer)
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flag", "value"), [("tokenizer", "."), ("prediction", "v")])
def test_what_only_a_single_file_needs(exported, tmp_path, flag, value):
    with pytest.raises(UserError, match=f"--{flag} is for a Stable Diffusion in a .safetensors or .ckpt file"):
        workdirs.import_weights(str(exported), tmp_path / "run", **{flag: value})


def test_tokenizer_of_another_encoder(tokens, tmp_path):
    parts = (
        small(UNET, 0),
        small(single_files.autoencoder_shapes(), 1),
        small(single_files.text_shapes(length=20), 2),
    )
    save_file(single_files.checkpoint(*parts), tmp_path / "x.safetensors")
    with pytest.raises(
        UserError, match=f"the tokenizer has {VOCAB_SIZE} tokens .* accepted: at most the 50 tokens and texts of 20"
    ):
        workdirs.import_weights(str(tmp_path / "x.safetensors"), tmp_path / "run", tokenizer=tokens)
    assert not (tmp_path / "run").exists()


def test_file_of_another_kind(tokens, tmp_path):
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is not a Stable Diffusion checkpoint"):
        workdirs.import_weights(str(tmp_path / "x.safetensors"), tmp_path / "run", tokenizer=tokens)
    for name in ("y.safetensors", "y.ckpt"):
        with pytest.raises(UserError, match=f"{name}' is not a file"):
            workdirs.import_weights(str(tmp_path / name), tmp_path / "run", tokenizer=tokens)


# A network that is given the masked picture.

INPAINTING = {"num_steps": 2, "prompts": ["a red bicycle"], "guidance_scale": 3.0, "sampler": "ddim"}
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
MASK = np.zeros((16, 16), bool)
MASK[4:12, 2:9] = True


def inpainting_unet():
    """Its first filters emphasise the picture's latents, which vary little without training."""
    tensors = small(single_files.unet_shapes(in_channels=9), 0)
    tensors["conv_in.weight"][:, 5:] *= 300
    return tensors


@pytest.fixture(scope="module")
def inpainting(tokens, tmp_path_factory):
    """Imported from a single file."""
    folder = tmp_path_factory.mktemp("inpainting")
    parts = (
        inpainting_unet(),
        small(single_files.autoencoder_shapes(), 1),
        small(TEXT, 2),
    )
    save_file(single_files.checkpoint(*parts), folder / "x.safetensors")
    return workdirs.import_weights(str(folder / "x.safetensors"), folder / "run", tokenizer=tokens)


def test_inpainting_network(inpainting):
    run = load(inpainting).at(16, 16)
    assert run.config.model.masked_picture
    found = run.inpaint(PICTURES, MASK, 1, **INPAINTING)
    np.testing.assert_array_equal(found[:, ~MASK], PICTURES[:, ~MASK])
    assert np.any(found[:, MASK] != PICTURES[:, MASK])
    hidden = np.where(MASK[..., None], 0, PICTURES)
    np.testing.assert_array_equal(run.inpaint(hidden, MASK, 1, **INPAINTING)[:, MASK], found[:, MASK])
    shown = np.where(MASK[..., None], PICTURES, 255 - PICTURES)  # what is known counts
    assert np.any(run.inpaint(shown, MASK, 1, **INPAINTING)[:, MASK] != found[:, MASK])
    each = run.inpaint(PICTURES[1:], np.stack([MASK, ~MASK]), 1, batch_size=1, **INPAINTING)
    np.testing.assert_array_equal(each[1][MASK], PICTURES[2][MASK])
    assert not near(each[0][MASK], found[1][MASK])  # picture 0 of this call, whose noise is another
    assert near(run.inpaint(PICTURES[:1], MASK, 1, batch_size=1, **INPAINTING), found[:1])


def test_inpainting_network_by_guidance(inpainting):
    """Both branches are given the picture: a prompt that is its own negative prompt is one without guidance."""
    run = load(inpainting).at(16, 16)
    options = {**INPAINTING, "negative_prompts": INPAINTING["prompts"]}
    plain = run.inpaint(PICTURES, MASK, 1, **{**INPAINTING, "guidance_scale": 1.0})
    assert near(run.inpaint(PICTURES, MASK, 1, **options), plain)


def test_what_an_inpainting_network_cannot(inpainting, imported, tmp_path):
    run = load(inpainting).at(16, 16)
    calls = (
        lambda: run.sample(1, **INPAINTING),
        lambda: run.progressive(1, **INPAINTING),
        lambda: run.vary(PICTURES, 500, **INPAINTING),
        lambda: run.interpolate(PICTURES[0], PICTURES[1], **INPAINTING),
        lambda: run.encode(PICTURES, 2),
    )
    for call in calls:
        with pytest.raises(UserError, match="paints a part of a picture anew, and needs the picture and a mask"):
            call()
    for name, value in {"jump": 10, "times": 1, "fixed_noise": True}.items():
        with pytest.raises(UserError, match=f"{name} is {value}, but this run's network takes the masked picture"):
            run.inpaint(PICTURES, MASK, **{name: value}, **INPAINTING)
    with pytest.raises(UserError, match="networks that take a masked picture cannot be trained here"):
        ddpm_jax.train(finetune.get_config(str(inpainting)), tmp_path / "run")
    with pytest.raises(UserError, match=r"stage 2, .*, takes no input from another stage"):
        compose([imported, inpainting], tmp_path / "pipeline")


def test_inpainting_network_there_and_back(inpainting, tmp_path):
    run = load(inpainting)
    exported = workdirs.export_weights(run, tmp_path / "folder")
    assert json.loads((exported / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    assert json.loads((exported / "unet" / "config.json").read_text())["in_channels"] == 9
    expected, found = inpainting_unet(), part(exported, "unet")
    assert found.keys() == expected.keys()
    assert all(value.tobytes() == expected[name].tobytes() for name, value in found.items())
    again = workdirs.import_weights(str(exported), tmp_path / "again")
    assert_same_runs(again, inpainting)
    assert stable_diffusion.layout_of(run.model, {}) == stable_diffusion.layout_of(run.model, run.dataset)


def test_inpainting_network_by_command(call, inpainting, tmp_path):
    Image.fromarray(PICTURES[0]).save(tmp_path / "picture.png")
    Image.fromarray(255 * MASK.astype(np.uint8)).save(tmp_path / "mask.png")
    told = ("--height=16", "--width=16", "--num_steps=2", "--num_images=2", "--prompt=a red bicycle")
    flags = ("--mode=inpaint", f"--workdir={inpainting}", *told, f"--input={tmp_path / 'picture.png'}")
    flags = (*flags, f"--mask={tmp_path / 'mask.png'}", f"--out={tmp_path / 'x.png'}")
    status, output = call(*flags, config=None)
    assert status == 0, output
    assert (tmp_path / "x.png").exists()
    for command, said in (
        ((*flags, "--jump=10"), "error: jump is 10, but this run's network takes the masked picture as an input"),
        (("--mode=sample", f"--workdir={inpainting}", *told), "accepted: --mode=inpaint with --input and --mask"),
    ):
        status, output = call(*command, config=None)
        assert (status, output.count("\n")) == (1, 1), output
        assert said in output


# Runs that diffusers cannot hold.


@pytest.mark.parametrize(
    ("captions", "said"), [(("a", "b"), "has a text encoder trained with the network"), ((), "takes no prompts")]
)
def test_no_stable_diffusion(tmp_path, captions, said):
    run = make_run(captions=captions)
    with pytest.raises(UserError, match=f"LoRA files are for a Stable Diffusion, but this run {said}"):
        adapters.add([("x.safetensors", 1.0)], run.dataset, run.model, run.params)
    if captions:
        with pytest.raises(UserError, match=f"this run {said}.*accepted: --out of a .safetensors file"):
            workdirs.export_weights(run, tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "said"), [("mask_padding", "padding of prompts"), ("pooled", "vector for the whole")]
)
def test_prompts_that_are_treated_differently(imported, field, said):
    config = read_config(imported)
    config.text[field] = True
    assert said in stable_diffusion.why_not(config_lib.make_model(config, read_dataset(imported)))


def test_latents_without_prompts(imported, tmp_path):
    config = read_config(imported)
    config.text.encoder = ""
    run = load(imported)
    run = dataclasses.replace(run, config=config, model=config_lib.make_model(config, read_dataset(imported)))
    with pytest.raises(UserError, match="latents without prompts, for which diffusers has no pipeline"):
        workdirs.export_weights(run, tmp_path / "out")


def test_layout_of_a_run_that_was_trained_further(imported):
    """Its description lacks the layout, so the default one is written."""
    run = load(imported)
    assert stable_diffusion.layout_of(run.model, {}) == stable_diffusion.layout_of(run.model, run.dataset)


# By command.


def test_commands(call, file, tokens, imported, two, tmp_path):
    run, made = tmp_path / "run", tmp_path / "made.safetensors"
    flags = ("--mode=import", f"--source={file}", f"--tokenizer={tokens}", f"--workdir={run}")
    status, output = call(*flags, config=None)
    assert status == 0, output
    loras = [f"--lora={path}:{weight}" for path, weight in two]
    sized = ("--height=8", "--width=8", "--num_steps=2", "--num_images=1", "--prompt=a red bicycle")
    status, output = call(
        "--mode=sample", f"--workdir={run}", *sized, *loras, f"--out={tmp_path / 'x.png'}", config=None
    )
    assert status == 0, output
    assert "LoRA a.safetensors at 0.7, LoRA b.safetensors at 0.3" in output
    with Image.open(tmp_path / "x.png") as picture:
        settings = json.loads(picture.text["settings"])
    assert [found["name"] for found in settings["loras"]] == ["a.safetensors", "b.safetensors"]
    status, output = call("--mode=export", f"--workdir={run}", *loras, f"--out={tmp_path / 'changed'}", config=None)
    assert status == 0, output
    assert (tmp_path / "changed" / "model_index.json").exists()
    for more, said in (
        (("--adapters", f"--out={made}"), "this run trained no adapters (lora.rank is 0)"),
        (("--prediction=v", f"--out={made}"), "--prediction does nothing with --mode=export"),
        (("--lora=a:b", f"--out={made}"), "--lora is 'a:b'; accepted: a file"),
        (("--lora=nothing", f"--out={made}"), "'nothing' is not a file"),
    ):
        status, output = call("--mode=export", f"--workdir={run}", *more, config=None)
        assert (status, output.count("\n")) == (1, 1), output
        assert said in output


def test_autoencoder(call, tmp_path):
    """A run that trained one is written as a folder, with the scaling factor of its latents."""
    run, out = tmp_path / "run", tmp_path / "out"
    sizes = {"level_channels": "(8,8)", "num_res_blocks": "1", "num_groups": "4", "middle_attention": "False"}
    flags = [f"--config.autoencoder.{name}={value}" for name, value in sizes.items()]
    status, output = call("--config.train.objective=autoencoder", *flags, f"--workdir={run}")
    assert status == 0, output
    status, output = call("--mode=export", f"--workdir={run}", f"--out={out}", config=None)
    assert status == 0, output
    net, params, factor = ddpm_jax.load_autoencoder(out)
    own, expected, unknown = ddpm_jax.load_autoencoder(run)
    assert net == own
    assert (factor > 0, unknown) == (True, 0)
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(expected))
    for more, said in (
        ((), "--mode=export of an autoencoder needs --out: a folder"),
        (("--step=4", f"--out={tmp_path / 'x'}"), "--step does nothing with --mode=export of an autoencoder"),
        ((f"--out={out}",), "not empty"),
    ):
        status, output = call("--mode=export", f"--workdir={run}", *more, config=None)
        assert (status, output.count("\n")) == (1, 1), output
        assert said in output
