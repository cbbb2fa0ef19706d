"""Comparison with diffusers and PyTorch: all variants of the network, and whole sampling runs with each scheduler."""

import importlib
import json
import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from their_configs import DEFAULT, NARROW_SUPER_RESOLUTION, NETWORKS, SCHEDULERS, network
from theirs import relative, their_network, to_numpy, to_torch
from tiny import of_classes

from ddpm_jax import config as config_lib
from ddpm_jax.diffusion import samplers
from ddpm_jax.interop import workdirs
from ddpm_jax.interop.diffusers import folder as folder_lib
from ddpm_jax.interop.diffusers import scheduler as scheduler_lib
from ddpm_jax.interop.diffusers import unet as unet_lib
from ddpm_jax.pipeline import load
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.errors import UserError

WHY = "diffusers and PyTorch are not installed (pip install -e '.[peers]')"
torch = pytest.importorskip("torch", reason=WHY)
diffusers = pytest.importorskip("diffusers", reason=WHY)
pytestmark = pytest.mark.peers
UNET = f"unet/{folder_lib.WEIGHTS[0]}"


def save(net, folder, scheduler=None):
    scheduler = diffusers.DDPMScheduler() if scheduler is None else scheduler
    diffusers.DDPMPipeline(net, scheduler).save_pretrained(folder)
    return folder


def written(config):
    """A config as in a JSON file, without the metadata of its writer."""
    return {name: value for name, value in json.loads(json.dumps(dict(config))).items() if not name.startswith("_")}


def compare(measure, name, theirs, folder):
    """Checks outputs, gradients and the export of the network in `folder`."""
    described, params = folder_lib.read(folder)
    net = config_lib.make_model(described.config, of_classes(described.num_classes)).net
    size, rng = described.config.data, np.random.default_rng(0)
    shape = (2, size.height, size.width, size.channels)
    x, weights = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    t, labels = np.array([3, 811]), np.array([0, described.num_classes - 1])
    cond, their_labels = (
        ({"label": labels}, {"class_labels": torch.tensor(labels)}) if described.num_classes else ({}, {})
    )

    @partial(jax.jit, compiler_options=parallel.run_once_options())
    def ours(params, x):
        y, vjp = jax.vjp(lambda params, x: net.apply({"params": params}, x, t, cond), params, x)
        return y, *vjp(jnp.asarray(weights))

    y, params_gradient, x_gradient = ours(params, x)
    their_x = to_torch(x).requires_grad_()
    their_y = theirs(their_x, torch.tensor(t), **their_labels).sample
    their_y.backward(to_torch(weights))
    against = "diffusers' `UNet2DModel`, PyTorch"
    measure(f"output, {name}", against, relative(y, to_numpy(their_y)), 1e-5, "relative")
    error = relative(x_gradient, to_numpy(their_x.grad))
    measure(f"gradient with respect to x, {name}", against, error, 1e-5, "relative")
    gradients = unet_lib.to_tensors(params_gradient, len(net.widths))
    largest = max(float(torch.linalg.norm(p.grad)) for p in theirs.parameters() if p.grad is not None)
    for parameter_name, parameter in theirs.named_parameters():
        expected = parameter.grad.numpy()
        # Some are rounding alone: a key's bias moves every logit of a row alike, and a norm undoes a constant.
        if np.linalg.norm(expected) > 1e-6 * largest:
            error = relative(gradients[parameter_name], expected)
            measure(f"gradient with respect to each parameter, {name}", against, error, 1e-4, "relative")

    again = folder.parent / "again"
    assert folder_lib.write(again, described.config, net, params) == []
    before, after = load_file(folder / UNET), load_file(again / UNET)
    assert before.keys() == after.keys()
    different = [tensor for tensor, value in before.items() if value.tobytes() != after[tensor].tobytes()]
    measure(f"tensors that differ after import and export, {name}", "their bytes", len(different), 0)
    opened = diffusers.DDPMPipeline.from_pretrained(again)
    with torch.no_grad():
        found = opened.unet.eval()(to_torch(x), torch.tensor(t), **their_labels).sample
    torch.testing.assert_close(found, their_y, rtol=0, atol=0)
    return opened


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(measure, name, tmp_path):
    theirs = their_network(network(name))
    opened = compare(measure, name, theirs, save(theirs, tmp_path / "theirs"))
    assert written(opened.unet.config) == written(theirs.config)
    assert written(opened.scheduler.config) == written(diffusers.DDPMScheduler().config)


