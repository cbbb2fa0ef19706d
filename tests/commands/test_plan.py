"""--mode=plan: measured on the CPUs here, and compiled for TPUs where their compiler is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import TINY
from tiny import make_run

from ddpm_jax.commands import plan
from ddpm_jax.config import default_config
from ddpm_jax.planning import measured
from ddpm_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


def call(*arguments):
    process = subprocess.run(
        (sys.executable, "main.py", "--mode=plan", "--compilation_cache=off", *arguments),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
    )
    return process.returncode, process.stdout + process.stderr


@pytest.mark.slow
@pytest.mark.eight
def test_without_a_topology_it_measures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measured, "_SECONDS", 0.1)
    config = make_run(class_conditional=True).config
    plan.plan(config, str(tmp_path), None, ["train", "sample", "evaluate"])
    result = json.loads((tmp_path / "plan.json").read_text())
    assert (result["kind"], result["chips"], result["chip"]) == ("measurement", 8, None)
    train, sample, judge = (result["programs"][name] for name in ("train", "sample", "evaluate"))
    assert (train["images"], sample["images"], sample["calls"], judge["images"]) == (128, 16, 10, 64)
    # A network call, forward and backward, costs three times the forward one, and here for 8 times as many images.
    assert train["flops"] == pytest.approx(3 * 8 * sample["flops"], rel=0.1)
    run = result["run"]["train"]
    assert run["images_per_second"] == pytest.approx(128 / train["seconds"])
    assert run["days"] == pytest.approx(config.train.num_steps * train["seconds"] / 86400)
    assert run["chip_hours"] == pytest.approx(24 * 8 * run["days"])
    # 50,000 images in batches of 16, each of the run's 40 calls.
    assert result["run"]["sample"]["hours"] == pytest.approx(3125 * 40 * sample["seconds"] / 3600)
    output = capsys.readouterr().out
    assert "Measured here" in output
    assert "of an unknown peak" in output


@pytest.mark.parametrize(
    ("topology", "sentence"),
    [("v5e", "accepted: a TPU"), ("v7x:2x2", "accepted: a TPU"), ("v5e:2x", "accepted: a TPU")],
)
def test_an_invalid_topology(topology, sentence):
    with pytest.raises(UserError, match=sentence):
        plan.plan(default_config(), "", topology, ["train"])


@pytest.mark.skipif(HAS_LIBTPU, reason="TPUs' compiler is installed")
def test_no_compiler_for_tpus():
    with pytest.raises(UserError, match=r"ddpm-jax\[tpu\]"):
        plan.plan(default_config(), "", "v5e:2x4", ["train"])


def test_nothing_to_plan():
    with pytest.raises(UserError, match="needs --config, or the --workdir"):
        plan.plan(None, "", None, ["train"])
    with pytest.raises(UserError, match="--programs has 'fly'"):
        plan.plan(default_config(), "", None, ["fly"])


@pytest.mark.skipif(not HAS_LIBTPU, reason="the extra tpu is not installed")
@pytest.mark.slow
class TestCompiledForTPUs:
    def test_costs_and_ladder(self, tmp_path):
        arguments = (
            "--programs=train,sample",
            "--topology=v5e:2x4",
            f"--workdir={tmp_path}",
            "--config.train.batch_size=64",
        )
        status, output = call(*TINY, *arguments)
        assert status == 0, output
        assert "An estimate, not a measurement" in output
        result = json.loads((tmp_path / "plan.json").read_text())
        train = result["programs"]["train"]
        reduced = sum(c["bytes"] for c in train["collectives"] if c["kind"] == "all-reduce")
        # The five embeddings' and two shortcuts' biases have the gradients of biases beside them, which are sent once;
        # with the gradients go the batch's loss and the losses and counts by quarter of t.
        assert reduced == 4 * (result["parameters"] - 7 * 8 + 9)
        assert train["seconds"] == max(train["arithmetic"], train["memory"], train["network"])
        assert 0 < train["traffic"] < train["xla_traffic"]
        rungs = {(rung["chips"], rung["batch"]): rung for rung in result["ladder"]}
        assert rungs[8, 64]["how"] == "compiled"
        assert rungs[64, 512]["how"] == "same program"
        assert rungs[64, 64]["how"] == "estimated"
        assert rungs[256, 2048]["memory"] == rungs[8, 64]["memory"] > rungs[64, 64]["memory"]
        assert rungs[256, 2048]["network"] > rungs[8, 64]["network"]

    def test_a_slice_that_does_not_exist(self):
        status, output = call(*TINY, "--topology=v5e:3x5", "--config.train.batch_size=15")
        assert status == 1
        assert "error: --topology is 'v5e:3x5'" in output
