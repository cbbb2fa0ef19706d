"""CLIP's transformers folders: reading, refusals, and comparison with transformers' outputs."""

import dataclasses
import json
from pathlib import Path

import clips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import edit_config, edit_tensors, refusal
from safetensors.numpy import load_file, save_file

from ddpm_jax.interop import transformers as interop
from ddpm_jax.models.clip import CLIPTextEncoder
from ddpm_jax.runtime.parallel import run_once_options

NET = CLIPTextEncoder(30, max_length=9, width=16, num_layers=2, num_heads=2, mlp_width=24, end_token=28, projection=5)
FINAL = "text_model.final_layer_norm.bias"


def random_params(net):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def params():
    return random_params(NET)


@pytest.fixture
def folder(tmp_path, params):
    return interop.write(tmp_path / "encoder", NET, params)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("end_token", [None, 28])
@pytest.mark.parametrize("projection", [None, 5])
def test_written_and_read(tmp_path, end_token, projection):
    net = NET.clone(end_token=end_token, projection=projection, activation="gelu", epsilon=1e-6)
    params = random_params(net)
    found, again = interop.read(interop.write(tmp_path / "encoder", net, params))
    assert found == net
    assert_same(again, params)
    assert "not empty" in refusal(interop.write, tmp_path / "encoder", net, params)


def test_the_text_half_of_a_whole_clip(folder, params):
    """As in older files: with the image half, the position numbers, and the fields twice."""
    text = json.loads((folder / "config.json").read_text()) | {"projection_dim": 7}
    architectures = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 5}
    clip = {"text_config": text | {"hidden_act": "gelu"}, "text_config_dict": text}
    (folder / "config.json").write_text(json.dumps(architectures | clip))
    others = {
        "vision_model.post_layernorm.bias": np.zeros(3, np.float32),
        "visual_projection.weight": np.zeros((2, 3), np.float32),
        "logit_scale": np.zeros((), np.float32),
        "text_model.embeddings.position_ids": np.arange(9)[None],
    }
    edit_tensors(folder, lambda tensors: tensors | others)
    net, found = interop.read(folder)
    assert net == NET
    assert_same(found, params)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_in_shards_without_prefix(folder, params, dtype):
    tensors = {
        name.removeprefix("text_model."): value.astype(dtype)
        for name, value in load_file(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: value for name, value in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    _, found = interop.read(folder)
    assert_same(found, jax.tree.map(lambda value: value.astype(dtype).astype(np.float32), params))
    (folder / file).unlink()
    assert refusal(interop.read, folder) == f"{str(folder / file)!r} is not a file"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    assert "names '../a.safetensors'; accepted: files in the same folder" in refusal(interop.read, folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refusal(interop.read, folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["BertModel"]}, "architectures is 'BertModel' in {}; accepted: CLIPTextModel, CLIPText"),
        ({"architectures": None, "model_type": "bert"}, "architectures is 'bert' in {}; accepted: CLIPTextModel, "),
        ({"hidden_act": "silu"}, "hidden_act is 'silu' in {}; accepted: gelu, gelu_new, quick_gelu, "),
        ({"hidden_size": "16"}, "hidden_size is '16' in {}; accepted: a whole number above 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0 in {}; accepted: a whole number above 0"),
        ({"num_attention_heads": 3}, "num_attention_heads is 3 in {}; accepted: a divisor of hidden_size, 16"),
        ({"projection_dim": None}, "projection_dim is None in {}; accepted: a whole number above 0"),
        ({"eos_token_id": [1]}, "eos_token_id is [1] in {}; accepted: a token's id"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None in {}; accepted: a number such as 1e-05"),
        ({"architectures": ["CLIPModel"], "text_config": [1]}, "text_config is [1] in {}; accepted: a JSON object"),
    ],
)
def test_refused_config(folder, fields, message):
    edit_config(folder, **fields)
    assert message.format(repr(str(folder / "config.json"))) in refusal(interop.read, folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != FINAL}, f"{{}} has no tensor {FINAL!r}"),
        (lambda t: t | {"text_model.extra": t[FINAL]}, "{} has a tensor 'text_model.extra'"),
        (lambda t: t | {FINAL: t[FINAL][:3]}, f"tensor {FINAL!r} in {{}} has shape (3,); accepted: (16,)"),
        (lambda t: t | {FINAL: t[FINAL].astype(np.float64)}, f"tensor {FINAL!r} in {{}} is float64; accepted: float32"),
    ],
)
def test_refused_tensors(folder, edit, message):
    edit_tensors(folder, edit)
    assert message.format(repr(str(folder / "model.safetensors"))) in refusal(interop.read, folder)


