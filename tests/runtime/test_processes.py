"""Starting a multi-host job; test_survival.py tests how it ends."""

import os
import re
import socket
import subprocess
import sys

import pytest
from runs import PATIENCE, free_port

from ddpm_jax.runtime import processes
from ddpm_jax.runtime.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_processes": 2}, "need --coordinator"),
        ({"process_id": 0}, "need --coordinator"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "'host'; accepted: host:port"),
        ({"coordinator": "host:1", "num_processes": 2}, "--process_id below it, not 2 and None"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "--process_id below it, not 2 and 2"),
    ],
)
def test_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)), processes.job(**arguments):
        pass


def test_nothing_is_done_for_a_job_of_one():
    with processes.job():
        assert processes._last_word.say() == ""


def test_wrong_number_in_the_environment(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES is 'two'"), processes.job(automatic=True):
        pass


def test_port_of_process_0_is_taken():
    with socket.create_server(("", 0)) as server:
        coordinator = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(UserError, match="cannot open port"), processes.job(coordinator, 2, 0):
            pass


def test_process_0_does_not_answer():
    coordinator = f"localhost:{free_port()}"
    with pytest.raises(UserError, match="did not respond for 1 s"), processes.job(coordinator, 2, 1, start_timeout=1):
        pass


JOB = """
import sys
from ddpm_jax.runtime import processes
from ddpm_jax.runtime.errors import UserError

try:
    with processes.job(automatic=True, start_timeout=int(sys.argv[1]), silence_timeout=60, advice=lambda: "go on"):
        if len(sys.argv) == 3:
            raise UserError(sys.argv[2])
        while True:
            pass
except UserError as error:
    sys.exit(f"error: {error}")
"""


def start(*arguments, **environment):
    command = [sys.executable, "-c", JOB, *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)


@pytest.mark.slow
class TestJob:
    def test_nothing_in_the_environment(self):
        process = start("5")
        assert "error: --distributed could not start a job" in process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 1

    def test_others_never_come(self):
        process = start(
            "2", JAX_COORDINATOR_ADDRESS=f"localhost:{free_port()}", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0"
        )
        sentence = process.communicate(timeout=PATIENCE)[1].splitlines()[-1]
        assert sentence == "error: not all processes of the job joined within 2 s; go on"
        assert process.returncode == 1

    def test_error_of_one_ends_both(self):
        """Even one that only computes, without communicating."""
        job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
        arguments = [("600",), ("600", "its disk is full")]
        processes = [start(*words, JAX_PROCESS_ID=str(index), **job) for index, words in enumerate(arguments)]
        outputs = [process.communicate(timeout=PATIENCE)[1] for process in processes]
        assert [process.returncode for process in processes] == [1, 1], outputs
        assert outputs[0].splitlines()[-1] == "error: process 1 of 2 stopped: its disk is full"
        assert outputs[1].splitlines()[-1] == "error: its disk is full"
