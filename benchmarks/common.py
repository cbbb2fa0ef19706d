"""Shared by the benchmarks: peers take turns, medians are compared, and the result is a table and a JSON line."""

import json
import multiprocessing as mp
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# A candidate is set up once and returns the function to time, which waits for its result. Further information goes into
# that function's attribute `facts`; the process's peak memory is added to it. A function that takes minutes may have an
# attribute `warm_up`, a shorter call of the same programs.
Setup = Callable[[], Callable[[], Any]]


def _serve(setup: Setup, pipe: Connection) -> None:
    try:
        run = setup()
        warm_up = getattr(run, "warm_up", run)
        warm_up(), warm_up()  # compiles, and fills caches
        pipe.send(getattr(run, "facts", {}) | {"peak_mib": peak_mib()})
        while pipe.recv():
            began = time.perf_counter()
            run()
            pipe.send(time.perf_counter() - began)
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))


def peak_mib() -> int:
    """The peak memory of this process, without that of the process that started it, which ru_maxrss may include."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def alternate(
    candidates: dict[str, Setup], rounds: int, facts: dict[str, dict[str, Any]] | None = None, steps: int = 1
) -> dict[str, list[float]]:
    """Seconds of the candidates' calls, which take turns; the candidates' `facts` are put into the argument.

    If a call makes several `steps`, one after another, the seconds are those of one. Short steps need that: the first
    after a pause is slower, because the system has taken memory back.

    Every candidate has its own process, idle while the others run, so that candidates do not compete for threads or
    memory. All have the environment in which `main.py` starts itself.
    """
    from ddpm_jax.runtime import memory

    os.environ.update(memory.huge_pages())
    context = mp.get_context("spawn")
    workers = {}
    for name, setup in candidates.items():
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(setup, there), daemon=True)
        process.start()
        workers[name] = (process, here)
        told = _receive(here)
        if facts is not None:
            facts[name] = told
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, (_, pipe) in workers.items():
            pipe.send(True)
            seconds[name].append(_receive(pipe) / steps)
    for process, pipe in workers.values():
        pipe.send(False)
        process.join()
    return seconds


def _receive(pipe: Connection) -> Any:
    answer = pipe.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


def planned(compiled: Any, params: Any) -> dict[str, Any]:
    """The number of parameters of a network, and XLA's counts for a compiled program: arithmetic, and the bytes that
    all fusions read and write."""
    import jax

    cost, count = compiled.cost_analysis(), sum(p.size for p in jax.tree.leaves(params))
    return {
        "parameters": count,
        "gflop": round(cost["flops"] / 1e9, 1),
        "traffic_gb": round(cost["bytes accessed"] / 1e9, 2),
    }


def report(benchmark: str, seconds: dict[str, list[float]], against: str, **facts: Any) -> None:
    """Prints medians, spreads and each median's ratio to that of `against`, then one line of JSON."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    width = max(map(len, medians))
    print(f"{benchmark}: {len(next(iter(seconds.values())))} alternating calls each")
    print(f"{'':{width}}  {'median':>10}  {'fastest':>10}  {'slowest':>10}  {'ratio':>6}")
    for name, values in seconds.items():
        columns = (f"{1e3 * value:8.1f}ms" for value in (medians[name], min(values), max(values)))
        print(f"{name:{width}}  {'  '.join(columns)}  {medians[name] / medians[against]:6.3f}")
    ratios = {name: round(median / medians[against], 4) for name, median in medians.items()}
    milliseconds = {name: round(1e3 * median, 3) for name, median in medians.items()}
    print_json(benchmark, median_ms=milliseconds, ratio=ratios, **facts)


def print_json(benchmark: str, **facts: Any) -> None:
    """The result as one line of JSON, with the machine it was measured on."""
    machine = {"cpu": _cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()} | _gpu()
    print(json.dumps({"benchmark": benchmark, **facts, **machine}))


def _gpu() -> dict[str, str]:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return {"gpu": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
