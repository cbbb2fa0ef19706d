"""What a run is and how it went, in a few lines of its page."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ddpm_jax import config as config_lib
from ddpm_jax.evaluation.comparison import describe
from ddpm_jax.report.elements import definitions, moment, size_of


def summary(
    config: Any,
    dataset: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
) -> str:
    diffusion, train = config.diffusion, config.train
    started: Mapping[str, Any] = next((event for event in reversed(history) if event["event"] == "started"), {})
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    facts: dict[str, Any] = {}
    if dataset.get("shape"):
        classes = f", {len(dataset['class_names'])} classes" if dataset.get("class_names") else ""
        held_out = f", {len(dataset['held_out'])} numbers held out" if dataset.get("held_out") else ""
        found = f"{dataset.get('num_images', 0):,} images of {size_of(dataset)}"
        facts["Data"] = f"{describe(dataset)}: {found}{classes}{held_out}"
    size = f"{started['num_parameters']:,} parameters, " if "num_parameters" in started else ""
    facts["Network"] = f"{_network(config, size)}, {config.model.dtype}"
    if config.text.encoder == config_lib.TRAINED:
        facts["Text encoder"] = f"trained, width {config.text.width}, {config.text.num_layers} layers"
    elif config.text.encoder:
        facts["Text encoder"] = f"frozen, {config.text.encoder}"
    if train.objective == "diffusion":
        facts["Diffusion"] = (
            f"{diffusion.schedule} schedule of {diffusion.num_timesteps:,} timesteps, predicts {diffusion.prediction}, "
            f"variance {diffusion.variance}"
        )
    facts["Training"] = (
        f"{train.num_steps:,} steps of {train.batch_size} images, {config.optimizer.name} at "
        f"{config.optimizer.learning_rate:g}, average of decay {train.ema_decays[0]:g}"
    )
    if lines:
        last = lines[-1]
        losses = [line for line in lines if "loss" in line]  # evaluations have none
        if losses:
            facts["Loss"] = f"{losses[-1]['loss']:.4f} at step {losses[-1]['step']:,}"
        if speeds:
            middle = statistics.median(speeds)
            facts["Speed"] = f"{middle:,.0f} images/s, {middle / train.batch_size:.3g} steps/s (median)"
        memory = [line["peak_memory_gib"] for line in lines if "peak_memory_gib" in line]
        if memory:
            facts["Memory"] = f"{max(memory):.2f} GiB at the peak, on the first device or, on CPU, of the process"
        facts["Last update"] = moment(last["time"])
    facts["Devices"] = started.get("devices") or environment.get("devices", "")
    packages = environment.get("packages", {})
    facts["Versions"] = ", ".join(f"{name} {version}" for name, version in packages.items())
    facts["Source"] = environment.get("git_revision") or ""
    return definitions({name: value for name, value in facts.items() if value})


def _network(config: Any, size: str) -> str:
    """What the run trains; `size` is its number of parameters, in words."""
    if config.train.objective == "autoencoder":
        autoencoder = config.autoencoder
        return (
            f"Autoencoder of {size}{_comma_separated(autoencoder.level_channels)} channels by level, "
            f"{_blocks(autoencoder.num_res_blocks)}, {autoencoder.latent_channels} channels of latents"
        )
    if config.train.objective == "clip":
        clip = config.clip
        return (
            f"CLIP of {size}image encoder of width {clip.width} and {clip.num_layers} layers on patches of "
            f"{clip.patch_size}x{clip.patch_size}, embeddings of width {clip.projection}"
        )
    if config.prior.clip:
        return f"Transformer of {size}width {config.prior.width}, {config.prior.num_layers} layers"
    model = config.model
    widths = model.level_channels or [model.channels * multiplier for multiplier in model.channel_multipliers]
    blocks = f"{' '.join(map(str, model.level_res_blocks))} blocks" if model.level_res_blocks else ""
    kind = f"LoRA of rank {config.lora.rank}, {size}for a UNet of " if config.lora.rank else f"UNet of {size}"
    return f"{kind}{_comma_separated(widths)} channels by level, {blocks or _blocks(model.num_res_blocks)}"


def _comma_separated(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _blocks(count: int) -> str:
    return f"{count} block{'s' if count > 1 else ''} each"


def of_pipeline(runs: Sequence[Mapping[str, Any]]) -> str:
    """The stages of a pipeline, each of which has its own report."""
    names = [f"{run['workdir']}, step {run['step']:,}, makes {'x'.join(map(str, run['size']))}" for run in runs]
    return definitions({f"Stage {number}": name for number, name in enumerate(names, 1)})
