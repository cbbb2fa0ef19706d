"""The results of a comparison: its subject, its uncertainty, and what could not be computed."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from PIL import Image

from ddpm_jax.evaluation.comparison import compare, describe
from ddpm_jax.evaluation.features import Features, custom_features
from ddpm_jax.evaluation.image_sets import open_images
from ddpm_jax.evaluation.references import open_summary, read_reference, write_reference
from ddpm_jax.evaluation.summaries import summarize
from ddpm_jax.runtime.errors import UserError

MESH = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
NAME = "Frechet distance (pixels)"


def apply(images):
    x = images.reshape(len(images), -1) / 255.0
    return {"pool": x[:, :8], "spatial": x[:, 8:12], "logits": 3 * x[:, 12:16]}


JUDGE = custom_features("pixels", apply)


def pictures(seed, count, power=1.0):
    return (255 * np.random.default_rng(seed).uniform(size=(count, 4, 4, 3)) ** power).astype(np.uint8)


@pytest.fixture(scope="module")
def real():
    return summarize(JUDGE, [pictures(0, 600)], MESH, source={"source": "folder", "path": "real"})


@pytest.fixture(scope="module")
def result(real):
    return compare(JUDGE, real, [pictures(1, 200, 1.2)], MESH)


class TestCompare:
    def test_says_what_it_is_of(self, result):
        assert {name: result[name] for name in ("features", "images", "reference", "generated")} == {
            "features": "pixels",
            "images": "8-bit",
            "reference": "folder real",
            "generated": "images",
        }
        assert (result["num_real"], result["num_generated"]) == (600, 200)
        json.dumps(result)

    def test_distance_with_interval_floor_and_extrapolation(self, result):
        low, high = result[f"{NAME}, 95 % interval"]
        assert 0 < result[f"{NAME}, floor"] < low < result[NAME] < high < 2 * result[NAME]
        assert result[f"{NAME}, extrapolated"] < result[NAME]
        assert result[f"{NAME}, bias"] == pytest.approx(result[f"{NAME}, floor"], rel=0.8)

    def test_the_other_metrics(self, result):
        assert result["sFID"] > 0
        assert 1 < result["Inception Score (pixels)"] < 4
        assert all(0 <= result[name] <= 1 for name in ("precision", "recall", "coverage"))
        assert "not computed" not in result
        assert not any("FID" in name and name != "sFID" for name in result)

    def test_of_real_images_is_about_the_floor(self, real):
        found = [compare(JUDGE, real, [pictures(seed, 200)], MESH) for seed in range(2, 6)]
        assert np.mean([x[NAME] for x in found]) == pytest.approx(found[0][f"{NAME}, floor"], rel=0.5)

    def test_warns_of_few_images(self, real, result):
        assert (
            f"{NAME} is for 200 generated images; with fewer than 50,000 it is too high, here by about"
            in (result["note"])
        )
        few = compare(JUDGE, real, [pictures(1, 6)], MESH)
        assert "no more images than the features' 8 dimensions" in few["note"]
        assert few[NAME] > result[NAME]
        assert few["not computed"] == f"{NAME}, extrapolated, KID, precision, recall, density, coverage"

    def test_is_named_FID_with_inception_alone(self, real):  # noqa: N802
        judge = Features("pixels", "FID", None, JUDGE.apply)
        names = compare(judge, real, [pictures(1, 50)], MESH).keys()
        assert {"FID", "FID, 95 % interval", "FID, floor", "FID-infinity", "FID, bias", "IS"} <= names

    def test_with_a_file_of_moments(self, real, result, tmp_path):
        """The same distance and, by the halves in the file, a floor; the rest is reported as missing."""
        write_reference(tmp_path / "x.npz", real)
        found = compare(JUDGE, read_reference(tmp_path / "x.npz"), [pictures(1, 200, 1.2)], MESH)
        assert found[NAME] == pytest.approx(result[NAME], rel=1e-9)
        assert 0.4 < found[f"{NAME}, floor"] / result[f"{NAME}, floor"] < 2.5
        assert found["not computed"] == "KID, precision, recall, density, coverage"
        assert "The reference contains only moments" in found["note"]
        np.savez(tmp_path / "bare.npz", mu=np.ones(8), sigma=np.eye(8))
        found = compare(JUDGE, read_reference(tmp_path / "bare.npz"), [pictures(1, 200)], MESH)
        assert found["not computed"].startswith(f"{NAME}, floor, sFID, KID")
        assert "does not say which network" in found["note"]
        assert found["num_real"] is None

    def test_moments_alone_on_both_sides(self, real):
        moments = [summarize(JUDGE, [pictures(seed, 100)], MESH, keep=False) for seed in (0, 1)]
        found = compare(JUDGE, *moments, MESH)
        assert {name for name in found if isinstance(found[name], float)} == {NAME, "sFID"}

    def test_of_a_file_of_moments_as_the_generated_ones(self, real, tmp_path):
        np.savez(tmp_path / "x.npz", mu=np.ones(8), sigma=np.eye(8))
        found = compare(JUDGE, real, read_reference(tmp_path / "x.npz"), MESH)
        assert found[NAME] > 0
        assert (found["num_generated"], f"{NAME}, floor" in found, "note" in found) == (None, False, False)

    def test_folder_against_folder(self, tmp_path):
        for name, seed in (("a", 0), ("b", 1)):
            (tmp_path / name).mkdir()
            for index, image in enumerate(pictures(seed, 20)):
                Image.fromarray(image).save(tmp_path / name / f"{index}.png")
        told = []
        progress = lambda *done: told.append(done)  # noqa: E731
        found = compare(
            JUDGE,
            *(open_summary(tmp_path / x, JUDGE, MESH, batch_size=20, progress=progress) for x in ("a", "b")),
            MESH,
        )
        assert told == [(20, 20), (20, 20)]
        assert found["reference"] == f"folder {tmp_path / 'a'}"
        again = compare(JUDGE, open_images(tmp_path / "a"), open_images(tmp_path / "b"), MESH)
        assert again == found

    @pytest.mark.parametrize(
        ("judge", "images", "message"),
        [
            (JUDGE, [pictures(0, 1)], "at least 2 images of each kind, not 1"),
            (JUDGE, [pictures(0, 9) / 255], "are float64"),
            (custom_features("other", apply), [pictures(0, 9)], "folder real has features of 'pixels', not 'other'"),
        ],
    )
    def test_refusals(self, real, judge, images, message):
        with pytest.raises(UserError, match=message):
            compare(judge, real, images, MESH)

    def test_reference_of_another_dimension(self, tmp_path):
        np.savez(tmp_path / "x.npz", mu=np.ones(3), sigma=np.eye(3))
        with pytest.raises(UserError, match=r"x.npz has 3 dimensions, but pixels has 8 \(pool\)"):
            compare(JUDGE, read_reference(tmp_path / "x.npz"), [pictures(0, 20)], MESH)


def test_describe():
    assert describe({"source": "tfds", "name": "cifar10:3.0.2", "split": "train"}) == "tfds cifar10:3.0.2 train"
    assert describe({}) == "images"
