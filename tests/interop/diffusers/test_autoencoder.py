"""diffusers' `AutoencoderKL`: reading, writing, refusals, and comparison with diffusers' outputs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import refusal
from safetensors.numpy import load_file, save_file
from theirs import to_numpy, to_torch

from ddpm_jax.interop.diffusers import autoencoder as interop
from ddpm_jax.interop.diffusers.fields import WEIGHTS
from ddpm_jax.models.autoencoder import Autoencoder, param_shapes
from ddpm_jax.runtime.parallel import run_once_options

NET = Autoencoder(channels=2, latent_channels=3, widths=(8, 12), num_res_blocks=1, num_groups=4)
FIELDS = interop.to_fields(NET, 0.5)
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
NAME, QUERY = "decoder.up_blocks.1.resnets.0.conv1.weight", "encoder.mid_block.attentions.0.to_q.weight"


def random_tensors(net):
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731
    tensors = interop.to_tensors(jax.tree.map(draw, param_shapes(net)), net)
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}  # as `save_file` wants them


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if value.tobytes() != found[name].tobytes()]
    assert not different


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(NET)


@pytest.fixture(scope="module")
def params(tensors):
    return interop.to_params("x.safetensors", tensors, NET)


@pytest.fixture
def folder(tmp_path, params):
    interop.write(tmp_path / "vae", NET, params, 0.5)
    return tmp_path / "vae"


VARIANTS = [
    NET,
    NET.clone(widths=(8,), num_res_blocks=2, middle_attention=False),
    NET.clone(widths=(8,), use_quant_conv=False, use_post_quant_conv=False),
    NET.clone(widths=(8,), use_post_quant_conv=False),
]


@pytest.mark.parametrize("net", VARIANTS)
def test_there_and_back(tmp_path, net):
    tensors = random_tensors(net)
    assert ("quant_conv.weight" in tensors) == net.use_quant_conv
    assert ("post_quant_conv.weight" in tensors) == net.use_post_quant_conv
    params = interop.to_params("x.safetensors", tensors, net)
    assert_same(interop.to_tensors(params, net), tensors)
    folder = tmp_path / "vae"
    interop.write(folder, net, params, 0.13)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", WEIGHTS[0]]
    assert interop.read_module(folder) == (net, 0.13)
    found, again, factor = interop.read(folder)
    assert (found, factor) == (net, 0.13)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert "not empty" in refusal(interop.write, folder, net, params, 0.13)


def test_layout():
    shapes = {name: value.shape for name, value in random_tensors(NET).items()}
    assert shapes["quant_conv.weight"] == (6, 6, 1, 1)
    assert shapes[NAME] == (8, 12, 3, 3)
    assert shapes["decoder.up_blocks.1.resnets.0.conv_shortcut.weight"] == (8, 12, 1, 1)
    assert shapes["encoder.down_blocks.0.downsamplers.0.conv.weight"] == (8, 8, 3, 3)
    assert shapes["decoder.up_blocks.0.upsamplers.0.conv.weight"] == (12, 12, 3, 3)
    assert shapes[QUERY] == (12, 12)


def test_stable_diffusion():
    """The config in its first file, and fields that later ones omit or add."""
    levels = 4
    fields = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    assert interop.to_module(fields) == (Autoencoder(), 0.18215)
    later = {"scaling_factor": 0.13025, "shift_factor": 0.0, "latents_mean": None, "force_upcast": False}
    assert interop.to_module(fields | later) == (Autoencoder(), 0.13025)
    assert {**interop.to_fields(Autoencoder(), 0.18215), **fields} == {
        **fields,
        "scaling_factor": 0.18215,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    }


def former(name):
    for new, old in OLD.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


@pytest.mark.parametrize("shape", [(12, 12), (12, 12, 1, 1)])
def test_former_names_and_shapes_of_attention(tensors, params, shape):
    found = {
        former(name): value.reshape(shape) if ".attentions." in name and value.ndim > 1 else value
        for name, value in tensors.items()
    }
    assert found[former(QUERY)].shape == shape
    jax.tree.map(np.testing.assert_array_equal, interop.to_params("x.bin", found, NET), params)


def halved(params, dtype):
    return jax.tree.map(lambda value: value.astype(dtype).astype(np.float32), params)


def shard(folder, tensors, index):
    files = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: value for name, value in tensors.items() if files[name] == file}, folder / file)
    (folder / index).write_text(json.dumps({"weight_map": files}))
    return folder / file


def test_variants_and_shards(folder, params, tensors):
    """Half precision if there is no plain file; shards; and a truncated or missing shard."""
    for dtype, variant in ((jnp.bfloat16, "bf16"), (np.float16, "fp16")):
        save_file(
            {name: value.astype(dtype) for name, value in tensors.items()},
            folder / WEIGHTS[0].replace(".", f".{variant}."),
        )
    jax.tree.map(np.testing.assert_array_equal, interop.read(folder)[1], params)
    (folder / WEIGHTS[0]).unlink()
    jax.tree.map(np.testing.assert_array_equal, interop.read(folder)[1], halved(params, np.float16))
    last = shard(folder, tensors, f"{WEIGHTS[0]}.index.json")
    jax.tree.map(np.testing.assert_array_equal, interop.read(folder)[1], params)
    last.write_bytes(last.read_bytes()[:-1])
    assert refusal(interop.read, folder).startswith(f"{str(last)!r} cannot be read: ")
    last.unlink()
    assert refusal(interop.read, folder) == f"{str(last)!r} is not a file"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"_class_name": "VQModel"}, "_class_name is 'VQModel' in {}; accepted: 'AutoencoderKL'"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu' in {}; accepted: 'silu', 'swish'"),
        ({"out_channels": 3}, "out_channels is 3 in {}; accepted: 2"),
        ({"shift_factor": 0.1159}, "shift_factor is 0.1159 in {}; accepted: None, 0.0"),
        ({"latents_mean": [0.0]}, "latents_mean is [0.0] in {}; accepted: None"),
        ({"latents_std": [1.0]}, "latents_std is [1.0] in {}; accepted: None"),
        ({"use_quant_conv": "yes"}, "use_quant_conv is 'yes' in {}; accepted: True, False"),
        ({"scaling_factor": 0}, "scaling_factor is 0 in {}; accepted: a number above 0"),
        ({"scaling_factor": None}, "scaling_factor is None in {}"),
        ({"scaling_factor": float("nan")}, "scaling_factor is nan in {}"),
        ({"latent_channels": 0}, "latent_channels is 0 in {}; accepted: whole numbers above 0"),
        ({"layers_per_block": "1"}, "layers_per_block is '1' in {}; accepted: whole numbers above 0"),
        ({"norm_num_groups": True}, "norm_num_groups is True in {}"),
        ({"norm_num_groups": 3}, "norm_num_groups is 3 in {}; accepted: a divisor of (8, 12)"),
        ({"block_out_channels": 8}, "block_out_channels is 8 in {}; accepted: 'a list of widths'"),
        ({"block_out_channels": []}, "block_out_channels is [] in {}"),
        ({"block_out_channels": [8, 12.0]}, "block_out_channels is 12.0 in {}; accepted: whole numbers above 0"),
        ({"block_out_channels": [8]}, "down_block_types is ['DownEncoderBlock2D', 'DownEncoderBlock2D'] in {}"),
        (
            {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
            "down_block_types is ['DownEncoderBlock2D', 'AttnDownEncoderBlock2D'] in {}; accepted: "
            "DownEncoderBlock2D for each of block_out_channels",
        ),
        ({"up_block_types": "UpDecoderBlock2D"}, "up_block_types is 'UpDecoderBlock2D' in {}; accepted: UpDecoder"),
        ({"magic": 1}, "magic is 1 in {}, but this project does not support this field"),
    ],
)
def test_what_is_not_ours(fields, said):
    message = refusal(interop.to_module, json.loads(json.dumps(FIELDS | fields)), "config.json")
    assert message.startswith(said.format("'config.json'"))


def test_what_diffusers_does_not_have():
    message = refusal(interop.to_fields, NET.clone(norm_epsilon=1e-5), 1.0)
    assert message == "norm_epsilon is 1e-05; diffusers' AutoencoderKL only has 1e-06"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({NAME: None}, f"{{}} has no tensor {NAME!r}"),
        ({"extra": np.zeros(1, np.float32)}, "{} has a tensor 'extra'"),
        ({NAME: np.zeros((8, 12, 3), np.float32)}, f"tensor {NAME!r} in {{}} has shape (8, 12, 3); accepted: (8, 12"),
        ({NAME: np.zeros((8, 12, 3, 3))}, f"tensor {NAME!r} in {{}} is float64; accepted: float32"),
        ({QUERY: np.zeros((12, 12, 1), np.float32)}, f"tensor {QUERY!r} in {{}} has shape (12, 12, 1); accepted: (12,"),
    ],
)
def test_refused_tensors(folder, tensors, change, said):
    save_file({name: value for name, value in (tensors | change).items() if value is not None}, folder / WEIGHTS[0])
    assert refusal(interop.read, folder).startswith(said.format(repr(str(folder / WEIGHTS[0]))))


def test_refused_folders(folder, tmp_path):
    path = folder / WEIGHTS[0]
    path.write_bytes(path.read_bytes()[:-10])
    assert refusal(interop.read, folder).startswith(f"{str(path)!r} cannot be read: ")
    path.unlink()
    assert refusal(interop.read, folder).startswith(f"{str(folder)!r} has no weights; accepted: {WEIGHTS[0]} or ")
    (folder / "config.json").write_text("{")
    assert "is not valid JSON" in refusal(interop.read, folder)
    assert "config.json' cannot be read" in refusal(interop.read, tmp_path / "nothing")


# Against diffusers.

AGAINST = "diffusers' `AutoencoderKL`, PyTorch"
NARROW = {
    "three levels": {"block_out_channels": (16, 24, 32), "layers_per_block": 2},
    "one level, other channels": {"block_out_channels": (16,), "in_channels": 1, "out_channels": 1},
    "no attention, no quant_conv": {
        "block_out_channels": (16, 8),
        "latent_channels": 3,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}


def their_autoencoder(**fields):
    """An `AutoencoderKL` with random parameters, large enough that attention is not nearly uniform."""
    why = "diffusers and PyTorch are not installed (pip install -e '.[peers]')"
    torch = pytest.importorskip("torch", reason=why)
    diffusers = pytest.importorskip("diffusers", reason=why)
    torch.manual_seed(0)
    levels = len(fields["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    net = diffusers.AutoencoderKL(**{"norm_num_groups": 8, **blocks, **fields})
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim == 1:  # those that start at zero or one
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif ".to_q." in name or ".to_k." in name:
                parameter.mul_(2)
    return net.eval()


def largest(found, expected):
    """The largest difference relative to the largest value."""
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


def compare(measure, name, net, params, theirs, pictures):
    """Mean and log-variance of the pictures, and the pictures of other latents."""
    import torch

    encode, decode = (
        jax.jit(
            lambda params, x, method=method: net.apply({"params": params}, x, method=method),
            compiler_options=run_once_options(),
        )
        for method in ("encode", "decode")
    )
    mean, log_variance = encode(params, pictures)
    latents = np.random.default_rng(1).standard_normal(mean.shape).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(to_torch(pictures)).latent_dist
        decoded = theirs.decode(to_torch(latents)).sample
    for what, found, expected in (
        ("mean", mean, posterior.mean),
        ("log-variance", log_variance, posterior.logvar),
        ("decoded pictures", decode(params, latents), decoded),
    ):
        measure(f"{what}, {name}", AGAINST, largest(found, to_numpy(expected)), 3e-5, "relative")


def random_pictures(height, width, channels=3, count=2):
    return np.random.default_rng(0).uniform(-1, 1, (count, height, width, channels)).astype(np.float32)


@pytest.mark.peers
@pytest.mark.parametrize("name", NARROW)
def test_narrow_autoencoders(measure, tmp_path, name):
    theirs, what = their_autoencoder(**NARROW[name]), "narrow autoencoders"
    theirs.save_pretrained(tmp_path / "theirs")
    net, params, factor = interop.read(tmp_path / "theirs")
    compare(measure, what, net, params, theirs, random_pictures(24, 32, net.channels))

    written = tmp_path / "again"
    interop.write(written, net, params, factor)
    before, after = (load_file(folder / WEIGHTS[0]) for folder in (tmp_path / "theirs", written))
    assert before.keys() == after.keys()
    different = [tensor for tensor, value in before.items() if value.tobytes() != after[tensor].tobytes()]
    measure(f"tensors that differ after reading and writing, {what}", "their bytes", len(different), 0)
    opened = type(theirs).from_pretrained(written).state_dict()
    assert_same({k: v.numpy() for k, v in opened.items()}, {k: v.numpy() for k, v in theirs.state_dict().items()})


@pytest.mark.peers
def test_gradients(measure):
    """The function is the sum of the squares of mean, log-variance and the pictures decoded from the mean."""
    theirs, name = their_autoencoder(**NARROW["three levels"]), "narrow autoencoder"
    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    net, _ = interop.to_module(json.loads(json.dumps(dict(theirs.config))))
    params, pictures = interop.to_params("theirs", tensors, net), random_pictures(16, 24)

    def loss(params, pictures):
        mean, log_variance = net.apply({"params": params}, pictures, method="encode")
        decoded = net.apply({"params": params}, mean, method="decode")
        return sum(jnp.sum(x**2) for x in (mean, log_variance, decoded))

    gradients, by_pictures = jax.jit(jax.grad(loss, (0, 1)), compiler_options=run_once_options())(params, pictures)
    x = to_torch(pictures).requires_grad_()
    posterior = theirs.encode(x).latent_dist
    sum((y**2).sum() for y in (posterior.mean, posterior.logvar, theirs.decode(posterior.mean).sample)).backward()
    measure(
        f"gradient with respect to pictures, {name}", AGAINST, largest(by_pictures, to_numpy(x.grad)), 5e-5, "relative"
    )
    found = interop.to_tensors(gradients, net)
    for parameter_name, parameter in theirs.named_parameters():
        # A key's bias moves every logit of a row alike: its gradient is rounding.
        if not parameter_name.endswith("to_k.bias"):
            error = largest(found[parameter_name], parameter.grad.numpy())
            measure(f"gradient with respect to each parameter, {name}", AGAINST, error, 1e-4, "relative")


@pytest.mark.peers
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}, {"safe_serialization": False}])
def test_half_precision_as_diffusers_saves_it(tmp_path, options):
    theirs = their_autoencoder(**NARROW["three levels"]).half()
    theirs.save_pretrained(tmp_path / "theirs", variant="fp16", **options)
    assert ("max_shard_size" in options) == any(tmp_path.glob("theirs/*.index.fp16.json"))
    net, params, _ = interop.read(tmp_path / "theirs")
    expected = {name: value.float().numpy() for name, value in theirs.state_dict().items()}
    assert_same(interop.to_tensors(params, net), expected)


@pytest.mark.peers
def test_stable_diffusions_autoencoder(measure):
    fields = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
    theirs = their_autoencoder(**fields)
    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    net = Autoencoder()
    params = interop.to_params("theirs", tensors, net)
    compare(measure, "Stable Diffusion's autoencoder", net, params, theirs, random_pictures(64, 64, count=1))
