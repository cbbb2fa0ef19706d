"""Opens a workdir: restores a checkpoint's weights onto this machine's devices."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.interop.diffusers import adapters as adapters_lib
from ddpm_jax.models import lora
from ddpm_jax.run.run import Run
from ddpm_jax.runtime import parallel, workdir
from ddpm_jax.runtime.checkpoints import Checkpoints
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.captions import CaptionCondition
from ddpm_jax.sampling.generate import Model
from ddpm_jax.text.encoders import FrozenTexts
from ddpm_jax.validation import make_valid_model


def open_run(
    path: str | Path,
    step: int | None = None,
    ema_decay: float | None = None,
    raw: bool = False,
    dtype: str | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
) -> Run:
    """Opens the workdir of a single run: restores a checkpoint's weights onto this machine's devices.

    Args:
      path: the workdir.
      step: of the checkpoint; None: the newest that can be read.
      ema_decay: which moving average; None: the first of the config's.
      raw: the weights as trained instead of an average.
      dtype: "float32" or "bfloat16", of the weights in memory and of the network's arithmetic; None: float32 weights,
        and the arithmetic of config.model.dtype.
      loras: LoRA files and the weight of each, usually 1, for a Stable Diffusion; they are added to the network and to
        the text encoder.

    Raises:
      UserError: no run in the folder, no such checkpoint or average, or a LoRA file that does not fit.
    """
    config, dataset = workdir.read_config(path), workdir.read_dataset(path)
    if dtype is not None:
        config.model.dtype = dtype
    _check_draws(config, path)
    ema_decay = None if raw else _decay(config, ema_decay)
    if dataset is None:
        first = min(config.checkpoint.every_steps, config.train.num_steps)
        raise UserError(f"{str(path)!r} has no checkpoint yet; training saves the first by step {first}")
    model, shapes = make_valid_model(config, dataset, dtype)
    devices, fsdp = jax.device_count(), config.mesh.fsdp
    mesh = parallel.make_mesh(fsdp=devices if fsdp == -1 else math.gcd(fsdp, devices))
    folder, part = Path(path).expanduser(), _part(dataset, ema_decay)
    if config.lora.rank:
        _, base = _restored(folder / workdir.BASE, None, "params", shapes, mesh, dtype)
        found, adapted = _restored(folder, step, part, _adapter_shapes(config, shapes), mesh, None)
        params = jax.jit(lora.merge, donate_argnums=0)(base, adapted, config_lib.lora_scale(config))
        if config.lora.text_encoder:
            model, params = _with_texts_frozen(config, dataset, model, params)
    else:
        found, params = _restored(folder, step, part, shapes, mesh, dtype)
    model, added = adapters_lib.add(loras, dataset, model, params) if loras else (model, ())
    return Run(config, dataset, found, ema_decay, model, params, mesh, added)


def _check_draws(config: ConfigDict, path: str | Path) -> None:
    """Raises UserError for an autoencoder or a CLIP, which draws no pictures itself."""
    if config.train.objective == "autoencoder":
        raise UserError(
            f"{str(path)!r} holds an autoencoder, which makes no pictures by itself; accepted: a run that uses it as "
            "its autoencoder.source, or ddpm_jax.load_autoencoder"
        )
    if config.train.objective == "clip":
        raise UserError(
            f"{str(path)!r} holds a CLIP, which makes no pictures; accepted: a run that uses it as its text.encoder, "
            "or ddpm_jax.load_clip"
        )


def _decay(config: ConfigDict, wanted: float | None) -> float:
    """The decay of the average that is wanted; None: the first."""
    decays = config.train.ema_decays
    decay = decays[0] if wanted is None else wanted
    if decay not in decays:
        raise UserError(f"this run has no average of decay {decay}; it has {', '.join(map(str, decays))}")
    return decay


def load_adapters(run: Run, path: str | Path) -> Any:
    """The adapters of a run with lora.rank above 0, which `load` merged into its weights.

    Args:
      run: from `load`.
      path: the workdir of the run.
    """
    folder, part = Path(path).expanduser(), _part(run.dataset, run.ema_decay)
    shapes = config_lib.make_model(run.config, run.dataset).param_shapes()
    return _restored(folder, run.step, part, _adapter_shapes(run.config, shapes), run.mesh, None)[1]


def _with_texts_frozen(
    config: ConfigDict, dataset: Mapping[str, Any], model: Model, params: Mapping[str, Any]
) -> tuple[Model, Any]:
    """Freezes the text encoder of a model in which it was adapted along with the network."""
    encoder = jax.tree.map(parallel.to_host, params["encoder"])
    config = config.copy_and_resolve_references()
    config.lora.text_encoder = False
    condition = config_lib.make_condition(config, dataset)
    assert isinstance(condition, CaptionCondition)
    assert isinstance(condition.texts, FrozenTexts)
    texts = dataclasses.replace(condition.texts, open_params=lambda: jax.tree.map(np.asarray, encoder))
    condition = dataclasses.replace(condition, texts=texts)
    net = config_lib.make_network(config, condition)
    return dataclasses.replace(model, condition=condition, net=net), params["net"]


def _part(dataset: Mapping[str, Any], ema_decay: float | None) -> str:
    """Which weights of a checkpoint to read. Imported weights have no average of their own."""
    return "params" if ema_decay is None or "imported" in dataset else f"ema_{ema_decay}"


def _adapter_shapes(config: ConfigDict, shapes: Any) -> Any:
    return jax.eval_shape(lambda: lora.init(shapes, config.lora.rank, jax.random.key(0)))


def _restored(folder: Path, step: int | None, part: str, shapes: Any, mesh: Mesh, dtype: str | None) -> tuple[int, Any]:
    """The step and the weights of a checkpoint, on the mesh and in this dtype; None: in their own."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), shapes)
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        return checkpoints.restore_weights(step, part, parallel.laid(shapes, parallel.state_shardings(mesh, shapes)))
    finally:
        checkpoints.close()
