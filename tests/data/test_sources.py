import os

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from picture_files import BLUE, GREEN, RED, folder, save, stripes
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_jax.data.pictures import Fit
from ddpm_jax.data.prepared import TfdsSource
from ddpm_jax.data.sources import open_source
from ddpm_jax.runtime.errors import UserError


def sentence(call, *args, **kwargs):
    """The message of a UserError, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def examples(source):
    """The examples as a sorted list, whatever their order."""
    return sorted(
        (example["image"].tobytes(), example["label"]) for example in map(source.__getitem__, range(len(source)))
    )


def array(path, height=4, width=4, channels=3, **options):
    return open_source("array", path=str(path), height=height, width=width, channels=channels, **options)


# The built-in digits and tensorflow-datasets.


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def prepared_digits(digits_dir, python):
    """Prepares a data set in another process; returns the output."""
    return python(
        "from ddpm_jax.data.sources import open_source\n"
        "source = open_source('digits', data_dir=sys.argv[1], height=8, width=8, channels=1, labels=True)\n"
        "print(len(source), source[5]['image'].shape, 'tensorflow' in sys.modules)\n",
        digits_dir,
    )


def open_digits(digits_dir, height=8, width=8, channels=1, **options):
    return open_source("digits", data_dir=str(digits_dir), height=height, width=width, channels=channels, **options)


def test_digits_are_prepared_without_tensorflow(prepared_digits):
    assert "1797 (8, 8, 1) False" in prepared_digits
    assert "TENSORFLOW" not in prepared_digits


def test_digits_are_those_of_scikit_learn(digits_dir, prepared_digits):
    before = {path: path.stat().st_mtime_ns for path in digits_dir.rglob("*")}
    assert any("array_record" in path.name for path in before)
    source = open_digits(digits_dir, labels=True)
    assert {path: path.stat().st_mtime_ns for path in digits_dir.rglob("*")} == before, "prepared again"
    images, labels = load_digits(return_X_y=True)
    images = np.round(images * 255 / 16).astype(np.uint8)
    assert len(source) == 1797
    assert source.shape == source[0]["image"].shape == (8, 8, 1)
    assert source[0]["image"].dtype == np.uint8
    assert source.class_names == tuple("0123456789")
    assert examples(source) == sorted(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


def test_digits_description(digits_dir, prepared_digits):
    whole, part = open_digits(digits_dir), open_digits(digits_dir, split="train[:5]")
    assert len(part) == 5
    assert [part[i]["image"].tobytes() for i in range(5)] == [whole[i]["image"].tobytes() for i in range(5)]
    assert whole.class_names == ()
    assert whole[0]["label"] == 0
    assert whole.describe() == open_digits(digits_dir).describe()
    assert whole.describe()["fingerprint"] != part.describe()["fingerprint"]
    assert whole.describe()["name"] == "digits/1.0.0"
    assert whole.describe()["num_images"] == 1797


def test_digits_are_brought_to_another_size_and_colour(digits_dir, prepared_digits):
    image = open_digits(digits_dir, height=16, width=16, channels=3, split="train[:1]")[0]["image"]
    assert image.shape == (16, 16, 3)
    assert (image == image[..., :1]).all()
    assert image.max() > 200


@pytest.mark.parametrize("split", ["test", "bogus[", "train[:0]"])
def test_split_that_does_not_exist(digits_dir, prepared_digits, split):
    text = sentence(open_digits, digits_dir, split=split)
    assert repr(split) in text
    assert "digits/1.0.0" in text


@pytest.mark.parametrize(("name", "near"), [("cifar1o", "cifar10"), ("lsun/church", "church_outdoor"), ("zzzzzzz", "")])
def test_unknown_dataset_suggests_a_known_one(tmp_path, name, near):
    text = sentence(open_source, "tfds", name=name, data_dir=str(tmp_path), height=8, width=8, channels=3)
    assert repr(name) in text
    assert near in text


def test_dataset_that_cannot_be_downloaded_says_so_in_one_sentence(tmp_path):
    text = sentence(open_source, "tfds", name="celeb_a_hq/256", data_dir=str(tmp_path), height=8, width=8, channels=3)
    assert "'celeb_a_hq/256'" in text
    assert str(tmp_path / "downloads/manual") in text


@pytest.mark.parametrize("error", [requests.ConnectionError, requests.Timeout])
def test_without_network_a_dataset_is_refused_at_once(tmp_path, monkeypatch, error):
    def no_network(*args, **kwargs):
        raise error("no network")

    def download(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(requests, "head", no_network)
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", download)
    text = sentence(open_source, "tfds", name="cifar10", data_dir=str(tmp_path), height=32, width=32, channels=3)
    assert "'cifar10' is not prepared" in text
    assert str(tmp_path) in text
    assert "www.cs.toronto.edu cannot be reached" in text
    assert "data.data_dir" in text


CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_FILES = {**{f"data_batch_{i}.bin": 4 for i in range(1, 6)}, "test_batch.bin": 3}


@pytest.fixture
def cifar(tmp_path):
    """A small CIFAR-10 in its own binary format: the folder, and the pictures of each split."""
    data = tmp_path / "extracted" / "cifar-10-batches-bin"
    data.mkdir(parents=True)
    (data / "batches.meta.txt").write_text("\n".join(CIFAR_CLASSES) + "\n\n")
    rng = np.random.default_rng(0)
    splits = {"train": [], "test": []}
    for name, count in CIFAR_FILES.items():
        labels, images = rng.integers(0, 10, count, np.uint8), rng.integers(0, 256, (count, 3, 32, 32), np.uint8)
        np.concatenate([labels[:, None], images.reshape(count, -1)], axis=1).tofile(data / name)
        pictures = zip(images.transpose(0, 2, 3, 1), labels, strict=True)
        splits["test" if name.startswith("test") else "train"] += [(i.tobytes(), int(label)) for i, label in pictures]
    return data.parent, {name: sorted(pictures) for name, pictures in splits.items()}


# A web server on this machine stands in for the network.
CIFAR_SERVER = (
    "import functools, http.server, os, tarfile, threading\n"
    "from tensorflow_datasets.image_classification import cifar\n"
    "os.environ['NO_PROXY'] = '*'\n"
    "with tarfile.open(sys.argv[2] + '/cifar-10-binary.tar.gz', 'w:gz') as archive:\n"
    "    archive.add(sys.argv[2] + '/cifar-10-batches-bin', 'cifar-10-batches-bin')\n"
    "handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[2])\n"
    "server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)\n"
    "threading.Thread(target=server.serve_forever, daemon=True).start()\n"
    "original = cifar.Cifar10._cifar_info.fget\n"
    "url = f'http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz'\n"
    "cifar.Cifar10._cifar_info = property(lambda self: original(self)._replace(url=url))\n"
)


def test_cifar10_is_prepared_without_tensorflow(tmp_path, cifar, python):
    extracted, splits = cifar
    output = python(
        "import requests\n"
        "import tensorflow_datasets as tfds\n"
        "from ddpm_jax.data.sources import open_source\n"
        "requests.head = lambda *args, **kwargs: None\n"
        + CIFAR_SERVER
        + "arguments = {'name': 'cifar10', 'data_dir': sys.argv[1], 'height': 32, 'width': 32, 'channels': 3}\n"
        "print(len(open_source('tfds', labels=True, **arguments)), 'tensorflow' in sys.modules)\n",
        tmp_path / "tfds",
        extracted,
    )
    assert "20 False" in output
    assert "TENSORFLOW" not in output
    for split, expected in splits.items():
        source = open_source(
            "tfds",
            name="cifar10",
            split=split,
            data_dir=str(tmp_path / "tfds"),
            height=32,
            width=32,
            channels=3,
            labels=True,
        )
        assert source.class_names == CIFAR_CLASSES
        assert examples(source) == expected


def small_builder(data_dir, feature):
    """A prepared data set of three pictures under the name `feature`, without labels."""
    with tfds.core.registered.skip_registration():

        class Small(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = None

            def _info(self):
                features = {feature: tfds.features.Image(shape=(4, 4, 3), encoding_format="png")}
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": ((i, {feature: Image.new("RGB", (4, 4), (i, 0, 0))}) for i in range(3))}

            def _generate_examples(self):
                raise NotImplementedError

        builder = Small(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return builder


def test_dataset_without_labels(tmp_path):
    builder, fit = small_builder(tmp_path, "image"), Fit(4, 4, 3)
    source = TfdsSource(builder, "train", fit, False)
    assert sorted(int(source[i]["image"][0, 0, 0]) for i in range(3)) == [0, 1, 2]
    assert "no 'label'" in sentence(TfdsSource, builder, "train", fit, True)


def test_dataset_without_images(tmp_path):
    builder = small_builder(tmp_path, "picture")
    text = sentence(TfdsSource, builder, "train", Fit(4, 4, 3), False)
    assert "no 'image'" in text
    assert "picture" in text


def test_unknown_source_names_those_there_are():
    text = sentence(open_source, "fodler", height=4, width=4, channels=3)
    assert "'fodler'" in text
    assert "digits, numbers, tfds, folder, array" in text


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_channels_are_1_or_3(tmp_path, channels):
    save(tmp_path / "a.png", RED)
    assert f"data.channels is {channels}" in sentence(folder, tmp_path, channels=channels)


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
