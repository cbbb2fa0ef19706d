"""Imports other projects' weights as workdirs, and exports workdirs' weights for other projects."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax import pipeline as pipeline_lib
from ddpm_jax.data.dataset import training_images
from ddpm_jax.interop import lora, plain, single_file, transformers
from ddpm_jax.interop.diffusers import adapters, deepfloyd, stable_diffusion, stages, unclip
from ddpm_jax.interop.diffusers import autoencoder as autoencoder_lib
from ddpm_jax.interop.diffusers import folder as diffusers_folder
from ddpm_jax.models.clip import CLIPTextEncoder
from ddpm_jax.run import Run, load_adapters
from ddpm_jax.runtime import workdir
from ddpm_jax.runtime.checkpoints import Checkpoints
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import new_folder
from ddpm_jax.sampling.decoder import Pixels
from ddpm_jax.text.tokenizers import Tokenizer
from ddpm_jax.training import autoencoders, clips

Tell = Callable[[str], None]

_TOKENIZER = "openai/clip-vit-large-patch14"  # on the hub
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def _silent(sentence: str) -> None:
    pass


def import_weights(
    source: str,
    path: str | Path,
    tell: Tell = _silent,
    *,
    tokenizer: str | Path | None = None,
    prediction: str | None = None,
) -> Path:
    """Creates a workdir for sampling, for evaluation, and as a start for training with --init_from.

    Args:
      source: a diffusers folder or its name on the Hugging Face hub, a .safetensors file from `export_weights`, or a
        Stable Diffusion 1.x or 2.x in a .safetensors or .ckpt file.
      path: the workdir; must not exist, or be empty.
      tell: called with each note on how the run samples differently from the source's program.
      tokenizer: for a Stable Diffusion in a file: a folder with CLIP's vocab.json and merges.txt; None: from the hub.
      prediction: for a Stable Diffusion in a file: "eps" or "v", which files of 2.x do not specify; None: "eps" for
        1.x.

    Returns:
      The workdir; if the import fails, nothing is left behind.

    Raises:
      UserError: a source that is missing, broken or needs something that is not supported, or a workdir in use.
    """
    if jax.process_count() > 1:
        raise UserError("importing weights needs a single process, but this job has several")
    runs = _read(source, tokenizer, prediction)
    for note in dict.fromkeys(note for run in runs.values() for note in run.notes):
        tell(note)
    with new_folder(path, "--workdir", workdir.LOCK) as temporary, workdir.locked(path, "import"):
        for name, run in runs.items():
            _write(temporary / name, run, source)
        if len(runs) > 1:
            pipeline_lib.record(temporary, [(name, run.step, run.makes) for name, run in runs.items()])
    return Path(path).expanduser()


def _write(folder: Path, found: "_Found", source: str) -> None:
    folder.mkdir(exist_ok=True)
    found.write_parts(folder)
    workdir.record(folder, found.config, {**found.dataset, "imported": source})
    checkpoints = Checkpoints(folder)
    checkpoints.save_weights(found.step, jax.tree.map(jnp.asarray, found.params))
    checkpoints.close()


@dataclasses.dataclass(frozen=True)
class _Found:
    """A run found in a source; `write_parts` writes its frozen parts into a folder."""

    config: ConfigDict
    dataset: dict[str, Any]
    params: Any
    step: int = 0
    notes: Sequence[str] = ()
    write_parts: Callable[[Path], None] = lambda folder: None

    @property
    def makes(self) -> Sequence[int]:
        """The shape of the run's samples: pictures, or a prior's embeddings."""
        shape: list[int] = self.dataset["shape"]
        return [1, 1, len(self.config.prior.mean)] if self.config.prior.clip else shape


def _read(source: str, tokenizer: str | Path | None, prediction: str | None) -> Mapping[str, _Found]:
    """Reads a source: a run, with the folder "", or the stages of a pipeline by folder.

    The arguments are those of `import_weights`.
    """
    if _is_single_file(source):
        return {"": _of_pipeline(source, _read_single_file(source, tokenizer, prediction))}
    for flag, value in (("tokenizer", tokenizer), ("prediction", prediction)):
        if value is not None:
            raise UserError(f"--{flag} is for a Stable Diffusion in a .safetensors or .ckpt file, not for {source!r}")
    if source.endswith(".safetensors"):
        export = plain.read(os.path.expanduser(source))
        parts = partial(plain.write_files, files=export.files)
        return {"": _Found(export.config, export.dataset, export.params, export.step, write_parts=parts)}
    folder = diffusers_folder.locate(source)
    kind = stages.class_name(folder)
    if kind in deepfloyd.PIPELINES:
        return {"": _of_stage(source, deepfloyd.read(folder, kind, source))}
    if kind in unclip.PIPELINES:
        found = unclip.read(folder, kind, source)
        return {f"stage_{number}_{stage.name}": _of_stage(source, stage) for number, stage in enumerate(found, 1)}
    if stable_diffusion.is_pipeline(folder):
        return {"": _of_pipeline(source, stable_diffusion.read(folder, source))}
    described, params = diffusers_folder.read(folder)
    dataset = _description(source, described.config, params, described.num_classes)
    return {"": _Found(described.config, dataset, params, notes=described.notes)}


def _of_pipeline(source: str, pipeline: stable_diffusion.Pipeline) -> _Found:
    dataset = {
        **_description(source, pipeline.config, pipeline.params, 0),
        "diffusers": dataclasses.asdict(pipeline.layout),
        "tokenizer": pipeline.tokenizer.to_json(),
        "shown_captions": [""],
    }
    parts = partial(_write_parts, pipeline)
    return _Found(pipeline.config, dataset, pipeline.params, notes=pipeline.notes, write_parts=parts)


def _of_stage(source: str, stage: stages.Stage) -> _Found:
    dataset = {**_description(source, stage.config, stage.params, 0), **stage.described}
    if stage.texts:
        dataset |= {"tokenizer": stage.texts[0].to_json(), "shown_captions": [""]}
    parts = partial(_write_stage_parts, stage)
    return _Found(stage.config, dataset, stage.params, notes=stage.notes, write_parts=parts)


def _write_stage_parts(stage: stages.Stage, folder: Path) -> None:
    """Writes a stage's frozen parts to where `workdir.read_dataset` finds them."""
    if stage.texts:
        transformers.write(folder / workdir.TEXT_ENCODER, *stage.texts[1:])
    if stage.clip:
        transformers.write_clip(folder / workdir.CLIP, stage.clip)


