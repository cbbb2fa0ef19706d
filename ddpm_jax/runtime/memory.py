"""The memory of CPU programs: settings of the C allocator and of XLA, on Linux.

XLA's CPU backend allocates the temporary arrays of a program anew at every call, gigabytes for a training step. By
default the allocator gets such blocks from the kernel and returns them, page by page of 4 KiB, and the page faults can
take a third of the step.
"""

import ctypes
import importlib.util
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

_BLOCK_FLAG = "--xla_multiheap_size_constraint_per_heap"
_BLOCK = 56 << 20  # bytes; one of glibc's heaps holds 64 MiB, including its own records
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Starts this Python program again with the environment of `huge_pages`, where that asks for something.

    Does nothing under a debugger, or if JAX is imported already.
    """
    environment = huge_pages()
    if environment and "jax" not in sys.modules and not sys.gettrace():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | environment)


def huge_pages() -> dict[str, str]:
    """The environment variables with which a program's memory comes in huge pages.

    Huge pages have 2 MiB, so there are few page faults. Many systems give them only to programs that ask, and glibc
    (since 2.35) reads from its environment, at the start, whether to ask.

    Returns:
      {} if the kernel gives huge pages unasked or never, if GLIBC_TUNABLES is set already, on other systems than Linux,
      or if an accelerator's plug-in is installed.
    """
    if _kernel_choice() != "madvise" or "GLIBC_TUNABLES" in os.environ or not _serves_cpu():
        return {}
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def keep_freed_memory(devices: int = 1) -> None:
    """Lets the C allocator keep memory that a step frees; does nothing if an accelerator's plug-in is installed.

    If all threads share an arena, they wait for one another, which lengthens a step by up to a third. But only the main
    thread's arena keeps blocks of more than 64 MiB. So with one device, whose blocks are the largest, programs run in
    the thread that calls them, and the threads share two arenas for each core: more would take more memory. With
    several devices, XLA allocates a program's temporary arrays in blocks small enough for every arena, unless the user
    has set their size in XLA_FLAGS.

    Call this before JAX opens its devices, because XLA_FLAGS has no effect after that.

    Args:
      devices: the number of CPU devices of this process.
    """
    if _serves_cpu():
        try:
            libc = ctypes.CDLL("libc.so.6")
        except OSError:  # another C library, such as musl
            return
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_TOP_PAD, 64 << 20)
        import jax

        if devices == 1:
            libc.mallopt(M_ARENA_MAX, 2 * (os.cpu_count() or 1))
            jax.config.update("jax_cpu_enable_async_dispatch", False)
        elif _BLOCK_FLAG not in (flags := os.environ.get("XLA_FLAGS", "")):
            os.environ["XLA_FLAGS"] = f"{flags} {_BLOCK_FLAG}={_BLOCK}".lstrip()
        jax.monitoring.register_event_duration_secs_listener(_after_compiling)


def _kernel_choice() -> str:
    """To which programs the kernel gives huge pages: "always", "madvise" (those that ask) or "never"."""
    try:
        found = re.search(r"\[(\w+)\]", _HUGE_PAGES.read_text())
    except OSError:
        return "never"
    return found[1] if found else "never"


def _serves_cpu() -> bool:
    """Whether this is Linux without an accelerator's plug-in."""
    return sys.platform == "linux" and not any(map(importlib.util.find_spec, _PLUGINS))


def _after_compiling(event: str, duration_secs: float, **_: Any) -> None:
    """Returns the compiler's memory to the system before the compiled program allocates its own."""
    if event == "/jax/core/compile/backend_compile_duration" and duration_secs > 0.1:
        return_freed_memory()


def return_freed_memory() -> None:
    """Returns the memory that `keep_freed_memory` holds to the system.

    Memory that a program frees is worth keeping for its next call; memory used to read weights or to compile is not.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)
