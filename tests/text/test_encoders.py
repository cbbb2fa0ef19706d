"""Texts as arrays: token ids for a trained encoder, and states from a frozen one."""

import threading
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models.clip import CLIPTextEncoder, TextEncoder
from ddpm_jax.models.t5 import T5Encoder
from ddpm_jax.text.encoders import FrozenTexts, TrainedTexts
from ddpm_jax.text.tokenizers import Tokenizer

TOKENIZER = Tokenizer.train(["a red apple", "two green pears"], 270, 8)
CLIP = CLIPTextEncoder(270, max_length=9, width=8, num_layers=1, num_heads=2, mlp_width=8, end_token=2)
T5 = T5Encoder(270, width=8, num_layers=1, num_heads=3, head_width=4, mlp_width=8)
TEXTS = ["a red apple", "", "two green pears", "\U0001f34e", "a red apple and so much more that it does not fit"]


class Counting:
    """A slow tokenizer that records its calls."""

    patience = 0.0

    def __init__(self):
        self.calls = []
        self.max_length = TOKENIZER.max_length

    def encode(self, texts):
        self.calls.append(list(texts))
        time.sleep(self.patience)
        return TOKENIZER.encode(texts)


def made(net):
    """An encoder, and its parameters."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return net, jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / 2, shapes)


@pytest.fixture(scope="module")
def encoder():
    return made(CLIP)


def frozen(encoder, **options):
    return FrozenTexts(Counting(), encoder[0], lambda: encoder[1], **options)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def rows_of(arrays, rows):
    return {name: values[rows] for name, values in arrays.items()}


def test_ids_of_an_encoder_that_is_trained_along():
    net = TextEncoder(270, max_length=8, width=8)
    texts, tokens = TrainedTexts(TOKENIZER, net), TOKENIZER.encode(TEXTS)
    found = texts.arrays(TEXTS)
    assert_same(found, {"ids": tokens.ids, "ids_mask": tokens.mask})
    assert {name: (values.shape[1:], values.dtype) for name, values in found.items()} == {
        name: (x.shape, x.dtype) for name, x in texts.shapes.items()
    }
    assert texts.network(net).encoder is net


@pytest.mark.parametrize("net", [CLIP, CLIP.clone(projection=5), T5])
def test_states_are_the_encoder_s(net):
    encoder = made(net)
    texts, tokens = frozen(encoder), TOKENIZER.encode(TEXTS)
    found = texts.arrays(TEXTS)
    states = jax.jit(encoder[0].apply)({"params": encoder[1]}, tokens.ids, tokens.mask)
    np.testing.assert_array_equal(found["tokens_mask"], tokens.mask)
    np.testing.assert_allclose(found["tokens"][tokens.mask], states.tokens[tokens.mask], atol=1e-5)
    vector = states.pooled if states.projected is None else states.projected
    np.testing.assert_allclose(found["vector"], vector, atol=1e-5)
    assert {name: (values.shape[1:], values.dtype) for name, values in found.items()} == {
        name: (x.shape, x.dtype) for name, x in texts.shapes.items()
    }
    assert texts.network(encoder[0]) is encoder[0]


def test_states_that_have_seen_the_padding(encoder):
    """Like Stable Diffusion's: the states of padding are used, so there is no mask."""
    texts, tokens = frozen(encoder, mask_padding=False), TOKENIZER.encode(TEXTS)
    found = texts.arrays(TEXTS)
    assert found.keys() == texts.shapes.keys() == {"tokens", "vector"}
    states = jax.jit(encoder[0].apply)({"params": encoder[1]}, tokens.ids)
    np.testing.assert_allclose(found["tokens"], states.tokens, atol=1e-5)
    masked = frozen(encoder).arrays(TEXTS)["tokens"]
    assert not np.allclose(found["tokens"][~tokens.mask], masked[~tokens.mask], atol=1e-3)


@pytest.mark.parametrize("mask_padding", [False, True])
def test_without_the_state_of_the_whole_text(encoder, mask_padding):
    texts = frozen(encoder, mask_padding=mask_padding, pooled=False)
    found, whole = texts.arrays(TEXTS), frozen(encoder, mask_padding=mask_padding).arrays(TEXTS)
    assert found.keys() == texts.shapes.keys() == whole.keys() - {"vector"}
    assert_same(found, {name: whole[name] for name in found})
    assert {name: (values.shape[1:], values.dtype) for name, values in found.items()} == {
        name: (x.shape, x.dtype) for name, x in texts.shapes.items()
    }