def test_refused_folders(folder):
    (folder / "model.safetensors").unlink()
    assert "has no weights; accepted: model.safetensors or pytorch_model.bin" in refusal(interop.read, folder)
    (folder / "config.json").write_text("[]")
    assert "is not a JSON object" in refusal(interop.read, folder)
    (folder / "config.json").write_text("{")
    assert "is not valid JSON" in refusal(interop.read, folder)
    assert "config.json' cannot be read: No such file or directory" in refusal(interop.read, folder / "elsewhere")


# A whole CLIP.


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clips.make_clip(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def clip_folder(tmp_path, clip):
    return interop.write_clip(tmp_path / "clip", clip)


def assert_same_clip(found, expected):
    for field in dataclasses.fields(expected):
        if field.name not in ("params", "tokenizer"):
            assert getattr(found, field.name) == getattr(expected, field.name), field.name
    assert_same(found.params, expected.params)
    assert found.tokenizer.to_json() == expected.tokenizer.to_json()


def test_a_whole_clip_written_and_read(clip, clip_folder):
    assert_same_clip(interop.read_clip(clip_folder), clip)
    net, params = interop.read(clip_folder)
    assert net == clip.text
    assert_same(params, clip.params["text"])


def test_an_older_clip_in_half_precision(clip, clip_folder):
    """With the fields twice, sizes as numbers, and OpenAI's defaults without a preprocessor_config.json."""
    config = json.loads((clip_folder / "config.json").read_text())
    vision = config["vision_config"]
    edit_config(clip_folder, vision_config=vision | {"num_hidden_layers": 9}, vision_config_dict=vision)
    preprocessor = clip_folder / "preprocessor_config.json"
    preprocessor.write_text(json.dumps(json.loads(preprocessor.read_text()) | {"size": 12, "crop_size": 12}))
    ranges = {f"{half}_model.embeddings.position_ids": np.arange(9)[None] for half in ("text", "vision")}
    edit_tensors(clip_folder, lambda tensors: {k: v.astype(np.float16) for k, v in tensors.items()} | ranges)
    halved = jax.tree.map(lambda value: value.astype(np.float16).astype(np.float32), clip.params)
    assert_same_clip(interop.read_clip(clip_folder), dataclasses.replace(clip, params=halved))
    preprocessor.unlink()
    found = interop.read_clip(clip_folder)
    assert (found.image_mean[0], found.image_std[2]) == (0.48145466, 0.27577711)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("config", {"architectures": ["CLIPTextModel"]}, "architectures is 'CLIPTextModel' in {}; accepted: CLIPModel"),
        ("config", {"vision_config": 3}, "vision_config is 3 in {}; accepted: a JSON object"),
        ("config", {"vision_config": {"patch_size": 5}}, "patch_size is 5 in {}; accepted: a divisor of image_size, 2"),
        ("config", {"vision_config": {"num_channels": 4}}, "num_channels is 4 in {}; accepted: 1 or 3"),
        (
            "config",
            {"vision_config": {"hidden_act": "silu"}},
            "hidden_act is 'silu' in {}; accepted: gelu, gelu_new, quick_gelu, ",
        ),
        ("preprocessor_config", {"size": {"height": 12, "width": 12}}, "size is {{'height': 12, 'width': 12}} in {}"),
        ("preprocessor_config", {"size": {"shortest_edge": 16}}, "size is {{'shortest_edge': 16}} in {}; accepted: 12"),
        ("preprocessor_config", {"crop_size": 8}, "crop_size is 8 in {}; accepted: 12"),
        ("preprocessor_config", {"resample": 2}, "resample is 2 in {}; accepted: 3"),
        ("preprocessor_config", {"do_normalize": False}, "do_normalize is False in {}; accepted: true"),
        ("preprocessor_config", {"image_mean": [0.5]}, "image_mean is [0.5] in {}; accepted: 3 numbers"),
        ("preprocessor_config", {"image_std": [1, 1, 0]}, "image_std is [1, 1, 0] in {}; accepted: numbers above 0"),
    ],
)
def test_refused_clip(clip_folder, name, fields, message):
    path = clip_folder / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert message.format(repr(str(path))) in refusal(interop.read_clip, clip_folder)


