"""LoRA: low-rank changes to a Stable Diffusion's weights (Hu et al. 2021, arXiv:2106.09685).

A module's weights W become W + weight * alpha / r * up @ down, with down [r, C] and up [D, r]. This module supports
diffusers' files, current ones (with PEFT's names) and those of its first releases, and kohya's, which use diffusers' or
CompVis' module names with underscores for dots. Other formats are refused: LoHa, LoKr, DoRA, and LoRAs for SDXL.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from ddpm_jax.interop import single_file
from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.runtime.errors import UserError

PARTS = ("unet", "text_encoder")

_METADATA = "lora_adapter_metadata"
_ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
# The first diffusers files use names such as "to_q_lora.down.weight"; these are the modules that they mean, by part.
_PROCESSOR = re.compile(r"(?:\.processor)?\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")
_PROJECTIONS = {
    "unet": {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"},
    "text_encoder": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}
_OTHER_FORMS = {
    "lora_te2_": "an SDXL LoRA, with a second text encoder",
    "text_encoder_2.": "an SDXL LoRA, with a second text encoder",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "a LoRA with a core between its two factors",
    "lora_embedding_": "a LoRA of an embedding",
}
_ACCEPTED = "a LoRA of diffusers or kohya for Stable Diffusion 1.x or 2.x"


class Update(NamedTuple):
    """A change of one module: float32 down [r, C] or [r, C, h, w], up [D, r] or [D, r, 1, 1], and alpha."""

    down: np.ndarray
    up: np.ndarray
    alpha: float

    def delta(self, weight: float) -> np.ndarray:
        """weight * alpha / r * up @ down, float32 [D, C * h * w]."""
        rank = len(self.down)
        product = self.up.reshape(-1, rank) @ self.down.reshape(rank, -1)
        return np.float32(weight * self.alpha / rank) * product


@dataclasses.dataclass(frozen=True, eq=False)
class Lora:
    """Changes by module name, with diffusers' names for the network and transformers' for the text encoder."""

    unet: Mapping[str, Update]
    text_encoder: Mapping[str, Update]


def read(path: str | Path, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Lora:
    """Reads the changes in a .safetensors, .bin or .pt file.

    Args:
      path: of the file.
      shapes: of the weights to change: under "unet" and "text_encoder", the shape of every tensor by diffusers' and
        transformers' names. They are used to find the modules and to check the changes.

    Raises:
      UserError: a file that is missing or broken, a tensor that does not belong to a LoRA, a module that the part does
        not have, or a tensor that does not fit it; the tensor is named.
    """
    where, tensors = str(path), tensors_lib.read(path)
    finders = {part: _Modules(part, shapes[part]) for part in PARTS}
    found: dict[str, dict[str, dict[str, str]]] = {part: {} for part in PARTS}
    for name in tensors:
        part, module, role = _parsed(where, name, finders)
        roles = found[part].setdefault(module, {})
        if role in roles:
            raise UserError(f"tensors {roles[role]!r} and {name!r} in {where!r} are for the same module, {module!r}")
        roles[role] = name
    metadata = _metadata(Path(path))
    changes: dict[str, dict[str, Update]] = {part: {} for part in PARTS}
    for part in PARTS:
        for module, roles in found[part].items():
            down, up, alpha = _checked(where, tensors, roles, shapes[part][f"{module}.weight"])
            if alpha is None:
                alpha = _described_alpha(where, metadata, part, module, len(down))
            changes[part][module] = Update(down, up, alpha)
    if not any(changes.values()):
        raise UserError(f"{where!r} has no tensors; accepted: {_ACCEPTED}")
    return Lora(**changes)


def write(path: str | Path, lora: Lora) -> None:
    """Writes a .safetensors file for `load_lora_weights` of diffusers' pipelines; UserError if it cannot be written."""
    tensors: tensors_lib.Tensors = {}
    metadata: dict[str, Any] = {}
    for part in PARTS:
        changes: Mapping[str, Update] = getattr(lora, part)
        for module, update in changes.items():
            tensors[f"{part}.{module}.lora_A.weight"] = update.down
            tensors[f"{part}.{module}.lora_B.weight"] = update.up
        metadata |= {f"{part}.{field}": value for field, value in _peft_config(changes).items()}
    tensors_lib.write(path, tensors, {"format": "pt", _METADATA: json.dumps(metadata, indent=2, sort_keys=True)})


