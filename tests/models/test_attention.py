from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ddpm_jax.models import attention
from ddpm_jax.models.attention import attend


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


QUERY, KEY, VALUE = normal(0, 8, 21, 3, 10), 3 * normal(1, 8, 13, 3, 10), normal(2, 8, 13, 3, 10)
MASK = np.random.default_rng(3).random((8, 13)) < 0.6
MASK[:, 0] = True
ROW = 4 * 3 * 13  # bytes of one query's logits


def chunks(monkeypatch, queries):
    """Makes every attention compute the logits of this many queries at a time."""
    monkeypatch.setattr(attention, "LARGEST_LOGITS", queries * ROW)


def heads(monkeypatch, queries):
    """Makes every attention without a bias compute the logits of one head and this many queries at a time."""
    monkeypatch.setattr(attention, "_LARGEST_ON_CPU", 0)
    monkeypatch.setattr(attention, "_QUERIES_ON_CPU", queries)


@pytest.mark.parametrize("divide", [chunks, heads])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": MASK},
        {"causal": True},
        {"mask": MASK, "causal": True},
        {"mask": MASK, "bias": normal(5, 3, 21, 13), "scale": 0.5},
    ],
)
def test_parts_change_neither_numbers_nor_gradients(monkeypatch, options, divide):
    def loss(*arguments):
        attended = attend(*arguments, **options)
        return (attended * normal(4, *QUERY.shape)).sum(), attended

    found = []
    for queries in (None, 21, 4, 1):  # at a time of 21, which 4 does not divide; None: without parts
        if queries:
            divide(monkeypatch, queries)
        gradients, attended = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(QUERY, KEY, VALUE)
        found.append((attended, *gradients))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(a).max())  # other sums


def test_small_matrices_go_the_plain_way():
    """Bit for bit, in both kinds of attention blocks."""
    expected = jax.nn.dot_product_attention(QUERY, KEY, VALUE, mask=MASK[:, None, None, :])
    np.testing.assert_array_equal(attend(QUERY, KEY, VALUE, MASK), expected)


def test_bias_and_scale(monkeypatch):
    bias = normal(5, 3, 21, 13)
    logits = 0.7 * np.einsum("bqhd,bkhd->bhqk", QUERY, KEY, dtype=np.float64) + bias
    weights = np.exp(logits) * MASK[:, None, None, :]
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), VALUE)
    for queries in (21, 4):
        chunks(monkeypatch, queries)
        np.testing.assert_allclose(attend(QUERY, KEY, VALUE, MASK, bias=bias, scale=0.7), expected, atol=2e-5)


def test_an_example_whose_keys_are_all_masked(monkeypatch):
    """Attends to all keys alike, and its logits get no gradient."""
    mask = MASK & (np.arange(8)[:, None] != 2)

    def gradient():
        product = lambda *arguments: (attend(*arguments) * normal(4, *QUERY.shape)).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(product, (0, 1, 2)))(QUERY, KEY, VALUE, mask)

    expected = gradient()
    heads(monkeypatch, 4)
    found = gradient()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)
    assert not found[1][0][2].any()


@pytest.mark.parametrize("length", [4096, 5000])
def test_no_whole_matrix_is_held(length):
    """Stable Diffusion's largest attention at 512x512, and a size that no chunk divides, forward and back."""
    x = jax.ShapeDtypeStruct((2, length, 8, 40), jnp.float32)
    gradient = jax.grad(lambda *arguments: attend(*arguments).sum(), (0, 1, 2))
    whole = 2 * 8 * length**2 * 4
    for function in (attend, gradient):
        memory = jax.jit(function).lower(x, x, x).compile().memory_analysis()
        assert memory.temp_size_in_bytes < whole / 4


def test_the_batch_does_not_choose_the_way():
    """So an image does not depend on the number of images sampled with it."""

    def divides(batch, length):
        x = jax.ShapeDtypeStruct((batch, length, 8, 40), jnp.float32)
        return "scan" in str(jax.make_jaxpr(attend)(x, x, x))

    assert divides(1, 4096)
    assert not divides(512, 64)


@pytest.mark.parametrize("divide", [chunks, heads])
def test_computes_in_half_precision_with_logits_in_float32(monkeypatch, divide):
    expected = attend(QUERY, KEY, VALUE)
    divide(monkeypatch, 4)
    found = attend(*(jnp.asarray(x, jnp.bfloat16) for x in (QUERY, KEY, VALUE)))
    assert found.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(found, np.float32) - expected) / np.linalg.norm(expected)
    assert error < 2e-2


