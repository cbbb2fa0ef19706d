"""Comparison with diffusers and PyTorch: the network, each sampling step, whole trajectories, and training."""

import importlib
from functools import partial

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from theirs import relative, their_network, to_numpy, to_torch

from ddpm_jax.diffusion import gaussian, samplers, tables
from ddpm_jax.diffusion.losses import training_loss
from ddpm_jax.diffusion.schedules import make_betas, make_schedule, rescale_to_zero_terminal_snr
from ddpm_jax.diffusion.tables import Levels
from ddpm_jax.interop import workdirs
from ddpm_jax.interop.diffusers import unet as unet_lib
from ddpm_jax.interop.diffusers.folder import WEIGHTS
from ddpm_jax.pipeline import load
from ddpm_jax.runtime import parallel
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


def import_pipeline(net, folder, **scheduler):
    pipeline = diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(**{"variance_type": "fixed_large", **scheduler}))
    pipeline.save_pretrained(folder / "theirs")
    return load(workdirs.import_weights(str(folder / "theirs"), folder / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_network_gradients_and_round_trip(measure, name, tmp_path):
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
    against = "diffusers' `UNet2DModel`, PyTorch"
    measure(f"output, {name} network", against, relative(y, to_numpy(their_y)), 1e-5, "relative")
    error = relative(x_gradient, to_numpy(their_x.grad))
    measure(f"gradient with respect to x, {name} network", against, error, 1e-5, "relative")
    gradients = unet_lib.to_tensors(params_gradient, len(config["block_out_channels"]))
    for parameter_name, parameter in theirs.named_parameters():
        # A key's bias moves every logit of a row alike: its gradient is rounding.
        if not parameter_name.endswith("to_k.bias"):
            error = relative(gradients[parameter_name], parameter.grad.numpy())
            measure(f"gradient with respect to each parameter, {name} network", against, error, 1e-4, "relative")

    again = workdirs.export_weights(run, tmp_path / "again")
    before, after = (load_file(folder / "unet" / WEIGHTS[0]) for folder in (tmp_path / "theirs", again))
    assert before.keys() == after.keys()
    different = [tensor for tensor, value in before.items() if value.tobytes() != after[tensor].tobytes()]
    measure(f"tensors that differ after import and export, {name} network", "their bytes", len(different), 0)
    opened = diffusers.DDPMPipeline.from_pretrained(again)
    with torch.no_grad():
        torch.testing.assert_close(opened.unet.eval()(to_torch(x), torch.tensor(t)).sample, their_y, rtol=0, atol=0)


def test_pickled_weights_of_a_whole_network(tmp_path):
    theirs = their_network(SMALL)
    run = import_pipeline(theirs, tmp_path)
    unet = tmp_path / "theirs/unet"
    (unet / WEIGHTS[0]).unlink()
    torch.save(theirs.state_dict(), unet / WEIGHTS[1])
    again = load(workdirs.import_weights(str(tmp_path / "theirs"), tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, run.params, again.params)


# Sampling.

LINEAR = make_schedule("linear", 1000)
SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned",
}


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_schedules(measure, beta_schedule):
    theirs = diffusers.DDPMScheduler(beta_schedule=beta_schedule)
    ours = make_schedule(SCHEDULES[beta_schedule], 1000)
    # Theirs is computed in float32, a product of a thousand factors among it.
    errors = np.abs(ours.betas / theirs.betas.numpy() - 1)
    measure("betas: linear, quadratic, cosine", "diffusers' float32 arrays", errors.max(), 3e-5, "relative")
    errors = np.abs(ours.alphas_cumprod / theirs.alphas_cumprod.numpy() - 1)
    measure("abar: linear, quadratic, cosine", "diffusers' float32 arrays", errors.max(), 2e-4, "relative")


def test_zero_terminal_snr(measure):
    theirs = diffusers.DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ours = make_schedule(rescale_to_zero_terminal_snr(make_betas("linear", 1000)))
    errors = np.abs(ours.alphas_cumprod - theirs.alphas_cumprod.numpy())
    measure("abar, rescaled to a zero terminal SNR", "diffusers' float32 arrays", errors.max(), 1e-5)


def in_float64(scheduler):
    """Replaces their float32 schedule, so that its rounding does not matter."""
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


class Inputs:
    """The same x, network output and noise for both, at up to 40 steps spread over a subsequence."""

    def __init__(self, timesteps, seed, channels=3):
        self.chosen = np.unique(np.linspace(0, len(timesteps) - 1, 40).astype(int))
        rng = np.random.default_rng(seed)
        self.x = rng.standard_normal((len(self.chosen), 4, 4, 3)).astype(np.float32)
        self.output = rng.standard_normal((len(self.chosen), 4, 4, channels)).astype(np.float32)
        self.output[..., 3:] = np.tanh(self.output[..., 3:])
        self.noise = rng.standard_normal((4, 4, 3)).astype(np.float32)

    def ours(self, i, table, row, prediction):
        """The next x from the i-th input, for a row that only uses x and D."""
        raw, v, x = self.output[i, ..., :3], self.output[i, ..., 3:], self.x[i]
        x_0 = gaussian.to_x_0(prediction, *map(jnp.float32, (raw, x, table.a[row], table.s[row])))
        largest, smallest = table.log_variance_max[row], table.log_variance_min[row]
        log_variance = (v + 1) / 2 * largest + (1 - v) / 2 * smallest if v.size else largest
        std = np.sqrt(table.noise_scale[row] * np.exp(log_variance) + table.noise_variance[row])
        return table.next[row, tables.D] * np.clip(x_0, -1, 1) + table.next[row, tables.X] * x + std * self.noise


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1000, 50, 7])
@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_steps_of_the_ddpm_scheduler(measure, monkeypatch, prediction_type, variance_type, num_steps, spacing):
    scheduler = diffusers.DDPMScheduler(
        variance_type=variance_type, prediction_type=prediction_type, timestep_spacing=spacing
    )
    in_float64(scheduler).set_timesteps(num_steps)
    timesteps = scheduler.timesteps.numpy()
    inputs = Inputs(timesteps, num_steps, channels=6 if variance_type == "learned_range" else 3)
    drawn = []
    monkeypatch.setattr(their_ddpm, "randn_tensor", lambda *_, **__: to_torch(drawn[-1]))
    table = tables.ddpm(Levels.of(LINEAR, timesteps), VARIANCES[variance_type])
    for i, row in enumerate(inputs.chosen):
        # The paper's last step adds no noise; theirs does where "trailing" ends above t = 0.
        drawn.append(inputs.noise[None] * (row < len(timesteps) - 1))
        output, x = to_torch(inputs.output[i : i + 1]), to_torch(inputs.x[i : i + 1])
        expected = scheduler.step(output, int(timesteps[row]), x).prev_sample
        error = np.abs(inputs.ours(i, table, row, PREDICTIONS[prediction_type]) - to_numpy(expected)[0])
        what = "a step of ddpm; eps, x_0, v; all variances and spacings; 1000, 50, 7 steps"
        measure(what, "diffusers' `DDPMScheduler`", error.max(), 1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1000, 50, 7])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_steps_of_the_ddim_scheduler(measure, prediction_type, eta, num_steps, spacing):
    scheduler = in_float64(diffusers.DDIMScheduler(prediction_type=prediction_type, timestep_spacing=spacing))
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.numpy()
    inputs = Inputs(timesteps, num_steps)
    for i, row in enumerate(inputs.chosen):
        t = int(timesteps[row])
        # Theirs goes down by T / steps, not to the next of its timesteps, which "linspace" and a remainder tell apart.
        following = t - 1000 // num_steps
        table = tables.ddim(Levels.of(LINEAR, [t], following if following >= 0 else None), eta)
        output, x, noise = (to_torch(v[None]) for v in (inputs.output[i], inputs.x[i], inputs.noise))
        options = {"eta": eta, "use_clipped_model_output": True, "variance_noise": noise}
        expected = scheduler.step(output, t, x, **options).prev_sample
        error = np.abs(inputs.ours(i, table, 0, PREDICTIONS[prediction_type]) - to_numpy(expected)[0])
        what = "a step of ddim; eta 0, 0.5, 1; eps, x_0, v; all spacings; 1000, 50, 7 steps"
        measure(what, "diffusers' `DDIMScheduler`", error.max(), 1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1000, 50, 10, 3])
