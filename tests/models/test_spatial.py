import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ddpm_jax.models.spatial import SpatialTransformer

MASK = np.array([[True, True, False, False, False], [True, True, True, True, True]])


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X, CONTEXT = normal(0, 2, 4, 6, 16), normal(1, 2, 5, 12)


def test_starts_as_the_identity_and_sees_no_masked_token():
    module = SpatialTransformer(num_heads=2, num_groups=4)
    variables = jax.jit(module.init)(jax.random.key(0), X, CONTEXT)
    apply = jax.jit(module.apply)
    np.testing.assert_allclose(apply(variables, X, CONTEXT, MASK), X, atol=1e-3)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype) / 4, variables)
    found, other = (apply(variables, X, np.where(MASK[..., None], CONTEXT, pad), MASK) for pad in (0, 100))
    np.testing.assert_array_equal(found, other)
    assert np.abs(found - apply(variables, X, CONTEXT, np.ones_like(MASK)))[0].max() > 1e-3


def test_computes_in_its_dtype_with_parameters_in_float32():
    module = SpatialTransformer(head_width=8, num_groups=4, dtype=jnp.bfloat16)
    found, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), X.astype(jnp.bfloat16), CONTEXT)
    assert (found.shape, found.dtype) == (X.shape, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "num_heads is None and head_width is None; accepted: one of the two"),
        ({"num_heads": 2, "head_width": 8}, "num_heads is 2 and head_width is 8; accepted: one of the two"),
        ({"head_width": 5}, "head_width 5 does not divide the 16 channels of a level"),
        ({"num_heads": 3}, "num_heads 3 does not divide the width 16"),
    ],
)
def test_refused_heads(options, message):
    module = SpatialTransformer(num_groups=4, **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), X, CONTEXT)


THEIRS = {
    "project_in": "proj_in",
    "project_out": "proj_out",
    "norm_0": "norm1",
    "norm_1": "norm2",
    "norm_2": "norm3",
    "mlp_0": "ff.net.0.proj",
    "mlp_1": "ff.net.2",
    "attention": "attn1",
    "cross": "attn2",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
    "kernel": "weight",
    "scale": "weight",
}


def params_of(shapes, tensors):
    """Our parameters of a Transformer2DModel's, of which none may be left."""

    def find(path, leaf):
        names = [key.key for key in path]
        name = ".".join(THEIRS.get(name, name).replace("block_", "transformer_blocks.") for name in names)
        value = tensors.pop(name).numpy()
        value = value.reshape(value.shape[:2]).T if names[-1] == "kernel" else value
        assert value.shape == leaf.shape
        return jnp.asarray(value)

    params = jax.tree_util.tree_map_with_path(find, shapes)
    assert not tensors
    return params


@pytest.mark.peers
@pytest.mark.parametrize("linear", [False, True])
def test_against_diffusers(measure, linear):
    why = "diffusers and PyTorch are not installed (pip install -e '.[peers]')"
    torch = pytest.importorskip("torch", reason=why)
    diffusers = pytest.importorskip("diffusers", reason=why)
    torch.manual_seed(0)
    options = {"norm_num_groups": 4, "cross_attention_dim": 12, "use_linear_projection": linear}
    theirs = diffusers.Transformer2DModel(2, 8, in_channels=16, num_layers=2, **options).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    heads = {"head_width": 8} if linear else {"num_heads": 2}  # which is the same at 16 channels
    module = SpatialTransformer(depth=2, num_groups=4, **heads)
    shapes = jax.eval_shape(module.init, jax.random.key(0), X, CONTEXT)["params"]
    params = params_of(shapes, theirs.state_dict())
    assert len(flatten_dict(params)) == len(theirs.state_dict())
    apply = jax.jit(module.apply)
    for mask in (MASK, None):
        with torch.no_grad():
            image, context = torch.tensor(X.transpose(0, 3, 1, 2)), torch.tensor(CONTEXT)
            their_mask = None if mask is None else torch.tensor(mask)
            expected = theirs(image, context, encoder_attention_mask=their_mask).sample
        change = expected.numpy().transpose(0, 2, 3, 1) - X  # without the input, which is added at the end
        error = np.linalg.norm(apply({"params": params}, X, CONTEXT, mask) - X - change) / np.linalg.norm(change)
        what = "spatial transformer of two blocks, linear and convolutional projections, with a mask and without"
        measure(what, "diffusers' `Transformer2DModel`, PyTorch", error, 1e-4, "relative")
