"""The quality of digits by sampler and number of steps, for a run of configs/digits.py.

    python benchmarks/digits_steps.py runs/digits --long dpmpp_2m ddpm --plot docs/images/steps.png

The measure is the Frechet distance between the digits and as many samples, in the features of the small digits
classifier; its floor is the distance that as many real digits would have. It is only comparable within this table, and
is not FID. Prints a Markdown table and one line of JSON.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import ddpm_jax
from ddpm_jax.data.dataset import training_images
from ddpm_jax.diffusion.tables import SAMPLERS
from ddpm_jax.evaluation import metrics
from ddpm_jax.evaluation.features import train_digits_classifier
from ddpm_jax.evaluation.metrics import Moments
from ddpm_jax.runtime.files import atomic_path


def measure(run, steps, long):
    """{sampler: {number of network calls: distance}}, and the floor."""
    source, features = training_images(run.config, run.dataset), train_digits_classifier()
    real = np.stack([source[i]["image"] for i in range(len(source))])
    judge = lambda images: features.of([images], run.mesh, 256)["pool"]  # noqa: E731
    rows = judge(real)
    reference, floor = Moments.of(rows), metrics.frechet_floor(rows, len(rows))
    found = {sampler: {} for sampler in SAMPLERS}
    for sampler in SAMPLERS:
        for count in (*steps, run.schedule.num_timesteps) if sampler in long else steps:
            # Heun calls the network twice per step, so it gets half the steps.
            options = {"sampler": sampler, "num_steps": (count + 1) // 2 if sampler == "heun" else count}
            images = run.sample(len(real), batch_size=256, **options)
            found[sampler][run.calls(**options)] = metrics.frechet_distance(Moments.of(judge(images)), reference)
            print(sampler, found[sampler], file=sys.stderr, flush=True)
    return found, floor


def plot(path, found, floor):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for sampler, distances in found.items():
        axes.loglog(list(distances), list(distances.values()), "o-", label=sampler)
    axes.axhline(floor, color="grey", linestyle=":", label="as many real digits")
    axes.set_xlabel("network calls")
    axes.set_ylabel("Frechet distance (digits classifier)")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("workdir")
    arguments.add_argument("--steps", nargs="*", type=int, default=[5, 10, 20, 50])
    arguments.add_argument("--long", nargs="*", default=[], help="samplers to run over all timesteps as well")
    arguments.add_argument("--plot", type=Path)
    options = arguments.parse_args()
    found, floor = measure(ddpm_jax.load(options.workdir), options.steps, options.long)
    counts = sorted({count for distances in found.values() for count in distances})
    print(f"| sampler | {' | '.join(map(str, counts))} |")
    print("|-" * (len(counts) + 1) + "|")
    for sampler, distances in found.items():
        print(f"| `{sampler}` | {' | '.join(f'{distances[c]:.2f}' if c in distances else '' for c in counts)} |")
    print(f"floor: {floor:.2f}")
    if options.plot:
        plot(options.plot, found, floor)
    print(json.dumps({"benchmark": "digits_steps", "frechet": found, "floor": floor}))
