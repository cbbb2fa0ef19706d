"""Reads files of named tensors: safetensors, and PyTorch's pickled files without executing code in them."""

import dataclasses
import io
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ddpm_jax.runtime.errors import UserError, first_line
from ddpm_jax.runtime.files import atomic_path, read_json_object

Tensors = dict[str, np.ndarray]

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# Modules whose objects occur besides weights in training checkpoints: callbacks, settings, optimisers, random states.
_SKIPPED_MODULES = ("_codecs", "collections", "lightning", "numpy", "omegaconf", "pytorch_lightning", "torch", "typing")
_SKIPPED_BUILTINS = ("bytearray", "complex", "dict", "float", "frozenset", "int", "list", "set", "slice")
# The start of files from PyTorch before 1.6.
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001


def read(path: str | Path) -> Tensors:
    """Reads the tensors of a .safetensors file, or of a .bin, .pt or .pth file of PyTorch.

    Raises:
      UserError: the file is missing, truncated, of another format, or contains Python objects other than tensors.
    """
    return _read(path, _named_tensors, skipping=False)


def read_checkpoint(path: str | Path) -> Tensors:
    """Reads the tensors of a PyTorch training checkpoint (.ckpt, .pt, .bin) or of a .safetensors file.

    They are those of the checkpoint's "state_dict", or of the file itself if it has none. Everything else is ignored:
    numbers, texts, optimiser states, and objects of PyTorch, PyTorch Lightning, NumPy and OmegaConf. An inert
    placeholder replaces the classes of such objects, so none of them is imported or run.

    Raises:
      UserError: as for `read`; or a file that refers to code of any other module.
    """
    return _read(path, _state_dict, skipping=True)


def _read(path: str | Path, select: Callable[[Any], dict[str, "_Tensor"]], skipping: bool) -> Tensors:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{str(path)!r} is not a file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = _read_zip(path, skipping) if zipfile.is_zipfile(path) else _read_legacy(path, skipping)
        return {name: tensor.array() for name, tensor in select(content).items()}
    except Exception as error:  # a broken file may raise any error
        raise UserError(f"{str(path)!r} cannot be read: {first_line(error)}") from None


def read_weights(folder: str | Path, names: Sequence[str]) -> tuple[Path, Tensors]:
    """Reads the weights of a folder, from one file or from shards listed in an index.

    Args:
      folder: to look in.
      names: of the file; the first existing one is read. If there is none, half-precision variants are tried, such as
        model.fp16.safetensors.

    Returns:
      The file or the index, and all tensors.

    Raises:
      UserError: none of them exists, or one cannot be read.
    """
    folder = Path(folder)
    for file, _ in _candidates(names):
        path = folder / file
        if path.is_file():
            return path, _read_shards(path) if path.suffix == ".json" else read(path)
    raise UserError(
        f"{str(folder)!r} has no weights; accepted: {' or '.join(names)}, in one file or shards, or their fp16 or bf16 "
        "variant"
    )


def weight_files(files: Collection[str], names: Sequence[str]) -> list[str]:
    """The files of a folder that `read_weights` reads: one file, an index and its shards, or none.

    Args:
      files: the names of all files.
      names: as in `read_weights`.
    """
    for file, shard in _candidates(names):
        if file in files:
            shards = [other for other in files if shard.fullmatch(other)] if file.endswith(".json") else []
            return [file, *sorted(shards)]
    return []


def _candidates(names: Sequence[str]) -> Iterator[tuple[str, re.Pattern]]:
    """Yields candidates for the weights file or its index, in order of preference, with the pattern of shard names."""
    for variant in ("", ".fp16", ".bf16"):
        for name in names:
            stem, _, suffix = name.rpartition(".")
            number, form = r"-\d+-of-\d+", re.escape(variant)
            shard = re.compile(rf"{re.escape(stem)}({form}{number}|{number}{form})\.{suffix}")
            whole = f"{stem}{variant}.{suffix}"
            for file in dict.fromkeys((whole, f"{whole}.index.json", f"{name}.index{variant}.json")):
                yield file, shard


def _read_shards(index: Path) -> Tensors:
    files = read_json_object(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{str(index)!r} has no weight_map from tensor names to files")
    tensors: Tensors = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise UserError(f"{str(index)!r} names {file!r}; accepted: files in the same folder")
        tensors |= read(index.parent / file)
    return tensors


def to_float32(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Converts half-precision tensors to float32, which changes no value."""
    halves = (np.float16, jnp.bfloat16)
    return {name: value.astype(np.float32) if value.dtype in halves else value for name, value in tensors.items()}


def write(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a .safetensors file atomically; UserError if it cannot be written."""
    contiguous = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    try:
        with atomic_path(path) as temporary:
            save_file(contiguous, temporary, metadata=dict(metadata or {}))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(path)!r} cannot be written: {error}") from None


def check(
    path: str | Path, tensors: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]], dtype: Any = np.float32
) -> None:
    """UserError, naming a tensor, unless the tensors have exactly the wanted names, shapes and dtypes."""
    for name, shape in wanted.items():
        if name not in tensors:
            raise UserError(f"{str(path)!r} has no tensor {name!r}, which the network of its config needs")
        found = tensors[name]
        if found.shape != shape:
            raise UserError(f"tensor {name!r} in {str(path)!r} has shape {found.shape}; accepted: {shape}")
        if found.dtype != dtype:
            raise UserError(f"tensor {name!r} in {str(path)!r} is {found.dtype}; accepted: {np.dtype(dtype)}")
    extra = [name for name in tensors if name not in wanted]
    if extra:
        raise UserError(f"{str(path)!r} has a tensor {extra[0]!r}, which the network of its config does not have")


