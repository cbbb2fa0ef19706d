"""One writer at a time: a lock file for any disk on which two processes cannot create the same name.

Nothing here uses flock or fcntl: network disks may lack these locks, or grant them on each host separately. Instead:

- *Taking the lock.* The file is written under a temporary name and then linked to its own. On local disks and on NFS
  only one process can create the link, and the file is complete. Where there are no links (FAT, some FUSE file
  systems), the file is created with O_EXCL, which is just as exclusive. A response lost by NFS does no harm: a process
  has the lock if it finds its own token in the file.
- *Checking whether the holder is alive.* On the holder's machine (the same boot of the same kernel, and the same PID
  namespace), the process exists or not, according to its PID and start time. On any other machine, and on systems
  without /proc, only its heartbeat counts: the holder rewrites a number in the file every few seconds. If the file is
  unchanged at each of many reads, spread over the silence that the file allows, the holder is gone. No clocks are
  compared.
- *Taking over.* Several processes may find an abandoned lock. Only one at a time may replace it: the one that holds a
  second lock of the same kind, named after the abandoned token. It replaces the file only if it is still unchanged.
- *Losing it.* Another host may take over while a process is suspended. So the holder calls `Lock.check` before it
  writes anything that matters. A suspension between this check and the write goes unnoticed.

The holder keeps the file open and writes its heartbeat there, so it never writes to another holder's file. Two things
are assumed: opening a file shows what was previously written and closed, or synchronised (NFS's close-to-open
consistency); and two running machines differ in boot identifier or host name.
"""

import dataclasses
import datetime
import errno
import json
import os
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

EVERY, SILENCE = 5.0, 60.0  # seconds between heartbeats, and seconds without one after which a holder counts as gone
_LOOKS = 200  # reads of the file during the silence
_LOOKS_BEFORE_A_WORD = 10
_POLL = 0.02  # seconds, while waiting for a process on this machine


@dataclasses.dataclass(frozen=True)
class Holder:
    """The content of a lock file.

    Attributes:
      raw: its bytes, including the heartbeat.
      values: the same as JSON values; empty if it cannot be parsed.
    """

    raw: bytes
    values: Mapping[str, Any]

    @property
    def token(self) -> str:
        """Identifies this acquisition of the lock."""
        return str(self.values.get("token") or f"{zlib.crc32(self.raw):08x}")

    @property
    def silence(self) -> float:
        """Seconds without a heartbeat after which the holder counts as gone."""
        silence = self.values.get("silence")
        return float(silence) if isinstance(silence, int | float) else SILENCE

    def is_alive(self) -> bool | None:
        """Whether the process exists; None if this machine cannot tell."""
        values = self.values
        machine, pid = values.get("machine"), values.get("pid")
        if machine is None or machine != _machine() or values.get("host") != socket.gethostname():
            return None
        if not isinstance(pid, int) or not 0 < pid < 2**31:
            return None
        try:
            os.kill(pid, 0)  # tests for existence, sends no signal
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's
        found = _process(pid)
        if found is None:
            return None  # it ended just now, or /proc hides it
        state, started = found
        return started == values.get("started") and state not in "ZX"

    def __str__(self) -> str:
        if "pid" not in self.values:
            return "an unknown process, whose lock file cannot be read"
        values = self.values
        processes = values.get("processes", 1)
        many = f" by {processes} processes" if processes > 1 else ""
        return (
            f"process {values['pid']} on host {values.get('host')} ({values.get('purpose')}{many} since "
            f"{values.get('since')} UTC)"
        )


class HeldError(Exception):
    """Another process has the lock."""

    def __init__(self, holder: Holder):
        super().__init__(f"in use by {holder}")
        self.holder = holder


class LostError(Exception):
    """This process has lost the lock.

    Attributes:
      holder: who has it; None: nobody.
    """

    def __init__(self, holder: Holder | None):
        super().__init__("the lock file is gone" if holder is None else f"taken over by {holder}")
        self.holder = holder


class Lock:
    """A lock that this process holds, from `hold`."""

    def __init__(self, path: Path, token: str):
        self.path, self.token = path, token

    def check(self) -> None:
        """LostError if this process has lost the lock."""
        found = read(self.path)
        if found is None or found.token != self.token:
            raise LostError(found)


