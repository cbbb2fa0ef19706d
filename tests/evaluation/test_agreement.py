"""CLIPScore against its formula, what is ranked first, and digits that are read."""

import dataclasses
import json

import clips
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from PIL import Image

from ddpm_jax.data.numbers import NumbersSource
from ddpm_jax.data.pictures import Fit
from ddpm_jax.evaluation.agreement import clip_score, read_digits, retrieval
from ddpm_jax.interop import transformers as interop
from ddpm_jax.runtime.errors import UserError

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (7, 9, 14, 3), np.uint8)
TEXTS = ["a red bicycle", "forty-two", "", "a red bicycle", "forty-two", "Ünï", "a text that is longer than the rest"]


def mesh(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))


def refusal(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return interop.read_clip(interop.write_clip(folder / "clip", clips.make_clip(folder / "tokenizer")))


@pytest.fixture(scope="module")
def scores(clip):
    return clip_score(clip, PICTURES, TEXTS, mesh=mesh(1), batch_size=4)


class TestClipScore:
    def test_follows_the_formula(self, clip, scores):
        """The encoders' own outputs, in float64; one picture and one text at a time."""
        pixels = np.stack([np.asarray(Image.fromarray(p).resize((18, 12), Image.Resampling.BICUBIC)) for p in PICTURES])
        x = (pixels[:, :, 3:15] / 255 - np.array(clip.image_mean)) / np.array(clip.image_std)
        encode_image, encode_text = (jax.jit(net.apply) for net in (clip.image, clip.text))
        for picture, text, score in zip(x, TEXTS, scores, strict=True):
            ids = clip.tokenizer.encode([text]).ids
            image = encode_image({"params": clip.params["image"]}, picture[None].astype(np.float32))
            states = encode_text({"params": clip.params["text"]}, ids)
            a, b = (np.asarray(v.projected[0], np.float64) for v in (image, states))
            expected = max(100 * a @ b / np.sqrt(a @ a * (b @ b)), 0)
            np.testing.assert_allclose(score, expected, atol=1e-3)
            assert score > 1
        assert scores.dtype == np.float32

    def test_is_0_where_the_cosine_is_below(self, clip):
        opposite = jax.tree.map(np.negative, clip.params["text"]["projection"])
        params = clip.params | {"text": clip.params["text"] | {"projection": opposite}}
        found = clip_score(dataclasses.replace(clip, params=params), PICTURES, TEXTS, mesh=mesh(1), batch_size=4)
        np.testing.assert_array_equal(found, np.zeros(7))

    def test_on_devices_and_in_batches(self, clip, scores):
        calls = []
        found = clip_score(clip, PICTURES, TEXTS, mesh=mesh(8), batch_size=2, progress=lambda *done: calls.append(done))
        np.testing.assert_allclose(found, scores, atol=1e-3)
        assert calls[-1] == (12, 12)  # 5 different texts and 7 pictures
        assert calls == sorted(calls)

    @pytest.mark.parametrize(
        ("pictures", "texts", "message"),
        [
            (PICTURES, TEXTS[:6], "there are 7 pictures and 6 texts; accepted: one text for each"),
            (PICTURES[:0], [], "there are no pictures to judge"),
            (PICTURES / 255, TEXTS, "the pictures are float64 of shape (7, 9, 14, 3); accepted: uint8 [N, H, W, 1 or"),
            (PICTURES[..., :2], TEXTS, "uint8 of shape (7, 9, 14, 2); accepted"),
            (PICTURES[0], TEXTS, "uint8 of shape (9, 14, 3); accepted"),
        ],
    )
    def test_refused(self, clip, pictures, texts, message):
        assert message in refusal(clip_score, clip, pictures, texts)


class TestRetrieval:
    SIMILARITIES = np.array([[3, 1, 2], [3, 1, 2], [3, 1, 2], [1, 1, 0]])

    @pytest.mark.parametrize(
        ("right", "within", "share"),
        [
            ([0, 0, 0, 2], 1, 0.75),
            ([0, 2, 1, 0], 1, 0.25),  # the last one ties with another
            ([0, 2, 1, 0], 2, 0.75),
            ([1, 1, 1, 1], 1, 0.0),
            ([1, 1, 1, 2], 3, 1.0),
        ],
    )
    def test_by_hand(self, right, within, share):
        assert retrieval(self.SIMILARITIES, np.array(right), within) == share

    def test_constant_or_nan_similarities_are_never_right(self):
        right = np.arange(4) % 3
        assert retrieval(np.zeros((4, 3)), right) == 0
        assert retrieval(np.full((4, 3), np.nan), right) == 0

    def test_chance(self):
        rng = np.random.default_rng(0)
        similarities, right = rng.standard_normal((20_000, 10)), rng.integers(0, 10, 20_000)
        for within in (1, 5):
            assert abs(retrieval(similarities, right, within) - within / 10) < 0.02

    @pytest.mark.parametrize(("count", "right"), [(0, []), (2, [0]), (2, [0, 3]), (2, [-1, 0])])
    def test_refused(self, count, right):
        with pytest.raises(ValueError, match=f"right must be {count} numbers from 0 to 2"):
            retrieval(np.zeros((count, 3)), np.array(right, int))


class TestReadDigits:
    @pytest.mark.parametrize("digits", [1, 3])
    def test_reads_the_embedded_numbers(self, digits):
        source = NumbersSource(digits, [], Fit(8, 8 * digits, 1))
        chosen = range(0, len(source), len(source) // 300)
        found = read_digits(np.stack([source[i]["image"] for i in chosen]), mesh=mesh(8))
        expected = [source.numbers[i % len(source.numbers)] for i in chosen]
        assert found.dtype == np.int64
        assert np.mean(found == expected) > 0.97

    @pytest.mark.parametrize(
        "pictures",
        [
            np.zeros((2, 8, 12, 1), np.uint8),
            np.zeros((2, 16, 16, 1), np.uint8),
            np.zeros((2, 8, 16, 3), np.uint8),
            np.zeros((8, 8), np.uint8),
            np.zeros((0, 8, 8, 1), np.uint8),
            np.zeros((2, 8, 8, 1)),
        ],
    )
    def test_refused(self, pictures):
        assert f"of shape {pictures.shape}; accepted: uint8 [N, 8, 8 k, 1]" in refusal(read_digits, pictures)


@pytest.mark.peers
def test_clip_score_is_that_of_transformers(measure, tmp_path):
    """Their model, tokenizer and processor of images, and the logits that these give."""
    why = "transformers and PyTorch are not installed (pip install -e '.[peers]')"
    torch, transformers = (pytest.importorskip(name, reason=why) for name in ("torch", "transformers"))
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    text = {"vocab_size": clips.VOCAB_SIZE, "bos_token_id": 512, "eos_token_id": 513, "max_position_embeddings": 40}
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = small | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text | small, vision_config=vision, projection_dim=16)
    net = transformers.CLIPModel(config).eval()
    net.save_pretrained(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["size"] == {"shortest_edge": 32}
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clips.write_tokenizer(tmp_path, max_length=40))
    clip, tokens = interop.read_clip(tmp_path), tokenizer(TEXTS, padding=True, return_tensors="pt")
    for shape in ((40, 40, 3), (33, 64, 3), (61, 20, 1)):
        pictures = RNG.integers(0, 256, (len(TEXTS), *shape), np.uint8)
        pixels = processor([Image.fromarray(p.squeeze()).convert("RGB") for p in pictures], return_tensors="pt")
        with torch.no_grad():
            logits = net(**tokens, **pixels).logits_per_image.numpy()
        expected = np.maximum(100 * np.diag(logits) / np.exp(net.logit_scale.item()), 0)
        error = np.abs(clip_score(clip, pictures, TEXTS) - expected).max()
        what = "CLIPScore, from 0 to 100, of a small CLIP, pictures of three shapes"
        measure(what, "transformers, PyTorch", error, 1e-3)