@pytest.mark.parametrize("divide", [chunks, heads])
def test_a_divided_batch_stays_divided(monkeypatch, divide):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    divided = NamedSharding(mesh, PartitionSpec("data"))
    arguments = [jax.device_put(x, divided) for x in (QUERY, KEY, VALUE, MASK)]
    expected = attend(QUERY, KEY, VALUE, MASK)
    divide(monkeypatch, 4)
    compiled = jax.jit(partial(attend, causal=False), out_shardings=divided).lower(*arguments).compile()
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to-all"))
    np.testing.assert_allclose(compiled(*arguments), expected, atol=1e-5)


CPU, TPU = (SimpleNamespace(platform=name) for name in ("cpu", "tpu"))
GPU, OLD_GPU = (SimpleNamespace(platform="gpu", compute_capability=version) for version in ("9.0", "7.5"))


def shaped(length, heads, width, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((2, length, heads, width), dtype)


class TestWay:
    @pytest.mark.parametrize(
        ("device", "length", "name", "reason"),
        [
            (TPU, 1024, "chunks", "an example's logits, 32 MiB, exceed 16 MiB"),
            (TPU, 512, "whole", "an example's logits take 8 MiB"),
            (
                *(CPU, 512, "heads"),
                "an example's logits, 8 MiB, exceed 0.125 MiB, "
                "and a CPU's cache holds those of one head and 256 queries",
            ),
            (CPU, 64, "whole", "an example's logits take 0.125 MiB"),
        ],
    )
    def test_without_a_gpu(self, device, length, name, reason):
        assert attention.way(shaped(length, 8, 40), shaped(length, 8, 40), device) == attention.Way(name, reason)

    def test_a_bias_is_not_divided_by_heads(self):
        assert attention.way(shaped(1024, 8, 40), shaped(1024, 8, 40), CPU, has_bias=True).name == "chunks"

    @pytest.mark.parametrize(
        ("query", "has_bias", "gpu", "obstacle"),
        [
            (shaped(512, 8, 40), False, GPU, None),
            (shaped(512, 8, 40, jnp.float16), True, GPU, None),
            (shaped(77, 8, 40), False, GPU, None),
            (shaped(512, 8, 40, jnp.float32), False, GPU, "not in float32"),
            (shaped(512, 8, 160), False, GPU, "not for heads of width 160: only multiples of 8 up to 128"),
            (shaped(512, 8, 36), False, GPU, "not for heads of width 36: only multiples of 8 up to 128"),
            (shaped(77, 8, 40), True, GPU, "not with a mask or bias and an odd number of queries or keys"),
            (shaped(512, 8, 40), False, OLD_GPU, "not on GPUs of compute capability 7.5"),
        ],
    )
    def test_on_a_gpu(self, query, has_bias, gpu, obstacle):
        found = attention.way(query, query, gpu, has_bias=has_bias)
        if obstacle is None:
            assert found.name == "cudnn"
        else:
            assert found.name == attention.way(query, query, TPU).name
            assert found.reason.endswith(f"; cuDNN's fused kernel does {obstacle}")

    def test_is_reported_once_for_each_kind(self):
        x, other = shaped(64, 2, 8), shaped(5, 2, 8)
        with attention.observed(TPU) as seen:
            jax.eval_shape(lambda x, other: attend(attend(x, x, x), other, other) + attend(x, x, x), x, other)
        assert list(seen) == [
            "64 queries, 64 keys, 2 x 8 channels: whole, an example's logits take 0.0312 MiB",
            "64 queries, 5 keys, 2 x 8 channels: whole, an example's logits take 0.00244 MiB",
        ]


@pytest.mark.parametrize("options", [{}, {"mask": jnp.ones((2, 64), bool)}, {"causal": True, "scale": 0.5}])
def test_gpus_get_the_fused_kernel(monkeypatch, options):
    """The program for a GPU calls cuDNN, forward and back, with no matrix product of logits; that for a CPU does not.

    There is no GPU in the tests: only what is compiled for one can be looked at.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(jax, "local_devices", lambda: [GPU])
    x = shaped(64, 2, 8)

    def gradient(*arguments):
        return jax.grad(lambda *a: attend(*a, **options).astype(jnp.float32).sum(), (0, 1, 2))(*arguments)

    traced = jax.jit(gradient).trace(x, x, x)
    on_gpu = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert on_gpu.count("custom_call @__cudnn$fmha") == 2
    assert "dot_general" not in on_gpu
    on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "cudnn" not in on_cpu
    assert "dot_general" in on_cpu
