import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import ACTIVATIONS, dense, layer_norm, transformer

from ddpm_jax.diffusion.losses import training_loss
from ddpm_jax.diffusion.samplers import sample
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.models.prior import ADDED_TOKENS, Prior
from ddpm_jax.runtime.parallel import run_once_options

NARROW = Prior(width=16, num_layers=2, num_heads=2, num_tokens=5)
EVERY_OPTION = Prior(
    width=16,
    num_layers=1,
    num_heads=4,
    num_tokens=5,
    time_width=12,
    time_activation="gelu",
    project_tokens=False,
    norm_vector=True,
    norm_in=True,
)
D = 6  # width of the embeddings
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
T = np.array([0, 17, 999])


def inputs(net):
    rng = np.random.default_rng(0)
    shapes = ((3, 1, 1, D), (3, 5, 7 if net.project_tokens else net.width), (3, 9))
    x, tokens, vector = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x, {"tokens": tokens, "vector": vector, "tokens_mask": MASK}


def randomised(net):
    """Parameters in which no layer is (almost) zero."""
    x, cond = inputs(net)
    rng = np.random.default_rng(1)

    def draw(leaf):
        return jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[0] if leaf.ndim > 1 else 4), leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(net.init, jax.random.key(0), x, T, cond))


def apply(net, variables, x, cond, t=T):
    return np.asarray(jax.jit(net.apply, compiler_options=run_once_options())(variables, x, t, cond))


