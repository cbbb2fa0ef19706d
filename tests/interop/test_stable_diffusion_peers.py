"""Stable Diffusion's exports, single files, LoRAs and inpainting, against diffusers, transformers and PEFT."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import single_files
import stable_diffusions
from clips import VOCAB_SIZE, write_tokenizer
from safetensors.numpy import load_file, save_file
from theirs import to_numpy, to_torch

from ddpm_jax.diffusion import editing
from ddpm_jax.diffusion.samplers import sample
from ddpm_jax.interop import lora, workdirs
from ddpm_jax.interop.diffusers import adapters
from ddpm_jax.models import lora as models_lora
from ddpm_jax.pipeline import load

WHY = "diffusers and PyTorch are not installed (pip install -e '.[peers]')"
torch = pytest.importorskip("torch", reason=WHY)
diffusers = pytest.importorskip("diffusers", reason=WHY)
pytest.importorskip("peft", reason=WHY)
pytestmark = pytest.mark.peers

WEIGHTS = "diffusion_pytorch_model.safetensors"
OPTIONS = {
    "prompt": ["A red Bicycle!", "the sea"],
    "negative_prompt": ["blue", ""],
    "num_inference_steps": 3,
    "output_type": "latent",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "theirs"
    stable_diffusions.save(folder)
    return folder


@pytest.fixture(scope="module")
def imported(saved, tmp_path_factory):
    return workdirs.import_weights(str(saved), tmp_path_factory.mktemp("imported") / "run")


def opened(folder):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(pipeline):
    noise = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0))
    return pipeline(**OPTIONS, latents=noise).images.numpy()


def parts_of(pipeline):
    """The values of both parts' tensors; not all releases of transformers begin names with "text_model."."""
    return {
        part: {
            name.removeprefix("text_model."): value.numpy()
            for name, value in getattr(pipeline, part).state_dict().items()
        }
        for part in lora.PARTS
    }


def differences(found, expected):
    """The largest of every tensor."""
    for part, tensors in parts_of(expected).items():
        others = parts_of(found)[part]
        assert others.keys() == tensors.keys()
        yield from (np.abs(others[name] - value).max() for name, value in tensors.items())


def test_export_is_the_pipeline(measure, saved, imported, tmp_path):
    again = workdirs.export_weights(load(imported), tmp_path / "again")
    before, after = opened(saved), opened(again)
    different = []
    for name, file in {"unet": WEIGHTS, "vae": WEIGHTS, "text_encoder": "model.safetensors"}.items():
        tensors, others = (
            {tensor.removeprefix("text_model."): value for tensor, value in load_file(path).items()}
            for path in (saved / name / file, again / name / file)
        )
        assert tensors.keys() == others.keys()
        different += [tensor for tensor, value in tensors.items() if value.tobytes() != others[tensor].tobytes()]
    measure("tensors that differ after import and export, Stable Diffusion", "their bytes", len(different), 0)
    np.testing.assert_array_equal(latents_of(after), latents_of(before))
    texts = ["Hello, World! caf\u00e9 42", "", "don't " * 30]
    for tokenizer in (after.tokenizer, before.tokenizer):
        ids = tokenizer(texts, padding="max_length", truncation=True).input_ids
        np.testing.assert_array_equal(ids, load(imported).condition.texts.tokenizer.encode(texts).ids)


def test_checkpoint(tmp_path):
    """A .ckpt of PyTorch, with what training leaves in it, is the run of the .safetensors file."""
    shapes = single_files.unet_shapes(), single_files.autoencoder_shapes()
    tensors = single_files.checkpoint(
        *map(single_files.random, (*shapes, single_files.text_shapes(tokens=VOCAB_SIZE, length=20)))
    )
    state = {name: torch.tensor(value) for name, value in tensors.items()}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "x.ckpt")
    save_file(tensors, tmp_path / "x.safetensors")
    tokens = write_tokenizer(tmp_path / "tokens", max_length=20)
    runs = [
        load(workdirs.import_weights(str(tmp_path / f"x.{kind}"), tmp_path / kind, tokenizer=tokens))
        for kind in ("ckpt", "safetensors")
    ]
    for a, b in zip(*(jax.tree.leaves(run.params) for run in runs), strict=True):
        np.testing.assert_array_equal(a, b)
    assert runs[0].dataset["fingerprint"] == runs[1].dataset["fingerprint"]


