"""Seconds from the command to the first training step: real processes of main.py in fresh workdirs.

    python benchmarks/startup.py
    python benchmarks/startup.py --config cifar10 --batch 16

"Cold" starts with an empty compilation cache and fills it; "warm" uses the filled cache; "resumed" also starts from a
checkpoint. The images are synthetic, for configs whose data set would have to be downloaded. The times are those at
which the command reports that it compiles the step, that it has compiled it, and that the first step is done.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import print_json

ROOT = Path(__file__).resolve().parents[1]


def start(config, workdir, cache, flags):
    """Seconds until the process started compiling the step, had compiled it, and had taken its first step."""
    command = [
        *(sys.executable, "main.py", f"--config=configs/{config}.py", f"--workdir={workdir}"),
        *(f"--compilation_cache={cache}", "--config.log.every_steps=1", "--config.train.num_steps=1000"),
        *("--config.log.sample_every_steps=0", *flags),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    seconds, said = {}, []
    for line in process.stderr:
        said.append(line)
        for what in ("compiling", "compiled", "step"):
            if line.startswith(f"{what} ") and what not in seconds:
                seconds[what] = time.perf_counter() - began
                if what == "step":
                    process.terminate()  # it saves, and ends
    process.wait()
    if len(seconds) < 3:
        raise RuntimeError("".join(said))
    return list(seconds.values())


def main(options):
    flags = [] if options.batch is None else [f"--config.train.batch_size={options.batch}"]
    found = {"cold": [], "warm": [], "resumed": []}
    with tempfile.TemporaryDirectory() as folder:
        if options.config != "digits":
            images = np.random.default_rng(0).integers(0, 256, (1000, 32, 32, 3), np.uint8)
            np.savez(f"{folder}/images.npz", image=images)
            flags += ["--config.data.source=array", f"--config.data.path={folder}/images.npz"]
        for number in range(options.rounds):
            for how, workdir in (("cold", "a"), ("warm", "b"), ("resumed", "b")):
                place = Path(folder, f"{workdir}{number}")
                found[how].append(start(options.config, place, f"{folder}/cache{number}", flags))
    print(f"startup {options.config}: medians of {options.rounds}, seconds from the command on")
    print(f"{'':8}  {'compiling':>10}  {'compiled':>10}  {'first step':>10}")
    medians = {how: [statistics.median(column) for column in zip(*rows, strict=True)] for how, rows in found.items()}
    for how, values in medians.items():
        print(f"{how:8}  " + "  ".join(f"{value:10.1f}" for value in values))
    columns = ("compiling", "compiled", "first_step")
    seconds = {how: dict(zip(columns, np.round(values, 2).tolist(), strict=True)) for how, values in medians.items()}
    print_json("startup", config=options.config, batch=options.batch, seconds=seconds)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--config", choices=["digits", "cifar10"], default="digits")
    arguments.add_argument("--batch", type=int, help="by default the config's")
    arguments.add_argument("--rounds", type=int, default=3)
    main(arguments.parse_args())