@pytest.mark.slow
def test_super_resolution(measure):
    """A narrow version of Karlo's: an image is concatenated to the input."""
    theirs = their_network(NARROW_SUPER_RESOLUTION)
    config = config_lib.default_config()
    unet_lib.read(config, dict(theirs.config), "config.json", image_channels=3)
    net = config_lib.make_network(config)
    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    params = unet_lib.to_params("x", tensors, config, image_channels=3)
    rng = np.random.default_rng(0)
    x, image, weights = rng.standard_normal((3, 2, 8, 8, 3)).astype(np.float32)
    t = np.array([3, 811])

    def ours(params, x):
        return net.apply({"params": params}, x, t, {"image": image})

    y, vjp = jax.vjp(ours, params, x)
    params_gradient, x_gradient = vjp(jnp.asarray(weights))
    their_x = to_torch(x).requires_grad_()
    their_y = theirs(torch.cat([their_x, to_torch(image)], dim=1), torch.tensor(t)).sample
    their_y.backward(to_torch(weights))
    against = "diffusers' `UNet2DModel`, PyTorch"
    measure("output, narrow super-resolution", against, relative(y, to_numpy(their_y)), 1e-5, "relative")
    error = relative(x_gradient, to_numpy(their_x.grad))
    measure("gradient with respect to x, narrow super-resolution", against, error, 1e-5, "relative")
    gradients = unet_lib.to_tensors(params_gradient, len(net.widths))
    for name, parameter in theirs.named_parameters():
        error = relative(gradients[name], parameter.grad.numpy())
        measure("gradient with respect to each parameter, narrow super-resolution", against, error, 5e-5, "relative")


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_sampled_by_command(call, tmp_path, name):
    source, workdir = save(their_network(network(name)), tmp_path / "theirs"), tmp_path / "run"
    status, output = call("--mode=import", f"--source={source}", f"--workdir={workdir}", config=None)
    assert status == 0, output
    flags = ("--mode=sample", "--num_images=1", "--num_steps=2", "--output=npz", f"--out={tmp_path / 'images.npz'}")
    status, output = call(*flags, f"--workdir={workdir}", config=None)
    assert status == 0, output
    size = network(name)["sample_size"]
    sides = (size, size) if isinstance(size, int) else size
    assert np.load(tmp_path / "images.npz")["image"].shape == (1, *sides, network(name)["in_channels"])


def drawn(seed):
    """A network with random options, all supported by diffusers."""
    rng = random.Random(seed)
    levels = rng.choice([1, 2, 3])
    down, up = [], []
    for _ in range(levels):
        attention = rng.random() < 0.4
        down.append("AttnDownBlock2D" if attention else rng.choice(["DownBlock2D", "ResnetDownsampleBlock2D"]))
        up.append("AttnUpBlock2D" if attention else rng.choice(["UpBlock2D", "ResnetUpsampleBlock2D"]))
    if rng.random() < 0.1:
        down[0], up[0] = "SkipDownBlock2D", "SkipUpBlock2D"
    channels, time = rng.choice([1, 2, 3, 4]), rng.choice(["positional", "positional", "learned", "fourier"])
    return {
        "sample_size": rng.choice([8, [4, 8], (12, 8)]),
        "in_channels": channels,
        "out_channels": channels,
        "center_input_sample": rng.random() < 0.3,
        "time_embedding_type": time,
        "num_train_timesteps": 1000 if time == "learned" else None,
        "freq_shift": rng.choice([0, 1]),
        "flip_sin_to_cos": rng.random() < 0.5,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "block_out_channels": [rng.choice([8, 12, 16, 20]) for _ in range(levels)],
        "layers_per_block": rng.choice([1, 2]),
        "downsample_padding": rng.choice([0, 1]),
        "downsample_type": rng.choice(["conv", "resnet"]),
        "upsample_type": rng.choice(["conv", "resnet"]),
        "dropout": rng.choice([0.0, 0.1]),
        "act_fn": rng.choice(["silu", "swish", "gelu", "mish", "relu"]),
        "attention_head_dim": rng.choice([None, 3, 4, 8]),
        "norm_num_groups": rng.choice([1, 2, 4]),
        "attn_norm_num_groups": rng.choice([None, 1, 2]),
        "norm_eps": rng.choice([1e-6, 1e-5, 1e-2]),
        "resnet_time_scale_shift": rng.choice(["default", "scale_shift"]),
        "add_attention": rng.random() < 0.7,
        "num_class_embeds": rng.choice([None, None, 3]),
        "mid_block_scale_factor": rng.choice([1, 1, 1, 1, 2**0.5]),
    }


