"""Stable Diffusion's network against diffusers': narrow ones with every option, and 1.5 and 2.1 at full size."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from their_configs import CONDITION_NETWORKS, STABLE_DIFFUSION_1, STABLE_DIFFUSION_2, condition_network
from theirs import relative, their_network, to_numpy, to_torch

from ddpm_jax import config as config_lib
from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.interop.diffusers import unet_condition
from ddpm_jax.interop.diffusers.folder import WEIGHTS
from ddpm_jax.runtime import parallel

WHY = "diffusers and PyTorch are not installed (pip install -e '.[peers]')"
torch = pytest.importorskip("torch", reason=WHY)
diffusers = pytest.importorskip("diffusers", reason=WHY)
pytestmark = pytest.mark.peers

AGAINST = "diffusers' `UNet2DConditionModel`, PyTorch"


def read(fields):
    config = config_lib.default_config()
    if fields["out_channels"] == 6:
        config.diffusion.variance = "learned"
    layout = unet_condition.read(config, fields, "config.json")
    return config, config_lib.make_network(config), layout


def inputs(net, layout, batch, size, tokens):
    """Random x, t and cond."""
    x, _, cond = unet_condition.example(net, layout, tokens)
    rng = np.random.default_rng(0)

    def draw(array):
        if array.ndim == 1:
            return np.array([250, 17])[:batch]
        shape = size if array.ndim == 4 else array.shape[1:-1]
        return rng.standard_normal((batch, *shape, array.shape[-1])).astype(np.float32)

    cond = {name: draw(array) for name, array in cond.items()}
    if net.vector_embedding == "none":  # Karlo's decoder attends to its own tokens and to those of the text
        cond["tokens_mask"] = np.arange(tokens) < np.array([[tokens], [5]])[:batch]
    return draw(x), np.array([3, 811])[:batch], cond


def call(theirs, x, t, cond):
    """Their output; an image, if there is one, is concatenated to the latents' channels."""
    joined = torch.cat([x, to_torch(cond["image"])], dim=1) if "image" in cond else x
    others = {
        "class_labels": cond.get("level", cond.get("vector")),
        "attention_mask": cond.get("tokens_mask"),
    }
    others = {name: torch.tensor(value) for name, value in others.items() if value is not None}
    return theirs(joined, torch.tensor(t), torch.tensor(cond["tokens"]), **others).sample


@pytest.mark.slow
@pytest.mark.parametrize("name", CONDITION_NETWORKS)
def test_networks(measure, tmp_path, name):
    theirs = their_network(condition_network(name), "UNet2DConditionModel")
    theirs.save_pretrained(tmp_path / "theirs")
    config, net, layout = read(json.loads((tmp_path / "theirs/config.json").read_text()))
    tensors = load_file(tmp_path / "theirs" / WEIGHTS[0])
    params = unet_condition.to_params("x", tensors, net, layout)
    x, t, cond = inputs(net, layout, 2, layout.sample_size, 7)
    shape = (*x.shape[:3], x.shape[3] * (2 if net.learned_variance else 1))
    weights = np.random.default_rng(1).standard_normal(shape).astype(np.float32)

    @partial(jax.jit, compiler_options=parallel.run_once_options())
    def ours(params, x):
        y, vjp = jax.vjp(lambda params, x: net.apply({"params": params}, x, t, cond), params, x)
        return y, *vjp(jnp.asarray(weights))

    y, params_gradient, x_gradient = ours(params, x)
    their_x = to_torch(x).requires_grad_()
    their_y = call(theirs, their_x, t, cond)
    their_y.backward(to_torch(weights))
    measure(f"output, narrow network: {name}", AGAINST, relative(y, to_numpy(their_y)), 1e-5, "relative")
    error = relative(x_gradient, to_numpy(their_x.grad))
    measure(f"gradient with respect to x, narrow network: {name}", AGAINST, error, 1e-5, "relative")
    gradients = unet_condition.to_tensors(params_gradient, len(net.widths), layout.linear_projections)
    # A bias that all keys of a softmax share changes nothing, and its gradient is rounding.
    nothing = 1e-6 * max(parameter.grad.norm().item() for parameter in theirs.parameters())
    for parameter_name, parameter in theirs.named_parameters():
        if parameter.grad.norm().item() < nothing:
            assert parameter_name.endswith("k_proj.bias")
            assert np.linalg.norm(gradients[parameter_name]) < nothing
            continue
        error = relative(gradients[parameter_name], parameter.grad.numpy())
        measure(f"gradient with respect to each parameter, narrow network: {name}", AGAINST, error, 5e-5, "relative")

    again = unet_condition.to_tensors(params, len(net.widths), layout.linear_projections)
    assert again.keys() == tensors.keys()
    different = [tensor for tensor, value in tensors.items() if value.tobytes() != again[tensor].tobytes()]
    measure(f"tensors that differ after reading and writing: {name}", "their bytes", len(different), 0)
    fields = unet_condition.to_fields(config, net, layout)
    assert {field for field in theirs.config if field[0] != "_"} == fields.keys() - {"_class_name"}
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/config.json").write_text(json.dumps(fields))
    tensors_lib.write(tmp_path / "ours" / WEIGHTS[0], again, {"format": "pt"})
    opened = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(call(opened, to_torch(x), t, cond), their_y, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields"), [("1.5", STABLE_DIFFUSION_1), ("2.1", STABLE_DIFFUSION_2)])
def test_stable_diffusion(measure, name, fields):
    """The full size with random weights, on 8x8 latents."""
    _, net, layout = read(json.loads(json.dumps(fields)))
    x, t, cond = inputs(net, layout, 1, (8, 8), 77)
    theirs = their_network(fields, "UNet2DConditionModel")
    with torch.no_grad():
        expected = to_numpy(call(theirs, to_torch(x), t, cond))
    tensors = {tensor: value.numpy() for tensor, value in theirs.state_dict().items()}
    del theirs
    params = unet_condition.to_params("x", tensors, net, layout)
    tensors.clear()
    apply = jax.jit(net.apply, compiler_options=parallel.run_once_options())
    error = relative(apply({"params": params}, x, t, cond), expected)
    measure(f"output, Stable Diffusion {name} with random weights", AGAINST, error, 1e-5, "relative")


def test_inpainting_network_of_full_size():
    """Every tensor of the network of 1.5 that is given a masked picture, by name and shape."""
    fields = {**STABLE_DIFFUSION_1, "in_channels": 9}
    _, net, layout = read(fields)
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**fields).state_dict()
    assert {name: tuple(value.shape) for name, value in theirs.items()} == unet_condition.tensor_shapes(net, layout)
    assert sum(value.numel() for value in theirs.values()) == 859_535_364