def test_spacings(spacing, num_steps):
    scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    np.testing.assert_array_equal(tables.spaced_timesteps(LINEAR, num_steps, spacing), scheduler.timesteps)


def replay(table, x, network, noise=None):
    """Runs a table in a NumPy loop, for a network that predicts eps."""
    kept, past = np.zeros_like(x), [np.zeros_like(x)] * 3
    for i, t in enumerate(table.t):
        x_0 = (x - table.s[i] * network(x, t)) / table.a[i]
        images = [x, kept, x_0, *past]
        past = [table.remembered[i, 0] * x + table.remembered[i, 1] * x_0, *past[:2]]
        x, kept = (sum(map(np.multiply, factors, images)) for factors in (table.next[i], table.kept[i]))
        if noise is not None:
            x = x + np.sqrt(table.noise_variance[i]) * noise[i]
    return x


def smooth_network(x, t):
    return np.tanh(x * (0.3 + t / 2000)) + 0.1


MULTISTEP = {
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}, {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "unipc of order 1": ("UniPCMultistepScheduler", {"solver_order": 1}, {"order": 1}),
    "unipc of order 2": ("UniPCMultistepScheduler", {"solver_order": 2}, {"order": 2}),
    "unipc of order 3": ("UniPCMultistepScheduler", {"solver_order": 3}, {"order": 3}),
}


