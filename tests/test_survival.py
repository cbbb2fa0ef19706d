"""Runs are killed, stopped and damaged, and lose nothing. docs/survival.md is the list of these tests."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from runs import PATIENCE, STEPS, assert_same_checkpoint, metrics, results, start_two, wait_for_step

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[1] / "docs" / "survival.md"
# A run that does not end before it is stopped, however late the signal comes.
ENDLESS = (
    "--config.train.num_steps=100000",
    "--config.checkpoint.every_steps=100000",
    "--config.log.sample_every_steps=0",
)


@pytest.fixture(scope="module")
def trained(trained, shared):
    """The run that no other test has added anything to."""
    return shared / "trained", trained[1]


def assert_nothing_lost(workdir, whole, step=STEPS):
    assert_same_checkpoint(workdir, whole, step)
    for ours, theirs in zip(results(workdir), results(whole), strict=True):
        assert ours == theirs


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives a folder on a disk of so many KiB, or changes the disk's size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def resize(kib):
        options = f"size={kib}k" + (",remount" if disk.is_mount() else "")
        result = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {result.stderr.strip()}")
        return disk / "run"

    yield resize
    if disk.is_mount():
        subprocess.run(["umount", disk], check=True)


def stopped_while_saving(process, workdir):
    """Stops a run in the middle of saving; False: it was not saving, or was done before it stopped."""
    if list(workdir.glob("checkpoints/*-tmp*")):
        process.send_signal(signal.SIGSTOP)
        while process.poll() is None and state(process) not in "TtZX":
            time.sleep(0.001)
        if list(workdir.glob("checkpoints/*-tmp*")):
            return True
        process.send_signal(signal.SIGCONT)
    return False


def state(process):
    """A letter, as in the manual of /proc: T is a process that was stopped."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


class TestKills:
    def test_at_random_moments_and_while_saving(self, start, call, tmp_path, request):
        """--kills times by SIGKILL and SIGTERM; it ends as the uninterrupted run does, bit for bit."""
        kills = request.config.getoption("--kills")
        num_steps = 50 * kills
        flags = (
            f"--config.train.num_steps={num_steps}",
            "--config.checkpoint.every_steps=20",
            "--config.log.every_steps=5",
            f"--config.log.sample_every_steps={num_steps // 4}",
            "--config.sample.num_steps=5",
        )
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        status, output = call(f"--workdir={whole}", *flags)
        assert status == 0, output
        rng = np.random.default_rng(0)
        outputs, half_written = [], 0
        for number in range(kills):
            kind = ("running", "saving", "told to stop", "starting")[number % 4]
            often = ("--config.checkpoint.every_steps=2",) if kind == "saving" else ()
            process = start(f"--workdir={killed}", *flags, *often)
            if kind == "starting":
                time.sleep(rng.uniform(0, 5))
            else:
                wait_for_step(process, killed, 40 * (number + 1))
                time.sleep(rng.uniform(0, 0.3))
            while kind == "saving" and process.poll() is None and not stopped_while_saving(process, killed):
                pass
            process.send_signal(signal.SIGTERM if kind == "told to stop" else signal.SIGKILL)
            outputs.append(process.communicate(timeout=PATIENCE)[0])
            assert process.returncode in (0, -signal.SIGKILL, -signal.SIGTERM), outputs[-1]
            half_written += bool(list(killed.glob("checkpoints/*-tmp*")))
        status, output = call(f"--workdir={killed}", *flags)
        assert status == 0, output
        outputs = "".join(outputs) + output
        print(f"{kills} kills, {half_written} of them left a half-written checkpoint")
        assert "Traceback" not in outputs
        assert half_written
        assert outputs.count("was half-written when the run was interrupted; removing it") == half_written
        assert not list(killed.glob("checkpoints/*-tmp*"))
        assert_nothing_lost(killed, whole, num_steps)

    def test_told_to_stop_between_two_lines_of_metrics(self, start, call, tmp_path):
        whole, stopped = tmp_path / "whole", tmp_path / "stopped"
        process = start(f"--workdir={stopped}", *ENDLESS)
        wait_for_step(process, stopped, 2)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
        saved = int(re.search(r"stopped at step (\d+)", output)[1])
        assert saved >= 2
        for workdir in (stopped, whole):  # saving at other steps may change while a run continues
            flags = (f"--config.train.num_steps={saved + 7}", "--config.log.sample_every_steps=0")
            status, output = call(f"--workdir={workdir}", *flags)
            assert status == 0, output
            assert (f"resuming from the checkpoint of step {saved}" in output) == (workdir == stopped)
        assert_nothing_lost(stopped, whole, saved + 7)


