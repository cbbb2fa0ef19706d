import jax
import jax.numpy as jnp
import numpy as np
from references import dense, layer_norm

from ddpm_jax.models.embedding_condition import EmbeddingCondition

MODULE = EmbeddingCondition(width=8, time_width=10, num_tokens=3)
MASK = np.array([[True, False], [True, True]])


def inputs():
    rng = np.random.default_rng(0)
    embedding, tokens, vector = (rng.standard_normal(s).astype(np.float32) for s in ((2, 6), (2, 2, 7), (2, 5)))
    return embedding, {"tokens": tokens, "vector": vector, "tokens_mask": MASK}


def randomised():
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(MODULE.init, jax.random.key(0), *inputs())
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), shapes)


def test_follows_the_equations():
    (embedding, cond), variables = inputs(), randomised()
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    found = MODULE.apply(variables, embedding, cond)
    vector = dense(p["embedding_to_time"], embedding) + dense(p["vector_to_time"], cond["vector"])
    np.testing.assert_allclose(found["vector"], vector, atol=1e-5)
    kernel, bias = (p["embedding_to_tokens"][leaf].reshape(-1, 8, 3) for leaf in ("kernel", "bias"))
    for i in range(3):
        np.testing.assert_allclose(found["tokens"][:, i], embedding @ kernel[..., i] + bias[..., i], atol=1e-5)
    text = layer_norm(p["tokens_norm"], dense(p["tokens"], cond["tokens"]), 1e-5)
    np.testing.assert_allclose(found["tokens"][:, 3:], text, atol=1e-5)
    np.testing.assert_array_equal(found["tokens_mask"], np.pad(MASK, ((0, 0), (3, 0)), constant_values=True))
    del cond["tokens_mask"]
    assert MODULE.apply(variables, embedding, cond).keys() == {"tokens", "vector"}


def test_a_dropped_embedding_is_the_learned_one():
    (embedding, cond), variables = inputs(), randomised()
    found = MODULE.apply(variables, embedding, cond, jnp.array([True, False]))
    replaced = embedding.copy()
    replaced[0] = variables["params"]["null"]
    expected = MODULE.apply(variables, replaced, cond)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    gradient = jax.grad(
        lambda null: jnp.sum(
            MODULE.apply({"params": {**variables["params"], "null": null}}, embedding, cond, jnp.ones(2, bool))[
                "vector"
            ]
        )
    )(variables["params"]["null"])
    assert np.all(gradient != 0)


def test_bfloat16_is_close_to_float32():
    (embedding, cond), variables = inputs(), randomised()
    low, expected = (module.apply(variables, embedding, cond) for module in (MODULE.clone(dtype=jnp.bfloat16), MODULE))
    for name in ("tokens", "vector"):
        assert low[name].dtype == jnp.float32
        assert np.abs(low[name] - expected[name]).max() < 0.05 * np.abs(expected[name]).max()
