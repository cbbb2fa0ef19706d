"""Training by the command line."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from runs import STEPS, assert_same_checkpoint, checkpoint, in_two_processes, metrics

import ddpm_jax
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.files import read_json_lines

pytestmark = pytest.mark.slow


def test_leaves_a_whole_run(trained):
    workdir, output = trained
    assert {p.name for p in workdir.iterdir()} == {
        *("config.json", "dataset.json", "environment.json", "history.jsonl", "metrics.jsonl"),
        *("report.html", "checkpoints", "samples", "tensorboard"),
    }
    assert sorted(p.name for p in (workdir / "samples").iterdir()) == [
        "data.png",
        "denoising.png",
        "final.png",
        "step_00000012.png",
    ]
    assert Image.open(workdir / "samples" / "final.png").size == (3 * 66 + 2,) * 2
    assert Image.open(workdir / "samples" / "denoising.png").size == (10 * 66 + 2, 8 * 66 + 2)
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [12, 18, 24]
    dataset = json.loads((workdir / "dataset.json").read_text())
    assert dataset["num_images"] == 1797
    assert [event["event"] for event in read_json_lines(workdir / "history.jsonl")] == ["started", "finished"]
    assert json.loads((workdir / "environment.json").read_text())["packages"]["jax"] == jax.__version__
    assert list((workdir / "tensorboard").glob("events*"))
    assert re.search(r"step 12/24 .*loss \d.* images/s.* left", output)
    assert "warning" not in output.lower(), output
    assert re.search(r"\nwrote: \S+/report.html\nnext:  python main.py --mode=sample --workdir=\S+\n\Z", output)


def test_metrics_show_the_course_of_training(trained):
    lines = metrics(trained[0])
    assert [line["step"] for line in lines] == list(range(2, STEPS + 1, 2))
    quarters = {f"loss_t_quarter_{i}" for i in range(1, 5)}
    assert {"loss", "grad_norm", "param_norm", "learning_rate", "images_per_second", *quarters} <= set(lines[-1])
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_evaluation_on_the_way(trained, call, tmp_path):
    """It is logged and does not affect training."""
    flags = ("every_steps=12", "likelihood_images=16", "num_images=32", "num_steps=4")
    status, output = call(f"--workdir={tmp_path}", *(f"--config.evaluate.{flag}" for flag in flags))
    assert status == 0, output
    found = [line for line in metrics(tmp_path) if "bits_per_dim" in line]
    assert [line["step"] for line in found] == [12, 24]
    for line in found:
        assert 0 < line["bits_per_dim_error"] < line["bits_per_dim"]
        assert line["frechet_distance_digits"] > 0
    assert found[1]["bits_per_dim"] < found[0]["bits_per_dim"]
    assert_same_checkpoint(tmp_path, trained[0])
    # As if it had been killed after the last checkpoint and before the evaluation.
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert metrics(tmp_path)[-1] != found[1]
    status, output = call(f"--workdir={tmp_path}", *(f"--config.evaluate.{flag}" for flag in flags))
    assert status == 0, output
    assert metrics(tmp_path)[-1] | {"time": 0} == found[1] | {"time": 0}


def test_divergence_stops_and_keeps_the_last_good_checkpoint(call, tmp_path):
    flags = (
        "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.warmup_steps=7",
        "--config.checkpoint.every_steps=1",
    )
    status, output = call(f"--workdir={tmp_path}", *flags)
    assert status == 1
    assert re.search(r"error: training diverged at step \d+: loss (nan|inf).*, gradient norm \S+", output)
    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert steps
    for leaf in jax.tree.leaves(checkpoint(tmp_path, max(steps))["params"]):
        assert np.all(np.isfinite(leaf))


@pytest.mark.eight
def test_eight_devices(trained, call, tmp_path):
    few = ("--config.log.sample_every_steps=0", "--config.sample.num_images=8", "--config.sample.num_steps=5")
    status, output = call(f"--workdir={tmp_path}", *few, devices=8)
    assert status == 0, output
    assert "8 cpu device(s)" in output
    ours, reference = checkpoint(tmp_path)["params"], checkpoint(trained[0])["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, reference)


def test_several_steps_at_once_on_a_mesh_of_two_axes(trained, call, tmp_path):
    """From a checkpoint within a group of steps, to an end within another; logged where the groups end."""
    shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "24")
    flags = ("--config.train.steps_per_dispatch=5", "--config.mesh.fsdp=2")
    status, output = call(f"--workdir={tmp_path / 'run'}", *flags, devices=2)
    assert status == 0, output
    assert "resuming from the checkpoint of step 18" in output
    ours, reference = checkpoint(tmp_path / "run")["params"], checkpoint(trained[0])["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, reference)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [*range(2, 19, 2), 20, 24]


@pytest.mark.eight
def test_two_processes_that_divide_the_state(start, call, tmp_path):
    """Each keeps a part of the wide layers; one process resumes from what the two have saved."""
    flags = (
        "--config.model.channels=48",
        "--config.train.num_steps=6",
        "--config.checkpoint.every_steps=3",
        "--config.log.every_steps=1",
        "--config.log.sample_every_steps=3",
        "--config.log.sample_steps=2",
        "--config.sample.num_images=4",
        "--config.sample.num_steps=2",
    )
    whole, divided = tmp_path / "whole", tmp_path / "divided"
    status, output = call(f"--workdir={whole}", *flags)
    assert status == 0, output
    evaluation = ("every_steps=3", "likelihood_images=8", "num_images=8", "num_steps=2")
    more = ("--config.mesh.data=1", "--config.mesh.fsdp=-1", *(f"--config.evaluate.{flag}" for flag in evaluation))
    in_two_processes(start, f"--workdir={divided}", *flags, *more)
    params = ddpm_jax.load(divided).params
    shardings = parallel.state_shardings(parallel.make_mesh(data=2, fsdp=4), params)
    assert not all(sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings))
    assert [line["step"] for line in metrics(divided) if "bits_per_dim" in line] == [3, 6]
    for name in ("step_00000003.png", "final.png"):
        pictures = [np.asarray(Image.open(workdir / "samples" / name)) for workdir in (whole, divided)]
        assert np.max(np.abs(np.subtract(*pictures, dtype=int))) <= 1
    shutil.rmtree(divided / "checkpoints" / "6")
    status, output = call(f"--workdir={divided}", *flags)
    assert status == 0, output
    assert "resuming from the checkpoint of step 3" in output
    losses = [[line["loss"] for line in metrics(workdir) if "loss" in line] for workdir in (whole, divided)]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, rtol=1e-5)