@pytest.mark.parametrize("num_steps", [5, 20])
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_schedulers(measure, monkeypatch, name, num_steps):
    """A whole trajectory with the same network, a function of x and t, and the same noise."""
    kind, theirs, ours = MULTISTEP[name]
    scheduler = getattr(diffusers, kind)(timestep_spacing="linspace", final_sigmas_type="zero", **theirs)
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.numpy()
    rng = np.random.default_rng(num_steps)
    x, noise = rng.standard_normal((2, 3, 4, 4)), rng.standard_normal((num_steps, 2, 3, 4, 4))
    drawn = iter(noise)
    module = importlib.import_module(type(scheduler).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.tensor(next(drawn)), raising=False)
    expected = torch.tensor(x)
    for t in timesteps:
        output = torch.tensor(smooth_network(expected.numpy(), int(t)))
        expected = scheduler.step(output, int(t), expected).prev_sample
    table = tables.make_table(name.split(" ")[0], Levels.of(LINEAR, timesteps), **ours)
    error = relative(replay(table, x, smooth_network, noise), expected.numpy())
    # Their noise levels are float32.
    measure(f"{name}, 5 and 20 steps", f"diffusers' `{kind}`", error, 1e-5, "relative")


def test_heun_scheduler(measure):
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_schedule="linear", timestep_spacing="linspace", beta_start=1e-4, beta_end=0.02
    )
    scheduler.set_timesteps(12)
    # Theirs are fractional timesteps, of which only the noise level counts here.
    log_abar = np.append(-np.log1p(scheduler.sigmas[:-1:2].numpy().astype(np.float64) ** 2), 0.0)
    table = tables.heun(Levels(np.append(scheduler.timesteps[::2].numpy().astype(np.int32), -1), log_abar))
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
    expected = torch.tensor(x / table.a[0])  # theirs is x / a
    for i, t in enumerate(scheduler.timesteps):
        output = smooth_network(table.a[i] * expected.numpy(), table.t[i])
        expected = scheduler.step(torch.tensor(output), t, expected).prev_sample
    error = relative(replay(table, x, smooth_network), expected.numpy())
    measure("heun, 12 steps", "diffusers' `HeunDiscreteScheduler`", error, 1e-5, "relative")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_trajectory_of_an_imported_network(measure, tmp_path, monkeypatch, sampler):
    """50 steps with the same noise, ours in the scan of `sample`, theirs in a loop around the scheduler."""
    theirs = their_network(SMALL)
    run = import_pipeline(theirs, tmp_path)
    shape, key = (2, 8, 8, 3), jax.random.key(0)
    timesteps = tables.spaced_timesteps(LINEAR, 50, "leading")
    ours = samplers.sample(
        run.schedule, run.model_fn, key, shape, sampler=sampler, timesteps=timesteps, variance="fixed_large"
    )

    @jax.jit
    def noise(index):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), index))(jnp.arange(shape[0]))
        return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(keys)

    x, drawn = to_torch(noise(0)), []
    monkeypatch.setattr(their_ddpm, "randn_tensor", lambda *_, **__: to_torch(drawn[-1]))
    if sampler == "ddpm":
        scheduler, options = diffusers.DDPMScheduler(variance_type="fixed_large"), {}
    else:
        scheduler, options = diffusers.DDIMScheduler(set_alpha_to_one=True), {"use_clipped_model_output": True}
    scheduler.set_timesteps(50)
    np.testing.assert_array_equal(scheduler.timesteps, timesteps)
    for index, t in enumerate(scheduler.timesteps):
        drawn.append(noise(index + 1))
        with torch.no_grad():
            x = scheduler.step(theirs(x, t).sample, int(t), x, **options).prev_sample
    what, against = f"{sampler}, 50 steps of an imported network", "PyTorch with diffusers' scheduler"
    measure(what, against, relative(ours, to_numpy(x)), 1e-3, "relative")


