import os

import numpy as np
import pytest
from picture_files import BLUE, GREEN, RED, examples, folder, save, stripes
from PIL import Image
from refusals import sentence

from ddpm_jax.data.sources import open_source


def array(path, height=4, width=4, channels=3, **options):
    return open_source("array", path=str(path), height=height, width=width, channels=channels, **options)


# Folders.


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.png", {}, 0),
        ("A.PNG", {"format": "png"}, 0),
        ("a.bmp", {}, 0),
        ("a.webp", {"lossless": True}, 0),
        ("a.jpg", {"quality": 95}, 2),
        ("a.JPEG", {"format": "jpeg", "quality": 95}, 2),
    ],
)
def test_formats(tmp_path, name, options, tolerance):
    save(tmp_path / name, (200, 100, 50), **options)
    source = folder(tmp_path)
    assert len(source) == 1
    image = source[0]["image"]
    assert image.dtype == np.uint8
    assert image.shape == source.shape == (4, 4, 3)
    assert np.abs(image.astype(int) - (200, 100, 50)).max() <= tolerance


def test_images_come_in_the_order_of_their_paths_from_all_depths(tmp_path):
    names = ["z.png", "b/a.png", "a/c/d.png", "a/b.png", "a.png", "B.png"]
    for level, name in enumerate(names):
        save(tmp_path / name, (level, level, level))
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    source = folder(tmp_path)
    assert source.paths == ["B.png", "a.png", "a/b.png", "a/c/d.png", "b/a.png", "z.png"]
    assert [int(source[i]["image"][0, 0, 0]) for i in range(6)] == [names.index(path) for path in source.paths]
    assert {source[i]["label"] for i in range(6)} == {0}
    assert source.class_names == ()


def test_sub_folders_are_classes(tmp_path):
    for name in ("dogs/1.png", "cats/2.png", "cats/old/3.png", "ants/4.png"):
        save(tmp_path / name, RED)
    source = folder(tmp_path, labels=True)
    assert source.class_names == ("ants", "cats", "dogs")
    assert [source.class_names[source[i]["label"]] for i in range(4)] == [path.split("/")[0] for path in source.paths]
    assert source.describe()["class_names"] == ["ants", "cats", "dogs"]


def test_with_classes_an_image_in_no_sub_folder_is_refused(tmp_path):
    save(tmp_path / "cats/1.png", RED)
    save(tmp_path / "loose.png", RED)
    assert "'loose.png'" in sentence(folder, tmp_path, labels=True)
    assert len(folder(tmp_path, labels=True, skipped=["loose.png"])) == 1


def test_folder_without_images(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "absent") in sentence(folder, tmp_path / "absent")
    assert str(tmp_path / "file") in sentence(folder, tmp_path / "file")
    text = sentence(folder, tmp_path / "empty")
    assert str(tmp_path / "empty") in text
    assert ".png, .jpg, .jpeg, .webp, .bmp" in text
    assert "data.path is empty" in sentence(folder, "")


@pytest.fixture
def broken_folder(tmp_path):
    for name in ("1.png", "sub/2.jpg", "sub/3.jpg"):
        save(tmp_path / name, Image.effect_noise((64, 64), 80))
    jpeg = (tmp_path / "sub/3.jpg").read_bytes()
    (tmp_path / "sub/3.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.webp").touch()
    return tmp_path


def test_broken_images_are_found(broken_folder):
    calls = []
    broken = folder(broken_folder).find_broken(lambda *call: calls.append(call))
    assert sorted(broken) == ["empty.webp", "sub/3.jpg", "text.png"]
    assert "truncated" in broken["sub/3.jpg"]
    assert all(broken.values())
    assert calls == [(i, 5) for i in range(1, 6)]


def test_broken_images_can_be_left_out(broken_folder):
    skipped = ["empty.webp", "sub/3.jpg", "text.png"]
    source = folder(broken_folder, skipped=skipped)
    assert source.paths == ["1.png", "sub/2.jpg"]
    assert source.find_broken() == {}
    assert source.describe()["skipped"] == skipped
    assert source.describe()["num_images"] == 2