def _is_single_file(source: str) -> bool:
    """Whether a source is a file of another project."""
    path = os.path.expanduser(source)
    return source.endswith(".ckpt") or (source.endswith(".safetensors") and not plain.is_export(path))


def _read_single_file(source: str, tokenizer: str | Path | None, prediction: str | None) -> stable_diffusion.Pipeline:
    """Reads a Stable Diffusion in a file; the arguments are those of `import_weights`."""
    file = single_file.read(os.path.expanduser(source))
    if file.version == "2.x" and prediction is None:
        raise UserError(
            f"{source!r} is a Stable Diffusion 2.x, whose files do not specify what the network predicts; use "
            "--prediction=eps for a 512-pixel model, --prediction=v for a 768-pixel model"
        )
    fields = file.fields(None if prediction is None else single_file.PREDICTIONS[prediction])
    folder = _locate_tokenizer(source) if tokenizer is None else Path(tokenizer).expanduser()
    length = fields["text_encoder"]["max_position_embeddings"]
    tensors = {"unet": file.unet, "vae": file.autoencoder, "text_encoder": file.text_encoder}
    return stable_diffusion.assemble(
        fields,
        lambda part: (source, tensors.pop(part)),
        Tokenizer.read(folder, length, single_file.PAD_TOKENS[file.version]),
        source=source,
        where=dict.fromkeys(fields, source),
    )


def _locate_tokenizer(source: str) -> Path:
    try:
        return diffusers_folder.locate(_TOKENIZER, lambda files: [file for file in files if file in _TOKENIZER_FILES])
    except UserError as error:
        raise UserError(
            f"{source!r} has no tokenizer, and {error}; use --tokenizer with a folder that has CLIP's vocab.json and "
            "merges.txt"
        ) from None


def _write_parts(pipeline: stable_diffusion.Pipeline, folder: Path) -> None:
    """Writes a pipeline's frozen parts to where `workdir.read_dataset` finds them."""
    transformers.write(folder / workdir.TEXT_ENCODER, *pipeline.text_encoder)
    autoencoder_lib.write(folder / workdir.AUTOENCODER, *pipeline.autoencoder)


