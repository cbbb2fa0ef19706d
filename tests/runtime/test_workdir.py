import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from ddpm_jax.config import default_config
from ddpm_jax.data.sources import open_source
from ddpm_jax.runtime import workdir
from ddpm_jax.runtime.errors import UserError


def sentence(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def description(tmp_path):
    return describe(tmp_path, 0)


def describe(folder, level):
    np.save(folder / "images.npy", np.full((2, 4, 4), level, np.uint8))
    return open_source("array", path=str(folder / "images.npy"), height=4, width=4, channels=1).describe()


@pytest.fixture
def run(tmp_path, description):
    """The folder of a run of the default config."""
    folder = workdir.check_writable(tmp_path / "run")
    workdir.record(folder, default_config(), description)
    return folder


def test_what_is_recorded_is_read_back(run, description):
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "dataset.json", "environment.json"]
    config = workdir.read_config(str(run))
    assert config == default_config()
    assert isinstance(config.model.channel_multipliers, tuple)
    assert workdir.read_dataset(run) == description


def test_recording_again_replaces(run, tmp_path):
    config = default_config()
    config.train.num_steps = 7
    other = describe(tmp_path, 1)
    workdir.record(run, config, other)
    assert workdir.read_config(run).train.num_steps == 7
    assert workdir.read_dataset(run) == other
    assert len(list(run.iterdir())) == 3


def test_environment(run):
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__
    assert environment["packages"]["numpy"] == np.__version__
    assert environment["devices"].startswith("8 x ")
    assert environment["processes"] == 1
    git = ("git", "rev-parse", "HEAD")
    result = subprocess.run(git, cwd=Path(workdir.__file__).parent, capture_output=True, text=True)
    if result.returncode:
        assert environment["git_revision"] is None
    else:
        assert environment["git_revision"].removesuffix("-dirty") == result.stdout.strip()


def test_a_run_continues_with_the_same_config(run):
    config = default_config()
    workdir.check_config(run, config)
    config.train.num_steps = 900_000
    config.log.every_steps = 7
    workdir.check_config(run, config)


def test_another_config_is_refused_by_field(run):
    config = default_config()
    config.model.dropout = 0.5
    config.train.ema_decays = (0.5, 0.9)
    text = sentence(workdir.check_config, run, config)
    assert str(run) in text
    assert "model.dropout: 0.1 -> 0.5; train.ema_decays: (0.9999,) -> (0.5, 0.9)" in text


def test_other_images_are_refused(run, description, tmp_path):
    workdir.check_dataset(run, dict(description))
    text = sentence(workdir.check_dataset, run, describe(tmp_path, 1) | {"num_images": 7})
    assert str(run) in text
    assert "2 then, 7 now" in text


def test_moved_images_are_the_same_images(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = describe(tmp_path / "elsewhere", 0)
    assert moved["path"] != workdir.read_dataset(run)["path"]
    workdir.check_dataset(run, moved)


def test_a_new_workdir_takes_anything(tmp_path, description):
    folder = workdir.check_writable(tmp_path / "new")
    workdir.check_config(folder, default_config())
    assert workdir.read_dataset(folder) is None
    workdir.check_dataset(folder, description)


def test_check_writable_makes_the_folder_and_leaves_it_empty(tmp_path, monkeypatch):
    folder = workdir.check_writable(str(tmp_path / "a/b"))
    assert folder == tmp_path / "a/b"
    assert list(folder.iterdir()) == []
    assert workdir.check_writable(folder) == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert workdir.check_writable("~/c") == tmp_path / "c"
    assert (tmp_path / "c").is_dir()


@pytest.mark.parametrize("path", ["file", "file/run", "file/a/b"])
def test_a_folder_that_cannot_be_made(tmp_path, path):
    (tmp_path / "file").write_text("x")
    text = sentence(workdir.check_writable, tmp_path / path)
    assert str(tmp_path / path) in text
    assert "cannot be written to" in text
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in sentence(workdir.check_writable, tmp_path)


def test_no_run_there(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        text = sentence(workdir.read_config, folder)
        assert str(folder) in text
        assert ("there is no config.json in it" if folder.exists() else "there is no folder") in text


@pytest.mark.parametrize("content", [b"", b'{"seed": 0', b"seed = 0", b"\xff\xfe", b"[1, 2]"])
def test_an_invalid_config(run, content):
    (run / "config.json").write_bytes(content)
    assert str(run / "config.json") in sentence(workdir.read_config, run)
    assert str(run / "config.json") in sentence(workdir.check_config, run, default_config())


def test_dataset_that_is_not_json(run, description):
    (run / "dataset.json").write_text('{"fingerprint"')
    assert str(run / "dataset.json") in sentence(workdir.check_dataset, run, description)


class TestLocked:
    def test_a_second_one_is_refused(self, tmp_path):
        with workdir.locked(tmp_path, "training") as (folder, check):
            assert folder == tmp_path
            check()
            with pytest.raises(UserError) as caught, workdir.locked(tmp_path, "training"):
                pass
            assert str(caught.value).startswith(f"--workdir '{tmp_path}' is in use by process {os.getpid()} on host ")
            assert str(caught.value).endswith("UTC); wait for it to end, or choose another --workdir")
        assert not list(tmp_path.iterdir())

    def test_a_lock_that_was_removed(self, tmp_path):
        with workdir.locked(tmp_path, "training") as (folder, check):
            (folder / workdir.LOCK).unlink()
            assert "lock.json in it was removed; nothing more is written" in sentence(check)

    def test_nothing_is_left_of_a_start_that_fails(self, tmp_path):
        def fail(folder):
            with workdir.locked(folder, "training"):
                raise UserError("its config is wrong")

        (tmp_path / "there").mkdir()
        for name in ("there", "new"):
            assert sentence(fail, tmp_path / name) == "its config is wrong"
        assert [found.name for found in tmp_path.iterdir()] == ["there"]


def test_a_folder_of_diffusers_is_to_be_imported(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=f"--mode=import --source={tmp_path} makes one"):
        workdir.read_config(tmp_path)