class _StorageType:
    """Stands for torch.FloatStorage and similar classes."""

    def __init__(self, dtype: Any):
        self.dtype = np.dtype(dtype)


class _Skipped:
    """A placeholder for other projects' classes, functions and objects: accepts everything, keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Skipped":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    extend = add = append


class _Unpickler(pickle.Unpickler):
    """Only knows how to build tensors from raw data; `skipping` replaces some other objects by a `_Skipped`."""

    def __init__(
        self, file: IO[bytes], find_storage: Callable[[Any], "_Storage"] | None = None, *, skipping: bool = False
    ):
        super().__init__(file)
        self._find_storage, self._skipping = find_storage, skipping

    def find_class(self, module: str, name: str) -> Any:
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, requires_grad, hooks: tensor
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        builtin = module in ("builtins", "__builtin__")  # the latter is Python 2's name
        known = name in _SKIPPED_BUILTINS if builtin else module.split(".")[0] in _SKIPPED_MODULES
        if self._skipping and known and not name.endswith("Storage"):
            return _Skipped
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not a tensor and is not run")

    def persistent_load(self, pid: Any) -> "_Storage":
        if self._find_storage is None:
            raise pickle.UnpicklingError("it refers to data that does not exist")
        return self._find_storage(pid)


@dataclasses.dataclass
class _Storage:
    """Raw data in the file that tensors are views of; it may follow its first mention in the file."""

    dtype: np.dtype
    count: int
    data: np.ndarray | None = None

    def fill(self, data: bytes) -> None:
        if not 0 <= self.count * self.dtype.itemsize <= len(data):
            raise ValueError("a tensor's data are truncated")
        self.data = np.frombuffer(data, self.dtype, self.count)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor, to be made from a storage once its data are read."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self) -> np.ndarray:
        data = self.storage.data
        if data is None:
            raise ValueError("a tensor's data are missing")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        too_far = 0 not in self.size and last >= len(data)
        if min((self.offset, *self.size, *self.stride)) < 0 or too_far or math.prod(self.size) > len(data):
            raise ValueError("a tensor is larger than its data")
        strides = [step * data.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(data[self.offset :], self.size, strides).copy()


def _rebuild_tensor(source: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> _Tensor:
    if not isinstance(source, _Storage):
        raise ValueError("a tensor does not refer to raw data")
    return _Tensor(source, offset, tuple(size), tuple(stride))


def _named_tensors(content: Any) -> dict[str, _Tensor]:
    """A file's content, which must consist of named tensors."""
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, _Tensor) for name, tensor in content.items()
    ):
        raise ValueError("it contains something other than named tensors")
    return content


def _state_dict(content: Any) -> dict[str, _Tensor]:
    """The named tensors in a training checkpoint."""
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if isinstance(value, _Tensor)}
    if not content:
        raise ValueError("it contains no named tensors")
    return _named_tensors(content)


def _read_zip(path: Path, skipping: bool) -> Any:
    """PyTorch 1.6 and later: an archive with one pickle and one data file per storage."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed, which PyTorch's files are not")
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = index.removesuffix("data.pkl")
        storages: dict[str, _Storage] = {}

        def find(pid: Any) -> _Storage:
            _, kind, key, _, count = pid
            if key not in storages:
                storages[key] = _Storage(kind.dtype, count)
                storages[key].fill(archive.read(f"{folder}data/{key}"))
            return storages[key]

        return _Unpickler(io.BytesIO(archive.read(index)), find, skipping=skipping).load()


def _read_legacy(path: Path, skipping: bool) -> Any:
    """PyTorch before 1.6: consecutive pickles, then the data of the storages that they refer to."""
    with path.open("rb") as file:
        try:
            known = _Unpickler(file).load() == _MAGIC and _Unpickler(file).load() == _VERSION
        except Exception:  # anything other than pickles
            known = False
        if not known:
            raise ValueError("it is not a PyTorch file, or it is truncated")
        if not _Unpickler(file).load()["little_endian"]:
            raise ValueError("its numbers are big-endian")
        storages: dict[Any, _Storage] = {}
        views: list[tuple[_Storage, _Storage, int]] = []

        def find(pid: Any) -> _Storage:
            name, kind, key, _, count, view = pid
            if name != "storage":
                raise pickle.UnpicklingError(f"it contains a {name}, which is not a tensor and is not run")
            whole = storages.setdefault(key, _Storage(kind.dtype, count))
            if view is None:
                return whole
            _, offset, length = view
            views.append((_Storage(kind.dtype, length), whole, offset))
            return views[-1][0]

        tensors = _Unpickler(file, find, skipping=skipping).load()
        for key in _Unpickler(file).load():
            storage = storages[key]
            count = int.from_bytes(file.read(8), "little", signed=True)
            if count != storage.count:
                raise ValueError("a tensor's data do not have the stated length, or are truncated")
            storage.fill(file.read(count * storage.dtype.itemsize))
        for part, whole, offset in views:
            if whole.data is None or not 0 <= offset <= offset + part.count <= whole.count:
                raise ValueError("a tensor is larger than its data")
            part.data = whole.data[offset : offset + part.count]
    return tensors
