import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ddpm_jax.models import lora
from ddpm_jax.models.unet import UNet

NET = UNet(channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(4,), num_groups=4)
TRANSFORMER = NET.clone(transformer_depth=1)
TOKENS = {"tokens": jnp.zeros((1, 2, 6))}


def shapes_of(net, cond=None):
    return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1), cond)["params"]


def randomised(shapes, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), shapes)


PROJECTIONS = {"query", "key", "value", "out"}


@pytest.mark.parametrize(
    ("net", "cond", "names"),
    [
        (NET, None, PROJECTIONS),
        (NET, TOKENS, PROJECTIONS | {f"cross_{name}" for name in PROJECTIONS}),
        (TRANSFORMER, TOKENS, PROJECTIONS),
    ],
)
def test_attention_s_projections_alone_are_adapted(net, cond, names):
    params = shapes_of(net, cond)
    shapes, adapters = flatten_dict(params), flatten_dict(lora.init(params, 2, jax.random.key(0)))
    adapted = {path[:-1] for path in adapters}
    assert adapted == {path[:-1] for path in shapes if path[-2] in names and path[-1] == "kernel"}
    assert {path[-1] for path in adapted} == names
    assert any("cross" in path for path in adapted) == (net is TRANSFORMER)
    for path in adapted:
        inputs, outputs = shapes[*path, "kernel"].shape
        assert adapters[*path, "down"].shape == (inputs, 2)
        assert adapters[*path, "up"].shape == (2, outputs)


def test_at_first_nothing_changes():
    params = randomised(shapes_of(NET))
    adapters = lora.init(params, 4, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, adapters, 3.0), params)


def test_what_the_factors_start_as():
    """`up` is zero, `down` normal and different for each kernel; all follow from the key."""
    wide = {f"block_{i}": {"query": {"kernel": jax.ShapeDtypeStruct((500, 8), jnp.float32)}} for i in range(2)}
    adapters = lora.init(wide, 4, jax.random.key(1))
    first, second = (adapters[f"block_{i}"]["query"] for i in range(2))
    assert not np.any(first["up"])
    assert abs(np.std(first["down"]) - 1 / 4) < 0.02
    assert abs(np.mean(first["down"])) < 0.02
    assert not np.any(first["down"] == second["down"])
    jax.tree.map(np.testing.assert_array_equal, lora.init(wide, 4, jax.random.key(1)), adapters)
    assert np.all(lora.init(wide, 4, jax.random.key(2))["block_0"]["query"]["down"] != first["down"])


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_merged_kernels(dtype):
    """W + scale down up, in the dtype of W; all other parameters are unchanged."""
    params = randomised(shapes_of(NET), dtype)
    adapters = randomised(lora.init(params, 2, jax.random.key(0)), seed=1)
    merged = flatten_dict(lora.merge(params, adapters, 0.5))
    flat, factors = flatten_dict(params), flatten_dict(adapters)
    assert merged.keys() == flat.keys()
    for path, value in flat.items():
        found = merged[path]
        assert found.dtype == value.dtype
        expected = np.asarray(value, np.float64)
        if (*path[:-1], "down") in factors and path[-1] == "kernel":
            down, up = (np.asarray(factors[*path[:-1], name], np.float64) for name in ("down", "up"))
            expected = expected + 0.5 * down @ up
            tolerance = 1e-5 if dtype == np.float32 else 2**-8
            np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance)
        else:
            np.testing.assert_array_equal(np.asarray(found, np.float64), expected)


def test_a_network_without_attention():
    net = NET.clone(attention_resolutions=(), middle_attention=False)
    with pytest.raises(ValueError, match=r"lora\.rank needs a network with attention"):
        lora.init(shapes_of(net), 2, jax.random.key(0))
