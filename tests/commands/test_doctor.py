"""The check of a machine: of this one, with one problem at a time."""

import importlib.metadata
import json
import re
import shutil

import jax
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.commands.doctor import OK, WARNING, WRONG, examine
from ddpm_jax.runtime.workdir import LOCK, locked


def found(subject, config=None, folder=None):
    """[(level, text)] of a subject."""
    return [(f.level, f.text) for f in examine(config, folder) if f.subject == subject]


@pytest.fixture
def config(data_dir):
    config = config_lib.default_config()
    config.data.update(source="digits", height=8, width=8, channels=1, data_dir=str(data_dir))
    config.model.update(channels=8, num_groups=4, channel_multipliers=(1,), middle_attention=False)
    return config


@pytest.mark.slow
class TestCommand:
    def test_of_a_run(self, trained, call):
        status, output = call("--mode=doctor", f"--workdir={trained[0]}", config=None)
        assert status == 0, output
        assert f"jax {jax.__version__}, jaxlib" in output
        assert re.search(r"ok +run +checkpoints of the steps 12, 18, 24, \d+ MiB each", output)
        assert re.search(r"ok +devices +.*cpu: computes", output)
        assert "wrong" not in output

    def test_a_problem_is_a_failure(self, trained, call):
        status, output = call("--mode=doctor", f"--workdir={trained[0]}", "--config.train.batch_size=32")
        assert status == 1
        assert re.search(r"wrong +config .*train.batch_size: 16 -> 32", output)
        assert "error: 1 problem found; see the lines that begin with 'wrong'" in output


class TestExamine:
    def test_finds_this_machine_well(self):
        levels = {finding.subject: finding.level for finding in examine(None, None)}
        assert levels["machine"] == levels["packages"] == OK
        assert [level for level, text in found("devices") if text.endswith("computes")] == [OK] * 8

    def test_a_package_that_is_too_old(self, monkeypatch):
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy>=99", 'nothing; extra == "cuda"'])
        (level, text), _ = found("packages")
        assert level == WRONG
        assert text.startswith("numpy>=99 is required; found: ")

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        ((level, text),) = found("workdir", folder=tmp_path / "file" / "run")
        assert level == WRONG
        assert "cannot be written to" in text

    @pytest.mark.slow
    def test_a_disk_without_room(self, trained, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 0))
        assert [level for level, _ in found("run", folder=trained[0])] == [OK, WRONG]
        assert found("workdir", folder=trained[0])[0][0] == WARNING

    @pytest.mark.slow
    def test_checkpoints_that_were_set_aside(self, trained, tmp_path):
        shutil.copytree(trained[0], tmp_path / "run")
        (tmp_path / "run" / "corrupt" / "6").mkdir(parents=True)
        assert found("run", folder=tmp_path / "run")[-1] == (
            WARNING,
            "checkpoints that could not be read were set aside: step 6",
        )

    def test_memory_of_a_network(self, config):
        ((level, text),) = found("network", config)
        count = sum(x.size for x in jax.tree.leaves(config_lib.make_model(config).param_shapes()))
        assert level == OK
        assert text.startswith(f"{count:,} parameters; ")

    def test_a_config_that_does_not_fit(self, config):
        config.model.channels = 9
        assert found("config", config)[0][0] == WRONG

    def test_images_are_not_fetched(self, config, tmp_path):
        config.data.update(source="tfds", name="mnist", height=28, width=28, data_dir=str(tmp_path / "data"))
        *before, (level, text) = found("data", config) or found("config", config)
        if level == OK:
            assert "mnist will be prepared in" in text
            assert before == [(WARNING, f"data.data_dir {str(tmp_path / 'data')!r} does not exist yet")]
        else:  # no network
            assert (level, "cannot be reached" in text) == (WRONG, True)
        assert not (tmp_path / "data").exists()

    def test_a_data_set_that_does_not_exist(self, config):
        config.data.update(source="tfds", name="cifar11")
        ((level, text),) = found("config", config)
        assert (level, "Did you mean" in text) == (WRONG, True)


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        ({}, WARNING, "by process {pid} on host {host} (training since {since} UTC); no other process can train there"),
        ({"started": 1}, OK, "by no process; process {pid} on host {host} (training since {since} UTC) was killed"),
        (
            {"host": "elsewhere"},
            WARNING,
            "by process {pid} on host elsewhere (training since {since} UTC), if it is still alive",
        ),
    ],
    ids=["running", "killed", "elsewhere"],
)
def test_workdir_in_use(tmp_path, changes, level, said):
    with locked(tmp_path, "training"):
        path = tmp_path / LOCK
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(values))
        [(found_level, text)] = found("in use", folder=tmp_path)
    assert found_level == level
    assert said.format(**values) in text