def make_lora(pipeline, seed):
    """It changes all projections of attention, some filters, and the text encoder's layers."""
    rng = np.random.default_rng(seed)
    chosen = {"unet": ("to_q", "to_k", "to_out.0", "proj_in", "conv1"), "text_encoder": ("q_proj", "fc1")}
    parts = {}
    for part, endings in chosen.items():
        parts[part] = {}
        for name, value in getattr(pipeline, part).state_dict().items():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and module.endswith(endings):
                out, *inner = value.shape
                sizes = ((3, *inner), (out, 3, *[1] * (len(inner) - 1)))
                factors = (0.1 * rng.standard_normal(size).astype(np.float32) for size in sizes)
                parts[part][module] = lora.Update(*factors, 2.0)
    return lora.Lora(**parts)


def test_two_loras(measure, saved, imported, tmp_path):
    pipeline, files = opened(saved), {"a": 0.7, "b": 0.3}
    for seed, name in enumerate(files):
        lora.write(tmp_path / f"{name}.safetensors", make_lora(pipeline, seed))
    before = parts_of(pipeline)
    for name in files:
        pipeline.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    pipeline.set_adapters(list(files), adapter_weights=list(files.values()))
    pipeline.fuse_lora(adapter_names=list(files))
    pipeline.unload_lora_weights()
    run = load(imported, loras=[(tmp_path / f"{name}.safetensors", weight) for name, weight in files.items()])
    found = opened(workdirs.export_weights(run, tmp_path / "found"))
    for part, tensors in parts_of(found).items():
        moved = [name for name, value in tensors.items() if np.any(value != before[part][name])]
        assert len(moved) == len(getattr(make_lora(found, 0), part))
    what = "weights with two LoRAs of 0.7 and 0.3"
    measure(what, "diffusers and PEFT", max(differences(found, pipeline)), 1e-6)
    expected, ours = latents_of(pipeline), latents_of(found)
    measure(f"latents, {what}", "diffusers and PEFT", np.abs(ours - expected).max() / np.abs(expected).max(), 1e-5)


def test_trained_adapters(measure, saved, imported, tmp_path):
    """A run's adapters, loaded with `load_lora_weights`, give the run's network."""
    run, rng = load(imported), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: models_lora.init(run.params, 4, jax.random.key(0)))
    trained = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), shapes)
    lora.write(tmp_path / "x.safetensors", adapters.to_lora(trained, 0.5, len(run.net.widths)))
    pipeline = opened(saved)
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    run = dataclasses.replace(run, params=models_lora.merge(run.params, trained, 0.5))
    found = opened(workdirs.export_weights(run, tmp_path / "found"))
    measure("weights with a run's adapters", "diffusers and PEFT", max(differences(found, pipeline)), 1e-6)


DDIM = {**stable_diffusions.SCHEDULE, "set_alpha_to_one": False, "clip_sample": False}
INPAINTERS = {"ddim": ("DDIMScheduler", DDIM), "dpmpp_2m": ("DPMSolverMultistepScheduler", stable_diffusions.SCHEDULE)}