class TestDisk:
    def test_full_while_saving(self, trained, call, small_disk):
        size = sum(path.stat().st_size for path in (trained[0] / "checkpoints" / "24").rglob("*") if path.is_file())
        workdir = small_disk(27 * size // 10240)
        status, output = call(f"--workdir={workdir}", "--config.log.sample_every_steps=0")
        assert status == 1
        sentence = output.splitlines()[-1]
        found = re.fullmatch(
            r"error: a checkpoint could not be written to \S+ \(No space left on device\); the checkpoint of step "
            r"(\d+) is intact; once the problem is fixed, the same command resumes",
            sentence,
        )
        assert found, output
        assert "Traceback" not in output
        small_disk(40_000)
        status, output = call(f"--workdir={workdir}")
        assert status == 0, output
        assert f"resuming from the checkpoint of step {found[1]}" in output
        assert "was half-written when the run was interrupted; removing it" in output
        assert_same_checkpoint(workdir, trained[0])
        assert results(workdir)[:2] == results(trained[0])[:2]

    def test_full_while_logging(self, trained, start, call, small_disk):
        workdir = small_disk(8_000)
        process = start(
            f"--workdir={workdir}", "--config.train.num_steps=100000", "--config.checkpoint.every_steps=100000"
        )
        wait_for_step(process, workdir, 8)
        filler = workdir.parent / "filler"
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(8_000 << 10))
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        sentence = output.splitlines()[-1]
        assert re.match(r"error: .*No space left on device.* the same command resumes from ", sentence), output
        assert "Traceback" not in output
        filler.unlink()
        status, output = call(f"--workdir={workdir}")
        assert status == 0, output
        assert_nothing_lost(workdir, trained[0])

    def test_checkpoints_cannot_be_made(self, call, tmp_path):
        (tmp_path / "checkpoints").touch()
        status, output = call(f"--workdir={tmp_path}")
        assert status == 1
        assert re.match(r"error: .*checkpoints", output.splitlines()[-1])
        assert "Traceback" not in output

    def test_no_checkpoint_can_be_read(self, trained, call, tmp_path):
        """What lies there stays where it is, for the reason may pass."""
        workdir = shutil.copytree(trained[0], tmp_path / "run")
        kept = {path: path.read_bytes() for path in (workdir / "checkpoints").rglob("d/*")}
        lines = (workdir / "metrics.jsonl").read_bytes()
        for file in kept:
            file.write_bytes(b"")
        status, output = call(f"--workdir={workdir}")
        assert status == 1
        assert re.match(r"error: none of the 3 checkpoints in .* can be read", output.splitlines()[-1])
        assert (workdir / "metrics.jsonl").read_bytes() == lines
        for file, content in kept.items():
            file.write_bytes(content)
        status, output = call(f"--workdir={workdir}")
        assert status == 0, output
        assert_nothing_lost(workdir, trained[0])

    def test_newest_checkpoint_is_corrupt(self, trained, call, tmp_path):
        workdir = shutil.copytree(trained[0], tmp_path / "run")
        for file in (workdir / "checkpoints" / "24").rglob("d/*"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        status, output = call(f"--workdir={workdir}")
        assert status == 0, output
        assert "Checkpoint 24 cannot be read" in output
        assert "resuming from the checkpoint of step 18" in output
        assert (workdir / "corrupt" / "24").is_dir()
        assert_nothing_lost(workdir, trained[0])


class TestTwoStarts:
    def test_second_is_refused(self, start, call, tmp_path):
        """While modes that only add to the workdir work beside the training."""
        process = start(f"--workdir={tmp_path}", "--config.train.num_steps=1000000")
        wait_for_step(process, tmp_path, 8)
        whole = {path.name for path in tmp_path.iterdir()}
        status, output = call(f"--workdir={tmp_path}")
        assert status == 1
        assert re.fullmatch(
            rf"error: --workdir '{tmp_path}' is in use by process {process.pid} on host \S+ \(training since "
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\); wait for it to end, or choose another --workdir\n",
            output,
        )
        flags = ("--num_images=2", "--num_steps=2", f"--workdir={tmp_path}")
        status, output = call("--mode=sample", *flags, config=None)
        assert status == 0, output
        status, output = call("--mode=doctor", f"--workdir={tmp_path}", config=None)
        assert f"by process {process.pid} on host" in output
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
        assert {path.name for path in tmp_path.iterdir()} == whole - {"lock.json"}

    def test_another_host_took_over(self, start, tmp_path):
        """As while this one was suspended: it ends, and leaves the other's files alone."""
        process = start(f"--workdir={tmp_path}", "--config.train.num_steps=1000000")
        wait_for_step(process, tmp_path, 8)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        lock, history = tmp_path / "lock.json", (tmp_path / "history.jsonl").read_bytes()
        other = json.loads(lock.read_text()) | {"host": "elsewhere", "pid": 77, "token": "another"}
        lock.unlink()
        lock.write_text(json.dumps(other))
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert re.fullmatch(
            rf"error: --workdir '{tmp_path}' no longer belongs to this process: taken over by process 77 on host "
            r"elsewhere \(training since .* UTC\); nothing more is written, and the other process resumes from the "
            "last checkpoint",
            output.splitlines()[-1],
        ), output
        assert json.loads(lock.read_text()) == other
        assert (tmp_path / "history.jsonl").read_bytes() == history


