"""A step of fine-tuning a Stable Diffusion, beside PyTorch with diffusers and PEFT."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stable_diffusions
from theirs import relative, to_torch

from ddpm_jax import config as config_lib
from ddpm_jax.interop import workdirs
from ddpm_jax.interop.diffusers import adapters, unet_tensors
from ddpm_jax.models import lora
from ddpm_jax.pipeline import load
from ddpm_jax.runtime import parallel
from ddpm_jax.training.objectives import Diffusion

WHY = "diffusers, PEFT and PyTorch are not installed (pip install -e '.[peers]')"
torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("diffusers", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)
pytestmark = pytest.mark.peers

AGAINST = "PyTorch, diffusers and PEFT"
RANK, ALPHA = 4, 6.0
SCHEDULERS = {
    "eps": stable_diffusions.SCHEDULER,
    "v": {**stable_diffusions.SCHEDULER, "prediction_type": "v_prediction"},
}


@pytest.fixture(params=SCHEDULERS)
def both(request, tmp_path):
    """Their pipeline, its import, and what a step draws."""
    pipeline = stable_diffusions.save(tmp_path / "theirs", fields=SCHEDULERS[request.param])
    run = load(workdirs.import_weights(str(tmp_path / "theirs"), tmp_path / "run"))
    rng = np.random.default_rng(0)
    x_0, noise = rng.standard_normal((2, 3, 8, 8, 4)).astype(np.float32)
    states = rng.standard_normal((3, 20, 24)).astype(np.float32)
    examples = {"x_0": x_0, "noise": noise, "t": np.array([3, 500, 981]), "cond": {"tokens": states}}
    return pipeline, run, jax.tree.map(jnp.asarray, examples)


def their_loss(pipeline, examples):
    """As diffusers' training scripts have it; its gradients are left in the parameters."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    x_0, noise = (to_torch(examples[name]) for name in ("x_0", "noise"))
    t = torch.tensor(np.asarray(examples["t"]))
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(x_0, noise, t) if is_v else noise
    states = torch.tensor(np.asarray(examples["cond"]["tokens"]))
    found = pipeline.unet(scheduler.add_noise(x_0, noise, t), t, states).sample
    loss = torch.nn.functional.mse_loss(found, target)
    loss.backward()
    return loss.item()


def our_loss(objective, params, frozen, examples):
    """The loss and its gradients."""

    @partial(jax.jit, compiler_options=parallel.run_once_options())
    @jax.value_and_grad
    def step(params):
        return jnp.mean(objective.losses(params, frozen, examples, jax.random.key(0)))

    return step(params)


def objective_of(run, **options):
    assert run.config.diffusion.loss == "simple"
    return Diffusion(run.model, "uniform", config_lib.loss_options(run.config), **options)


def test_step_of_lora(measure, both):
    pipeline, run, examples = both
    scale, levels, rng = ALPHA / RANK, len(run.net.widths), np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: lora.init(run.params, RANK, jax.random.key(0)))
    trained = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), shapes)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipeline.unet.requires_grad_(False)
    pipeline.unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    theirs = {name: value for name, value in pipeline.unet.named_parameters() if value.requires_grad}
    updates = adapters.to_lora(trained, scale, levels).unet
    assert len(theirs) == 2 * len(updates)
    for module, update in updates.items():
        assert update.alpha == ALPHA
        theirs[f"{module}.lora_A.default.weight"].data = torch.tensor(update.down)
        theirs[f"{module}.lora_B.default.weight"].data = torch.tensor(update.up)
    expected = their_loss(pipeline, examples)
    objective = objective_of(run, lora_rank=RANK, lora_scale=scale)
    loss, gradients = our_loss(objective, trained, run.params, examples)
    what = "a step of LoRA, rank 4, narrow Stable Diffusion, eps and v"
    measure(f"loss, {what}", AGAINST, abs(float(loss) / expected - 1), 1e-6, "relative")
    for module, update in adapters.to_lora(gradients, scale, levels).unet.items():
        for name, found in {"A": update.down, "B": update.up}.items():
            error = relative(found, theirs[f"{module}.lora_{name}.default.weight"].grad.numpy())
            measure(f"gradient with respect to each factor, {what}", AGAINST, error, 2e-5, "relative")


def test_step_of_the_whole_network(measure, both):
    pipeline, run, examples = both
    expected = their_loss(pipeline, examples)
    loss, gradients = our_loss(objective_of(run), run.params, None, examples)
    what = "a step of the whole network, narrow Stable Diffusion, eps and v"
    measure(f"loss, {what}", "PyTorch and diffusers", abs(float(loss) / expected - 1), 1e-6, "relative")
    found = unet_tensors.to_tensors(gradients, len(run.net.widths))
    for name, parameter in pipeline.unet.named_parameters():
        error = relative(found[name], parameter.grad.numpy())
        measure(f"gradient with respect to each parameter, {what}", "PyTorch and diffusers", error, 2e-5, "relative")