@pytest.mark.parametrize("sampler", INPAINTERS)
def test_inpainting(measure, tmp_path, sampler):
    """With an ordinary network and the known part's noise fixed: 20 steps from the same latents, with guidance."""
    pipeline = stable_diffusions.save(tmp_path / "theirs", *INPAINTERS[sampler])
    run = load(workdirs.import_weights(str(tmp_path / "theirs"), tmp_path / "run"))
    assert run.config.sample.sampler == sampler
    decoder, rng = run.model.decoder, np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 4, 4, 3), np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    mask = np.zeros((2, 16, 16, 1), bool)
    mask[0, 2:10, 4:14] = mask[1, :6] = True
    x_0 = np.asarray(decoder.encode(pictures))
    noise = rng.standard_normal(x_0.shape).astype(np.float32)
    prompts, negative = OPTIONS["prompt"], OPTIONS["negative_prompt"]

    theirs = diffusers.StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    their_latents = theirs(
        prompt=prompts,
        negative_prompt=negative,
        image=to_torch(x_0),  # latents are taken as they are, and pictures are drawn from their posterior
        masked_image_latents=to_torch(x_0),
        mask_image=to_torch(mask.astype(np.float32)),
        latents=to_torch(noise),
        num_inference_steps=20,
        guidance_scale=7.5,
        output_type="latent",
    ).images
    with torch.no_grad():  # as the pipeline itself makes pictures of them
        decoded = theirs.vae.decode(their_latents / theirs.vae.config.scaling_factor).sample
    their_pictures = np.round(theirs.image_processor.postprocess(decoded, output_type="np") * 255)
    their_latents = to_numpy(their_latents)

    request = run.request(prompts=prompts, negative_prompts=negative, num_steps=20, guidance_scale=7.5)
    cond, null = request.condition.of_images(np.arange(2)), request.condition.null(2)
    latents = editing.inpaint(
        run.schedule,
        run.model.model_fn(run.params, cond, null, request.guidance),
        jax.random.key(0),
        jnp.asarray(x_0),
        decoder.encode_mask(mask),
        known_noise=jnp.asarray(noise),
        **request.keywords(),
    )
    what, against = "inpainting by ddim and dpmpp_2m, narrow", "diffusers' `StableDiffusionInpaintPipeline`"
    error = np.abs(np.asarray(latents) - their_latents).max() / np.abs(their_latents).max()
    measure(f"latents, {what}", against, error, 1e-5, "relative")
    measure(f"pictures, {what}", against, np.abs(decoder.decode(latents) - their_pictures).max(), 1, "of 255")


def save_inpainting(folder, sampler):
    """A pipeline whose network is given the masked picture."""
    pipeline = stable_diffusions.save(folder.with_name(f"{folder.name}_parts"), *INPAINTERS[sampler], in_channels=9)
    pipeline = diffusers.StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.mark.parametrize("sampler", INPAINTERS)
def test_inpainting_network(measure, monkeypatch, tmp_path, sampler):
    """20 steps from the same latents, with guidance; the masked picture becomes the mean, from which they draw."""
    theirs = save_inpainting(tmp_path / "theirs", sampler)
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint
    mean = functools.partial(module.retrieve_latents, sample_mode="argmax")
    monkeypatch.setattr(module, "retrieve_latents", mean)
    run = load(workdirs.import_weights(str(tmp_path / "theirs"), tmp_path / "run"))
    assert (run.config.model.masked_picture, run.config.sample.sampler) == (True, sampler)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 4, 4, 3), np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    mask = np.zeros((2, 16, 16, 1), bool)
    mask[0, 3:10, 5:14] = mask[1, :7] = True  # not aligned with the latents
    noise = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    prompts, negative = OPTIONS["prompt"], OPTIONS["negative_prompt"]
    their_latents = theirs(
        prompt=prompts,
        negative_prompt=negative,
        image=to_torch(pictures.astype(np.float32) / 255),
        mask_image=to_torch(mask.astype(np.float32)),
        latents=to_torch(noise),
        num_inference_steps=20,
        guidance_scale=7.5,
        output_type="latent",
    ).images
    with torch.no_grad():
        decoded = theirs.vae.decode(their_latents / theirs.vae.config.scaling_factor).sample
    their_pictures = np.round(theirs.image_processor.postprocess(decoded, output_type="np") * 255)
    their_latents = to_numpy(their_latents)

    request = run.request(prompts=prompts, negative_prompts=negative, num_steps=20, guidance_scale=7.5)
    given = run.model.given
    values = given.of_pictures(run.model.decoder, pictures, mask)

    def latents_with(values):
        cond, null = request.condition.of_images(np.arange(2)), request.condition.null(2)
        picture = given.of_images(values, 0, np.arange(2))
        model_fn = run.model.model_fn(run.params, cond | picture, null | given.null(picture), request.guidance)
        return sample(run.schedule, model_fn, jax.random.key(0), noise.shape, x_t=noise, **request.keywords())

    latents = latents_with(values)
    scale = np.abs(their_latents).max()
    assert np.abs(latents_with(np.zeros_like(values)) - latents).max() > 0.01 * scale
    what, against = "inpainting network by ddim and dpmpp_2m, narrow", "diffusers' `StableDiffusionInpaintPipeline`"
    measure(f"latents, {what}", against, np.abs(np.asarray(latents) - their_latents).max() / scale, 1e-5, "relative")
    decoded = run.model.decoder.decode(latents)
    measure(f"pictures, {what}", against, np.abs(decoded - their_pictures).max(), 1, "of 255")