def sinusoids(t, width):
    angles = t[:, None] * 10_000.0 ** (-np.arange(width // 2) / (width // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


@pytest.mark.parametrize("net", [NARROW, EVERY_OPTION])
def test_follows_the_equations(net):
    """In float64, position by position: text, text embedding, timestep, noised embedding, query."""
    x, cond = inputs(net)
    variables = randomised(net)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    x_64, tokens, vector = (np.asarray(v, np.float64) for v in (x[:, 0, 0], cond["tokens"], cond["vector"]))
    hidden = dense(p["time_0"], sinusoids(T, 16))
    activation = ACTIVATIONS["gelu"] if net is EVERY_OPTION else lambda h: h / (1 + np.exp(-h))
    time = dense(p["time_1"], activation(hidden))
    tokens = dense(p["tokens"], tokens) if net.project_tokens else tokens
    vector = layer_norm(p["vector_norm"], vector, 1e-5) if net.norm_vector else vector
    query = np.broadcast_to(p["query"], (3, 16))
    added = np.stack([dense(p["vector"], vector), time, dense(p["x"], x_64), query], axis=1)
    h = np.concatenate([tokens, added], axis=1) + p["positions"]
    h = layer_norm(p["norm_in"], h, 1e-5) if net.norm_in else h
    seen = np.concatenate([MASK, np.ones((3, ADDED_TOKENS), bool)], axis=1)
    allowed = seen[:, None] & np.tri(9, dtype=bool)
    allowed = allowed | ~allowed.any(axis=-1, keepdims=True)  # of such tokens nothing is used
    h = transformer(p["transformer"], h, net.num_heads, allowed, "gelu", 1e-5)
    expected = dense(p["out"], layer_norm(p["norm_out"], h[:, -1], 1e-5))
    found = apply(net, variables, x, cond)
    assert found.shape == (3, 1, 1, D)
    np.testing.assert_allclose(found[:, 0, 0], expected, atol=2e-5)


def test_karlo_s_parameters():
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    cond = {"tokens": shape(1, 77, 768), "vector": shape(1, 768)}
    shapes = jax.eval_shape(Prior().init, jax.random.key(0), shape(1, 1, 1, 768), shape(1), cond)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1_022_028_544


@pytest.mark.slow
def test_no_token_sees_those_behind_it():
    """Each block's output at a position depends only on that position and earlier ones."""
    x, cond = inputs(NARROW)
    variables, whole = randomised(NARROW), {**cond, "tokens_mask": np.ones_like(MASK)}

    def states(x, cond):
        _, kept = NARROW.apply(variables, x, T, cond, capture_intermediates=True)
        (found,) = kept["intermediates"]["transformer"]["__call__"]
        return found

    before = states(x, whole)
    later_token = np.where(np.arange(5)[:, None] >= 3, 9.0, whole["tokens"]).astype(np.float32)
    after = states(x, {**whole, "tokens": later_token})
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert np.all(np.any(after[:, 3:] != before[:, 3:], axis=-1))
    after = states(x + 1, whole)  # behind the text, its embedding and the timestep
    np.testing.assert_array_equal(after[:, :7], before[:, :7])
    assert np.all(np.any(after[:, 7:] != before[:, 7:], axis=-1))


def test_masked_tokens_change_nothing():
    x, cond = inputs(NARROW)
    variables = randomised(NARROW)
    found = apply(NARROW, variables, x, cond)
    hidden = np.where(MASK[..., None], cond["tokens"], 100.0).astype(np.float32)
    np.testing.assert_allclose(apply(NARROW, variables, x, {**cond, "tokens": hidden}), found, atol=1e-6)
    whole = apply(NARROW, variables, x, {**cond, "tokens_mask": np.ones_like(MASK)})
    del cond["tokens_mask"]
    np.testing.assert_array_equal(apply(NARROW, variables, x, cond), whole)
    assert np.all(np.isfinite(found))
    assert np.all(np.any(whole[[0, 2]] != found[[0, 2]], axis=-1))


def test_everything_else_counts():
    x, cond = inputs(NARROW)
    variables = randomised(NARROW)
    found = apply(NARROW, variables, x, cond)
    others = [
        apply(NARROW, variables, x + 1, cond),
        apply(NARROW, variables, x, cond, t=np.array([500, 900, 3])),
        apply(NARROW, variables, x, {**cond, "vector": cond["vector"] + 1}),
    ]
    for other in others:
        assert np.all(np.abs(other - found).max(axis=-1) > 1e-3)


@pytest.mark.slow
def test_starts_near_zero_and_bfloat16_is_close_to_float32():
    x, cond = inputs(NARROW)
    initial = jax.jit(NARROW.init)(jax.random.key(0), x, T, cond)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(apply(NARROW, initial, x, cond), 0, atol=1e-3)
    variables = randomised(NARROW)
    low, expected = (apply(net, variables, x, cond) for net in (NARROW.clone(dtype=jnp.bfloat16), NARROW))
    assert low.dtype == np.float32
    assert np.abs(low - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.slow
def test_embeddings_are_images_of_one_pixel():
    """The loss and the samplers of images take them."""
    x, cond = inputs(NARROW)
    schedule, variables = make_schedule("cosine", 20), randomised(NARROW)

    def model_fn(x_t, t):
        return 4 * NARROW.apply(variables, x_t, t, cond)

    loss = training_loss(schedule, model_fn, jax.random.key(0), x, prediction="x_0")
    assert loss.shape == (3,)
    assert np.all(np.isfinite(loss))
    options = {"num_steps": 3, "prediction": "x_0", "variance": "fixed_small"}
    found = sample(schedule, model_fn, jax.random.key(0), x.shape, clip_range=0.5, **options)
    assert found.shape == x.shape
    assert np.abs(found).max() == 0.5
    assert np.abs(sample(schedule, model_fn, jax.random.key(0), x.shape, clip_range=5.0, **options)).max() > 1


@pytest.mark.parametrize(
    ("net", "change", "message"),
    [
        (NARROW, {"x": np.zeros((3, D))}, r"x has shape \(3, 6\); accepted: \[B, 1, 1, D\]"),
        (NARROW, {"x": np.zeros((3, 2, 1, D))}, r"x has shape \(3, 2, 1, 6\)"),
        (NARROW, {"t": np.zeros(2)}, r"t has shape \(2,\); accepted: \(3,\), one entry per embedding"),
        (NARROW, {"label": np.zeros(3)}, "cond has 'label'; accepted: tokens, tokens_mask, vector"),
        (NARROW, {"vector": None}, "cond has no 'vector'"),
        (NARROW, {"tokens": None}, "cond has no 'tokens'"),
        (NARROW, {"tokens": np.zeros((3, 4, 7))}, "the texts have 4 tokens; accepted: 5"),
        (EVERY_OPTION, {"tokens": np.zeros((3, 5, 7))}, "states have width 7; accepted without project_tokens: 16"),
        (NARROW.clone(time_activation="tanh"), {}, "time_activation is 'tanh'; accepted: swish, gelu"),
        (NARROW.clone(num_heads=3), {}, "num_heads 3 does not divide the width 16"),
    ],
)
def test_refused(net, change, message):
    x, cond = inputs(net)
    change = dict(change)
    x, t = change.pop("x", x), change.pop("t", T)
    cond = {name: value for name, value in {**cond, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(net.init, jax.random.key(0), x, t, cond)