def _peft_config(changes: Mapping[str, Update]) -> dict[str, Any]:
    """The fields of PEFT's config: the most frequent rank and alpha, and the modules with other values.

    Module names omit "text_model.", which not all releases of transformers have; PEFT matches by suffix.
    """
    if not changes:
        return {}
    ranks = {module.removeprefix("text_model."): len(update.down) for module, update in changes.items()}
    alphas = {module.removeprefix("text_model."): update.alpha for module, update in changes.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
    }


class _Modules:
    """Finds a part's modules by their names in LoRA files."""

    def __init__(self, part: str, shapes: Mapping[str, tuple[int, ...]]):
        """Args: part: "unet" or "text_encoder"; shapes: of its tensors."""
        names = [name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight")]
        modules = [
            name for name in names if len(shapes[f"{name}.weight"]) in (2, 4) and not name.endswith("_embedding")
        ]
        self._part = part
        self._dotted = {self._bare(module): module for module in modules}
        self._flat = {module.replace(".", "_"): original for module, original in self._dotted.items()}
        self._layers = len({name.split(".")[3] for name in names if name.startswith("down_blocks.0.resnets.")})

    def _bare(self, name: str) -> str:
        """The name without the prefix that not all releases of transformers have."""
        return name.removeprefix("text_model.") if self._part == "text_encoder" else name

    def by_dots(self, name: str) -> str | None:
        return self._dotted.get(self._bare(name))

    def by_underscores(self, name: str) -> str | None:
        """Finds a module by a name with underscores for dots, in diffusers', transformers' or CompVis' style."""
        if self._part == "text_encoder":
            return self._flat.get(name.removeprefix("text_model_"))
        return self._flat.get(name) or self._flat.get(_from_compvis(name, self._layers))


def _from_compvis(name: str, layers: int) -> str:
    """diffusers' name of a CompVis module, both with underscores; "" if there is none."""
    match = re.fullmatch(r"(?:(input|output)_blocks_(\d{1,4})|middle_block)_(\d{1,4})_(\w+)", name)
    if match:
        block = f"{match[1]}_blocks.{match[2]}" if match[1] else "middle_block"
        name = f"{block}.{match[3]}.{_dotted(match[4], single_file.RES)}"
    name = _dotted(name, single_file.OUTER)
    return (single_file.unet_module(name, layers) or "").replace(".", "_")


def _dotted(name: str, modules: Iterable[str]) -> str:
    return next((module for module in modules if module.replace(".", "_") == name), name)


def _parsed(where: str, name: str, finders: Mapping[str, _Modules]) -> tuple[str, str, str]:
    """(part, module, "down", "up" or "alpha") of a tensor of the file."""
    for mark, what in _OTHER_FORMS.items():
        if mark in name:
            raise UserError(f"tensor {name!r} in {where!r} belongs to {what}; accepted: {_ACCEPTED}")
    if match := _PROCESSOR.search(name):
        part, module = _split(name[: match.start()])
        module, role = f"{module}.{_PROJECTIONS[part][match[1]]}", match[2]
        found = finders[part].by_dots(module)
    else:
        ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
        if ending is None:
            raise UserError(f"tensor {name!r} in {where!r} does not belong to a LoRA; accepted: {_ACCEPTED}")
        stem, role = name.removesuffix(ending), _ENDINGS[ending]
        prefix = next((prefix for prefix in _KOHYA if name.startswith(prefix)), None)
        if prefix is None:
            part, module = _split(stem)
            found = finders[part].by_dots(module.replace(".processor.", "."))
        else:
            part = _KOHYA[prefix]
            found = finders[part].by_underscores(stem.removeprefix(prefix))
    if found is None:
        raise UserError(f"tensor {name!r} in {where!r} is for a module that the model's {part} does not have")
    return part, found, role


def _split(name: str) -> tuple[str, str]:
    """(part, module) of a name with dots; diffusers' first files, which name no part, are for the network."""
    part, _, module = name.partition(".")
    return (part, module) if part in PARTS else ("unet", name)


def _checked(
    where: str, tensors: Mapping[str, np.ndarray], names: Mapping[str, str], shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, float | None]:
    """A module's factors, checked against the weights' shape, and its alpha, if it has one."""
    for role, counterpart in (("down", "up"), ("up", "down")):
        if role not in names:
            name = names.get(counterpart, names.get("alpha"))
            raise UserError(f"tensor {name!r} in {where!r} has no counterpart, the {role!r} of its module")
    down, up = (_numbers(where, names[role], tensors[names[role]]) for role in ("down", "up"))
    rank = len(down)
    # Linear layers and 1 x 1 convolutions are equivalent, and files may have one for the other.
    fits = down.ndim in (2, 4) and rank > 0 and _filter(down.shape) == (rank, *_filter(shape)[1:])
    if not fits:
        raise _unfit(where, names["down"], down, f"(r, {', '.join(map(str, shape[1:]))})")
    if up.ndim not in (2, 4) or _filter(up.shape) != (shape[0], rank, 1, 1):
        raise _unfit(where, names["up"], up, f"({shape[0]}, {rank})")
    if "alpha" not in names:
        return down, up, None
    alpha = _numbers(where, names["alpha"], tensors[names["alpha"]])
    if alpha.size != 1 or not np.isfinite(alpha).all():
        raise _unfit(where, names["alpha"], alpha, "one finite number")
    return down, up, float(alpha.reshape(()))


def _filter(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1, 1) if len(shape) == 2 else shape


def _numbers(where: str, name: str, value: np.ndarray) -> np.ndarray:
    if not (jnp.issubdtype(value.dtype, jnp.floating) or name.endswith(".alpha")):
        raise UserError(f"tensor {name!r} in {where!r} is {value.dtype}; accepted: floating-point numbers")
    return value.astype(np.float32)


def _unfit(where: str, name: str, value: np.ndarray, accepted: str) -> UserError:
    return UserError(f"tensor {name!r} in {where!r} has shape {value.shape}; accepted: {accepted}")


def _metadata(path: Path) -> dict[str, Any]:
    """The description of the adapters in a diffusers file, such as "unet.lora_alpha"; empty if there is none."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "numpy") as file:
        text = (file.metadata() or {}).get(_METADATA, "{}")
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise UserError(f"{_METADATA} in {str(path)!r} is not a JSON object")
    return metadata


def _described_alpha(where: str, metadata: Mapping[str, Any], part: str, module: str, rank: int) -> float:
    """alpha from the file's description of its adapter, as PEFT reads it; the rank if there is none."""
    alpha, patterns = metadata.get(f"{part}.lora_alpha", rank), metadata.get(f"{part}.alpha_pattern") or {}
    if metadata.get(f"{part}.use_dora"):
        raise UserError(f"{part}.use_dora is true in {where!r}; accepted: {_ACCEPTED}")
    if not isinstance(patterns, dict) or any(re.search(r"[\\*+?()\[\]{}|$]", pattern) for pattern in patterns):
        raise UserError(f"{part}.alpha_pattern is {patterns!r} in {where!r}; accepted: names of modules")
    dotted = f".{module}"
    for pattern, value in patterns.items():
        whole = pattern.startswith("^")
        name = pattern.removeprefix("^")
        if name in (module, module.removeprefix("text_model.")) or (not whole and dotted.endswith(f".{name}")):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{part}.lora_alpha or alpha_pattern has {alpha!r} in {where!r}; accepted: a number")
    # "Rank-stabilised" LoRA divides by the square root of r.
    return float(alpha) * (math.sqrt(rank) if metadata.get(f"{part}.use_rslora") else 1.0)