class TestTwoProcesses:
    """In real processes of 2, then 4 devices each, joined over loopback."""

    def until_step(self, start, workdir, step, index, number, *flags):
        """Sends a signal to one of two processes at a step; the statuses and outputs of both."""
        processes = start_two(start, f"--workdir={workdir}", *flags)
        wait_for_step(processes[0], workdir, step)
        processes[index].send_signal(number)
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
        return [process.returncode for process in processes], outputs

    def test_one_is_told_to_stop(self, start, call, tmp_path):
        """Both save and stop; with 4 devices each they continue to the losses of one process."""
        flags = ("--config.log.sample_every_steps=0", "--config.sample.num_images=4", "--config.sample.num_steps=5")
        whole, stopped = tmp_path / "whole", tmp_path / "stopped"
        statuses, outputs = self.until_step(start, stopped, 2, 1, signal.SIGTERM, *flags, *ENDLESS)
        assert statuses == [0, 0], outputs
        assert "4 cpu device(s), 2 process(es)" in outputs[0]
        assert "process(es)" not in outputs[1]
        step = int(re.search(r"stopped at step (\d+) of 100000 and saved", outputs[0])[1])
        flags = (*flags, f"--config.train.num_steps={step + 8}")
        status, output = call(f"--workdir={whole}", *flags)
        assert status == 0, output
        processes = start_two(start, f"--workdir={stopped}", *flags, devices=4)
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        assert f"resuming from the checkpoint of step {step}" in outputs[0]
        assert "8 cpu device(s), 2 process(es)" in outputs[0]
        losses = [[line["loss"] for line in metrics(workdir)] for workdir in (stopped, whole)]
        np.testing.assert_allclose(*losses, rtol=1e-5)
        assert (stopped / "samples" / "final.png").exists()

    @pytest.mark.parametrize(("index", "why"), [(1, "no heartbeat for 20 s"), (0, "Connection refused")])
    def test_one_dies(self, start, tmp_path, index, why):
        flags = (*ENDLESS, "--config.checkpoint.every_steps=6", "--silence_timeout=20")
        statuses, outputs = self.until_step(start, tmp_path, 14, index, signal.SIGKILL, *flags)
        assert statuses[index] == -signal.SIGKILL
        assert statuses[1 - index] == 1, outputs[1 - index]
        step = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
        assert outputs[1 - index].splitlines()[-1] == (
            f"error: process {index} of 2 is gone ({why}), so process {1 - index} stops too; start the same command on "
            f"every host again: it resumes from the checkpoint of step {step}"
        )


def test_the_page_names_the_tests():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|") and line.endswith("` |")]
    names = {row.split("`")[-2] for row in rows}
    tests = {
        f"{kind.__name__}::{name}"
        for kind in (TestKills, TestDisk, TestTwoStarts, TestTwoProcesses)
        for name in vars(kind)
        if name.startswith("test_")
    }
    assert {name for name in names if not name.startswith("tests/")} == tests
