"""A CLIP that a run has trained, or one of transformers, opened for use."""

from pathlib import Path

import jax

from ddpm_jax.config import is_workdir
from ddpm_jax.interop import transformers
from ddpm_jax.interop.transformers import CLIP
from ddpm_jax.runtime import workdir
from ddpm_jax.runtime.checkpoints import read_weights
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.training.objectives import make_contrastive


def load_clip(path: str | Path) -> CLIP:
    """A CLIP: both encoders, their float32 parameters and the tokenizer.

    `ddpm_jax.evaluation.agreement` has what it is for: `embed_pictures`, `embed_texts`, `clip_score` and `retrieval`.

    Args:
      path: a transformers folder of a `CLIPModel`; or the workdir of a run with train.objective "clip", of which the
        first average of the newest checkpoint is read.

    Raises:
      UserError: no CLIP there, or one that is not supported.
    """
    if not is_workdir(path):
        return transformers.read_clip(Path(path).expanduser())
    config = workdir.read_config(path)
    if config.train.objective != "clip":
        raise UserError(
            f"{str(path)!r} is a run with train.objective {config.train.objective!r}; accepted: 'clip', or a "
            "transformers folder of a CLIPModel"
        )
    objective = make_contrastive(config, workdir.read_dataset(path))
    shapes = jax.eval_shape(lambda: objective.init_params(0))
    return objective.clip_of(read_weights(Path(path).expanduser(), f"ema_{config.train.ema_decays[0]}", shapes))
