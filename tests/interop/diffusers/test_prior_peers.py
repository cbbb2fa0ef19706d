"""DALL-E 2's prior, the condition of its decoder, and its sampling, against diffusers'."""

import importlib
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from theirs import relative, their_network

from ddpm_jax import config as config_lib
from ddpm_jax.diffusion.tables import spaced_timesteps
from ddpm_jax.interop.diffusers import embedding_condition, prior
from ddpm_jax.interop.diffusers import scheduler as scheduler_lib
from ddpm_jax.interop.diffusers.fields import WEIGHTS
from ddpm_jax.runtime import parallel

WHY = "diffusers and PyTorch are not installed (pip install -e '.[peers]')"
torch = pytest.importorskip("torch", reason=WHY)
diffusers = pytest.importorskip("diffusers", reason=WHY)
pytestmark = pytest.mark.peers

NARROW = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 3, "embedding_dim": 24, "num_embeddings": 9}
PRIORS = {
    "defaults": {},
    "layer norms": {"norm_in_type": "layer", "embedding_proj_norm_type": "layer"},
    "other widths": {"time_embed_dim": 40, "embedding_proj_dim": 20, "time_embed_act_fn": "gelu"},
    "tokens as they are": {"encoder_hid_proj_type": None, "clip_embed_dim": 24, "time_embed_act_fn": "mish"},
}
MASK = np.array([[1] * 9, [1] * 4 + [0] * 5, [0] * 9], bool)


def texts(net, widths):
    rng = np.random.default_rng(0)
    tokens = widths.embedding if net.project_tokens else net.width
    x, tokens, vector, weights = (
        rng.standard_normal((3, *shape)).astype(np.float32)
        for shape in ((widths.embedding,), (net.num_tokens, tokens), (widths.vector,), (widths.embedding,))
    )
    return x, np.array([0, 17, 999]), {"tokens": tokens, "vector": vector, "tokens_mask": MASK}, weights


def call(theirs, x, t, cond):
    arguments = (torch.tensor(cond[name]) for name in ("vector", "tokens", "tokens_mask"))
    return theirs(x, torch.tensor(t), *arguments).predicted_image_embedding


@pytest.mark.parametrize("name", PRIORS)
def test_priors(measure, tmp_path, name):
    theirs = their_network(NARROW | PRIORS[name], "PriorTransformer")
    with torch.no_grad():
        for parameter in (theirs.positional_embedding, theirs.prd_embedding, theirs.clip_mean, theirs.clip_std):
            parameter.copy_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    net, params, statistics = prior.read(tmp_path / "theirs")
    _, widths = prior.read_module(tmp_path / "theirs")
    x, t, cond, weights = texts(net, widths)

    @partial(jax.jit, compiler_options=parallel.run_once_options())
    def ours(params, x):
        y, vjp = jax.vjp(lambda params, x: net.apply({"params": params}, x[:, None, None], t, cond), params, x)
        return y[:, 0, 0], *vjp(jnp.asarray(weights)[:, None, None])

    y, params_gradient, x_gradient = ours(params, x)
    their_x = torch.tensor(x).requires_grad_()
    their_y = call(theirs, their_x, t, cond)
    their_y.backward(torch.tensor(weights))
    against = "diffusers' `PriorTransformer`, PyTorch"
    measure("output of narrow priors", against, relative(y, their_y.detach().numpy()), 1e-6, "relative")
    error = relative(x_gradient, their_x.grad.numpy())
    measure("gradient with respect to the embedding, narrow priors", against, error, 3e-6, "relative")
    gradients = prior.to_tensors(params_gradient, statistics)
    for parameter_name, parameter in theirs.named_parameters():
        # The statistics have no gradient, and a key's bias moves every logit of a row alike.
        if parameter.grad is not None and not parameter_name.endswith("to_k.bias"):
            error = relative(gradients[parameter_name], parameter.grad.numpy())
            measure("gradient with respect to each parameter, narrow priors", against, error, 1e-5, "relative")

    with torch.no_grad():
        expected = theirs.post_process_latents(their_y).numpy()
    np.testing.assert_allclose(y * statistics.std + statistics.mean, expected, atol=1e-5)

    prior.write(tmp_path / "ours", net, params, statistics)
    before, after = (load_file(tmp_path / folder / WEIGHTS[0]) for folder in ("theirs", "ours"))
    assert before.keys() == after.keys()
    different = [tensor for tensor, value in before.items() if value.tobytes() != after[tensor].tobytes()]
    measure("tensors that differ after reading and writing: narrow priors", "their bytes", len(different), 0)
    fields = {field for field in theirs.config if field[0] != "_"}
    assert fields == json.loads((tmp_path / "ours/config.json").read_text()).keys() - {"_class_name"}
    opened = diffusers.PriorTransformer.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(call(opened, torch.tensor(x), t, cond), their_y, rtol=0, atol=0)


def test_karlo_s_prior_has_these_tensors():
    """The full size, without allocating it."""
    with torch.device("meta"):
        theirs = diffusers.PriorTransformer()
    expected = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert prior.tensor_shapes(*prior.to_module(json.loads(theirs.to_json_string()))) == expected
    assert sum(value.numel() for value in theirs.parameters()) == 1_022_030_080


