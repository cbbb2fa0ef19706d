"""Several CPU devices in one process, so that sharding can be tested anywhere; set before jax is imported.

There are eight, or DDPM_JAX_TEST_DEVICES: the slow tests take less time with two, but those marked "eight" are skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from xla import trace_fast, xla_flags

trace_fast()
os.environ["JAX_PLATFORMS"] = "cpu"
DEVICES = int(os.environ.get("DDPM_JAX_TEST_DEVICES", "8"))
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(DEVICES)}"

pytest_plugins = ["runs", "browser", "exactness"]


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("peers"):
            item.add_marker(pytest.mark.slow)
        if DEVICES < 8 and item.get_closest_marker("eight"):
            item.add_marker(pytest.mark.skip(reason=f"needs eight devices; DDPM_JAX_TEST_DEVICES is {DEVICES}"))


TENSORFLOW_SEEMS_INSTALLED = """
import importlib.machinery, sys

class Spy:
    def find_spec(self, name, *args):
        return importlib.machinery.ModuleSpec(name, self) if name == "tensorflow" else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        print("TENSORFLOW", flush=True)
        raise ModuleNotFoundError("No module named 'tensorflow'")

sys.meta_path.insert(0, Spy())
"""


@pytest.fixture(scope="session")
def python():
    """Runs code in a new interpreter in which importing TensorFlow prints TENSORFLOW; returns the output."""

    def python(code, *arguments):
        command = [sys.executable, "-c", TENSORFLOW_SEEMS_INSTALLED + code, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return python
