"""T5's folders: reading, refusals, and comparison with transformers' outputs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5s
from folders import edit_config, edit_tensors, refusal
from safetensors.numpy import load_file, save_file

from ddpm_jax.interop import transformers as interop

NET = t5s.NET
FINAL = "encoder.final_layer_norm.weight"
SHARED, EMBEDDED = "shared.weight", "encoder.embed_tokens.weight"


@pytest.fixture(scope="module")
def params():
    return t5s.random_params(NET)


@pytest.fixture
def folder(tmp_path, params):
    return interop.write(tmp_path / "encoder", NET, params)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("activation", "gated", "name"),
    [
        ("relu", False, "relu"),
        ("gelu_new", True, "gated-gelu"),
        ("gelu_new", False, "gelu_new"),
        ("relu", True, "gated-relu"),
    ],
)
def test_written_and_read(tmp_path, activation, gated, name):
    net = NET.clone(activation=activation, gated=gated, epsilon=1e-5)
    params = t5s.random_params(net)
    written = interop.write(tmp_path / "encoder", net, params)
    assert json.loads((written / "config.json").read_text())["feed_forward_proj"] == name
    found, again = interop.read(written)
    assert found == net
    assert_same(again, params)
    assert "not empty" in refusal(interop.write, tmp_path / "encoder", net, params)


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", None])
@pytest.mark.parametrize("names", [[SHARED], [EMBEDDED], [SHARED, EMBEDDED]])
def test_the_encoder_of_a_whole_t5(folder, params, kind, names):
    edit_config(folder, architectures=kind and [kind])

    def edit(tensors):
        table = tensors.pop(SHARED)
        others = {name: np.zeros((2, 3), np.float32) for name in ("decoder.block.0.x.weight", "lm_head.weight")}
        return tensors | dict.fromkeys(names, table) | others

    edit_tensors(folder, edit)
    net, found = interop.read(folder)
    assert net == NET
    assert_same(found, params)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_in_shards(folder, params, dtype):
    tensors = {name: value.astype(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: value for name, value in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    _, found = interop.read(folder)
    assert_same(found, jax.tree.map(lambda value: value.astype(dtype).astype(np.float32), params))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["UMT5EncoderModel"]}, "architectures is 'UMT5EncoderModel' in {}; accepted: CLIPTextModel"),
        ({"d_model": "16"}, "d_model is '16' in {}; accepted: a whole number above 0"),
        ({"num_layers": 0}, "num_layers is 0 in {}; accepted: a whole number above 0"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu' in {}; accepted: gelu, gelu_new, "),
        ({"feed_forward_proj": None}, "feed_forward_proj is None in {}; accepted: gelu, gelu_new, "),
        ({"relative_attention_num_buckets": 3}, "relative_attention_num_buckets is 3 in {}; accepted: 4 or more"),
        ({"relative_attention_max_distance": 2}, "relative_attention_max_distance is 2 in {}; accepted: more than 2"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon is None in {}; accepted: a number such as 1e-06"),
    ],
)
def test_refused_config(folder, fields, message):
    edit_config(folder, **fields)
    assert message.format(repr(str(folder / "config.json"))) in refusal(interop.read, folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != FINAL}, f"{{}} has no tensor {FINAL!r}"),
        (lambda t: {k: v for k, v in t.items() if k != SHARED}, f"{{}} has no tensor {SHARED!r}"),
        (lambda t: t | {"encoder.extra": t[FINAL]}, "{} has a tensor 'encoder.extra'"),
        (lambda t: t | {FINAL: t[FINAL][:3]}, f"tensor {FINAL!r} in {{}} has shape (3,); accepted: (16,)"),
        (lambda t: t | {EMBEDDED: 2 * t[SHARED]}, f"tensors {SHARED!r} and {EMBEDDED!r} in {{}} differ"),
    ],
)
def test_refused_tensors(folder, edit, message):
    edit_tensors(folder, edit)
    assert message.format(repr(str(folder / "model.safetensors"))) in refusal(interop.read, folder)


# Against transformers.

NARROW = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 40,
}
V1_1_SMALL = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
KINDS = {"T5": "relu", "T5 v1.1": "gated-gelu"}


class Peer:
    """A T5 of transformers with random weights, the folder that it wrote, and the states that its encoder gives."""

    def __init__(self, kind, folder, **fields):
        why = "transformers and PyTorch are not installed (pip install -e '.[peers]')"
        self.torch = pytest.importorskip("torch", reason=why)
        transformers = pytest.importorskip("transformers", reason=why)
        self.torch.manual_seed(0)
        self.net = getattr(transformers, kind)(transformers.T5Config(**fields)).eval()
        with self.torch.no_grad():
            for name, parameter in self.net.named_parameters():
                if parameter.ndim == 1:  # those that start at one
                    parameter.add_(0.1 * self.torch.randn_like(parameter))
                if "relative" in name:
                    parameter.copy_(self.torch.randn_like(parameter))
        self.folder = folder
        self.net.save_pretrained(folder)

    def states(self, ids, mask):
        with self.torch.no_grad():
            mask = None if mask is None else self.torch.tensor(mask.astype(np.int64))
            found = self.net.get_encoder()(input_ids=self.torch.tensor(ids), attention_mask=mask)
            return found.last_hidden_state.numpy()


def prompts(vocab_size, length=77):
    """Two, one short: words, an end, padding."""
    ids = np.random.default_rng(0).integers(2, vocab_size, (2, length))
    mask = np.arange(length) <= np.array([[20], [length - 2]])
    ids[~mask] = 0
    ids[[0, 1], [20, length - 2]] = 1
    return ids.astype(np.int32), mask


def compare(measure, peer, name):
    net, params = interop.read(peer.folder)
    apply, (ids, mask) = jax.jit(net.apply), prompts(net.vocab_size)
    for used in (None, mask):
        kept = np.ones_like(mask) if used is None else mask
        found, expected = apply({"params": params}, ids, used).tokens[kept], peer.states(ids, used)[kept]
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        measure(f"states of tokens, {name}, with a mask and without", "transformers, PyTorch", error, 5e-6, "relative")
    return net, params


@pytest.mark.peers
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["T5EncoderModel", "T5ForConditionalGeneration"])
def test_narrow_encoders(measure, tmp_path, kind, model):
    fields = NARROW | {"feed_forward_proj": KINDS[kind], "decoder_start_token_id": 0}
    peer = Peer(model, tmp_path / "theirs", **fields)
    net, params = compare(measure, peer, "narrow encoders of T5 and T5 v1.1")
    written = interop.write(tmp_path / "again", net, params)
    before, after = (load_file(folder / "model.safetensors") for folder in (peer.folder, written))
    different = [name for name, value in after.items() if value.tobytes() != before[name].tobytes()]
    measure("tensors that differ after reading and writing, narrow encoders", "their bytes", len(different), 0)
    ids, mask = prompts(net.vocab_size)
    expected = peer.states(ids, mask)
    transformers = pytest.importorskip("transformers")
    peer.net, loading = transformers.T5EncoderModel.from_pretrained(written, output_loading_info=True)
    assert not any(loading.values())
    np.testing.assert_array_equal(peer.states(ids, mask), expected)


@pytest.mark.peers
@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_whole_t5(tmp_path, legacy):
    """A T5ForConditionalGeneration in bfloat16 with PyTorch's pickles, with the embedding table three times."""
    peer = Peer("T5ForConditionalGeneration", tmp_path, **NARROW)
    (tmp_path / "model.safetensors").unlink()
    state, path = peer.net.bfloat16().state_dict(), tmp_path / "pytorch_model.bin"
    assert {SHARED, EMBEDDED, "decoder.embed_tokens.weight"} <= state.keys()
    peer.torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    _, params = interop.read(tmp_path)
    kernel = state["encoder.block.2.layer.0.SelfAttention.k.weight"].float().numpy().T
    np.testing.assert_array_equal(params["transformer"]["block_2"]["attention"]["key"]["kernel"], kernel)
    np.testing.assert_array_equal(params["tokens"]["embedding"], state[SHARED].float().numpy())


@pytest.mark.peers
@pytest.mark.slow
def test_small_v1_1(measure, tmp_path):
    peer = Peer("T5EncoderModel", tmp_path, **V1_1_SMALL, feed_forward_proj="gated-gelu")
    _, params = compare(measure, peer, "the small T5 v1.1")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 35_332_800
