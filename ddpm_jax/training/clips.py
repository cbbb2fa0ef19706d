"""Opens a CLIP, either a run's or transformers', and keeps one in the workdir of another run."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ddpm_jax.config import is_workdir
from ddpm_jax.interop import transformers
from ddpm_jax.interop.transformers import CLIP
from ddpm_jax.runtime import workdir
from ddpm_jax.runtime.checkpoints import read_weights
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.training.objectives import make_contrastive


def load_clip(path: str | Path) -> CLIP:
    """Opens a CLIP: both encoders, their float32 parameters and the tokenizer.

    `ddpm_jax.sampling.clip` embeds pictures and texts by it, and `ddpm_jax.evaluation.agreement` judges by it.

    Args:
      path: a transformers folder of a `CLIPModel`; or the workdir of a run with train.objective "clip", whose first
        moving average in the newest checkpoint is read.

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


def clip_description(config: ConfigDict, folder: Path, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """Copies CLIP to the workdir of a run that uses its image embeddings.

    Args:
      config: of the run.
      folder: the workdir.
      known: the description from an earlier start of the run.

    Returns:
      Entries for the description of the run's data: "clip", a transformers folder, and "clip_crc32", with which a
      pipeline checks that its stages use the same one. {} if the run uses no image embeddings.

    Raises:
      UserError: a CLIP that cannot be read.
    """
    source = config.prior.clip or config.embedding.clip
    if not source:
        return {}
    kept = workdir.keep_part(
        folder, workdir.CLIP, known, lambda target: transformers.write_clip(target, load_clip(source))
    )
    return {workdir.CLIP: kept, "clip_crc32": zlib.crc32(Path(kept, transformers.WEIGHTS[0]).read_bytes())}