@pytest.mark.parametrize(("mask_padding", "pooled"), [(True, True), (True, False), (False, True), (False, False)])
def test_what_the_network_is_given_of_an_encoder_that_is_trained_along(mask_padding, pooled):
    given = []

    class Network(nn.Module):
        def __call__(self, x, t, cond, train=False):
            given.append(cond)
            return x

    texts = TrainedTexts(TOKENIZER, TextEncoder(270, 8, 8, 1, 2), mask_padding, pooled)
    arrays = texts.arrays(TEXTS)
    texts.network(Network()).init_with_output(jax.random.key(0), jnp.zeros(5), jnp.zeros(5), arrays)
    assert given[0].keys() == {"tokens"} | ({"tokens_mask"} if mask_padding else set()) | (
        {"vector"} if pooled else set()
    )


def test_each_text_is_encoded_once_in_any_order_and_number(encoder):
    texts, many = frozen(encoder), [f"number {i}" for i in range(10)]
    found = texts.arrays(many)
    assert [len(call) for call in texts.tokenizer.calls] == [1] * 10  # on a CPU
    rows = np.array([9, 3, 3, 0, 5, 3])
    assert_same(texts.arrays([many[row] for row in rows]), rows_of(found, rows))
    assert len(texts.tokenizer.calls) == 10
    texts.arrays([many[5], "new", many[5], "new"])
    assert set(texts.tokenizer.calls.pop()) == {"new"}
    assert texts._apply._cache_size() == 1


def test_what_does_not_fit_the_memory_is_encoded_again(encoder):
    size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in frozen(encoder).shapes.values())
    many, rows = [f"number {i}" for i in range(12)], np.random.default_rng(0).integers(0, 12, (20, 5))
    everything = frozen(encoder).arrays(many)
    for kept in (0, 1, 4):
        texts = frozen(encoder, cache_bytes=kept * size)
        for few in rows:
            assert_same(texts.arrays([many[row] for row in few]), rows_of(everything, few))
            assert len(texts._cache) <= max(kept, 1)
    before = len(texts.tokenizer.calls)
    texts.arrays([many[row] for row in rows[-1]][-1:])  # met last, and kept
    assert len(texts.tokenizer.calls) == before


def test_on_an_accelerator_two_texts_at_a_time(encoder, monkeypatch):
    """One program, which also encodes a single text."""
    wanted = frozen(encoder).arrays(TEXTS)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    texts = frozen(encoder)
    found = texts.arrays([*TEXTS, "new"])
    assert {len(call) for call in texts.tokenizer.calls} == {2}
    assert texts._apply._cache_size() == 1
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name][: len(TEXTS)], value, atol=1e-5)


def test_while_a_program_is_traced(encoder):
    """As in a training step, which has the null condition as a constant."""
    expected = frozen(encoder).arrays([""])
    texts = frozen(encoder)
    found = jax.jit(lambda x: jax.tree.map(lambda values: x + values, texts.arrays([""])))(jnp.zeros(()))
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda values: 0.0 + values, expected))


def test_in_a_loop_that_allows_no_transfers(encoder):
    with jax.transfer_guard("disallow"):
        found = frozen(encoder).arrays(TEXTS)
    assert_same(found, frozen(encoder).arrays(TEXTS))


def test_two_threads_encode_a_text_once(encoder):
    """Training's reader of batches, and its pictures."""
    texts, found = frozen(encoder), []
    texts.tokenizer.patience = 0.2  # in which both threads come
    threads = [threading.Thread(target=lambda: found.append(texts.arrays(TEXTS))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted({text for call in texts.tokenizer.calls for text in call}) == sorted(TEXTS)
    assert len(texts.tokenizer.calls) == len(TEXTS)
    assert_same(*found)


def test_a_mask_for_the_encoder_alone():
    """Like DeepFloyd IF: a masked encoder, to all of whose states the network attends."""
    encoder = made(T5)
    found = frozen(encoder, mask_padding=False, mask_in_encoder=True, pooled=False)
    assert found.shapes.keys() == {"tokens"}
    masked = frozen(encoder, pooled=False).arrays(TEXTS)["tokens"]
    np.testing.assert_array_equal(found.arrays(TEXTS)["tokens"], masked)
    assert not found.trained().encode_padding
    seen = frozen(encoder, mask_padding=False, pooled=False).arrays(TEXTS)["tokens"]
    assert np.abs(seen - masked).max() > 1e-3
