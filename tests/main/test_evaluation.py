"""--mode=evaluate."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

pytestmark = pytest.mark.slow


def test_of_samples_and_of_the_bound(trained, call, tmp_path):
    """By a fresh process each time: the second finds the first's samples."""
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    flags = ("--mode=evaluate", f"--workdir={workdir}", "--num_images=24", "--num_steps=4", "--batch_size=8")
    status, output = call(*flags, "--likelihood=bound", "--likelihood_images=8", config=None)
    assert status == 0, output
    assert re.search(r"Frechet distance \(digits classifier\) +[\d.]+ \([\d.]+ to [\d.]+\)  floor [\d.]+", output)
    assert re.search(r"bits/dim of training images, bound +[\d.]+ \([\d.]+\)", output)
    assert "warning" not in output.lower(), output
    bound = json.loads((workdir / "evaluation_bound.json").read_text())
    parts = [bound[name]["mean"] for name in ("prior", "kl", "decoder")]
    assert bound["total"]["mean"] == pytest.approx(sum(parts), rel=1e-6)
    assert len(bound["rate"]) == 50
    for name in ("terms", "rate_distortion"):
        assert Image.open(workdir / f"evaluation_{name}.png").size[0] > 500
    status, again = call(*flags, config=None)
    assert status == 0, again
    assert "shards that exist already: 1" in again
    first, second = json.loads((workdir / "evaluation.json").read_text())
    name = "Frechet distance (digits classifier)"
    assert first[name] == second[name]
    estimate = "bits/dim of training images, estimated bound"
    assert abs(second[estimate] - first["bits/dim of training images, bound"]) < 1


def test_of_two_folders_without_a_run(call, tmp_path):
    for name, brightness in (("a", 255), ("b", 200)):
        (tmp_path / name).mkdir()
        for i, digit in enumerate(load_digits().images[:30]):
            picture = (digit * (brightness / 16)).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / name / f"{i:02d}.png")
    paths = (f"--generated={tmp_path / 'b'}", f"--against={tmp_path / 'a'}")
    flags = ("--mode=evaluate", f"--workdir={tmp_path / 'out'}", *paths)
    status, output = call(*flags, "--features=digits", config=None)
    assert status == 0, output
    assert "num_generated" in output
    assert (tmp_path / "out" / "evaluation.md").exists()
    status, output = call(*flags, "--features=digits", "--num_images=3", config=None)
    assert (status, "--num_images does nothing with --mode=evaluate" in output) == (1, True), output
