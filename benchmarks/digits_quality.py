"""The quality of digits sampled from a run of configs/digits.py.

    python main.py --mode=sample --workdir=runs/digits --num_images=256 --output=npz --out=digits.npz
    python benchmarks/digits_quality.py digits.npz

A support-vector machine trained on all 1,797 real digits judges them: an image is recognised if one class has a
probability over 0.8. An image is a copy if it lies closer to a real digit than the closest 1 % of real digits lie to
their nearest neighbour.
"""

import argparse
import json
import warnings

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.svm import SVC


def nearest(a, b, exclude_self=False):
    """Euclidean distance of each a to the nearest b, in grey levels."""
    squares = np.sum(a**2, 1)[:, None] - 2 * a @ b.T + np.sum(b**2, 1)
    if exclude_self:
        np.fill_diagonal(squares, np.inf)
    return np.sqrt(np.maximum(squares.min(1), 0))


def judge(images):
    digits = load_digits()
    real = np.round(digits.images * (255 / 16)).reshape(-1, 64)
    fake = images.reshape(-1, 64).astype(np.float64)
    warnings.filterwarnings("ignore", category=FutureWarning)  # scikit-learn 1.9 renames SVC's probability
    classifier = SVC(C=10, probability=True, random_state=0)
    folds = StratifiedKFold(10, shuffle=True, random_state=0)
    held_out = cross_val_predict(classifier, real / 255, digits.target, method="predict_proba", cv=folds)
    probability = classifier.fit(real / 255, digits.target).predict_proba(fake / 255)
    recognised = probability.max(1) > 0.8
    copy = np.quantile(nearest(real, real, exclude_self=True), 0.01)
    return {
        "images": len(fake),
        "recognised": float(np.mean(recognised)),
        "recognised_real_held_out": float(np.mean(held_out.max(1) > 0.8)),
        "classes": np.bincount(probability.argmax(1)[recognised], minlength=10).tolist(),
        "copies": float(np.mean(nearest(fake, real) < copy)),
    }


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("images", help=".npz written by --mode=sample --output=npz")
    result = judge(np.load(arguments.parse_args().images)["image"])
    for name, value in result.items():
        print(f"{name:26} {value}")
    print(json.dumps({"benchmark": "digits_quality", **result}))