def test_refused_tensors_and_tokenizers_of_a_clip(clip, clip_folder, tmp_path):
    edit_tensors(clip_folder, lambda t: {k: v for k, v in t.items() if k != "logit_scale"})
    assert "has no tensor 'logit_scale'" in refusal(interop.read_clip, clip_folder)
    (clip_folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(interop.read_clip, clip_folder)
    few = dataclasses.replace(clip, text=clip.text.clone(vocab_size=500))
    message = refusal(interop.read_clip, interop.write_clip(tmp_path / "few", few))
    assert "the tokenizer has 514 tokens and texts of 24; accepted: at most the 500 tokens and texts of 24" in message


# Against transformers.

NARROW = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 58,
    "eos_token_id": 59,
    "projection_dim": 24,
}
VIT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
VIT_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
    "eos_token_id": 2,
}


class Peer:
    """A CLIP of transformers with random weights, the folder that it wrote, and the states that it gives."""

    def __init__(self, kind, config, folder, **saving):
        why = "transformers and PyTorch are not installed (pip install -e '.[peers]')"
        self.torch = pytest.importorskip("torch", reason=why)
        transformers = pytest.importorskip("transformers", reason=why)
        self.torch.manual_seed(0)
        self.net = getattr(transformers, kind)(config(transformers)).eval()
        with self.torch.no_grad():
            for parameter in self.net.parameters():
                if parameter.ndim == 1:  # those that start at zero or one
                    parameter.add_(0.1 * self.torch.randn_like(parameter))
        self.folder = Path(folder)
        self.net.save_pretrained(folder, **saving)

    def states(self, ids, mask):
        with self.torch.no_grad():
            mask = None if mask is None else self.torch.tensor(mask.astype(np.int64))
            return self.net(input_ids=self.torch.tensor(ids), attention_mask=mask, output_hidden_states=True)


def text_config(fields):
    return lambda transformers: transformers.CLIPTextConfig(**fields)


def prompts(vocab_size):
    """Two of 77 tokens, one short; start, words, end, padding of end tokens."""
    ids = np.random.default_rng(0).integers(0, vocab_size - 2, (2, 77))
    ids[:, 0] = vocab_size - 2
    ids[0, 20:] = ids[1, 76:] = vocab_size - 1
    mask = np.arange(77) <= np.array([[20], [76]])
    return ids.astype(np.int32), mask


def compare(measure, peer, name, tolerance=1e-5):
    """Every output, with a mask and without; tokens with a mask where they are not padding."""
    net, params = interop.read(peer.folder)
    apply = jax.jit(net.apply)
    ids, mask = prompts(net.vocab_size)
    against = "transformers, PyTorch"
    for used in (None, mask):
        found, theirs = apply({"params": params}, ids, used), peer.states(ids, used)
        kept = np.ones_like(mask) if used is None else mask
        projected = getattr(theirs, "text_embeds", None)
        tokens = theirs.last_hidden_state.numpy()
        pooled = theirs.pooler_output.numpy() if projected is None else tokens[[0, 1], [20, 76]]
        for what, ours, expected in (
            ("states of tokens", found.tokens[kept], tokens[kept]),
            ("pooled state", found.pooled, pooled),
            *([("projected state", found.projected, projected.numpy())] if projected is not None else []),
        ):
            error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
            measure(f"{what}, {name}, with a mask and without", against, error, tolerance, "relative")
    return net, params


@pytest.mark.peers
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_narrow_encoders(measure, tmp_path, kind, activation):
    fields = NARROW | {"hidden_act": activation, "eos_token_id": 2 if activation == "gelu" else 59}
    peer = Peer(kind, text_config(fields), tmp_path / "theirs")
    net, params = compare(measure, peer, "narrow encoders of both activations")
    written = interop.write(tmp_path / "again", net, params)
    before, after = (load_file(folder / "model.safetensors") for folder in (peer.folder, written))
    before = {"text_model." * (not name.startswith("text_")) + name: value for name, value in before.items()}
    assert before.keys() == after.keys()
    different = [name for name, value in before.items() if value.tobytes() != after[name].tobytes()]
    measure("tensors that differ after reading and writing, narrow encoders", "their bytes", len(different), 0)
    opened, (ids, mask) = type(peer.net).from_pretrained(written).eval(), prompts(60)
    expected = peer.states(ids, mask).last_hidden_state
    peer.net = opened
    assert peer.torch.equal(peer.states(ids, mask).last_hidden_state, expected)


