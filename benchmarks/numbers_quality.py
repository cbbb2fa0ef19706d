"""How often a run of configs/numbers.py draws the number in the prompt.

    python benchmarks/numbers_quality.py runs/numbers

A support-vector machine trained on all 1,797 real digits reads each digit; a picture is right if all of its digits are.
Trained and held-out numbers are evaluated separately, with 256 samples each per guidance scale. A picture is a copy if
it is closer to a training picture than the closest 1 % of 2,000 training pictures are to their nearest neighbour; the
same criterion applies to single digits and real digits.
"""

import argparse

import numpy as np
from common import print_json
from digits_quality import nearest
from sklearn.datasets import load_digits
from sklearn.svm import SVC

import ddpm_jax
from ddpm_jax.data.dataset import training_images
from ddpm_jax.data.numbers import in_words, numbers_of

_SAMPLES = 256
_SOME = 2000  # training pictures whose nearest neighbours define the threshold


def flat(pictures):
    return pictures.reshape(len(pictures), -1).astype(np.float64)


def pieces(pictures, count):
    """The digits of pictures, one after the other, [N count, 64]."""
    return flat(pictures.reshape(len(pictures), 8, count, 8).swapaxes(1, 2).reshape(-1, 8, 8))


class Judge:
    def __init__(self, run):
        digits = load_digits()
        self.digits = np.round(digits.images * (255 / 16)).reshape(-1, 64)
        self.classifier = SVC(C=10).fit(self.digits / 255, digits.target)
        source = training_images(run.config, run.dataset)
        self.count = run.dataset["num_digits"]
        self.pictures = flat(np.stack([source[i]["image"] for i in range(len(source))]))
        some = np.linspace(0, len(source) - 1, _SOME).round().astype(int)
        to_others = [nearest(self.pictures[[i]], np.delete(self.pictures, i, axis=0))[0] for i in some]
        self.close = np.quantile(to_others, 0.01)
        self.close_digit = np.quantile(nearest(self.digits, self.digits, exclude_self=True), 0.01)

    def read(self, pictures):
        read = self.classifier.predict(pieces(pictures, self.count) / 255).reshape(len(pictures), self.count)
        return read @ 10 ** np.arange(self.count)[::-1]

    def __call__(self, pictures, numbers):
        return {
            "right": float(np.mean(self.read(pictures) == numbers)),
            "copies": float(np.mean(nearest(flat(pictures), self.pictures) < self.close)),
            "copied_digits": float(np.mean(nearest(pieces(pictures, self.count), self.digits) < self.close_digit)),
        }


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("workdirs", nargs="+", help="runs of configs/numbers.py")
    arguments.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="of guidance")
    arguments.add_argument("--seed", type=int, default=1, help="of the samples")
    options = arguments.parse_args()
    results = []
    print(f"{'run':24} {'guidance':>8}  {'numbers':9} {'right':>6} {'copies':>7} {'copied digits':>14}")
    for workdir in options.workdirs:
        run = ddpm_jax.load(workdir)
        judge, held_out = Judge(run), run.dataset["held_out"]
        kinds = {"learned": sorted({*numbers_of(judge.count)} - {*held_out}), "held out": held_out}
        for scale in options.scales:
            for kind, numbers in kinds.items():
                words = [in_words(number) for number in numbers]
                pictures = run.sample(_SAMPLES, options.seed, prompts=words, guidance_scale=scale)
                found = judge(pictures, np.resize(numbers, _SAMPLES))
                print(
                    f"{workdir[-24:]:24} {scale:8g}  {kind:9} {found['right']:6.3f} {found['copies']:7.3f} "
                    f"{found['copied_digits']:14.3f}"
                )
                results.append({"run": workdir, "guidance": scale, "numbers": kind, **found})
    print_json("numbers_quality", samples=_SAMPLES, results=results)


if __name__ == "__main__":
    main()
