"""Inception's parts against their plain forms; the whole network is compared with torch-fidelity's in test_peers.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.evaluation import inception
from ddpm_jax.runtime.errors import UserError

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("size", [(9, 9), (8, 5), (3, 4)])
def test_pooling(size):
    x = jnp.asarray(RNG.standard_normal((2, *size, 3)), jnp.float32)
    np.testing.assert_array_equal(inception._maximum(x), nn.max_pool(x, (3, 3), (2, 2)))
    np.testing.assert_array_equal(inception._maximum(x, 1), nn.max_pool(x, (3, 3), padding=((1, 1), (1, 1))))
    average = nn.avg_pool(x, (3, 3), padding=((1, 1), (1, 1)), count_include_pad=False)
    np.testing.assert_allclose(inception._average(x), average, rtol=1e-5, atol=1e-6)


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        return inception._heads(x, {"a": 4, "b": 3, "branch_pool": 2}, inception._average)


def test_convolutions_of_one_input():
    """Each by itself, the last one after its pooling."""
    x = jnp.asarray(RNG.standard_normal((2, 5, 5, 6)), jnp.float32)
    draw = lambda *shape: RNG.standard_normal(shape).astype(np.float32)  # noqa: E731
    sizes = {"a": 4, "b": 3, "branch_pool": 2}
    params = {name: {"kernel": draw(1, 1, 6, n), "bias": draw(n)} for name, n in sizes.items()}
    for name, found in zip(params, jax.jit(Heads().apply)({"params": params}, x), strict=True):
        inputs = inception._average(x) if name == "branch_pool" else x
        expected = nn.relu(jnp.einsum("bijc,cd->bijd", inputs, params[name]["kernel"][0, 0]) + params[name]["bias"])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("height", [5, 12])
def test_resize(height):
    """Pixel by pixel, as TensorFlow 1 did."""
    x = RNG.integers(0, 256, (1, height, 7, 3), np.uint8)
    found = np.asarray(inception.resize(jnp.asarray(x), 9))[0]
    for i in range(9):
        for j in range(9):
            y, z = i * height / 9, j * 7 / 9
            low, left = int(y), int(z)
            high, right, a, b = min(low + 1, height - 1), min(left + 1, 6), y - low, z - left
            top = x[0, low, left] * (1 - b) + x[0, low, right] * b
            bottom = x[0, high, left] * (1 - b) + x[0, high, right] * b
            np.testing.assert_allclose(found[i, j], top * (1 - a) + bottom * a, rtol=1e-5, atol=1e-3)


@pytest.fixture(scope="module")
def tensors():
    """As the PyTorch port's file has them, with zeros for most."""
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.uint8)
    params = jax.eval_shape(inception.InceptionV3().init, jax.random.key(0), image)["params"]
    found = {"fc.weight": np.zeros((1008, 2048), np.float32), "fc.bias": np.zeros(1008, np.float32)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *layer, kind = [key.key for key in path]
        if kind == "kernel" and layer != ["fc"]:
            name = ".".join(layer)
            height, width, channels, features = leaf.shape
            found[f"{name}.conv.weight"] = np.zeros((features, channels, height, width), np.float32)
            for part in ("weight", "bias", "running_mean", "running_var"):
                found[f"{name}.bn.{part}"] = np.zeros(features, np.float32)
            found[f"{name}.bn.num_batches_tracked"] = np.array(7)
    return found


def test_batch_norm_is_folded(tensors):
    name, draw = "Mixed_6d.branch1x1", lambda *shape: RNG.uniform(0.5, 2, shape).astype(np.float32)
    weight, (scale, bias, mean, variance) = draw(192, 768, 1, 1), draw(4, 192)
    changed = {f"{name}.conv.weight": weight, f"{name}.bn.weight": scale, f"{name}.bn.bias": bias}
    changed |= {f"{name}.bn.running_mean": mean, f"{name}.bn.running_var": variance}
    params = inception.params_of("x", {**tensors, **changed})
    layer, x = params["Mixed_6d"]["branch1x1"], draw(5, 768)
    plain = x @ weight[:, :, 0, 0].T
    expected = (plain - mean) / np.sqrt(variance + 1e-3) * scale + bias
    np.testing.assert_allclose(x @ layer["kernel"][0, 0] + layer["bias"], expected, rtol=1e-5)
    np.testing.assert_allclose(x @ params["spatial"], plain[:, :7], rtol=1e-5)


def test_other_tensors(tensors):
    for changed, said in (
        ({name: value for name, value in tensors.items() if name != "Mixed_7c.branch_pool.bn.bias"}, "has no tensor"),
        ({**tensors, "AuxLogits.fc.bias": np.zeros(3, np.float32)}, "has a tensor 'AuxLogits.fc.bias'"),
        ({**tensors, "fc.bias": np.zeros(1000, np.float32)}, r"has shape \(1000,\); accepted: \(1008,\)"),
    ):
        with pytest.raises(UserError, match=said):
            inception.params_of("x", changed)
