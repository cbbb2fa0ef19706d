"""The C allocator's settings, in real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_jax.runtime import memory

SHOW = "print(os.environ.get('GLIBC_TUNABLES'), sys.argv[1:], sys.flags.dev_mode)"


def run(before="", environment=None):
    """What a program prints that restarts itself; it imports nothing before that but what `before` says."""
    code = f"import os, sys; {before}\nfrom ddpm_jax.runtime import memory\nmemory.restart_with_huge_pages()\n{SHOW}"
    unset = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-X", "dev", "-W", "ignore", "-c", code, "--a=b", "c d"]
    process = subprocess.run(command, env=unset | (environment or {}), capture_output=True, text=True, check=True)
    return process.stdout.splitlines()


@pytest.mark.skipif(not memory._serves_cpu(), reason="huge pages are asked for on Linux, without accelerators")
class TestRestart:
    def test_once_with_the_same_arguments(self, tmp_path):
        asked = tmp_path / "enabled"
        asked.write_text("always [madvise] never\n")
        lines = run(f"import ddpm_jax.runtime.memory as m; m._HUGE_PAGES = __import__('pathlib').Path({str(asked)!r})")
        assert lines == ["glibc.malloc.hugetlb=1 ['--a=b', 'c d'] True"]

    @pytest.mark.parametrize("found", ["[always] madvise never", "always madvise [never]", None])
    def test_not_where_the_kernel_does_not_wait_to_be_asked(self, tmp_path, found):
        path = tmp_path / "enabled"
        if found:
            path.write_text(found)
        lines = run(f"import ddpm_jax.runtime.memory as m; m._HUGE_PAGES = __import__('pathlib').Path({str(path)!r})")
        assert lines == ["None ['--a=b', 'c d'] True"]

    def test_not_against_the_user(self):
        assert run(environment={"GLIBC_TUNABLES": "glibc.malloc.check=0"})[0].startswith("glibc.malloc.check=0 ")

    @pytest.mark.parametrize("before", ["sys.modules['jax'] = None", "sys.settrace(lambda *ignored: None)"])
    def test_not_where_something_would_be_lost(self, before):
        assert run(before)[0].startswith("None ")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's memory")
@pytest.mark.skipif(not memory._serves_cpu(), reason="memory is kept on Linux, without accelerators")
@pytest.mark.parametrize("devices", [1, 2])
def test_freed_memory_is_kept_until_it_is_returned(devices):
    """A block of 32 MiB that is freed leaves the process only if the memory is returned."""
    code = (
        "import ctypes, re; from pathlib import Path; from ddpm_jax.runtime import memory\n"
        "def resident(): return int(re.search(r'VmRSS:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) >> 10\n"
        f"memory.keep_freed_memory({devices})\n"
        "libc = ctypes.CDLL('libc.so.6'); libc.malloc.restype = ctypes.c_void_p\n"
        "before = resident(); block = ctypes.c_void_p(libc.malloc(32 << 20))\n"
        "ctypes.memset(block, 1, 32 << 20); libc.free(block)\n"
        "kept = resident(); memory.return_freed_memory(); print(kept - before, kept - resident())"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, returned = map(int, process.stdout.split())
    assert kept >= 30
    assert returned >= 30


@pytest.mark.skipif(not memory._serves_cpu(), reason="memory is kept on Linux, without accelerators")
def test_with_one_device_a_program_runs_in_the_thread_that_calls_it():
    """So its result is ready when the call returns, however long it takes."""
    code = (
        "from ddpm_jax.runtime import memory; memory.keep_freed_memory(1)\n"
        "import jax, jax.numpy as jnp\n"
        "run = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda i, y: y @ x / 500, x)); x = jnp.ones((500, 500))\n"
        "run(x).block_until_ready(); print(run(x).is_ready())"
    )
    unset = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    process = subprocess.run([sys.executable, "-c", code], env=unset, capture_output=True, text=True, check=True)
    assert process.stdout == "True\n"


@pytest.mark.skipif(not memory._serves_cpu(), reason="memory is kept on Linux, without accelerators")
@pytest.mark.parametrize(("chosen", "is_kept"), [("", True), ("--xla_multiheap_size_constraint_per_heap=-1", False)])
def test_temporary_arrays_of_several_devices_are_kept(chosen, is_kept):
    """A program with 128 MiB of them stops taking new pages after some calls, unless the user chose one block."""
    code = (
        "import ctypes; PR_SET_THP_DISABLE = 41; ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)\n"
        "import jax, resource; from ddpm_jax.runtime import memory\n"
        "jax.config.update('jax_num_cpu_devices', 2); memory.keep_freed_memory(2)\n"
        "def rotate(_, arrays): return [1.5 * x for x in arrays[1:] + arrays[:1]]\n"
        "def run(x): return sum(jax.lax.fori_loop(0, 3, rotate, [x + i for i in range(8)]))\n"
        "x = jax.numpy.ones(4 << 20); run = jax.jit(run).lower(x).compile()\n"
        "print(run.memory_analysis().temp_size_in_bytes >> 20)\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): before = faults(); run(x).block_until_ready(); print(faults() - before)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"XLA_FLAGS": chosen}, capture_output=True, text=True, check=True
    )
    temporary, *faults = map(int, process.stdout.split())
    assert temporary >= 128
    assert min(faults) < 100 if is_kept else min(faults) > 10_000  # of 32,768 pages of 4 KiB, or more