def read(path: Path) -> Holder | None:
    """The holder of a lock, which may have been killed; None: nobody."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE, errno.ENOTDIR):
            return None
        raise
    try:
        values = json.loads(raw)
    except ValueError:
        values = None
    return Holder(raw, values if isinstance(values, dict) else {})


@contextmanager
def hold(
    path: Path,
    purpose: str,
    *,
    wait: bool = False,
    processes: int = 1,
    say: Callable[[str], None] = lambda text: None,
    every: float = EVERY,
    silence: float = SILENCE,
) -> Iterator[Lock]:
    """Holds the lock for the duration of the block; takes over a lock that a killed process left behind.

    Args:
      path: of the lock file, in an existing folder.
      purpose: what the lock is for, shown to others.
      wait: whether to wait until it is free, instead of raising HeldError.
      processes: number of processes in this job, for which process 0 holds the lock.
      say: called with a message if waiting takes longer.
      every: seconds between two heartbeats.
      silence: seconds without a heartbeat after which others may consider this process gone.

    Raises:
      HeldError: another process has it. Nothing was written.
      OSError: the disk cannot be read or written.
    """
    token = secrets.token_hex(8)
    text = _text(token, purpose, processes, silence)
    while not _take(path, token, text(0), wait, say):
        pass
    lock, ended = Lock(path, token), threading.Event()
    beat = threading.Thread(target=_beat, args=(lock, text, every, ended), name="heartbeat", daemon=True)
    beat.start()
    try:
        yield lock
    finally:
        ended.set()
        beat.join(every)  # it may be waiting for a disk that does not respond
        with suppress(LostError, OSError):
            lock.check()
            path.unlink()


def _text(token: str, purpose: str, processes: int, silence: float) -> Callable[[int], bytes]:
    """A lock file's content by heartbeat number: of constant length, so that it is valid JSON while it is rewritten."""
    process = _process(os.getpid())
    values = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "purpose": purpose,
        "since": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S}",
        "processes": processes,
        "started": process and process[1],
        "machine": _machine(),
        "silence": silence,
        "token": token,
    }
    return lambda beat: (json.dumps({**values, "beat": f"{beat:012d}"}, indent=2) + "\n").encode()


def _take(path: Path, token: str, text: bytes, wait: bool, say: Callable[[str], None]) -> bool:
    """Tries once; HeldError if another process has it and `wait` is false."""
    found = read(path)
    if found is None:
        return _create(path, token, text)
    alive = found.is_alive()
    if alive is None:
        now = _watch(path, found, say)
        alive = now is None or now.raw != found.raw
        if now is None:
            return False  # free by now
        found = now
    if alive and not wait:
        raise HeldError(found)
    if alive:
        time.sleep(_POLL)
        return False
    with hold(path.with_name(f".{path.name}.{found.token}.left"), "taking over", wait=True, say=say):
        again = read(path)
        return again is not None and again.raw == found.raw and _create(path, token, text, os.replace)


def _watch(path: Path, found: Holder, say: Callable[[str], None]) -> Holder | None:
    """The file's content as soon as it differs from `found`, or after the silence.

    Reads are counted rather than time measured, since this process may have been suspended in between.
    """
    for look in range(_LOOKS):
        if look == _LOOKS_BEFORE_A_WORD:
            say(f"waiting up to {found.silence:.0f} s for a sign of life from {found}")
        time.sleep(found.silence / _LOOKS)
        now = read(path)
        if now is None or now.raw != found.raw:
            return now
    return found


def _create(path: Path, token: str, text: bytes, move: Callable[[Path, Path], Any] | None = None) -> bool:
    """Creates the file atomically; returns whether it has this content. `move` may replace an existing file."""
    temporary = path.with_name(f".{path.name}.{token}.new")
    try:
        _write_new(temporary, text)
        try:
            (move or os.link)(temporary, path)
        except (FileExistsError, FileNotFoundError):
            pass  # another process was first, or NFS lost the response
        except OSError:
            if move:
                raise
            with suppress(FileExistsError):  # this file system has no links
                _write_new(path, text)
    finally:
        with suppress(OSError):
            temporary.unlink()
    found = read(path)
    return found is not None and found.token == token


def _write_new(path: Path, text: bytes) -> None:
    """Writes atomically unless the process is killed; FileExistsError if the file exists."""
    with path.open("xb") as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink()
            raise


def _beat(lock: Lock, text: Callable[[int], bytes], every: float, ended: threading.Event) -> None:
    number = 0
    with suppress(OSError), lock.path.open("r+b", buffering=0) as file:
        if lock.token.encode() not in file.read():
            return
        while not ended.wait(every):
            number += 1
            with suppress(OSError):  # a failing disk is reported by the code that depends on it
                file.seek(0)
                file.write(text(number))
                os.fsync(file.fileno())


def _machine() -> str | None:
    """Identifies this boot of this kernel and its PID namespace; None if they are unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process(pid: int) -> tuple[str, int] | None:
    """The state and the start time of a process, in ticks since boot; None if it does not exist or is hidden."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])