@pytest.mark.parametrize("guided", [False, True])
def test_condition_of_the_decoder(measure, tmp_path, guided):
    module = importlib.import_module("diffusers.pipelines.deprecated.unclip.text_proj")
    torch.manual_seed(0)
    theirs = module.UnCLIPTextProjModel(
        clip_extra_context_tokens=3, clip_embeddings_dim=12, time_embed_dim=20, cross_attention_dim=10
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    net, params = embedding_condition.read(tmp_path / "theirs")
    rng = np.random.default_rng(0)
    images, vector, tokens = (rng.standard_normal(s).astype(np.float32) for s in ((4, 12), (4, 12), (4, 7, 12)))
    dropped = jnp.arange(4) < 2  # the first half, as they do it
    cond = {"tokens": tokens, "vector": vector}
    found = net.apply({"params": params}, images, cond, dropped if guided else None)
    with torch.no_grad():
        their_tokens, their_vector = theirs(
            image_embeddings=torch.tensor(images[2:] if guided else images),
            prompt_embeds=torch.tensor(vector),
            text_encoder_hidden_states=torch.tensor(tokens),
            do_classifier_free_guidance=guided,
        )
    what, against = "condition of the decoder", "diffusers' `UnCLIPTextProjModel`, PyTorch"
    for ours, expected in ((found["tokens"], their_tokens), (found["vector"], their_vector)):
        measure(what, against, relative(ours, expected.numpy()), 1e-6, "relative")
    embedding_condition.write(tmp_path / "ours", net, params)
    before, after = (load_file(tmp_path / folder / WEIGHTS[0]) for folder in ("theirs", "ours"))
    assert {name: value.tobytes() for name, value in before.items()} == {
        name: value.tobytes() for name, value in after.items()
    }
    module.UnCLIPTextProjModel.from_pretrained(tmp_path / "ours")


# Sampling.

SCHEDULERS = {
    "the prior's": {"prediction_type": "sample", "clip_sample_range": 5.0},
    "the decoder's": {"variance_type": "learned_range"},
    "not clipped": {"clip_sample": False, "prediction_type": "sample"},
    "fixed variance of eps": {},
}


def smooth_network(x, t, learned):
    predicted = 6 * np.tanh(x * (0.3 + t / 2000)) + 0.1
    return np.concatenate([predicted, np.sin(3 * x + t)], axis=1) if learned else predicted


@pytest.mark.parametrize("steps", [20, 25, 7])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_runs_of_unclip_s_scheduler(measure, monkeypatch, name, steps):
    """Whole runs from the same noise, as diffusers' pipeline does them; ours in a NumPy loop over the table."""
    theirs, config = diffusers.UnCLIPScheduler(**SCHEDULERS[name]), config_lib.default_config()
    assert scheduler_lib.read(config, json.loads(theirs.to_json_string()), "scheduler_config.json") == []
    config.sample.num_steps = steps
    theirs.betas = torch.tensor(config_lib.make_betas_from(config))  # float64: rounding of theirs is not compared
    theirs.alphas, theirs.one = 1 - theirs.betas, torch.tensor(1.0, dtype=torch.float64)
    theirs.alphas_cumprod = torch.cumprod(theirs.alphas, 0)
    theirs.set_timesteps(steps)
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 3, 4, 4)), rng.standard_normal((steps, 2, 3, 4, 4))
    draw, learned = iter(noise), config.diffusion.variance == "learned"

    module = "diffusers.schedulers.scheduling_unclip"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: torch.tensor(next(draw)))
    expected, following = torch.tensor(x), [*theirs.timesteps[1:].tolist(), None]
    for t, before in zip(theirs.timesteps.tolist(), following, strict=True):
        output = torch.tensor(smooth_network(expected.numpy(), t, learned))
        expected = theirs.step(output, t, expected, prev_timestep=before).prev_sample
    output = config_lib.parameterization(config)
    schedule = config_lib.make_schedule_from(config)
    table = config_lib.sampling_steps(config).table(schedule, output.variance, output.prediction)
    np.testing.assert_array_equal(table.t, theirs.timesteps)
    for i, t in enumerate(table.t):
        predicted = smooth_network(x, int(t), learned)
        predicted, fraction = predicted[:, :3], (predicted[:, 3:] + 1) / 2 if learned else 0.0
        x_0 = predicted if output.prediction == "x_0" else (x - table.s[i] * predicted) / table.a[i]
        x_0 = np.clip(x_0, -output.clip_range, output.clip_range) if output.clip else x_0
        log_variance = fraction * table.log_variance_max[i] + (1 - fraction) * table.log_variance_min[i]
        x = table.next[i, 0] * x + table.next[i, 2] * x_0
        x = x + np.sqrt(table.noise_scale[i] * np.exp(log_variance)) * noise[i]
    what = "whole runs of 7, 20 and 25 steps: x_0 and eps, learned variance, clip range of 5"
    measure(what, "diffusers' `UnCLIPScheduler`", relative(x, expected.numpy()), 1e-6, "relative")


def test_unclip_s_timesteps():
    """A timestep at an exact half may be rounded either way; there are no other differences."""
    theirs, schedule = diffusers.UnCLIPScheduler(), config_lib.make_schedule_from(config_lib.default_config())
    for steps in range(2, 1001):
        theirs.set_timesteps(steps)
        ours = spaced_timesteps(schedule, steps)
        different = ours != theirs.timesteps.numpy()
        exact = np.arange(steps - 1, -1, -1) * 999 / (steps - 1)
        np.testing.assert_allclose(exact[different] % 1, 0.5, atol=1e-9)
