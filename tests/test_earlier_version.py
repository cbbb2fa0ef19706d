"""A run that version 0.1.0 trained: it opens, samples and continues as it did there."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tiny import near

import ddpm_jax
from ddpm_jax.commands.job import Job
from ddpm_jax.commands.sampling import sample_shards
from ddpm_jax.runtime import workdir

# A tiny class-conditional run of six steps with a shard of four images; beside it what 0.1.0 made of it: twelve images,
# twelve by class with guidance (seed 3), and the metrics of the next six steps.
FILE = Path(__file__).parent / "run_of_0.1.0.zip"


@pytest.fixture
def folder(tmp_path):
    with zipfile.ZipFile(FILE) as file:
        file.extractall(tmp_path)
    return tmp_path


def images(path):
    with np.load(path) as file:
        return file["image"], file["label"]


@pytest.mark.slow
def test_it_opens_and_samples(folder):
    run = ddpm_jax.load(folder / "run")
    plain, labels = images(folder / "plain.npz")
    assert near(run.sample(len(plain)), plain)
    np.testing.assert_array_equal(run.condition.record(np.arange(len(plain)))["label"], labels)
    guided, labels = images(folder / "guided.npz")
    options = {"labels": (1, 7), "guidance_scale": 2.0}
    assert near(run.sample(len(guided), 3, **options), guided)
    np.testing.assert_array_equal(run.request(**options).condition.record(np.arange(len(guided)))["label"], labels)


def test_its_shards_continue(folder, capsys):
    """The settings that they hold are recognised, so that none is made again."""
    job = Job(ddpm_jax.load(folder / "run"), folder / "run")
    (shard,) = (folder / "run" / "samples").glob("shards_*/*.npz")
    written = shard.stat().st_mtime_ns
    made = sample_shards(job, images="0-7", shard_size=4, part="0/1", batch_size=None)
    assert made == shard.parent
    assert "shards that exist already: 1" in capsys.readouterr().out
    assert (len([*made.iterdir()]), shard.stat().st_mtime_ns) == (2, written)


@pytest.mark.slow
def test_its_training_continues(folder):
    config = workdir.read_config(folder / "run")
    config.train.num_steps = 12
    ddpm_jax.train(config, folder / "run")
    found = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    for expected in json.loads((folder / "metrics.json").read_text()):
        line = next(line for line in found if line["step"] == expected["step"])
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-5)
