"""Inception features of images: ours against torch-fidelity's PyTorch network with the same random weights.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --memory

The first prints seconds per batch and images per second; both networks include the resizing to 299 pixels. The second
prints the additional memory and time that the metrics need for features of 50,000 images, generated batch by batch.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from common import alternate, report

ROOT = Path(__file__).resolve().parents[1]


def _images(batch, size):
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)


def _fidelity(path):
    sys.path.insert(0, str(ROOT / "tests"))
    import fidelity

    return fidelity.inception(path)


def theirs(path, batch, size):
    import torch

    network, images = _fidelity(path), torch.tensor(_images(batch, size).transpose(0, 3, 1, 2))

    def run():
        with torch.no_grad():
            network(images)

    return run


def ours(path, batch, size):
    from ddpm_jax.runtime import memory, parallel

    memory.keep_freed_memory()
    from ddpm_jax.evaluation.features import load_inception

    features, mesh, images = load_inception(path), parallel.make_mesh(), _images(batch, size)
    return lambda: features.of([images], mesh, batch)


def memory(count, dims):
    """Prints the metrics' additional memory and their time."""
    import jax.numpy as jnp
    import numpy as np

    from ddpm_jax.evaluation import metrics

    rng = np.random.default_rng(0)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # noqa: E731

    def batches(size=500):
        for first in range(0, count, size):
            yield rng.standard_normal((min(size, count - first), dims), np.float32)

    told = {}

    def tell(name, before, began):
        size, seconds = (peak() - before) / 2**20, time.perf_counter() - began
        print(f"{name}: {size:.0f} MiB more than before, {seconds:.0f} s", flush=True)
        told[name] = {"MiB": round(size), "seconds": round(seconds, 1)}

    before, began = peak(), time.perf_counter()
    moments = [metrics.Moments.over(batches()) for _ in range(2)]
    metrics.frechet_distance(*moments)
    tell("moments and their distance", before, began)

    real, fake = (rng.standard_normal((count, dims), np.float32) for _ in range(2))
    jnp.zeros(1).block_until_ready()  # JAX itself takes some
    before, began = peak(), time.perf_counter()
    root = metrics.covariance_root(moments[0])
    metrics.frechet_influence(fake, moments[1], moments[0], root=root)
    metrics.frechet_infinity(fake, moments[0], root=root)
    metrics.frechet_floor(real, count)
    tell("interval, extrapolation and floor", before, began)
    before, began = peak(), time.perf_counter()
    metrics.manifolds(real, fake)
    metrics.kid(real, fake)
    tell("precision, recall, density, coverage, KID", before, began)
    print(json.dumps({"benchmark": "evaluation memory", "images": count, "dims": dims, **told}))


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--size", type=int, default=32, help="of the images, in pixels")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--memory", action="store_true", help="measure the metrics' memory instead")
    arguments.add_argument("--images", type=int, default=50_000, help="of --memory")
    arguments.add_argument("--dims", type=int, default=2048, help="of --memory")
    options = arguments.parse_args()
    if options.memory:
        memory(options.images, options.dims)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.pth"
            _fidelity(path)
            arguments = {"path": path, "batch": options.batch, "size": options.size}
            candidates = {"ours": partial(ours, **arguments), "torch-fidelity": partial(theirs, **arguments)}
            seconds = alternate(candidates, options.rounds)
        rate = {f"{name}, images/s": round(options.batch / sorted(s)[len(s) // 2], 2) for name, s in seconds.items()}
        report("Inception features", seconds, "torch-fidelity", batch=options.batch, size=options.size, **rate)
