"""Sampling and editing by the command line, and as the library gives it."""

import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from runs import PATIENCE, ROOT, STEPS, checkpoint, in_two_processes
from sklearn.datasets import load_digits

import ddpm_jax

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("output", ["grid", "png", "npz"])
def test_writes_what_the_library_gives(trained, call, tmp_path, output):
    workdir, _ = trained
    out = tmp_path / {"grid": "a.png", "png": "folder", "npz": "a.npz"}[output]
    flags = (f"--workdir={workdir}", "--num_images=5", "--seed=3", "--num_steps=10", f"--output={output}")
    status, text = call("--mode=sample", *flags, f"--out={out}", config=None)
    assert status == 0, text
    expected = ddpm_jax.load(workdir).sample(5, seed=3, num_steps=10)
    assert expected.shape == (5, 8, 8, 1)
    if output == "grid":
        assert Image.open(out).size == (3 * 66 + 2, 2 * 66 + 2)
        return
    if output == "png":
        pictures = np.stack([np.asarray(Image.open(path))[..., None] for path in sorted(out.iterdir())])
    else:
        pictures = np.load(out)["image"]
    # The library runs on 8 devices here, the command on one.
    assert np.max(np.abs(pictures.astype(int) - expected)) <= 1


def test_image_depends_on_seed_and_number_alone(trained):
    run = ddpm_jax.load(trained[0])
    many = run.sample(20, seed=1, num_steps=10, batch_size=8)
    few = run.sample(3, seed=1, num_steps=10)
    assert np.max(np.abs(many[:3].astype(int) - few)) <= 1
    assert np.any(run.sample(3, seed=2, num_steps=10) != few)


def test_shards_continue_where_they_stopped(trained, call, tmp_path):
    """Killed on the way, then started again: what was there stays, and the images are those of one run."""
    flags = (f"--workdir={trained[0]}", "--images=0-39", "--shard_size=4", "--sampler=ddim", "--num_steps=9")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, text = call("--mode=sample", *flags, f"--out={whole}", config=None)
    assert status == 0, text
    process = subprocess.Popen(
        [sys.executable, "main.py", "--mode=sample", *flags, f"--out={parts}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + PATIENCE
    while not list(parts.glob("*.npz")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    first = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert first
    status, text = call("--mode=sample", *flags, f"--out={parts}", config=None)
    assert status == 0, text
    names = [path.name for path in sorted(whole.iterdir())]
    assert [path.name for path in sorted(parts.glob("images*"))] == names
    assert all((parts / name).stat().st_mtime_ns == time for name, time in first.items())
    for name in names:
        a, b = np.load(whole / name), np.load(parts / name)
        np.testing.assert_array_equal(a["image"], b["image"])
        assert str(a["settings"]) == str(b["settings"])


def test_two_processes_make_the_images_of_one(trained, start, tmp_path):
    out = tmp_path / "a.npz"
    flags = ("--mode=sample", f"--workdir={trained[0]}", "--num_images=6", "--num_steps=5", "--output=npz")
    outputs = in_two_processes(start, *flags, f"--out={out}", config=None)
    assert str(out) in outputs[0]
    assert str(out) not in outputs[1]
    run = ddpm_jax.load(trained[0])
    expected = run.sample(6, num_steps=5)
    assert np.max(np.abs(np.load(out)["image"].astype(int) - expected)) <= 1
    edit = ("--mode=vary", f"--workdir={trained[0]}", "--input=data:3", "--t=20", "--num_images=5", "--num_steps=4")
    in_two_processes(start, *edit, f"--out={tmp_path / 'vary.png'}", config=None)
    tiles = np.asarray(Image.open(tmp_path / "vary.png"))[2:, 2:].reshape(66, 6, 66).swapaxes(0, 1)[:, :64:8, :64:8]
    expected = run.vary(tiles[:1, ..., None].repeat(5, axis=0), 20, num_steps=4)
    assert np.max(np.abs(tiles[1:, ..., None].astype(int) - expected)) <= 1


def test_a_finished_run_is_left_as_it_is(trained, call, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    status, output = call(f"--workdir={workdir}")
    assert status == 0, output
    assert "already finished; pictures are in" in output
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    changed = {path.name for path in {*before, *after} if before.get(path) != after.get(path)}
    assert changed <= {"environment.json"}
    status, output = call(f"--workdir={workdir}", "--config.sample.num_images=4")
    assert status == 0, output
    assert "sampling 4 images" in output


def test_edits_training_images(trained, call, data_dir, tmp_path):
    """As a command, from pictures of the data set."""
    out = tmp_path / "a.png"
    flags = (f"--workdir={trained[0]}", "--input=data:0,data:9", "--t=20", "--weights=0,1", "--num_steps=5")
    status, text = call("--mode=interpolate", *flags, f"--out={out}", config=None)
    assert status == 0, text
    tiles = np.asarray(Image.open(out))[2:, 2:].reshape(66, 4, 66).swapaxes(0, 1)[:, :64:8, :64:8]
    digits = load_digits().images * 255 / 16
    assert all(min(np.abs(tile - digit).max() for digit in digits) <= 1 for tile in (tiles[0], tiles[3]))
    status, text = call("--mode=interpolate", f"--workdir={trained[0]}", "--input=data:0", config=None)
    assert (status, text) == (1, "error: --input has 1 values; accepted: 2\n")


def test_each_command_has_a_file_and_the_report_shows_them(trained, call, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    before = set((workdir / "samples").iterdir())
    for number in (1, 2):
        flags = (f"--input=data:{number}", "--t=20", "--num_images=1", "--num_steps=4")
        status, text = call("--mode=vary", f"--workdir={workdir}", *flags, config=None)
        assert status == 0, text
    made = sorted(path.name for path in set((workdir / "samples").iterdir()) - before)
    assert made == [
        f"vary_step_00000024_seed_0_input_data-{number}_num_images_1_num_steps_4_t_20.png" for number in (1, 2)
    ]
    page = (workdir / "report.html").read_text()
    assert all(name in page for name in made)


def test_step_and_weights_can_be_chosen(trained):
    newest, older, raw = (ddpm_jax.load(trained[0], **options) for options in ({}, {"step": 12}, {"raw": True}))
    assert (newest.step, older.step, raw.ema_decay) == (STEPS, 12, None)
    reference = checkpoint(trained[0])
    jax.tree.map(np.testing.assert_array_equal, newest.params, reference["ema_0.99"])
    jax.tree.map(np.testing.assert_array_equal, raw.params, reference["params"])
    jax.tree.map(np.testing.assert_array_equal, older.params, checkpoint(trained[0], 12)["ema_0.99"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 7}, "no checkpoint of step 7; accepted: [12, 18, 24]"),
        ({"ema_decay": 0.5}, "no average of decay 0.5; it has 0.99"),
    ],
)
def test_refuses_what_is_not_there(trained, options, message):
    with pytest.raises(ddpm_jax.UserError, match=re.escape(message)):
        ddpm_jax.load(trained[0], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "at least 1"),
        ({"num_steps": 51}, "num_steps is 51; accepted: 1 to 50"),
        ({"labels": [1]}, "not class-conditional"),
    ],
)
def test_refuses_bad_requests(trained, options, message):
    with pytest.raises(ddpm_jax.UserError, match=message):
        ddpm_jax.load(trained[0]).sample(**options)