def _description(source: str, config: ConfigDict, params: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """A placeholder for the description of the training set, which is unknown."""
    digest = hashlib.sha256()
    for name, value in sorted(flatten_dict(params, sep=".").items()):
        digest.update(name.encode() + value.tobytes())
    data = config.data
    return {
        "source": "import",
        "name": source,
        "num_images": 0,
        "shape": [data.height, data.width, data.channels],
        "class_names": [str(number) for number in range(num_classes)],
        "fingerprint": digest.hexdigest(),
    }


def export_weights(run: Run, out: str | Path, tell: Tell = _silent) -> Path:
    """Writes a run's weights: a diffusers folder or, if `out` ends in .safetensors, a file with our own names.

    Args:
      run: from `ddpm_jax.load`; if it takes prompts, it must be a Stable Diffusion.
      out: must not exist, or be an empty folder.
      tell: called with each note on how diffusers samples differently from the run.

    Raises:
      UserError: `out` already exists, or the run uses something that diffusers does not support.
    """
    if jax.process_count() > 1:
        raise UserError("exporting weights needs a single process, but this job has several")
    params = jax.device_get(run.params)
    if str(out).endswith(".safetensors"):
        if changed := [file.name for file in run.loras if file.with_text]:
            raise UserError(
                f"{changed[0]!r} changes the text encoder, which a .safetensors file of the network does not contain; "
                "accepted: a folder as --out"
            )
        if run.config.lora.text_encoder:
            raise UserError(
                "this run adapted its text encoder (lora.text_encoder), which a .safetensors file of the network does "
                "not contain; accepted: a folder as --out, or --adapters"
            )
        return plain.write(out, run.config, run.dataset, run.step, params)
    if run.condition.reads.keys() - {"label"}:
        notes = stable_diffusion.write(out, run.config, run.dataset, run.model, params)
    elif not isinstance(run.model.decoder, Pixels):
        raise UserError(
            "this run diffuses an autoencoder's latents without prompts, for which diffusers has no pipeline; "
            "accepted: a .safetensors file as --out"
        )
    else:
        notes = diffusers_folder.write(out, run.config, run.net, params)
    for note in notes:
        tell(note)
    return Path(out).expanduser()


def export_adapters(run: Run, path: str | Path, out: str | Path) -> Path:
    """Writes a run's trained adapters as a LoRA file for `load_lora_weights` of diffusers' pipelines.

    Args:
      run: from `ddpm_jax.load`, with a lora.rank above 0.
      path: its workdir.
      out: a .safetensors file that does not exist yet.

    Raises:
      UserError: `out` already exists or has another suffix, or the run has no adapters for a Stable Diffusion.
    """
    out = Path(out).expanduser()
    if not run.config.lora.rank:
        raise UserError("this run trained no adapters (lora.rank is 0); accepted: --mode=export without --adapters")
    if why := stable_diffusion.why_not(run.model):
        raise UserError(f"LoRA files are for a Stable Diffusion, but this run {why}")
    if run.loras:
        raise UserError("the file contains only the run's own adapters; accepted: --adapters without --lora")
    if out.suffix != ".safetensors":
        raise UserError(f"--out is {str(out)!r}; accepted: a name ending in .safetensors")
    if out.exists():
        raise UserError(f"{str(out)!r} already exists; choose another name")
    trained = jax.device_get(load_adapters(run, path))
    texts, net, _ = stable_diffusion.parts_of(run.model)
    encoder = texts.encoder if run.config.lora.text_encoder else None
    assert encoder is None or isinstance(encoder, CLIPTextEncoder)
    lora.write(out, adapters.to_lora(trained, config_lib.lora_scale(run.config), len(net.widths), encoder))
    return out


def export_autoencoder(path: str | Path, out: str | Path) -> Path:
    """Writes a run's trained autoencoder as a folder of diffusers' `AutoencoderKL`.

    The scaling factor of its latents is the config's, or else measured on its training set.

    Args:
      path: a workdir with train.objective "autoencoder".
      out: must not exist, or be empty.

    Raises:
      UserError: no autoencoder there, `out` already exists, or the training set is missing.
    """
    config, dataset = workdir.read_config(path), workdir.read_dataset(path)
    net, params, _ = autoencoders.load_autoencoder(path)
    factor = config.autoencoder.scaling_factor
    if not factor:
        factor = autoencoders.measured_scaling(net, params, training_images(config, dataset or {}))
    autoencoder_lib.write(out, net, jax.device_get(params), factor)
    return Path(out).expanduser()


def export_clip(path: str | Path, out: str | Path) -> Path:
    """Writes a run's trained CLIP as a folder of transformers' `CLIPModel`.

    Args:
      path: a workdir with train.objective "clip".
      out: must not exist, or be empty.

    Raises:
      UserError: no CLIP there, one that transformers does not support, or `out` already exists.
    """
    clip = clips.load_clip(path)
    if why := transformers.why_not(clip):
        raise UserError(f"{str(path)!r} {why}; accepted for transformers' CLIPModel: square pictures")
    return transformers.write_clip(out, clip)
