"""Against diffusers and PyTorch: the network, each sampling step, whole trajectories, and training."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from ddpm_jax import parallel
from ddpm_jax.diffusion import gaussian, samplers
from ddpm_jax.diffusion.losses import training_loss
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.interop import diffusers as interop
from ddpm_jax.interop import workdirs
from ddpm_jax.run import load
from ddpm_jax.training.state import update_ema

WHY = "diffusers and PyTorch are not installed (pip install -e '.[peers]')"
torch = pytest.importorskip("torch", reason=WHY)
diffusers = pytest.importorskip("diffusers", reason=WHY)
their_ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm", reason=WHY)
pytestmark = pytest.mark.peers

GOOGLE = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "time_embedding_type": "positional",
}
CIFAR10 = GOOGLE | {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
# The 256x256 networks' levels at a quarter of their width, on small images.
LARGE = GOOGLE | {
    "norm_num_groups": 8,
    "sample_size": 64,
    "block_out_channels": (32, 32, 64, 64, 128, 128),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
SMALL = GOOGLE | {
    "sample_size": 8,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
SCALE_SHIFT = SMALL | {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4, "attention_head_dim": 8}
SCALE_SHIFT |= {"block_out_channels": (32, 32), "add_attention": True}
NETWORKS = {
    "google/ddpm-cifar10-32": (CIFAR10, 35_746_307),
    "256x256 type": (LARGE, None),
    "scale shift": (SCALE_SHIFT, None),
}


def their_network(config):
    """With every parameter random, those too that start at zero or one."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**config)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def to_torch(x):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def to_numpy(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def relative(found, expected):
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


def import_pipeline(net, folder, **scheduler):
    pipeline = diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(**{"variance_type": "fixed_large", **scheduler}))
    pipeline.save_pretrained(folder / "theirs")
    return load(workdirs.import_weights(str(folder / "theirs"), folder / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_network_gradients_and_round_trip(name, tmp_path):
    config, count = NETWORKS[name]
    theirs = their_network(config)
    run = import_pipeline(theirs, tmp_path)
    if count:
        assert sum(leaf.size for leaf in jax.tree.leaves(run.params)) == count
    size = config["sample_size"]
    rng = np.random.default_rng(0)
    x, weights = (rng.standard_normal((2, size, size, 3)).astype(np.float32) for _ in range(2))
    t = np.array([3, 811])

    @partial(jax.jit, compiler_options=parallel.run_once_options())
    def ours(params, x):
        y, vjp = jax.vjp(lambda params, x: run.net.apply({"params": params}, x, t), params, x)
        return y, *vjp(jnp.asarray(weights))

    y, params_gradient, x_gradient = ours(run.params, x)
    their_x = to_torch(x).requires_grad_()
    their_y = theirs(their_x, torch.tensor(t)).sample
    their_y.backward(to_torch(weights))
    assert relative(y, to_numpy(their_y)) < 1e-5
    assert relative(x_gradient, to_numpy(their_x.grad)) < 1e-5
    gradients = interop.to_tensors(params_gradient, len(config["block_out_channels"]))
    for parameter_name, parameter in theirs.named_parameters():
        # A key's bias moves every logit of a row alike: its gradient is rounding.
        if not parameter_name.endswith("to_k.bias"):
            assert relative(gradients[parameter_name], parameter.grad.numpy()) < 1e-4, parameter_name

    again = workdirs.export_weights(run, tmp_path / "again")
    before, after = (load_file(folder / "unet" / interop.WEIGHTS[0]) for folder in (tmp_path / "theirs", again))
    assert before.keys() == after.keys()
    for tensor_name, value in before.items():
        assert value.tobytes() == after[tensor_name].tobytes(), tensor_name
    opened = diffusers.DDPMPipeline.from_pretrained(again)
    with torch.no_grad():
        torch.testing.assert_close(opened.unet.eval()(to_torch(x), torch.tensor(t)).sample, their_y, rtol=0, atol=0)


def test_pickled_weights_of_a_whole_network(tmp_path):
    theirs = their_network(SMALL)
    run = import_pipeline(theirs, tmp_path)
    unet = tmp_path / "theirs/unet"
    (unet / interop.WEIGHTS[0]).unlink()
    torch.save(theirs.state_dict(), unet / interop.WEIGHTS[1])
    again = load(workdirs.import_weights(str(tmp_path / "theirs"), tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, run.params, again.params)


# Sampling.

SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned",
}


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_schedules(beta_schedule):
    theirs = diffusers.DDPMScheduler(beta_schedule=beta_schedule)
    ours = make_schedule(SCHEDULES[beta_schedule], 1000)
    # Theirs is computed in float32, a product of a thousand factors among it.
    np.testing.assert_allclose(ours.betas, theirs.betas, rtol=3e-5)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1000, 50, 7])
