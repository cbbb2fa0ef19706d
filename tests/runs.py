"""Tiny runs by the command line, as their users start them: fixtures and helpers."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from filelock import FileLock, Timeout
from forks import Forks
from tensorboardX.proto import event_pb2
from xla import xla_flags

from ddpm_jax.data.sources import open_source

ROOT = Path(__file__).parents[1]
PATIENCE = 900  # seconds to wait before a test fails, generous even for a slow or loaded machine
STEPS = 24
TINY = [
    "--config=configs/digits.py",
    "--config.model.channels=8",
    "--config.model.num_groups=4",
    "--config.model.channel_multipliers=(1,)",
    "--config.model.middle_attention=False",
    "--config.model.dropout=0.1",
    "--config.diffusion.num_timesteps=50",
    "--config.train.batch_size=16",
    f"--config.train.num_steps={STEPS}",
    "--config.checkpoint.every_steps=6",
    "--config.log.every_steps=2",
    "--config.log.sample_every_steps=12",
    "--config.log.sample_images=4",
    "--config.log.sample_steps=5",
    "--config.sample.num_images=9",
    "--config.sample.batch_size=16",
]
CAPTIONED = [
    "--config=configs/numbers.py",
    *TINY[1:],
    "--config.data.width=8",
    "--config.model.attention_resolutions=()",
    "--config.model.middle_attention=True",
    "--config.text.vocab_size=280",
    "--config.text.width=16",
    "--config.text.num_layers=1",
    "--config.text.num_heads=2",
    "--config.sample.num_steps=5",
]


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="how often the run of tests/test_survival.py is killed")


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder shared by all workers of a test session."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def made_once(shared):
    """made_once(make): the folder that make(folder) has filled for all workers, which change nothing in it."""

    def made_once(make):
        folder = shared / f"{make.__module__}.{make.__name__}"
        done = folder.with_name(f"{folder.name}.done")
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made_once


@pytest.fixture(scope="session")
def data_dir(made_once):
    """The folder in which tensorflow-datasets has prepared the digits."""
    return made_once(_prepare_digits)


def _prepare_digits(folder):
    open_source("digits", height=8, width=8, channels=1, data_dir=str(folder))


def _arguments(flags, config, data_dir):
    return [str(flag) for flag in ([*config, *flags, f"--config.data.data_dir={data_dir}"] if config else flags)]


@pytest.fixture(scope="session")
def compiled(shared):
    """The compilation cache, since all processes compile the same few programs."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(shared / "compiled")}
    return cache | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none"}


@pytest.fixture(scope="session")
def start(data_dir, compiled):
    """Starts main.py with a tiny run's flags; returns the process."""

    def start(*flags, devices=1, config=TINY, **environment):
        return subprocess.Popen(
            [
                *(sys.executable, "-W", "error::DeprecationWarning:ddpm_jax", "main.py"),
                *_arguments(flags, config, data_dir),
            ],
            cwd=ROOT,
            env={**os.environ, **compiled, "XLA_FLAGS": xla_flags(devices), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def forks(compiled, tmp_path_factory):
    """Runs commands in processes that need not import anything."""
    forks = Forks(tmp_path_factory.mktemp("forks"), compiled)
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def call(forks, data_dir):
    """Runs main.py with a tiny run's flags to its end; (exit status, output)."""

    def call(*flags, devices=1, config=TINY):
        arguments = ["python", "main.py", *_arguments(flags, config, data_dir)]
        return forks.run(arguments, ROOT, {"XLA_FLAGS": xla_flags(devices)})

    return call


def _finished_run(name, config, call, shared, tmp_path_factory):
    workdir, said = shared / name, shared / f"{name}.txt"
    with FileLock(f"{workdir}.lock"):
        if not said.exists():
            status, output = call(f"--workdir={workdir}", config=config)
            assert status == 0, output
            said.write_text(output)
    return shutil.copytree(workdir, tmp_path_factory.mktemp("copy") / name), said.read_text()


@pytest.fixture(scope="session")
def trained(call, shared, tmp_path_factory):
    """A finished run's workdir, in which tests write nothing, and its output; each worker has a copy."""
    return _finished_run("trained", TINY, call, shared, tmp_path_factory)


@pytest.fixture(scope="session")
def captioned(call, shared, tmp_path_factory):
    """The same for a run trained with captions."""
    return _finished_run("captioned", CAPTIONED, call, shared, tmp_path_factory)


_reserved = []


def free_port():
    """A port that nothing else uses before this process ends.

    It is below the kernel's ephemeral ports, and a locked file reserves it among test processes.
    """
    folder = Path(tempfile.gettempdir()) / f"ddpm_jax_ports_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for port in np.random.default_rng().permutation(np.arange(20_000, 30_000)).tolist():
        lock = FileLock(folder / str(port))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                lock.release()
                continue
        _reserved.append(lock)
        return port
    raise AssertionError("no port is free")


def start_two(start, *flags, devices=2, **options):
    """Two processes joined over loopback, with this many devices each."""
    job = (*flags, f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2")
    options |= {"devices": devices, "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    return [start(*job, f"--process_id={index}", **options) for index in range(2)]


def in_two_processes(start, *flags, **options):
    """The output of each process."""
    processes = start_two(start, *flags, **options)
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs


def metrics(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for_step(process, workdir, step):
    """Waits until the run has logged a step; fails if it ends first."""
    deadline = time.monotonic() + PATIENCE
    while True:
        ended = process.poll() is not None  # checked before reading the log
        if any(line["step"] >= step for line in metrics(workdir)):
            return
        assert not ended, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def checkpoint(workdir, step=STEPS):
    """Every array of a checkpoint."""
    parts = {}
    for part in ("params", "ema_0.99", "train"):
        restored = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / part)
        parts[part] = jax.tree.map(np.asarray, restored)
    return parts


def assert_same_checkpoint(a, b, step=STEPS):
    jax.tree.map(np.testing.assert_array_equal, checkpoint(a, step), checkpoint(b, step))


def results(workdir):
    """The results that must not depend on interruptions: metrics, TensorBoard's events, pictures."""
    machine = {"time", "steps_per_second", "images_per_second", "input_wait", "peak_memory_gib"}
    lines = [{name: value for name, value in line.items() if name not in machine} for line in metrics(workdir)]
    board = {key: value for key, value in scalars(workdir / "tensorboard").items() if key[1] not in machine}
    return lines, board, {path.name: path.read_bytes() for path in (workdir / "samples").iterdir()}


def scalars(folder):
    """{(step, name): value} as TensorBoard reads them: each start overrides older events from its first step on."""
    found = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while len(data) >= 12:
            (length,) = struct.unpack_from("<Q", data)
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == event_pb2.SessionLog.START:
                found = {key: value for key, value in found.items() if key[0] < event.step}
            for scalar in event.summary.value:
                assert (event.step, scalar.tag) not in found
                found[event.step, scalar.tag] = scalar.simple_value
    return found
