"""The effect of bfloat16: digits trained and sampled with and without it.

    python benchmarks/precision.py
    python benchmarks/precision.py --run runs/digits

The first trains configs/digits.py for some steps twice, from the same weights on the same images and noise, and prints
the losses and their ratio. The second samples as many digits as there are from the weights of one run, computing in
float32 and in bfloat16, and prints the Frechet distances to the digits (small classifier's features, no FID).
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from common import print_json

import ddpm_jax

DTYPES = ("float32", "bfloat16")


def losses(steps):
    """{dtype: mean loss of the steps}."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from configs import digits

    found = {}
    for dtype in DTYPES:
        config = digits.get_config()
        config.model.dtype = dtype
        config.train.num_steps, config.optimizer.decay_steps = steps, config.train.num_steps
        config.log.update(every_steps=10, sample_every_steps=0, tensorboard=False)
        config.sample.update(num_images=1, sampler="dpmpp_2m", num_steps=2)
        with tempfile.TemporaryDirectory() as folder:
            ddpm_jax.train(config, folder)
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        found[dtype] = [json.loads(line)["loss"] for line in lines]
    return found


def distances(path, num_steps):
    """{dtype: Frechet distance of the samples}, with the weights of one run."""
    from ddpm_jax.data.dataset import training_images
    from ddpm_jax.evaluation import metrics
    from ddpm_jax.evaluation.features import train_digits_classifier

    run, features = ddpm_jax.load(path), train_digits_classifier()
    source = training_images(run.config, run.dataset)
    real = np.stack([source[i]["image"] for i in range(len(source))])
    moments = lambda images: metrics.Moments.of(features.of([images], run.mesh, 256)["pool"])  # noqa: E731
    found, reference = {}, moments(real)
    for dtype in DTYPES:
        again = dataclasses.replace(
            run, model=dataclasses.replace(run.model, net=run.net.clone(dtype=jnp.dtype(dtype)))
        )
        images = again.sample(len(real), sampler="dpmpp_2m", num_steps=num_steps, batch_size=256)
        found[dtype] = metrics.frechet_distance(moments(images), reference)
    return found


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=100, help="of training")
    arguments.add_argument("--run", help="a workdir of configs/digits.py, to sample from")
    arguments.add_argument("--num_steps", type=int, default=20, help="of sampling")
    options = arguments.parse_args()
    if options.run:
        found = distances(options.run, options.num_steps)
        name, figures = "Frechet distance of samples", found
    else:
        found = losses(options.steps)
        name, figures = f"loss over {options.steps} steps", {dtype: np.mean(values) for dtype, values in found.items()}
    for dtype in DTYPES:
        print(f"{name}, {dtype:9} {figures[dtype]:.5f}")
    ratio = figures["bfloat16"] / figures["float32"]
    print(f"bfloat16 / float32: {ratio:.4f}")
    print_json(f"precision: {name}", **found, ratio=round(float(ratio), 5))