@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_steps_of_the_ddpm_scheduler(monkeypatch, prediction_type, variance_type, num_steps, spacing):
    """Steps all over a sub-sequence, from the same x, network output and noise."""
    scheduler = diffusers.DDPMScheduler(
        variance_type=variance_type, prediction_type=prediction_type, timestep_spacing=spacing
    )
    # Rounding of their float32 schedule is not what is compared.
    scheduler.alphas = 1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas_cumprod, scheduler.one = torch.cumprod(scheduler.alphas, 0), torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.numpy()
    chosen = np.unique(np.linspace(0, len(timesteps) - 1, 40).astype(int))
    channels = 6 if variance_type == "learned_range" else 3
    rng = np.random.default_rng(num_steps)
    x = rng.standard_normal((len(chosen), 4, 4, 3)).astype(np.float32)
    output = rng.standard_normal((len(chosen), 4, 4, channels)).astype(np.float32)
    output[..., 3:] = np.tanh(output[..., 3:])
    noise = rng.standard_normal((1, 4, 4, 3)).astype(np.float32)
    drawn = []
    monkeypatch.setattr(their_ddpm, "randn_tensor", lambda *_, **__: to_torch(drawn[-1]))

    table = samplers.ddpm_table(make_schedule("linear", 1000), timesteps, VARIANCES[variance_type])
    raw, interpolation = output[..., :3], output[..., 3:]
    row = {name: np.asarray(getattr(table, name))[chosen].reshape(-1, 1, 1, 1) for name in table.__dataclass_fields__}
    x_0 = gaussian.to_x_0(PREDICTIONS[prediction_type], *map(jnp.float32, (raw, x, row["a"], row["s"])))
    mean = row["x_0_coef"] * np.clip(x_0, -1, 1) + row["x_coef"] * x
    log_variance = row["log_variance_max"]
    if variance_type == "learned_range":
        fraction = (interpolation + 1) / 2
        log_variance = fraction * row["log_variance_max"] + (1 - fraction) * row["log_variance_min"]
    for i, index in enumerate(chosen):
        t = int(timesteps[index])
        # The paper's last step adds no noise; theirs does where "trailing" ends above t = 0.
        drawn.append(noise * (index < len(timesteps) - 1))
        expected = scheduler.step(to_torch(output[i : i + 1]), t, to_torch(x[i : i + 1])).prev_sample
        std = np.exp(0.5 * np.broadcast_to(log_variance, x.shape)[i])
        ours = mean[i] + row["noise"][i] * std * noise[0]
        np.testing.assert_allclose(ours, to_numpy(expected)[0], atol=1e-5, err_msg=f"t = {t}")


def test_trajectory_of_an_imported_network(tmp_path, monkeypatch):
    """50 steps with the same noise, ours in the scan of `sample`, theirs in a loop around the scheduler."""
    theirs = their_network(SMALL)
    run = import_pipeline(theirs, tmp_path)
    shape, key = (2, 8, 8, 3), jax.random.key(0)
    ours = samplers.sample(run.schedule, run.model_fn, key, shape, num_steps=50, variance="fixed_large")

    @jax.jit
    def noise(index):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), index))(jnp.arange(shape[0]))
        return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(keys)

    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    scheduler.set_timesteps(timesteps=samplers.spaced_timesteps(1000, 50).tolist())
    x, drawn = to_torch(noise(0)), []
    monkeypatch.setattr(their_ddpm, "randn_tensor", lambda *_, **__: to_torch(drawn[-1]))
    for index, t in enumerate(scheduler.timesteps):
        drawn.append(noise(index + 1))
        with torch.no_grad():
            x = scheduler.step(theirs(x, t).sample, int(t), x).prev_sample
    assert relative(ours, to_numpy(x)) < 1e-3


# Training.


def test_twenty_steps_of_training(tmp_path):
    """The same x_0, t, eps and weights: the loss and gradients of one step, then twenty of clipping, Adam and EMA."""
    theirs = their_network(SMALL)
    run = import_pipeline(theirs, tmp_path)
    rng = np.random.default_rng(0)
    x_0 = rng.uniform(-1, 1, (20, 8, 8, 8, 3)).astype(np.float32)
    eps = rng.standard_normal(x_0.shape).astype(np.float32)
    t = rng.integers(0, 1000, (20, 8)).astype(np.int32)
    abar = np.asarray(make_schedule("linear", 1000).alphas_cumprod)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    @jax.jit
    def step(params, ema, opt_state, x_0, t, eps, count):
        def loss(params):
            model_fn = partial(run.net.apply, {"params": params})
            return training_loss(run.schedule, model_fn, jax.random.key(0), x_0, t=t, noise=eps).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        return value, gradients, params, update_ema(ema, params, 0.9, count), opt_state

    parameters = list(theirs.parameters())
    adam = torch.optim.Adam(parameters, lr=1e-3)
    average = [p.detach().clone() for p in parameters]
    params, ema, opt_state = run.params, run.params, optimizer.init(run.params)
    for i in range(20):
        value, gradients, params, ema, opt_state = step(params, ema, opt_state, x_0[i], t[i], eps[i], i)
        a = abar[t[i]].reshape(-1, 1, 1, 1)
        x_t = to_torch(np.sqrt(a) * x_0[i] + np.sqrt(1 - a) * eps[i])
        loss = torch.mean((theirs(x_t, torch.tensor(t[i])).sample - to_torch(eps[i])) ** 2)
        adam.zero_grad()
        loss.backward()
        if i == 0:
            assert abs(float(value) / loss.item() - 1) < 1e-6
            found = interop.to_tensors(gradients, 2)
            for name, parameter in theirs.named_parameters():
                if not name.endswith("to_k.bias"):
                    assert relative(found[name], parameter.grad.numpy()) < 1e-4, name
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        with torch.no_grad():
            for mean, parameter in zip(average, parameters, strict=True):
                mean.copy_(parameter if i == 0 else 0.9 * mean + 0.1 * parameter)
        assert abs(float(value) / loss.item() - 1) < 1e-3, f"step {i}"
    found = interop.to_tensors(ema, 2)
    names = [name for name, _ in theirs.named_parameters()]
    ours, expected = (
        np.concatenate([np.ravel(value) for value in values])
        for values in ([found[name] for name in names], [mean.numpy() for mean in average])
    )
    assert relative(ours, expected) < 1e-3
