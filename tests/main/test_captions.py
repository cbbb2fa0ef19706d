"""Runs that learn from captions, by the command line."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from runs import CAPTIONED, assert_same_checkpoint, checkpoint, metrics

import ddpm_jax
from ddpm_jax.interop import workdirs

pytestmark = pytest.mark.slow
PROMPTS = ("forty-two", "seventeen, \u0627\u062b\u0646\u0627\u0646")


def output_of(call, mode, *flags):
    status, output = call(f"--mode={mode}", *flags, config=None)
    assert status == 0, output
    return output


def test_a_run_keeps_its_tokenizer_and_trains_its_encoder(captioned):
    workdir, output = captioned
    dataset = json.loads((workdir / "dataset.json").read_text())
    assert len(dataset["shown_captions"]) == 64
    assert (workdir / "tokenizer.json").exists()
    assert "tokenizer" not in dataset
    parts = checkpoint(workdir)
    assert parts["params"].keys() == parts["ema_0.99"].keys() == {"net", "encoder"}
    assert "warning" not in output.lower(), output


def test_resumes_bit_for_bit(captioned, call, tmp_path):
    workdir = shutil.copytree(captioned[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "24")
    status, output = call(f"--workdir={workdir}", config=CAPTIONED)
    assert status == 0, output
    assert "resuming from the checkpoint of step 18" in output
    assert_same_checkpoint(workdir, captioned[0])
    assert metrics(workdir)[-1]["loss"] == metrics(captioned[0])[-1]["loss"]


def test_pictures_of_prompts(captioned, call, tmp_path):
    """A grid with one row per prompt, one file per image with its prompt, and arrays: all have the same images."""
    flags = (f"--workdir={captioned[0]}", "--num_images=5", "--seed=3", "--num_steps=4", "--guidance_scale=2")
    lines = tmp_path / "prompts.txt"
    lines.write_text("\ufeff" + "\n\n  ".join(PROMPTS) + "\n", "utf-8")
    grid, folder, arrays = (tmp_path / name for name in ("a.png", "folder", "a.npz"))
    each = [f"--prompt={prompt}" for prompt in PROMPTS]
    output_of(call, "sample", *flags, *each, f"--out={grid}")
    output_of(call, "sample", *flags, *each, "--negative_prompt=", "--output=png", f"--out={folder}")
    output_of(call, "sample", *flags, f"--prompts={lines}", "--output=npz", f"--out={arrays}")
    expected = np.load(arrays)
    assert expected["prompt"].tolist() == [PROMPTS[i % 2] for i in range(5)]
    tiles = np.asarray(Image.open(grid))[2:, 2:].reshape(2, 66, 3, 66).swapaxes(1, 2)[:, :, :64:8, :64:8]
    for number, image in enumerate(expected["image"][..., 0]):
        np.testing.assert_array_equal(tiles[number % 2, number // 2], image)
        with Image.open(folder / f"{number:06d}.png") as picture:
            np.testing.assert_array_equal(picture, image)
            said = picture.text
        prompt = PROMPTS[number % 2]
        assert said["Description"] == prompt
        assert said["Software"].startswith("ddpm_jax ")
        assert said["parameters"].splitlines()[:2] == [prompt, "Negative prompt: "]
        facts = "Steps: 4, Sampler: dpmpp_2m_sde, CFG scale: 2.0, Seed: 3, Size: 8x8"
        assert said["parameters"].splitlines()[2] == f"{facts}, Model: captioned, step 24, EMA 0.99"
        settings = json.loads(said["settings"])
        assert (settings["seed"], settings["index"], settings["num_steps"]) == (3, number, 4)
        assert (settings["prompts"], settings["negative_prompts"]) == (list(PROMPTS), [""])
    assert Image.open(grid).text["Description"] == "\n".join(PROMPTS)


def test_shards_hold_prompts_and_continue(captioned, call, tmp_path):
    flags = (f"--workdir={captioned[0]}", "--shard_size=4", "--num_steps=4", f"--out={tmp_path}")
    each = [f"--prompt={prompt}" for prompt in PROMPTS]
    output_of(call, "sample", *flags, *each, "--images=0-3")
    assert "shards that exist already: 1" in output_of(call, "sample", *flags, *each, "--images=0-7")
    files = [np.load(path) for path in sorted(tmp_path.iterdir())]
    assert [file["prompt"].tolist() for file in files] == [[*PROMPTS] * 2] * 2
    status, output = call("--mode=sample", *flags, "--prompt=another", "--images=0-7", config=None)
    assert (status, output.count("\n")) == (1, 1)
    assert "holds images made with different settings (prompts: ['forty-two', " in output


def test_a_prompt_that_is_cut_is_named(captioned, call, tmp_path):
    flags = (f"--workdir={captioned[0]}", "--num_images=1", "--num_steps=4", f"--out={tmp_path / 'a.png'}")
    lines = output_of(call, "sample", *flags, f"--prompt={'forty-two ' * 40}").splitlines()
    assert [line for line in lines if line.startswith("warning: The prompt 'forty-two forty-two")]  # without its source


@pytest.mark.parametrize(
    ("mode", "flags", "tiles"),
    [
        ("interpolate", ("--prompt=one", "--weights=0,0.5,1", "--num_images=2"), (3, 2)),
        ("vary", ("--input=data:3", "--t=20", "--num_images=1"), (2, 1)),
        ("inpaint", ("--input=data:3", "--mask={mask}", "--num_images=1"), (2, 1)),
        ("progressive", ("--num_images=2", "--num_stages=4"), (4, 2)),
    ],
)
def test_other_modes_take_a_prompt(captioned, call, tmp_path, mode, flags, tiles):
    mask, out = tmp_path / "mask.png", tmp_path / "a.png"
    Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 4, axis=0).repeat(8, axis=1)).save(mask)
    flags = [flag.format(mask=mask) for flag in flags]
    output_of(call, mode, f"--workdir={captioned[0]}", "--prompt=two", "--num_steps=4", f"--out={out}", *flags)
    picture = Image.open(out)
    assert picture.size == tuple(66 * count + 2 for count in tiles)
    assert picture.text["Description"].splitlines()[0] == "two"


def test_exported_and_imported_it_samples_the_same(captioned, tmp_path):
    """It has the same weights and the same tokens."""
    run = ddpm_jax.load(captioned[0])
    file = workdirs.export_weights(run, tmp_path / "a.safetensors")
    again = ddpm_jax.load(workdirs.import_weights(str(file), tmp_path / "again"))
    options = {"seed": 1, "prompts": [*PROMPTS, "", "forty " * 20]}
    assert again.settings(**options) == {**run.settings(**options), "step": again.step}
    found, expected = (each.request(prompts=options["prompts"]).condition for each in (again, run))
    jax.tree.map(np.testing.assert_array_equal, found.of_images(range(4)), expected.of_images(range(4)))
    assert found.shown == expected.shown


def test_is_answered_in_one_sentence(trained, captioned, call, tmp_path):
    for run, flags, message in (
        (trained, ("--mode=sample", "--prompt=one"), "did not learn from captions, so it takes no prompt"),
        (captioned, ("--mode=sample", f"--prompts={tmp_path / 'none'}"), "cannot be read: No such file"),
        (
            captioned,
            ("--mode=sample", "--prompt=a", "--negative_prompt=b"),
            "does nothing at a guidance_scale of 1",
        ),
        (captioned, ("--mode=export", f"--out={tmp_path / 'new'}"), "accepted: --out of a .safetensors file"),
    ):
        status, output = call(f"--workdir={run[0]}", *flags, config=None)
        assert (status, output.count("\n")) == (1, 1), output
        assert output.startswith("error: ")
        assert message in output
    assert not (tmp_path / "new").exists()
