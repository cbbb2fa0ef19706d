"""A lock file among real processes, threads, and other hosts, which are simulated by their lock files."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from runs import PATIENCE

from ddpm_jax.runtime import lock
from ddpm_jax.runtime.lock import HeldError, LostError, hold

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock.json"


def never(text):
    pytest.fail(f"nothing was to be waited for: {text}")


def left(path, **changes):
    """Leaves a lock file of this process, with the given changes."""
    values = json.loads(lock._text("0123456789abcdef", "training", 1, 60.0)(0))
    path.write_text(json.dumps({**values, **changes}))


@contextmanager
def process(code, path):
    """A process that runs code with `hold` and `path`; ends with the block."""
    begin = "import sys, pathlib, time\nfrom ddpm_jax.runtime.lock import hold\npath = pathlib.Path(sys.argv[1])\n"
    with subprocess.Popen(
        [sys.executable, "-c", begin + code, path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as started:
        try:
            yield started
        finally:
            started.kill()


HOLDS = """
with hold(path, "training"{options}) as held:
    print("held", flush=True)
    input()
    held.check()
"""


def test_is_there_for_as_long_as_the_block_lasts(path):
    with hold(path, "training", processes=4, say=never) as held:
        values = json.loads(path.read_text())
        assert (values["pid"], values["purpose"], values["processes"]) == (os.getpid(), "training", 4)
        assert [found.name for found in path.parent.iterdir()] == ["lock.json"]
        held.check()
    assert not list(path.parent.iterdir())


def test_second_is_told_who_has_it_and_writes_nothing(path):
    with process(HOLDS.format(options=", processes=2"), path) as first:
        assert first.stdout.readline() == "held\n"
        before = {found: found.stat().st_ino for found in path.parent.iterdir()}
        with pytest.raises(HeldError) as caught, hold(path, "training", say=never):
            pass
        host, since = lock.socket.gethostname(), json.loads(path.read_text())["since"]
        assert str(caught.value) == (
            f"in use by process {first.pid} on host {host} (training by 2 processes since {since} UTC)"
        )
        assert {found: found.stat().st_ino for found in path.parent.iterdir()} == before
        first.communicate("\n")
    assert first.returncode == 0
    assert not path.exists()


@pytest.mark.skipif(lock._machine() is None, reason="needs /proc")
class TestOnTheSameMachine:
    def test_killed_process_is_gone_at_once(self, path):
        """Even while it is a zombie, whose PID is still in use."""
        with process(HOLDS.format(options=""), path) as first:
            assert first.stdout.readline() == "held\n"
            first.kill()
            assert first.stdout.read() == ""  # it has ended
            assert path.exists()
            deadline = time.monotonic() + PATIENCE
            while lock.read(path).is_alive():
                assert time.monotonic() < deadline
            with hold(path, "training", say=never):
                pass

    def test_another_process_of_the_same_number(self, path):
        left(path, started=1)
        with hold(path, "training", say=never):
            pass

    def test_number_of_no_process(self, path):
        left(path, pid=2**22 + 1)  # above any that Linux gives
        with hold(path, "training", say=never):
            pass

    def test_hidden_process_is_judged_by_its_heartbeat(self, path, monkeypatch):
        left(path)
        monkeypatch.setattr(lock, "_process", lambda pid: None)
        assert lock.read(path).is_alive() is None


class TestOnAnotherMachine:
    @pytest.fixture(
        params=[
            {"host": "elsewhere"},
            {"machine": "0f1e2d3c-another-boot pid:[4026531836]"},
            {"machine": f"{str(lock._machine()).split()[0]} pid:[4026539999]"},  # another container's
            {"machine": None},  # a system without /proc
        ],
        ids=["host", "boot", "container", "unknown"],
    )
    def elsewhere(self, request):
        return request.param

    def test_without_a_heartbeat_it_is_gone_after_a_while(self, path, elsewhere):
        left(path, silence=0.1, **elsewhere)
        said = []
        with hold(path, "training", say=said.append):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert len(said) == 1
        assert said[0].startswith("waiting up to 0 s for a sign of life from process ")
        assert not list(path.parent.iterdir())

    def test_with_a_heartbeat_it_has_the_lock(self, path, elsewhere):
        left(path, **elsewhere)
        ended = threading.Event()

        def beat():
            with path.open("r+b") as file:
                content = file.read()
                for number in range(10**6):
                    if ended.wait(0.01):
                        return
                    file.seek(0)
                    file.write(content.replace(b'"beat": "000000000000"', f'"beat": "{number:012d}"'.encode()))
                    file.flush()

        thread = threading.Thread(target=beat)
        thread.start()
        try:
            with pytest.raises(HeldError), hold(path, "training"):
                pass
        finally:
            ended.set()
            thread.join()

    def test_released_while_it_is_watched(self, path, elsewhere):
        left(path, **elsewhere)
        timer = threading.Timer(0.05, path.unlink)
        timer.start()
        with hold(path, "training"):
            pass

    def test_heartbeat(self, path):
        with hold(path, "training", every=0.01):
            first, deadline = path.read_bytes(), time.monotonic() + PATIENCE
            while path.read_bytes() == first:
                assert time.monotonic() < deadline
            assert len(path.read_bytes()) == len(first)

    def test_suspended_holder_notices_that_it_lost_the_lock(self, path, monkeypatch):
        monkeypatch.setattr(lock, "_machine", lambda: "another")
        with process(HOLDS.format(options=", every=0.02, silence=0.2"), path) as first:
            assert first.stdout.readline() == "held\n"
            first.send_signal(signal.SIGSTOP)
            os.waitpid(first.pid, os.WUNTRACED)  # until it has stopped
            with hold(path, "training") as held:
                first.send_signal(signal.SIGCONT)
                first.stdin.write("\n")
                first.stdin.flush()
                assert first.wait(PATIENCE) == 1  # LostError
                held.check()  # and it leaves the lock alone


class TestTakingOver:
    @pytest.mark.parametrize("changes", [{"started": 1}, {"host": "elsewhere", "silence": 0.01}], ids=["same", "other"])
    def test_one_of_several_gets_it(self, path, changes):
        for _ in range(10):
            left(path, **changes)
            start, done, outcomes = threading.Barrier(8), threading.Barrier(8), []

            def challenge(start=start, done=done, outcomes=outcomes):
                with ExitStack() as stack:
                    start.wait()
                    try:
                        stack.enter_context(hold(path, "training"))
                        outcomes.append("held")
                    except HeldError:
                        outcomes.append("refused")
                    done.wait()

            threads = [threading.Thread(target=challenge) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(outcomes) == ["held"] + ["refused"] * 7
            assert not list(path.parent.iterdir())

    def test_killed_while_taking_over(self, path):
        """Both locks are left behind."""
        left(path, started=1)
        left(path.with_name(".lock.json.0123456789abcdef.left"), started=1, token="f" * 16)
        with hold(path, "training", say=never):
            pass
        assert not list(path.parent.iterdir())

    @pytest.mark.parametrize("content", [b"", b"\0" * 300, b'{"pid": 1', b"[]", b'{"pid": "x", "silence": "y"}'])
    def test_file_that_says_nothing(self, path, content, monkeypatch):
        """Such as one that a power failure leaves."""
        monkeypatch.setattr(lock, "SILENCE", 0.05)
        path.write_bytes(content)
        with hold(path, "training"):
            pass


class TestLosing:
    def test_to_another(self, path):
        with hold(path, "training") as held:
            left(path, token="another", host="elsewhere")
            with pytest.raises(LostError, match=r"taken over by process .* on host elsewhere"):
                held.check()
        assert lock.read(path).token == "another"

    def test_to_nobody(self, path):
        with hold(path, "training") as held:
            path.unlink()
            with pytest.raises(LostError, match="the lock file is gone"):
                held.check()


class TestWaiting:
    def test_for_its_turn(self, path):
        """Four processes add to a number in a file; none is lost."""
        number = path.with_name("number")
        number.write_text("0")
        code = """
