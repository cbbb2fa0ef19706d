"""Where a small training step's time goes on a CPU: the profiler's events, by kind of operation.

    python benchmarks/step_profile.py
    python benchmarks/step_profile.py --network numbers --devices 1

The times are those of an average device; with the profiler a step takes somewhat longer than without.
"""

import argparse
import gzip
import json
import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import cores
from common import print_json
from networks import NETWORKS

KINDS = {  # by the name of an operation in the compiled program
    "convolutions, products and sums by YNNPACK": r"ynn_fusion",
    "other convolutions and products": r"dot|convolution",
    "transposed copies": r".*(transpose|copy)",
    "all-reduce, with waiting for the other devices": r"all-(reduce|gather)|reduce-scatter",
    "element by element": r".*",
}


def events(folder):
    """(seconds, name) of each operation on a compute thread."""
    (file,) = Path(folder).rglob("*.trace.json.gz")
    trace = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in trace if e.get("name") == "thread_name"}
    for event in trace:
        thread = threads.get((event.get("pid"), event.get("tid")), "")
        is_operation = re.fullmatch(r"[a-z][\w-]*(\.\d+)*", event.get("name", "")) and "python" not in thread
        if event.get("ph") == "X" and is_operation and event["name"].split(".")[0] not in ("while", "call"):
            yield event["dur"] / 1e6, event["name"]


def main(options):
    run = cores.setup(options.network, options.devices)
    import jax

    run(), run()
    began = time.perf_counter()
    run()
    plain = (time.perf_counter() - began) / cores.STEPS
    settings = jax.profiler.ProfileOptions()
    settings.python_tracer_level, settings.host_tracer_level = 0, 3
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=settings):
            began = time.perf_counter()
            run()
            profiled = (time.perf_counter() - began) / cores.STEPS
        found = defaultdict(float)
        for seconds, name in events(folder):
            kind = next(kind for kind, pattern in KINDS.items() if re.match(pattern, name))
            found[kind] += seconds / cores.STEPS / options.devices
    found["between operations and between steps"] = profiled - sum(found.values())
    print(f"step_profile {options.network}, {options.devices} device(s): {1e3 * plain:.1f} ms per step")
    for kind, seconds in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{kind:46} {1e3 * seconds:7.1f} ms  {seconds / profiled:6.1%}")
    milliseconds = {kind: round(1e3 * seconds, 2) for kind, seconds in found.items()}
    print_json("step_profile", network=options.network, devices=options.devices, milliseconds=milliseconds)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--network", choices=list(NETWORKS), default="digits")
    arguments.add_argument("--devices", type=int, default=2)
    main(arguments.parse_args())
