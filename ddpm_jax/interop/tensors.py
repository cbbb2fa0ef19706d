"""Files of named tensors: safetensors, and PyTorch's older pickled files read without running what is in them."""

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
# Whose objects lie beside the weights in a training checkpoint: callbacks, settings, optimizers, random states.
_SKIPPED_MODULES = ("_codecs", "collections", "lightning", "numpy", "omegaconf", "pytorch_lightning", "torch", "typing")
_SKIPPED_BUILTINS = ("bytearray", "complex", "dict", "float", "frozenset", "int", "list", "set", "slice")
# How files of PyTorch before 1.6 begin.
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001


def read(path: str | Path) -> Tensors:
    """The tensors of a .safetensors file, or of a .bin, .pt or .pth file of PyTorch.

    Raises:
      UserError: the file is not there, cut off, of another format, or holds Python objects other than tensors.
    """
    return _read(path, _named_tensors, skipping=False)


def read_checkpoint(path: str | Path) -> Tensors:
    """The tensors of a training checkpoint of PyTorch (.ckpt, .pt, .bin) or of a .safetensors file.

    They are those of the checkpoint's "state_dict", or of the file itself where it has none. Everything else in it is
    passed over: numbers, texts, optimizer states, and objects of PyTorch, PyTorch Lightning, NumPy and OmegaConf. For
    these the file names classes; an object without behaviour takes the place of each, so that none of them is imported
    or run.

    Raises:
      UserError: as `read`; a file that names code of any other module.
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
    except Exception as error:  # a broken file raises nearly any kind
        raise UserError(f"{str(path)!r} cannot be read: {first_line(error)}") from None


def read_weights(folder: str | Path, names: Sequence[str]) -> tuple[Path, Tensors]:
    """The weights of a folder, whole or in shards that an index names.

    Args:
      folder: to look in.
      names: of the file, the first one that is there counts; where none is, their half-precision variants are looked
        for, such as model.fp16.safetensors.

    Returns:
      The file or the index, and all tensors.

    Raises:
      UserError: none of them is there, or one cannot be read.
    """
    folder = Path(folder)
    for file, _ in _candidates(names):
        path = folder / file
        if path.is_file():
            return path, _read_shards(path) if path.suffix == ".json" else read(path)
    raise UserError(
        f"{str(folder)!r} has no weights; accepted: {' or '.join(names)}, whole or in shards, or their fp16 or bf16 "
        "variant"
    )


def weight_files(files: Collection[str], names: Sequence[str]) -> list[str]:
    """Those files of a folder that `read_weights` reads: one, an index and its shards, or none.

    Args:
      files: the names of all.
      names: as of `read_weights`.
    """
    for file, shard in _candidates(names):
        if file in files:
            shards = [other for other in files if shard.fullmatch(other)] if file.endswith(".json") else []
            return [file, *sorted(shards)]
    return []


def _candidates(names: Sequence[str]) -> Iterator[tuple[str, re.Pattern]]:
    """The files that may hold weights, or be the index of some, in the order of preference; how shards are called."""
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
        raise UserError(f"{str(index)!r} has no weight_map from names of tensors to files")
    tensors: Tensors = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise UserError(f"{str(index)!r} names {file!r}; accepted: files of its own folder")
        tensors |= read(index.parent / file)
    return tensors


def to_float32(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """The tensors with those of half precision in float32, which changes no value."""
    halves = (np.float16, jnp.bfloat16)
    return {name: value.astype(np.float32) if value.dtype in halves else value for name, value in tensors.items()}


def write(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a .safetensors file, whole or not at all; UserError if it cannot be written."""
    contiguous = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    try:
        with atomic_path(path) as temporary:
            save_file(contiguous, temporary, metadata=dict(metadata or {}))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(path)!r} cannot be written: {error}") from None