@pytest.mark.peers
@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_half_of_a_whole_clip(tmp_path, legacy):
    """A CLIPModel in bfloat16 with PyTorch's pickles, of which the text half is read."""

    def config(transformers):
        image = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        return transformers.CLIPConfig(text_config=NARROW, vision_config=image, projection_dim=24)

    peer = Peer("CLIPModel", config, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state, path = peer.net.bfloat16().state_dict(), tmp_path / "pytorch_model.bin"
    peer.torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    net, params = interop.read(tmp_path)
    assert net.projection == 24
    expected = {name: value.float().numpy() for name, value in state.items()}
    kernel = expected["text_model.encoder.layers.1.self_attn.k_proj.weight"].T
    np.testing.assert_array_equal(params["transformer"]["block_1"]["attention"]["key"]["kernel"], kernel)
    np.testing.assert_array_equal(params["projection"]["kernel"], expected["text_projection.weight"].T)


def whole_config(vision):
    """The config of a CLIPModel whose text half is narrow."""
    text = NARROW | {"vocab_size": clips.VOCAB_SIZE, "bos_token_id": 512, "eos_token_id": 513}
    return lambda transformers: transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)


def compare_images(measure, peer, name, count=3):
    """Every output of the image encoder, and the whole CLIP where there is one."""
    clips.write_tokenizer(peer.folder, max_length=77)
    clip = interop.read_clip(peer.folder)
    size = clip.image.image_size
    images = np.random.default_rng(0).standard_normal((count, size, size, 3)).astype(np.float32)
    apply = jax.jit(clip.image.apply, compiler_options=run_once_options())
    found = apply({"params": clip.params["image"]}, images)
    pixels = peer.torch.tensor(images.transpose(0, 3, 1, 2))
    with peer.torch.no_grad():
        theirs = peer.net.vision_model(pixel_values=pixels)
        projected = peer.net.visual_projection(theirs.pooler_output)
    for what, ours, expected in (
        ("states of patches", found.patches, theirs.last_hidden_state[:, 1:]),
        ("pooled state of images", found.pooled, theirs.pooler_output),
        ("projected state of images", found.projected, projected),
    ):
        error = np.linalg.norm(ours - expected.numpy()) / np.linalg.norm(expected)
        measure(f"{what}, {name}", "transformers, PyTorch", error, 1e-5, "relative")
    return clip, found.projected, pixels


@pytest.mark.peers
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_narrow_clips(measure, tmp_path, activation):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 24, "patch_size": 4, "hidden_act": activation}
    peer, name = Peer("CLIPModel", whole_config(vision), tmp_path / "theirs"), "narrow CLIPs of both activations"
    clip, image, pixels = compare_images(measure, peer, name)
    ids, _ = prompts(clips.VOCAB_SIZE)
    text = jax.jit(clip.text.apply)({"params": clip.params["text"]}, ids).projected
    units = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text)]

    def logits(net):
        with peer.torch.no_grad():
            return net(input_ids=peer.torch.tensor(ids), pixel_values=pixels).logits_per_image.numpy()

    expected = logits(peer.net)
    error = np.linalg.norm(np.exp(clip.logit_scale) * units[0] @ units[1].T - expected) / np.linalg.norm(expected)
    measure(f"logits of images and texts, {name}", "transformers, PyTorch", error, 1e-5, "relative")

    written = interop.write_clip(tmp_path / "again", clip)
    before, after = (load_file(folder / "model.safetensors") for folder in (peer.folder, written))
    assert before.keys() == after.keys()
    different = [name for name, value in before.items() if value.tobytes() != after[name].tobytes()]
    measure("tensors that differ after reading and writing, narrow CLIPs", "their bytes", len(different), 0)
    np.testing.assert_array_equal(logits(type(peer.net).from_pretrained(written).eval()), expected)


@pytest.mark.peers
def test_large_image_encoder(measure, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="it is not installed (pip install -e '.[peers]')")
    # Torch's own initial values are as good here, and sooner drawn.
    monkeypatch.setattr(transformers.CLIPModel, "init_weights", lambda self: None)
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"image_size": 224, "patch_size": 14}
    peer = Peer("CLIPModel", whole_config(vision), tmp_path)
    clip, _, _ = compare_images(measure, peer, "ViT-L/14's image encoder", count=1)
    assert sum(leaf.size for leaf in jax.tree.leaves(clip.params["image"])) == 303_179_776 + 24 * 1024


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "fields", "count"),
    [
        ("ViT-L/14's encoder", "CLIPTextModel", VIT_L, 123_060_480),
        ("ViT-H/14's encoder with projection", "CLIPTextModelWithProjection", VIT_H, 340_387_840 + 512 * 1024),
    ],
)
def test_large_encoders(measure, tmp_path, name, kind, fields, count):
    peer = Peer(kind, text_config(fields), tmp_path, max_shard_size="400MB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    _, params = compare(measure, peer, name)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