number = path.with_name("number")
for _ in range(10):
    with hold(path, "counting", wait=True):
        value = int(number.read_text())
        time.sleep(0.001)
        number.write_text(str(value + 1))
"""
        with ExitStack() as stack:
            for started in [stack.enter_context(process(code, path)) for _ in range(4)]:
                started.communicate(timeout=PATIENCE)
                assert started.returncode == 0
        assert number.read_text() == "40"
        assert [found.name for found in path.parent.iterdir()] == ["number"]


class TestDisks:
    def test_without_links(self, path, monkeypatch):
        def link(*paths):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
        with hold(path, "training"):
            with pytest.raises(HeldError), hold(path, "training"):
                pass
            assert [found.name for found in path.parent.iterdir()] == ["lock.json"]
        left(path, started=1, host="elsewhere", silence=0.05)
        with hold(path, "training"):
            pass

    def test_whose_answer_is_lost(self, path, monkeypatch):
        """NFS may repeat a request, which then fails because the link exists."""
        link = os.link

        def twice(*paths):
            link(*paths)
            link(*paths)

        monkeypatch.setattr(os, "link", twice)
        with hold(path, "training", say=never):
            pass

    def test_full(self, path, monkeypatch):
        def fsync(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"), hold(path, "training"):
            pass
        assert not list(path.parent.iterdir())
