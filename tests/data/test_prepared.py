import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from picture_files import examples
from PIL import Image
from refusals import sentence
from sklearn.datasets import load_digits

from ddpm_jax.data.pictures import Fit
from ddpm_jax.data.prepared import TfdsSource
from ddpm_jax.data.sources import open_source

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
