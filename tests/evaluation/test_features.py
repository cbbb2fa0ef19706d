"""Features of images in any portions on any number of devices, and where FID's weights come from."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.tree_util import Partial

from ddpm_jax.evaluation import features as features_lib
from ddpm_jax.evaluation.features import custom_features, load_inception, train_digits_classifier
from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.runtime.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (37, 4, 4, 3), np.uint8)


def mesh(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))


def flatten(images):
    return images.reshape(len(images), -1) / 255.0


def said(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestCustomFeatures:
    def test_are_named_after_the_network(self):
        judge = custom_features("my network", flatten)
        assert (judge.name, judge.frechet) == ("my network", "Frechet distance (my network)")

    @pytest.mark.parametrize("devices", [1, 8])
    @pytest.mark.parametrize("cuts", [[], [1, 2, 30], [16, 32]])
    def test_of_any_portions(self, devices, cuts):
        judge = custom_features("flat", flatten)
        found = judge.of(np.split(IMAGES, cuts), mesh(devices), batch_size=8)
        assert found.keys() == {"pool"}
        np.testing.assert_allclose(found["pool"], flatten(IMAGES), rtol=1e-6)

    def test_of_a_dict_and_weights(self):
        """The weights of a Partial are part of the digest, and grey images become three channels."""
        scaled = lambda scale, images: {"pool": scale * flatten(images), "logits": flatten(images)[:, :2]}  # noqa: E731
        judges = [custom_features("scaled", Partial(scaled, jnp.float32(scale))) for scale in (2, 2, 3)]
        grey = IMAGES[..., :1]
        found = judges[0].of([grey], mesh(8), batch_size=5)
        np.testing.assert_allclose(found["pool"], 2 * flatten(grey.repeat(3, -1)), rtol=1e-6)
        assert found["logits"].shape == (37, 2)
        digests = [judge.digest for judge in judges]
        assert digests[0] == digests[1] != digests[2]

    def test_one_program_for_all_calls(self):
        traced = []

        def apply(images):
            traced.append(images.shape)
            return flatten(images)

        judge = custom_features("counted", apply)
        for images in (IMAGES, IMAGES[:20], IMAGES[:3]):
            judge.of([images], mesh(1), batch_size=8)
        assert traced == [(8, 4, 4, 3)]

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ([], "there are no images for flat to evaluate"),
            ([IMAGES[:0]], "there are no images"),
            ([IMAGES / 255], "are float64 of shape (37, 4, 4, 3); accepted: uint8"),
            ([np.full_like(IMAGES, np.nan, np.float32)], "are float32"),
            ([IMAGES[0]], "uint8 of shape (4, 4, 3); accepted"),
            ([IMAGES[..., :2]], "flat takes images of 3 channels, not of (4, 4, 2)"),
        ],
    )
    def test_refused_images(self, images, message):
        assert message in said(custom_features("flat", flatten).of, images, mesh(1), 8)

    def test_another_size_than_the_network_s(self):
        judge = custom_features("small", flatten, shape=(8, 8, 1))
        assert "small takes images of (8, 8, 1), not of (4, 4, 3)" in said(judge.of, [IMAGES], mesh(1), 8)

    def test_features_that_are_not_finite(self):
        images = np.zeros((20, 4, 4, 3), np.uint8)
        images[13] = 255
        judge = custom_features("odd", lambda x: jnp.where(x.max((1, 2)) > 0, jnp.nan, 1.0))
        assert "odd gives values of pool that are not finite for image 13" in said(judge.of, [images], mesh(1), 8)


def test_digits_classifier():
    judge = train_digits_classifier(steps=2)
    assert judge.frechet == "Frechet distance (digits classifier)"
    found = judge.of([IMAGES[:, :, :, :1].repeat(2, 1).repeat(2, 2)], mesh(1), 16)
    assert {name: value.shape for name, value in found.items()} == {"pool": (37, 64), "logits": (37, 10)}


# FID's weights. Their contents are tested in test_inception.py.

WEIGHTS = {"a": np.arange(4, dtype=np.float32)}


def as_pickled(tensors):
    """The tensors as they come out of a pickle."""
    return {
        name: tensors_lib._Tensor(
            tensors_lib._Storage(x.dtype, x.size, x.ravel()), 0, x.shape, tuple(n // x.itemsize for n in x.strides)
        )
        for name, x in tensors.items()
    }


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, files whose tensors are taken for Inception's, and the requests that are made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(features_lib.inception, "params_of", lambda path, tensors: tensors)
    tensors_lib.write(tmp_path / "x.safetensors", WEIGHTS)
    published = (tmp_path / "x.safetensors").read_bytes()
    digest = hashlib.sha256(published).hexdigest()
    name = f"weights-{digest[:8]}.pth"
    monkeypatch.setattr(features_lib, "INCEPTION_FILE", name)
    monkeypatch.setattr(features_lib, "INCEPTION_URL", f"https://example.org/{name}")
    monkeypatch.setattr(tensors_lib, "_read_legacy", lambda path, skipping: as_pickled(tensors_lib.load_file(path)))
    answers = []
    monkeypatch.setattr("requests.get", lambda url, **_: answers.pop(0)(url))
    return tmp_path / "cache" / "ddpm_jax", published, answers


class Answer:
    def __init__(self, content, status=200):
        self.content, self.status, self.headers = content, status, {"content-length": str(len(content))}

    def __call__(self, url):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def raise_for_status(self):
        import requests

        if self.status != 200:
            raise requests.HTTPError(f"{self.status} Not Found")

    def iter_content(self, size):
        yield self.content


class TestLoadInception:
    def test_is_fetched_once_and_kept_as_safetensors(self, cache):
        folder, published, answers = cache
        answers.append(Answer(published))
        first = load_inception()
        original = folder / features_lib.INCEPTION_FILE
        assert sorted(folder.iterdir()) == sorted([original, folder / "pt_inception-2015-12-05.safetensors"])
        original.unlink()
        again = load_inception()
        assert first.name == again.name == f"Inception v3 ({original.stem[-8:]})"
        assert (first.frechet, first.digest) == ("FID", again.digest)
        given = load_inception(folder / "pt_inception-2015-12-05.safetensors")
        assert given.name == first.name

    def test_damaged_copy_is_made_again(self, cache):
        folder, published, answers = cache
        answers.append(Answer(published))
        load_inception()
        copy = folder / "pt_inception-2015-12-05.safetensors"
        copy.write_bytes(copy.read_bytes()[:20])
        load_inception()
        np.testing.assert_array_equal(tensors_lib.read(copy)["a"], WEIGHTS["a"])

    @pytest.mark.parametrize("change", [lambda content: content[:-3], lambda content: content + b"x"])
    def test_other_content_is_refused(self, cache, change):
        folder, published, answers = cache
        answers.append(Answer(change(published)))
        assert "damaged or a different file: its SHA-256 begins with" in said(load_inception)
        assert list(folder.iterdir()) == []

    def test_offline(self, cache):
        folder, _, answers = cache

        def refuse(url):
            import requests

            raise requests.ConnectionError("no route to host")

        answers += [refuse, Answer(b"", 404)]
        for reason in ("no route to host", "404 Not Found"):
            message = said(load_inception)
            assert all(part in message for part in (str(folder / features_lib.INCEPTION_FILE), "https://", reason))
            assert "put it there" in message

    def test_given_file(self, cache, tmp_path):
        _, published, _ = cache
        good = tmp_path / features_lib.INCEPTION_FILE
        good.write_bytes(published)
        assert load_inception(good).name == load_inception(str(good)).name
        bad = tmp_path / "weights-00000000.pth"
        bad.write_bytes(published)
        assert "not with 00000000 as in its name" in said(load_inception, bad)
        assert "does not exist; download https://" in said(load_inception, tmp_path / "none.pth")
        (tmp_path / "cut.safetensors").write_bytes(published[:-3])
        assert "cannot be read" in said(load_inception, tmp_path / "cut.safetensors")


def test_other_tensors_than_inception_s(tmp_path):
    tensors_lib.write(tmp_path / "x.safetensors", WEIGHTS)
    assert "has no tensor 'fc.weight'" in said(load_inception, tmp_path / "x.safetensors")