def test_export_of_an_inpainting_network(measure, tmp_path):
    before = save_inpainting(tmp_path / "theirs", "ddim")
    run = load(workdirs.import_weights(str(tmp_path / "theirs"), tmp_path / "run"))
    again = workdirs.export_weights(run, tmp_path / "again")
    tensors, others = (load_file(folder / "unet" / WEIGHTS) for folder in (tmp_path / "theirs", again))
    assert tensors.keys() == others.keys()
    different = [name for name, value in tensors.items() if value.tobytes() != others[name].tobytes()]
    measure("tensors that differ after import and export, inpainting network", "their bytes", len(different), 0)
    after = diffusers.StableDiffusionInpaintPipeline.from_pretrained(again)
    after.set_progress_bar_config(disable=True)
    noise, picture = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0)), torch.full((1, 3, 16, 16), 0.25)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :9] = 1
    found, expected = (
        pipeline(**OPTIONS, latents=noise, image=picture, mask_image=mask, generator=torch.manual_seed(1)).images
        for pipeline in (after, before)
    )
    np.testing.assert_array_equal(found, expected)


def test_adapters_of_both_parts(measure, saved, imported, tmp_path):
    """A run that trained adapters of the text encoder, too: its LoRA file, its folder, and what it samples itself."""
    options = {"rank": 2, "alpha": 3.0, "text_encoder": True}
    stable_diffusions.fine_tune(tmp_path / "run", imported, tmp_path / "images.npz", **options)
    run = load(tmp_path / "run")
    workdirs.export_adapters(run, tmp_path / "run", tmp_path / "x.safetensors")
    before = latents_of(opened(saved))
    pipeline = opened(saved)
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    expected = latents_of(pipeline)
    assert np.abs(expected - before).max() > 0.01 * np.abs(before).max()

    noise = to_numpy(torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0)))
    said = {"prompts": OPTIONS["prompt"], "negative_prompts": OPTIONS["negative_prompt"]}
    request = run.request(**said, num_steps=OPTIONS["num_inference_steps"], guidance_scale=7.5)
    cond, null = request.condition.of_images(np.arange(2)), request.condition.null(2)
    model_fn = run.model.model_fn(run.params, cond, null, request.guidance)
    ours = sample(run.schedule, model_fn, jax.random.key(0), noise.shape, x_t=jnp.asarray(noise), **request.keywords())
    exported = latents_of(opened(workdirs.export_weights(run, tmp_path / "found")))
    of_run = "latents of a run with adapters for network and text encoder, against its exported LoRA file"
    of_folder = "latents of the run's exported folder, against its LoRA file"
    for what, found in ((of_run, to_torch(ours).numpy()), (of_folder, exported)):
        error = np.abs(found - expected).max() / np.abs(expected).max()
        measure(what, "diffusers and PEFT", error, 1e-5, "relative")
