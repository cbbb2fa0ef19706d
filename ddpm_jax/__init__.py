"""Denoising Diffusion Probabilistic Models (Ho, Jain & Abbeel 2020) and text-to-image models on them, in JAX.

The names below are the public interface; each is imported when it is first used, so that `import ddpm_jax` is quick and
touches no device.
"""

import importlib
from typing import Any

_NAMES = {
    "Schedule": "diffusion.schedules",
    "make_schedule": "diffusion.schedules",
    "q_step": "diffusion.gaussian",
    "q_sample": "diffusion.gaussian",
    "q_posterior": "diffusion.gaussian",
    "convert_prediction": "diffusion.gaussian",
    "p_mean_variance": "diffusion.gaussian",
    "p_sample": "diffusion.gaussian",
    "training_loss": "diffusion.losses",
    "sample_timesteps": "diffusion.timesteps",
    "prior_bpd": "diffusion.bound",
    "vb_term_bpd": "diffusion.bound",
    "variational_bound": "diffusion.bound",
    "sample": "diffusion.samplers",
    "guided": "diffusion.guidance",
    "interpolate": "diffusion.editing",
    "slerp": "diffusion.editing",
    "encode": "diffusion.editing",
    "vary": "diffusion.editing",
    "denoise": "diffusion.editing",
    "inpaint": "diffusion.editing",
    "coarse_to_fine": "diffusion.editing",
    "UNet": "models.unet",
    "default_config": "config",
    "train": "training.loop",
    "Run": "run",
    "load": "pipeline",
    "load_autoencoder": "training.autoencoders",
    "load_clip": "training.clips",
    "show": "runtime.images",
    "to_uint8": "runtime.images",
    "UserError": "runtime.errors",
}

__version__ = "0.2.0"
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