def test_an_image_too_large_to_be_true_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns above that, and refuses above twice that
    save(tmp_path / "fine.png", Image.new("L", (10, 10)))
    save(tmp_path / "large.png", Image.new("L", (15, 10)))
    save(tmp_path / "larger.png", Image.new("L", (30, 10)))
    assert sorted(folder(tmp_path).find_broken()) == ["large.png", "larger.png"]


def change_nothing(path): ...


def touch(path):
    os.utime(path / "a.png", (1, 1))


def move(path):
    path.rename(path.with_name("elsewhere"))


def add_text(path):
    (path / "notes.txt").write_text("x")


def add_image(path):
    save(path / "c.png", RED)


def remove_image(path):
    (path / "b.png").unlink()


def rename_image(path):
    (path / "b.png").rename(path / "c.png")


def change_image(path):
    save(path / "b.png", Image.effect_noise((4, 4), 80))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (change_nothing, True),
        (touch, True),
        (move, True),
        (add_text, True),
        (add_image, False),
        (remove_image, False),
        (rename_image, False),
        (change_image, False),
    ],
)
def test_folder_fingerprint(tmp_path, change, same):
    path = tmp_path / "pictures"
    save(path / "a.png", RED)
    save(path / "b.png", GREEN)
    before = folder(path).describe()["fingerprint"]
    change(path)
    path = path if path.exists() else path.with_name("elsewhere")
    assert (folder(path).describe()["fingerprint"] == before) == same


# Arrays.

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
LABELS = np.array([2, 0, 1])


@pytest.mark.parametrize("key", ["image", "images", "x", "arr_0"])
def test_npz_key_of_the_images(tmp_path, key):
    np.savez(tmp_path / "a.npz", **{key: PICTURES, "other": LABELS})
    source = array(tmp_path / "a.npz")
    assert len(source) == 3
    for i in range(3):
        np.testing.assert_array_equal(source[i]["image"], PICTURES[i])
        assert source[i]["label"] == 0
    assert source.class_names == ()


@pytest.mark.parametrize("key", ["label", "labels", "y", "arr_1"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_npz_key_of_the_labels(tmp_path, key, dtype):
    np.savez_compressed(tmp_path / "a.npz", **{"image": PICTURES, key: LABELS.astype(dtype)})
    source = array(tmp_path / "a.npz", labels=True)
    assert [source[i]["label"] for i in range(3)] == [2, 0, 1]
    assert source.class_names == ("0", "1", "2")


def test_npy(tmp_path):
    np.save(tmp_path / "a.npy", np.asfortranarray(PICTURES))
    source = array(tmp_path / "a.npy")
    np.testing.assert_array_equal([source[i]["image"] for i in range(3)], PICTURES)
    assert "without labels" in sentence(array, tmp_path / "a.npy", labels=True)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("stored", [None, 1, 3, 4])
def test_stored_channels(tmp_path, stored, channels):
    value, alpha = 77, 255
    pixel = {None: value, 1: [value], 3: [value] * 3, 4: [value] * 3 + [alpha]}[stored]
    images = np.broadcast_to(np.array(pixel, np.uint8), (2, 4, 4) if stored is None else (2, 4, 4, stored)).copy()
    if stored == 4:
        images[1, ..., 3] = 0
    np.save(tmp_path / "a.npy", images)
    source = array(tmp_path / "a.npy", channels=channels)
    np.testing.assert_array_equal(source[0]["image"], np.full((4, 4, channels), value))
    np.testing.assert_array_equal(source[1]["image"], np.full((4, 4, channels), 255 if stored == 4 else value))


def test_array_is_brought_to_the_size(tmp_path):
    np.save(tmp_path / "a.npy", stripes(RED, GREEN, BLUE)[None])
    np.testing.assert_array_equal(array(tmp_path / "a.npy")[0]["image"], stripes(GREEN))


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (PICTURES.astype(np.float32), "float32 (3, 4, 4, 3)"),
        (PICTURES.astype(np.int64), "int64 (3, 4, 4, 3)"),
        (PICTURES[0, 0], "uint8 (4, 3)"),
        (PICTURES[None], "uint8 (1, 3, 4, 4, 3)"),
        (PICTURES[..., :2], "uint8 (3, 4, 4, 2)"),
        (PICTURES.transpose(0, 3, 1, 2)[:, :, :, :2], "uint8 (3, 3, 4, 2)"),
        (PICTURES[:0], "uint8 (0, 4, 4, 3)"),
        (np.uint8(3), "uint8 ()"),
    ],
)
@pytest.mark.parametrize("labels", [False, True])
def test_array_of_the_wrong_kind(tmp_path, images, found, labels):
    np.savez(tmp_path / "a.npz", image=images, label=np.zeros(np.shape(images)[:1], np.int64))
    text = sentence(array, tmp_path / "a.npz", labels=labels)
    assert str(tmp_path / "a.npz") in text
    assert found in text
    assert "uint8 [N, H, W] or [N, H, W, C]" in text


