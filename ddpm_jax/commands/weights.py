"""Import and export of weights."""

from pathlib import Path

from ddpm_jax.commands.job import Job
from ddpm_jax.interop import workdirs
from ddpm_jax.runtime.errors import UserError


def import_weights(source: str | None, workdir: str | Path, tokenizer: str | None, prediction: str | None) -> Path:
    """Makes a workdir from other projects' weights; see `ddpm_jax.interop.workdirs.import_weights`."""
    if not source:
        raise UserError(
            "--mode=import needs --source: a diffusers folder, a hub name, an exported .safetensors file, or a "
            "single-file checkpoint of Stable Diffusion (.safetensors or .ckpt)"
        )
    return workdirs.import_weights(source, workdir, tell=print, tokenizer=tokenizer, prediction=prediction)


def export_weights(job: Job, adapters: bool) -> Path:
    """Writes a run's weights, or only its adapters, for other projects; see `ddpm_jax.interop.workdirs`."""
    if not job.out:
        raise UserError("--mode=export needs --out: a folder for diffusers, or a .safetensors file")
    if adapters:
        return workdirs.export_adapters(job.run, job.folder, job.out)
    return workdirs.export_weights(job.run, job.out, tell=print)


def export_clip(workdir: str | Path, out: str | None) -> Path:
    """Writes the CLIP of a workdir for transformers; see `ddpm_jax.interop.workdirs.export_clip`."""
    if not out:
        raise UserError("--mode=export of a CLIP needs --out: a folder for transformers")
    return workdirs.export_clip(workdir, out)


def export_autoencoder(workdir: str | Path, out: str | None) -> Path:
    """Writes the autoencoder of a workdir for diffusers; see `ddpm_jax.interop.workdirs.export_autoencoder`."""
    if not out:
        raise UserError("--mode=export of an autoencoder needs --out: a folder for diffusers")
    return workdirs.export_autoencoder(workdir, out)
