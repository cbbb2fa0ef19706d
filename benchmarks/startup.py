"""Seconds from the command to the first training step: real processes of main.py in fresh workdirs.

    python benchmarks/startup.py
    python benchmarks/startup.py --config cifar10 --batch 16
    pip install -e '.[peers]' && python benchmarks/startup.py --peers

"Cold" starts with an empty compilation cache and fills it; "warm" uses the filled cache; "resumed" also starts from a
checkpoint. The images are synthetic, for configs whose data set would have to be downloaded. The times are those at
which the command reports that it compiles the step, that it has compiled it, and that the first step is done. With
`--peers`, processes of PyTorch and diffusers take turns with ours: Python, imports, a network of equal size and one
step of `train_step.py`, eager and with torch.compile, whose cache is kept. They read no images and write nothing.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
from common import print_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


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


def start_peer(config, cache, compiled, batch):
    """Seconds until a process of the peer has taken a training step."""
    step = f"train_step.diffusers({config!r}, {batch}, 'float32', 1, {compiled})()"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import train_step; {step}"], cwd=HERE, env=environment, check=True)
    return [np.nan, np.nan, time.perf_counter() - began]


def main(options):
    flags = [] if options.batch is None else [f"--config.train.batch_size={options.batch}"]
    found = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        if options.config != "digits":
            images = np.random.default_rng(0).integers(0, 256, (1000, 32, 32, 3), np.uint8)
            np.savez(f"{folder}/images.npz", image=images)
            flags += ["--config.data.source=array", f"--config.data.path={folder}/images.npz"]
        for number in range(options.rounds):
            for how, workdir in (("cold", "a"), ("warm", "b"), ("resumed", "b")):
                place = Path(folder, f"{workdir}{number}")
                found[how].append(start(options.config, place, f"{folder}/cache{number}", flags))
            if options.peers:
                peer = partial(start_peer, options.config, f"{folder}/inductor{number}", batch=options.batch)
                found["diffusers"].append(peer(compiled=False))
                found["diffusers, compiled, cold"].append(peer(compiled=True))
                found["diffusers, compiled, warm"].append(peer(compiled=True))
    print(f"startup {options.config}: medians of {options.rounds}, seconds from the command on")
    print(f"{'':26}  {'compiling':>10}  {'compiled':>10}  {'first step':>10}")
    medians = {how: [statistics.median(column) for column in zip(*rows, strict=True)] for how, rows in found.items()}
    for how, values in medians.items():
        print(f"{how:26}  " + "  ".join(f"{'' if np.isnan(value) else round(value, 1):>10}" for value in values))
    columns = ("compiling", "compiled", "first_step")
    seconds = {
        how: {name: round(value, 2) for name, value in zip(columns, values, strict=True) if not np.isnan(value)}
        for how, values in medians.items()
    }
    print_json("startup", config=options.config, batch=options.batch, seconds=seconds)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--config", choices=["digits", "cifar10"], default="digits")
    arguments.add_argument("--batch", type=int, help="by default the config's")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--peers", action="store_true", help="PyTorch and diffusers, too")
    main(arguments.parse_args())
