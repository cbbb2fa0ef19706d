"""References in the formats of pytorch-fid and guided-diffusion, read and written."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from PIL import Image

from ddpm_jax.evaluation import metrics
from ddpm_jax.evaluation.features import custom_features
from ddpm_jax.evaluation.references import open_summary, read_reference, write_reference
from ddpm_jax.evaluation.summaries import summarize
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling import shards

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (60, 4, 4, 3), np.uint8)
MESH = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))


def apply(images):
    x = images.reshape(len(images), -1) / 255.0
    return {"pool": x[:, :12], "spatial": x[:, 12:20], "logits": x[:, 20:25]}


JUDGE = custom_features("pixels", apply)
POOL = np.asarray(apply(IMAGES)["pool"], np.float64)


@pytest.fixture(scope="module")
def whole():
    return summarize(JUDGE, [IMAGES], MESH, source={"source": "tfds", "name": "cifar10", "split": "test"})


def said(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_written_and_read(tmp_path, whole):
    """Under the names that other programs read, and with all that is known of it."""
    path = tmp_path / "reference.npz"
    write_reference(path, whole)
    with np.load(path) as file:
        np.testing.assert_allclose(file["mu"], POOL.mean(0), rtol=1e-6)
        np.testing.assert_allclose(file["sigma"], np.cov(POOL, rowvar=False), rtol=1e-5, atol=1e-9)
        assert (file["mu_s"].shape, file["sigma_s"].shape) == ((8,), (8, 8))
        assert (int(file["count"]), str(file["features"])) == (60, "pixels")
        assert json.loads(str(file["source"])) == whole.source
    found = read_reference(path)
    assert (found.features, found.count, found.rows) == ("pixels", 60, {})
    assert found.source == {**whole.source, "reference": str(path)}
    assert found.halves == pytest.approx(metrics.split_distance(whole.rows["pool"], 30))
    for name, moments in whole.moments.items():
        np.testing.assert_allclose(found.moments[name].scatter, moments.scatter, rtol=1e-12)
        assert found.moments[name].count == 60
    write_reference(tmp_path / "again.npz", found)
    assert read_reference(tmp_path / "again.npz").halves == found.halves


def test_of_pytorch_fid(tmp_path):
    np.savez(tmp_path / "x.npz", mu=POOL.mean(0), sigma=np.cov(POOL, rowvar=False))
    found = open_summary(tmp_path / "x.npz", JUDGE, MESH)
    assert (found.features, found.count, found.rows, found.halves) == ("", None, {}, None)
    np.testing.assert_allclose(found.moments["pool"].covariance, np.cov(POOL, rowvar=False), rtol=1e-12)
    assert list(found.moments) == ["pool"]


def test_of_guided_diffusion(tmp_path, whole):
    """Images alone; and with moments of other images, which are taken for the distances."""
    np.savez(tmp_path / "images.npz", IMAGES)
    found = open_summary(tmp_path / "images.npz", JUDGE, MESH)
    np.testing.assert_array_equal(found.rows["pool"], whole.rows["pool"])
    assert found.count == 60
    moments = {"mu": np.ones(12), "sigma": np.eye(12), "mu_s": np.ones(8), "sigma_s": np.eye(8)}
    np.savez(tmp_path / "both.npz", IMAGES, np.zeros(60), **moments)
    found = open_summary(tmp_path / "both.npz", JUDGE, MESH)
    np.testing.assert_array_equal(found.moments["pool"].covariance, np.eye(12))
    np.testing.assert_array_equal(found.moments["spatial"].mean, 1)
    np.testing.assert_array_equal(found.rows["pool"], whole.rows["pool"])
    assert (found.features, found.count) == ("pixels", None)


def test_of_folders(tmp_path, whole):
    """Pictures; and shards, whose features are kept."""
    for index, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"{index:03d}.png")
    told = []
    found = open_summary(tmp_path, JUDGE, MESH, batch_size=32, progress=lambda *done: told.append(done))
    np.testing.assert_array_equal(found.rows["pool"], whole.rows["pool"])
    assert told == [(32, 60), (60, 60)]
    folder = tmp_path / "shards"
    shards.write(folder, 0, 59, IMAGES, {"label": np.zeros(60)}, {})
    found = open_summary(folder, JUDGE, MESH, keep=False)
    assert (found.count, found.rows) == (60, {})
    assert (folder / f"features_{JUDGE.digest}").is_dir()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"sigma": np.eye(3)}, "has the arrays ['sigma']; mu and sigma are needed"),
        ({"mu": np.ones(4), "sigma": np.eye(3)}, "has mu (4,) and sigma (3, 3)"),
        ({"mu": np.ones(3), "sigma": np.full((3, 3), np.nan)}, "has numbers in mu or sigma that are not finite"),
    ],
)
def test_refused_references(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    assert message in said(read_reference, tmp_path / "x.npz")


def test_broken_reference(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.ones(3), sigma=np.eye(3))
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[:-30])
    assert "x.npz' cannot be read" in said(read_reference, tmp_path / "x.npz")
    assert "x.npz' cannot be read" in said(open_summary, tmp_path / "x.npz", JUDGE, MESH)
    assert "cannot be read" in said(read_reference, tmp_path / "none.npz")
    assert "none.npz' does not exist" in said(open_summary, tmp_path / "none.npz", JUDGE, MESH)


def test_reference_that_cannot_be_written(tmp_path, whole):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in said(write_reference, tmp_path / "file" / "x.npz", whole)