def compare_outputs(measure, theirs, folder):
    described, params = folder_lib.read(folder)
    data = described.config.data
    net = config_lib.make_model(described.config, of_classes(described.num_classes)).net
    x = np.random.default_rng(0).standard_normal((2, data.height, data.width, data.channels)).astype(np.float32)
    t, labels = np.array([3, 811]), np.array([0, 2])
    cond, their_labels = ({"label": labels}, {"class_labels": torch.tensor(labels)}) if net.num_classes else ({}, {})
    ours = jax.jit(net.apply, compiler_options=parallel.run_once_options())({"params": params}, x, t, cond)
    with torch.no_grad():
        expected = theirs(to_torch(x), torch.tensor(t), **their_labels).sample
    what, against = "output, networks drawn at random", "diffusers' `UNet2DModel`, PyTorch"
    measure(what, against, relative(ours, to_numpy(expected)), 1e-4, "relative")


@pytest.mark.slow
def test_ten_networks_drawn_at_random(measure, tmp_path):
    """Each agrees with diffusers, or is refused with the name of a field."""
    refused = []
    for seed in range(10):
        theirs = their_network(drawn(seed))
        folder = save(theirs, tmp_path / f"{seed}/theirs")
        try:
            folder_lib.read(folder)
        except UserError as error:
            refused.append(str(error))
        else:
            compare_outputs(measure, theirs, folder)
    assert len(refused) <= 5
    lacking = ("time_embedding_type is 'fourier'", "SkipDownBlock2D", "mid_block_scale_factor")
    assert all(any(name in text for name in lacking) for text in refused), refused


# Sampling.


def smooth_network(x, t):
    return np.tanh(x * (0.3 + t / 2000)) + 0.1


def in_float64(scheduler, config):
    """Replaces their float32 schedule, so that its rounding does not matter."""
    betas = torch.tensor(config_lib.make_betas_from(config))
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    if "set_alpha_to_one" in scheduler.config:
        first = scheduler.alphas_cumprod[0]
        scheduler.final_alpha_cumprod = torch.ones_like(first) if scheduler.config.set_alpha_to_one else first
    return scheduler


