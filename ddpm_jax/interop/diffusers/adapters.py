"""LoRA files for Stable Diffusion: adds them to a run's weights, and writes a run's trained adapters as one."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ddpm_jax.interop import lora
from ddpm_jax.interop.diffusers import stable_diffusion, unet_tensors
from ddpm_jax.interop.transformers import clip
from ddpm_jax.models.clip import CLIPTextEncoder
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.captions import CaptionCondition
from ddpm_jax.sampling.generate import Model


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """A LoRA file added to a run's weights.

    Attributes:
      name: of the file.
      weight: factor of its change; 1: the full change.
      crc32: of the file's bytes.
      with_text: whether it also changes the text encoder.
    """

    name: str
    weight: float
    crc32: int
    with_text: bool

    def settings(self) -> dict[str, Any]:
        """As JSON values."""
        return {"name": self.name, "weight": self.weight, "crc32": self.crc32}


def add(
    files: Sequence[tuple[str | Path, float]], dataset: Mapping[str, Any], model: Model, params: dict[str, Any]
) -> tuple[Model, tuple[LoraFile, ...]]:
    """Adds the changes of LoRA files, each with its weight, to a run.

    Args:
      files: the files and their weights.
      dataset: the description of the run's data.
      model: of the run.
      params: of its network; changed ones are replaced one after the other.

    Returns:
      The model, whose text encoder is changed when it is opened, and the added files.

    Raises:
      UserError: the run is not a Stable Diffusion, or a file is missing, broken or for another network.
    """
    if why := stable_diffusion.why_not(model):
        raise UserError(f"LoRA files are for a Stable Diffusion, but this run {why}")
    texts, net, _ = stable_diffusion.parts_of(model)
    encoder = texts.encoder
    assert isinstance(encoder, CLIPTextEncoder)
    layout, levels = stable_diffusion.layout_of(model, dataset), len(net.widths)
    shapes = {
        "unet": unet_tensors.tensor_shapes(params, levels, layout.linear_projections),
        "text_encoder": clip.tensor_shapes(encoder),
    }
    loras, added = [], []
    for name, weight in files:
        path = Path(name).expanduser()
        loras.append((lora.read(path, shapes), weight))
        added.append(LoraFile(path.name, weight, zlib.crc32(path.read_bytes()), bool(loras[-1][0].text_encoder)))
    _change(params, [(changes.unet, weight) for changes, weight in loras], unet_tensors.paths(params, levels))
    if any(file.with_text for file in added):
        opened, changes_of_text = texts.open_params, [(changes.text_encoder, weight) for changes, weight in loras]

        def open_params() -> Any:
            states = opened()
            _change(states, changes_of_text, clip.paths(encoder))
            return states

        changed = dataclasses.replace(texts, open_params=open_params)
        assert isinstance(model.condition, CaptionCondition)
        model = dataclasses.replace(model, condition=dataclasses.replace(model.condition, texts=changed))
    return model, tuple(added)


def _change(
    params: dict[str, Any],
    changes: Sequence[tuple[Mapping[str, lora.Update], float]],
    paths: Mapping[str, tuple[str, ...]],
) -> None:
    """Adds changes, by module name, to the kernels at the modules' paths."""
    for module in {module: None for of_modules, _ in changes for module in of_modules}:
        *outer, leaf = paths[f"{module}.weight"]
        place = params
        for name in outer:
            place = place[name]
        deltas = [of_modules[module].delta(weight) for of_modules, weight in changes if module in of_modules]
        place[leaf] = _changed(place[leaf], np.sum(deltas, axis=0))


def _changed(kernel: Any, delta: np.ndarray) -> Any:
    """Adds a change [D, C * h * w] to a kernel [C, D] or [h, w, C, D], keeping the kernel's sharding."""
    value = parallel.to_host(kernel)
    change = delta.T if value.ndim == 2 else delta.reshape(*value.shape[:1:-1], *value.shape[:2]).transpose(2, 3, 1, 0)
    value = (value.astype(np.float32) + change).astype(value.dtype)
    return parallel.place(value, kernel.sharding) if isinstance(kernel, jax.Array) else value


def to_lora(
    adapters: Mapping[str, Any], scale: float, levels: int, encoder: CLIPTextEncoder | None = None
) -> lora.Lora:
    """Converts a run's trained adapters to changes of diffusers' and transformers' modules.

    Args:
      adapters: of `ddpm_jax.models.lora`; with an encoder, "net" for the network and "encoder" for the encoder.
      scale: their factor.
      levels: number of levels of the network.
      encoder: the text encoder, if it was adapted as well.
    """
    of_net, of_text = (adapters, {}) if encoder is None else (adapters["net"], adapters["encoder"])
    kernels = unflatten_dict({(*path[:-1], "kernel"): None for path in flatten_dict(of_net)})
    text_paths = {} if encoder is None else clip.paths(encoder)
    return lora.Lora(
        unet=_updates(of_net, scale, unet_tensors.paths(kernels, levels)),
        text_encoder=_updates(of_text, scale, text_paths),
    )


def _updates(adapters: Mapping[str, Any], scale: float, paths: Mapping[str, tuple[str, ...]]) -> dict[str, lora.Update]:
    """The adapters by module name; `paths` maps the names to the paths of the weights."""
    flat = {path: np.asarray(value, np.float32) for path, value in flatten_dict(adapters).items()}
    changes = {}
    for name, path in sorted(paths.items()):
        if path[-1] == "kernel" and (*path[:-1], "down") in flat:
            down, up = flat[*path[:-1], "down"], flat[*path[:-1], "up"]
            changes[name.removesuffix(".weight")] = lora.Update(down.T, up.T, scale * len(up))
    return changes