def check(
    path: str | Path, tensors: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]], dtype: Any = np.float32
) -> None:
    """UserError unless the tensors are exactly the wanted ones, by name, shape and dtype; one is named."""
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
    """Stands for torch.FloatStorage and its like."""

    def __init__(self, dtype: Any):
        self.dtype = np.dtype(dtype)


class _Skipped:
    """Stands for any class or function of another project, and for its objects: takes everything, keeps nothing."""

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
    """Knows how tensors are put together from raw data, and nothing else; `skipping` puts a `_Skipped` for some."""

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
        builtin = module in ("builtins", "__builtin__")  # the latter in Python 2's words
        known = name in _SKIPPED_BUILTINS if builtin else module.split(".")[0] in _SKIPPED_MODULES
        if self._skipping and known and not name.endswith("Storage"):
            return _Skipped
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no tensor, and it is not run")

    def persistent_load(self, pid: Any) -> "_Storage":
        if self._find_storage is None:
            raise pickle.UnpicklingError("it names data where there is none")
        return self._find_storage(pid)


@dataclasses.dataclass
class _Storage:
    """What a tensor may be cut from: data of the file, which may lie behind what names it, and not another tensor."""

    dtype: np.dtype
    count: int
    data: np.ndarray | None = None

    def fill(self, data: bytes) -> None:
        if not 0 <= self.count * self.dtype.itemsize <= len(data):
            raise ValueError("a tensor's data are cut off")
        self.data = np.frombuffer(data, self.dtype, self.count)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor to be cut from a storage when its data are there."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self) -> np.ndarray:
        data = self.storage.data
        if data is None:
            raise ValueError("a tensor's data are not there")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        too_far = 0 not in self.size and last >= len(data)
        if min((self.offset, *self.size, *self.stride)) < 0 or too_far or math.prod(self.size) > len(data):
            raise ValueError("a tensor is larger than its data")
        strides = [step * data.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(data[self.offset :], self.size, strides).copy()


def _rebuild_tensor(source: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> _Tensor:
    if not isinstance(source, _Storage):
        raise ValueError("a tensor is made of something other than data")
    return _Tensor(source, offset, tuple(size), tuple(stride))


def _named_tensors(content: Any) -> dict[str, _Tensor]:
    """The whole content of a file, which must be named tensors."""
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, _Tensor) for name, tensor in content.items()
    ):
        raise ValueError("it holds something other than named tensors")
    return content


def _state_dict(content: Any) -> dict[str, _Tensor]:
    """The named tensors among the content of a training checkpoint."""
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if isinstance(value, _Tensor)}
    if not content:
        raise ValueError("it holds no named tensors")
    return _named_tensors(content)


def _read_zip(path: Path, skipping: bool) -> Any:
    """PyTorch 1.6 and later: an archive with one pickle and one file of data a storage."""
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
    """PyTorch before 1.6: pickles one behind the other, then the data of the storages that they name."""
    with path.open("rb") as file:
        try:
            known = _Unpickler(file).load() == _MAGIC and _Unpickler(file).load() == _VERSION
        except Exception:  # anything else than pickles
            known = False
        if not known:
            raise ValueError("it is no file of PyTorch's, or it is cut off")
        if not _Unpickler(file).load()["little_endian"]:
            raise ValueError("its numbers are big-endian")
        storages: dict[Any, _Storage] = {}
        views: list[tuple[_Storage, _Storage, int]] = []

        def find(pid: Any) -> _Storage:
            name, kind, key, _, count, view = pid
            if name != "storage":
                raise pickle.UnpicklingError(f"it holds a {name}, which is no tensor, and it is not run")
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
                raise ValueError("a tensor's data are of another length than it says, or cut off")
            storage.fill(file.read(count * storage.dtype.itemsize))
        for part, whole, offset in views:
            if whole.data is None or not 0 <= offset <= offset + part.count <= whole.count:
                raise ValueError("a tensor is larger than its data")
            part.data = whole.data[offset : offset + part.count]
    return tensors