def replay(table, x, output, noise):
    """Runs a table in a NumPy loop, for a network that predicts eps or v."""
    kept, past = np.zeros_like(x), [np.zeros_like(x)] * 3
    for i, t in enumerate(table.t):
        predicted = smooth_network(x, t)
        if output.prediction == "v":
            x_0 = table.a[i] * x - table.s[i] * predicted
        else:
            x_0 = (x - table.s[i] * predicted) / table.a[i]
        x_0 = np.clip(x_0, -1, 1) if output.clip else x_0
        images = [x, kept, x_0, *past]
        past = [table.remembered[i, 0] * x + table.remembered[i, 1] * x_0, *past[:2]]
        x, kept = (sum(map(np.multiply, factors, images)) for factors in (table.next[i], table.kept[i]))
        variance = table.noise_scale[i] * np.exp(table.log_variance_min[i]) + table.noise_variance[i]
        x = x + np.sqrt(variance) * noise[i]
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
def test_runs_of_schedulers(measure, monkeypatch, name):
    """A whole run from the same noise, with a network that is a function of x and t; 20 steps."""
    kind, fields, sampler = SCHEDULERS[name]
    theirs = getattr(diffusers, kind)(**fields)
    config = config_lib.default_config()
    scheduler_lib.read(config, json.loads(theirs.to_json_string()), "scheduler_config.json")
    assert config.sample.sampler == sampler
    config.sample.num_steps = 20
    if not config.diffusion.zero_terminal_snr:
        in_float64(theirs, config)
    theirs.set_timesteps(20)
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 3, 4, 4)), rng.standard_normal((40, 2, 3, 4, 4))
    draw = iter(noise)
    module = importlib.import_module(type(theirs).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.tensor(next(draw)), raising=False)
    expected = torch.tensor(x) * theirs.init_noise_sigma
    options = {"use_clipped_model_output": True} if kind == "DDIMScheduler" else {}
    for t in theirs.timesteps:
        seen = theirs.scale_model_input(expected, t)
        output = torch.tensor(smooth_network(seen.numpy(), float(t)))
        expected = theirs.step(output, t, expected, **options).prev_sample
    steps, output = config_lib.sampling_steps(config), config_lib.parameterization(config)
    table = steps.table(config_lib.make_schedule_from(config), output.variance, output.prediction)
    found = replay(table, steps.start_scale(table) * x, output, noise)
    # Their noise levels are float32 in the solvers.
    what = "whole runs of DDIM, PNDM, DPM-Solver, UniPC, Euler and Heun schedulers; all spacings, levels and ends"
    measure(what, "diffusers' schedulers", relative(found, expected.numpy()), 1e-5, "relative")


def test_their_sigmoid_schedule(measure):
    theirs, config = diffusers.DDPMScheduler(beta_schedule="sigmoid"), config_lib.default_config()
    scheduler_lib.read(config, json.loads(theirs.to_json_string()), "scheduler_config.json")
    errors = np.abs(config_lib.make_betas_from(config) / theirs.betas.numpy() - 1)
    measure("betas: sigmoid", "diffusers' float32 arrays", errors.max(), 3e-5, "relative")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_written_back(name):
    """The same class and fields if the run samples with that method; otherwise an equivalent scheduler."""
    kind, fields, _ = SCHEDULERS[name]
    theirs, config = getattr(diffusers, kind)(**fields), config_lib.default_config()
    scheduler_lib.read(config, json.loads(theirs.to_json_string()), "scheduler_config.json")
    back, notes = scheduler_lib.to_fields(config)
    assert notes == []
    again = getattr(diffusers, back["_class_name"])(**{k: v for k, v in back.items() if k != "_class_name"})
    if kind.startswith("Euler") and fields.get("timestep_spacing") == "leading" and not config.sample.levels:
        assert type(again).__name__ == ("DDPMScheduler" if "Ancestral" in kind else "DDIMScheduler")
        np.testing.assert_array_equal(again.betas, theirs.betas)
    else:
        assert written(again.config) == written(theirs.config)


@pytest.mark.slow
def test_run_of_an_imported_network_with_classes(measure, tmp_path):
    """20 steps of Stable Diffusion's DDIM from the same noise, by the run's defaults; ours in `sample`'s scan."""
    kind, fields, _ = SCHEDULERS["ddim of Stable Diffusion"]
    theirs = their_network(DEFAULT | {"num_class_embeds": 5})
    scheduler = getattr(diffusers, kind)(**fields)
    run = load(workdirs.import_weights(str(save(theirs, tmp_path / "theirs", scheduler)), tmp_path / "run"))
    x, labels = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32), np.array([1, 4])
    ours = samplers.sample(
        run.schedule,
        run.model.model_fn(run.params, {"label": jnp.asarray(labels)}),
        jax.random.key(0),
        x.shape,
        x_t=jnp.asarray(x),
        **run.request(num_steps=20).keywords(),
    )
    in_float64(scheduler, run.config).set_timesteps(20)
    expected = to_torch(x)
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = theirs(expected, t, class_labels=torch.tensor(labels)).sample
            expected = scheduler.step(output.double(), int(t), expected.double()).prev_sample.float()
    what = "ddim to the first timestep, 20 steps of an imported network with classes"
    measure(what, "PyTorch with diffusers' scheduler", relative(ours, to_numpy(expected)), 1e-4, "relative")