# The golden numbers.


def numbers_of_pytorch():
    """PyTorch's values in golden.json."""
    numbers = {}
    for name, config, size in (("cifar10", CIFAR10, 32), ("small", SMALL, 8)):
        net = diffusers.UNet2DModel(**config).eval()
        values = golden.tensors({key: tuple(value.shape) for key, value in net.state_dict().items()})
        net.load_state_dict({key: torch.tensor(value) for key, value in values.items()})
        x, t = golden.inputs(size)
        with torch.no_grad():
            numbers[f"{name} network"] = golden.summary(to_numpy(net(to_torch(x), torch.tensor(t)).sample))
    scheduler = in_float64(diffusers.DDIMScheduler(set_alpha_to_one=True))
    scheduler.set_timesteps(20)
    x = to_torch(x)
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(net(x, t).sample, int(t), x, use_clipped_model_output=True).prev_sample
    return numbers | {"ddim trajectory": golden.summary(to_numpy(x))}


def test_golden_numbers(measure):
    for name, numbers in numbers_of_pytorch().items():
        errors = np.abs(np.array(numbers) - golden.NUMBERS[name])
        measure(f"golden numbers of the {name}", "the installed PyTorch's results", errors.max(), 1e-5)


# Training.


def test_twenty_steps_of_training(measure, tmp_path):
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
            error = abs(float(value) / loss.item() - 1)
            measure("loss of a step, same x_0, t, eps, weights", "PyTorch", error, 1e-6, "relative")
            found = unet_lib.to_tensors(gradients, 2)
            for name, parameter in theirs.named_parameters():
                if not name.endswith("to_k.bias"):
                    error = relative(found[name], parameter.grad.numpy())
                    measure("gradient of that loss with respect to each parameter", "PyTorch", error, 1e-4, "relative")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        with torch.no_grad():
            for mean, parameter in zip(average, parameters, strict=True):
                mean.copy_(parameter if i == 0 else 0.9 * mean + 0.1 * parameter)
        error = abs(float(value) / loss.item() - 1)
        measure("loss over 20 steps of clipping, Adam and EMA", "PyTorch", error, 1e-3, "relative")
    found = unet_lib.to_tensors(ema, 2)
    names = [name for name, _ in theirs.named_parameters()]
    ours, expected = (
        np.concatenate([np.ravel(value) for value in values])
        for values in ([found[name] for name in names], [mean.numpy() for mean in average])
    )
    measure("averaged weights after these 20 steps", "PyTorch", relative(ours, expected), 1e-3, "relative")
