"""The frozen CLIP that a run keeps in its workdir."""

import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ddpm_jax.interop import transformers
from ddpm_jax.runtime import processes, workdir


def clip_description(config: ConfigDict, folder: Path, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entries on CLIP in the description of a run's data; {} without its image embeddings. Copies it.

    Args:
      config: of the run.
      folder: the workdir, to which CLIP is copied.
      known: the description that an earlier start of the run left.

    Returns:
      "clip", a transformers folder, and "clip_crc32", by which the stages of a pipeline know that theirs is the same.

    Raises:
      UserError: a CLIP that cannot be read.
    """
    source = config.prior.clip or config.embedding.clip
    if not source:
        return {}
    target = folder / workdir.CLIP
    if workdir.CLIP not in (known or {}):
        if jax.process_index() == 0:
            clip = transformers.read_clip(source)
            shutil.rmtree(target, ignore_errors=True)  # of a start that was cut off before it had a description
            transformers.write_clip(target, clip)
        processes.meet("clip")
    return {workdir.CLIP: str(target), "clip_crc32": zlib.crc32((target / transformers.WEIGHTS[0]).read_bytes())}