def test_npz_without_known_keys(tmp_path):
    np.savez(tmp_path / "a.npz", pictures=PICTURES, more=LABELS)
    text = sentence(array, tmp_path / "a.npz")
    assert str(tmp_path / "a.npz") in text
    assert "['more', 'pictures']" in text
    assert "image, images, x, arr_0" in text


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (None, "no labels"),
        (LABELS[:2], "labels int64 (2,)"),
        (LABELS[:, None], "labels int64 (3, 1)"),
        (LABELS / 2, "labels float64 (3,)"),
        (LABELS - 1, "labels int64 (3,)"),
    ],
)
def test_wrong_labels(tmp_path, labels, found):
    np.savez(tmp_path / "a.npz", image=PICTURES, **({} if labels is None else {"label": labels}))
    text = sentence(array, tmp_path / "a.npz", labels=True)
    assert str(tmp_path / "a.npz") in text
    assert found in text
    assert "non-negative integers [3]" in text


def npz_bytes(path):
    np.savez(path, image=PICTURES)
    return path.read_bytes()


def npy_bytes(path):
    np.save(path, PICTURES)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npy", lambda path: b"not an array"),
        ("a.npz", lambda path: b"not an array"),
        ("a.npy", lambda path: b""),
        ("a.npy", lambda path: npy_bytes(path)[:-10]),
        ("a.npz", lambda path: npz_bytes(path)[:-100]),
        ("a.npz", lambda path: npz_bytes(path).replace(PICTURES[1].tobytes(), PICTURES[2].tobytes())),
    ],
    ids=["text.npy", "text.npz", "empty", "truncated.npy", "truncated.npz", "damaged.npz"],
)
def test_array_file_that_cannot_be_read(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content(path))
    text = sentence(array, path)
    assert f"{str(path)!r} cannot be read as .npz or .npy" in text


def test_array_file_of_python_objects(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    assert "cannot be read" in sentence(array, tmp_path / "a.npy")


def test_array_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "absent.npz", tmp_path):
        text = sentence(array, path)
        assert repr(str(path)) in text
        assert ".npz or .npy" in text


def test_array_fingerprint(tmp_path):
    def fingerprint(images, labels=LABELS, **options):
        np.savez(tmp_path / "a.npz", image=images, label=labels)
        return array(tmp_path / "a.npz", **options).describe()["fingerprint"]

    changed = PICTURES.copy()
    changed[1, 2, 3, 0] ^= 1
    first = fingerprint(PICTURES)
    assert fingerprint(np.asfortranarray(PICTURES)) == first
    assert fingerprint(changed) != first
    assert fingerprint(PICTURES[::-1]) != first
    assert fingerprint(PICTURES[:2], LABELS[:2]) != first
    with_labels = fingerprint(PICTURES, labels=LABELS)
    assert with_labels == first
    read = {"labels": True}
    np.savez(tmp_path / "b.npz", image=PICTURES, label=LABELS)
    np.savez(tmp_path / "c.npz", image=PICTURES, label=LABELS[::-1])
    one, other = (array(tmp_path / name, **read).describe()["fingerprint"] for name in ("b.npz", "c.npz"))
    assert one != other


def test_array_fingerprint_depends_on_the_shape(tmp_path):
    np.save(tmp_path / "a.npy", PICTURES.reshape(3, 2, 8, 3))
    np.save(tmp_path / "b.npy", PICTURES.reshape(3, 8, 2, 3))
    a, b = array(tmp_path / "a.npy"), array(tmp_path / "b.npy")
    assert examples(a) != examples(b)
    assert a.describe()["fingerprint"] != b.describe()["fingerprint"]
