"""Opening images from all kinds of paths, reading them in portions, and refusals."""

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data.sources import open_source
from ddpm_jax.evaluation import image_sets
from ddpm_jax.evaluation.image_sets import of_source, open_images, read_array
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling import shards

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (21, 6, 5, 3), np.uint8)


@pytest.fixture(autouse=True)
def small_portions(monkeypatch):
    monkeypatch.setattr(image_sets, "PORTION", 8)


def joined(images):
    portions = list(images)
    assert [len(portion) for portion in portions[:-1]] == [8] * (len(portions) - 1)
    return np.concatenate(portions)


def said(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pictures(folder, images=IMAGES):
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    return folder


@pytest.mark.parametrize("key", ["image", "images", "x", "arr_0", "npy", "compressed"])
def test_array(tmp_path, key):
    path = tmp_path / ("x.npy" if key == "npy" else "x.npz")
    if key == "npy":
        np.save(path, IMAGES)
    elif key == "compressed":
        np.savez_compressed(path, IMAGES, label=np.zeros(21))
    else:
        np.savez(path, **{"a": np.zeros(3), key: IMAGES})
    found = open_images(path)
    assert found.count == 21
    for _ in range(2):
        np.testing.assert_array_equal(joined(found), IMAGES)


def test_grey_array(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES[..., 0])
    np.testing.assert_array_equal(joined(open_images(tmp_path / "x.npy")), IMAGES[..., :1])


def test_array_brought_to_a_size(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    assert joined(open_images(tmp_path / "x.npy", (4, 4, 1))).shape == (21, 4, 4, 1)
    np.testing.assert_array_equal(joined(open_images(tmp_path / "x.npy", (6, 5, 3))), IMAGES)


def test_pictures_keep_their_size(tmp_path):
    found = open_images(pictures(tmp_path / "a"))
    assert (found.count, found.source["source"]) == (21, "folder")
    np.testing.assert_array_equal(joined(found), IMAGES)
    assert joined(open_images(tmp_path / "a", (4, 4, 3))).shape == (21, 4, 4, 3)


def test_shards(tmp_path):
    for first in (0, 10):
        shards.write(tmp_path, first, first + 9, IMAGES[first : first + 10], {"label": np.zeros(10)}, {})
    found = open_images(tmp_path)
    assert found.count == 20
    np.testing.assert_array_equal(np.concatenate(list(found)), IMAGES[:20])


def test_source(tmp_path):
    source = open_source("folder", path=str(pictures(tmp_path / "a")), height=6, width=5, channels=3)
    found = of_source(source)
    assert found.source == source.describe()
    np.testing.assert_array_equal(joined(found), IMAGES)


def test_refused_pictures(tmp_path):
    folder = pictures(tmp_path / "a")
    assert "holds no images" in said(open_images, pictures(tmp_path / "empty", []))
    assert "none' does not exist" in said(open_images, tmp_path / "none")
    Image.fromarray(IMAGES[0, :4]).save(folder / "007.png")
    message = said(lambda: list(open_images(folder)))
    assert "007.png' cannot be read: it has 5x4 pixels, but the folder's first picture 5x6" in message
    (folder / "007.png").write_bytes(b"no picture")
    assert "007.png' cannot be read" in said(lambda: list(open_images(folder)))
    (folder / "000.png").write_bytes(b"no picture")
    assert "000.png' cannot be read" in said(open_images, folder)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": IMAGES / 255}, "holds float64 (21, 6, 5, 3); accepted: uint8"),
        ({"arr_0": np.full((2, 6, 5, 3), np.nan, np.float32)}, "holds float32"),
        ({"arr_0": IMAGES[:0]}, "N at least 1"),
        ({"arr_0": IMAGES[0, 0]}, "holds uint8 (5, 3)"),
        ({"pictures": IMAGES}, "has the arrays ['pictures']; accepted names for images: image, images, x, arr_0"),
    ],
)
def test_refused_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    assert message in said(open_images, tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["x.npz", "x.npy"])
@pytest.mark.parametrize("kept", [0, 40, -1])
def test_truncated_array(tmp_path, name, kept):
    (np.save if name == "x.npy" else np.savez)(tmp_path / name, IMAGES)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:kept])
    assert f"{name}' cannot be read as .npz or .npy" in said(lambda: list(read_array(tmp_path / name)))
