"""Runs the benchmarks one after another, each in its own process, and collects their lines of JSON.

    python benchmarks/all.py --out results.jsonl
    python benchmarks/all.py --quick
    python benchmarks/all.py --gpu

Prints the benchmarks' output, and at the end a Markdown table of all lines of JSON. Benchmarks that need a package that
is not installed are skipped and listed. A digits run for the benchmarks that need one is trained first, unless `--run`
names one. Everything takes hours on two cores, `--quick` (fewer rounds, only the small networks) about half an hour.
`--gpu` runs those for a GPU instead, and trains configs/numbers.py there; it has not been tried on a GPU yet.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("torch", "diffusers")
SMALL = ("numbers", "folder_small", "captions_small", "small")
# What is run: the command, the packages that it needs beyond the project's, and whether --quick runs it, with what.
BENCHMARKS = [
    ("train_step.py", PEERS, None),
    ("train_step.py --network=cifar10_64", PEERS, None),
    ("train_step.py --network=digits", PEERS, ["--rounds", "5"]),
    *((f"train_step.py --network={name}", PEERS, None) for name in SMALL),
    ("cores.py", (), ["--network", "digits", "--rounds", "5"]),
    ("step_profile.py", (), []),
    ("stable_diffusion.py", (*PEERS, "transformers"), None),
    ("fine_tuning.py", (*PEERS, "transformers", "peft"), None),
    ("peers.py", ("flaxdiff", "hackable_diffusion"), None),
    ("layers.py", (), ["--rounds", "5"]),
    ("attention.py", ("libtpu",), []),
    ("attention.py --cpu", ("torch",), ["--rounds", "3"]),
    ("sampling.py", PEERS, None),
    ("sampling.py --network=digits --methods dpmpp_2m", PEERS, ["--rounds", "3"]),
    *((f"sampling.py --network={name} --methods dpmpp_2m", PEERS, None) for name in SMALL),
    ("sampling.py --process --batch 1", PEERS, None),
    ("evaluation.py", ("torch", "torch_fidelity"), None),
    ("evaluation.py --memory", (), None),
    ("input.py", (), ["--images", "5000"]),
    ("startup.py --config digits --peers", PEERS, ["--rounds", "1"]),
    ("startup.py --config cifar10 --batch 16", (), None),
    ("serve.py {run}", ("starlette", "uvicorn", "python_multipart"), ["--seconds", "30"]),
    ("digits_quality.py {samples}", (), []),
    ("digits_steps.py {run} --long dpmpp_2m", (), None),
]
_WHOLE = "stable_diffusion.py --parts whole --dtype bfloat16 --rounds 5 --compiled"
GPU_BENCHMARKS = [  # what --gpu runs instead
    ("train_step.py --batch 128 --dtype bfloat16 --steps 20", PEERS, []),
    *((f"{_WHOLE} --batch {batch}", (*PEERS, "transformers"), []) for batch in (1, 8)),
    ("fine_tuning.py --batch 8", (*PEERS, "transformers", "peft"), []),
]


def call(script, *arguments):
    """What the script prints, which is passed on as it comes; None if it failed."""
    command = [sys.executable, str(ROOT / script), *arguments]
    print(f"\n$ python {script} {' '.join(arguments)}", flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return lines if process.wait() == 0 else None


def judged(options, folder):
    """The digits run and 256 samples of it, made where they are not given."""
    run, samples = options.run or f"{folder}/digits", f"{folder}/digits.npz"
    if not options.run:
        call("main.py", "--config=configs/digits.py", f"--workdir={run}")
    call("main.py", "--mode=sample", f"--workdir={run}", "--num_images=256", "--output=npz", f"--out={samples}")
    return {"run": run, "samples": samples}


def figures(result):
    """The results in a line of JSON, without the description of the benchmark and the machine."""
    values = result.get("median_ms") or {}
    if values:
        return ", ".join(f"{name} {value:,.1f} ms" for name, value in values.items())
    told = {name: value for name, value in result.items() if name not in ("benchmark", "cpu", "cores", "python")}
    return json.dumps(told)[1:-1].replace('"', "")


def main(options, folder):
    results, left_out = [], []
    places = {} if options.gpu else judged(options, folder)
    for command, packages, quick in GPU_BENCHMARKS if options.gpu else BENCHMARKS:
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing or (options.quick and quick is None):
            left_out.append(f"{command}: {'without ' + ', '.join(missing) if missing else 'not with --quick'}")
            continue
        script, *arguments = command.format(**places).split(" ")
        lines = call(f"benchmarks/{script}", *arguments, *(quick if options.quick else ()))
        if lines is None:
            left_out.append(f"{command}: failed")
            continue
        for line in lines:
            if line.startswith('{"benchmark"'):
                results.append({"command": command} | json.loads(line))
                with open(options.out, "a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
    if options.gpu:
        command, began = "main.py --config=configs/numbers.py", time.perf_counter()
        if call(*command.split(" "), f"--workdir={folder}/numbers") is None:
            left_out.append(f"{command}: failed")
        else:
            results.append({"command": command, "benchmark": "run", "seconds": round(time.perf_counter() - began, 1)})
    print("\n| benchmark | command | result |\n|-|-|-|")
    for result in results:
        command = result.pop("command")
        print(f"| {result['benchmark']} | `{command}` | {figures(result)} |")
    for line in left_out:
        print(f"left out: {line}")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="the short ones, in fewer rounds")
    arguments.add_argument("--gpu", action="store_true", help="those for a GPU instead")
    arguments.add_argument("--run", help="a workdir of configs/digits.py; by default one is trained")
    arguments.add_argument("--out", default="benchmarks.jsonl", help="lines of JSON are added to this file")
    with tempfile.TemporaryDirectory() as temporary:
        main(arguments.parse_args(), temporary)
