"""The logs of a run, read from their files."""

import json
import sys

import pytest
from runs import scalars

from ddpm_jax.config import default_config
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import read_json_lines
from ddpm_jax.training.journal import METRICS, Journal


@pytest.fixture
def config():
    config = default_config()
    config.log.tensorboard = False
    return config


def write(folder, config, first_step, steps):
    journal = Journal(folder, first_step, config)
    for step in steps:
        journal.write(step, {"loss": 1.0 / step})
    journal.close()


def test_what_lies_beyond_the_checkpoint_is_written_anew(tmp_path, config):
    write(tmp_path, config, 0, [1, 2, 3, 4])
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 5, "lo')  # cut off
    write(tmp_path, config, 2, [3, 4, 5])
    assert [line["step"] for line in read_json_lines(tmp_path / METRICS)] == [1, 2, 3, 4, 5]
    assert not (tmp_path / "wandb").exists()


def test_two_starts_in_one_second_have_their_own_events(tmp_path, config):
    config.log.tensorboard = True
    write(tmp_path, config, 0, [1, 2])
    write(tmp_path, config, 2, [3])
    assert scalars(tmp_path / "tensorboard") == pytest.approx({(step, "loss"): 1 / step for step in (1, 2, 3)})


class TestWeightsAndBiases:
    @pytest.fixture
    def config(self, config, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "offline")
        config.log.wandb = "a-project"
        return config

    @pytest.mark.slow
    def test_a_resumed_run_is_the_same_one_there(self, tmp_path, config):
        wandb = pytest.importorskip("wandb")
        write(tmp_path, config, 0, [1, 2])
        write(tmp_path, config, 2, [3])
        wandb.teardown()  # as at the end of a process; until then its service may still be writing the last records
        name = (tmp_path / "wandb" / "run_id").read_text()
        files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
        assert {file.name for file in files} == {f"run-{name}.wandb"}
        logged = [record.history for file in files for record in records(file) if record.HasField("history")]
        assert {history.step.num: loss(history) for history in logged} == {1: 1.0, 2: 0.5, 3: 1 / 3}

    def test_without_the_package(self, tmp_path, config, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(UserError, match=r"config.log.wandb needs the package wandb: pip install -e '.\[wandb\]'"):
            Journal(tmp_path, 0, config)


def records(path):
    """The records of a Weights & Biases file: a LevelDB log after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = path.read_bytes(), 7, []
    while place < len(data):
        left = 2**15 - place % 2**15  # of the block
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def loss(history):
    return next(json.loads(item.value_json) for item in history.item if "loss" in (item.key, *item.nested_key))


def test_tensorboard_does_not_wait_for_torch(tmp_path, python):
    """Which imports it where it is installed; a user's own import of it works afterwards."""
    (tmp_path / "torch.py").write_text("print('TORCH')\nTensor = int\n")
    code = """
import sys
from pathlib import Path
from ddpm_jax.config import default_config
from ddpm_jax.training.journal import Journal

sys.path.insert(0, sys.argv[1])
journal = Journal(Path(sys.argv[1]), 0, default_config())
journal.write(1, {"loss": 1.0})
journal.close()
print("written")
import torch
"""
    assert python(code, tmp_path).split() == ["written", "TORCH"]
    assert list((tmp_path / "tensorboard").iterdir())
