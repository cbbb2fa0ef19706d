"""Real processes without the cost of imports."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from xla import GC_THRESHOLDS

ROOT = Path(__file__).parents[1]

# Importing jax and its company takes longer than main.py on a tiny run: so one process imports them, touches no device,
# and forks for each command.
_SERVER = """
import gc, importlib, json, os, runpy, signal, sys, traceback

for module in "cli", "training.loop", "commands.editing", "commands.evaluation", "commands.plan", "commands.weights":
    importlib.import_module("ddpm_jax." + module)
for module in "tensorboardX.event_file_writer", "sklearn.datasets", "ddpm_jax.data.builders":
    importlib.import_module(module)
gc.freeze()  # what is imported stays
gc.set_threshold(*json.loads(sys.argv[1]))

def status_of(argv):
    sys.argv = argv[1:]
    try:
        if argv[1] == "-m":
            sys.argv = argv[2:]
            runpy.run_module(argv[2], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(argv[1], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(900)  # it ends, whatever it waits for
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.chdir(job["folder"])
        sys.path[0] = ""
        os.environ.update(job["environment"])
        status = status_of(job["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Runs "python main.py ..." and "python -m ddpm_jax ..." in processes forked from one that has imported all."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment
        self._output = folder / "output.txt"
        self._server = subprocess.Popen(
            [sys.executable, "-W", "error::DeprecationWarning:ddpm_jax", "-c", _SERVER, json.dumps(GC_THRESHOLDS)],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, argv: Sequence[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
        """(exit status, output) of a command started in the folder."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        job = {"argv": argv, "folder": str(folder), "output": str(self._output), "environment": environment}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the process that forks is gone"
        status = int(answer)
        return status, self._output.read_text()

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
