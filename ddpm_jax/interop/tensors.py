"""Files of named tensors: safetensors, and PyTorch's older pickled files read without running what is in them."""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ddpm_jax.errors import UserError, first_line
from ddpm_jax.files import atomic_path

Tensors = dict[str, np.ndarray]

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
}


def read(path: str | Path) -> Tensors:
    """The tensors of a .safetensors file, or of a .bin, .pt or .pth file of PyTorch 1.6 or later.

    Raises:
      UserError: the file is not there, cut off, of another format, or holds Python objects other than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{str(path)!r} is not a file")
    try:
        return load_file(path) if path.suffix == ".safetensors" else _read_pickled(path)
    except Exception as error:  # a broken file raises nearly any kind
        raise UserError(f"{str(path)!r} cannot be read: {first_line(error)}") from None


def write(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a .safetensors file, whole or not at all; UserError if it cannot be written."""
    contiguous = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
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


class _Unpickler(pickle.Unpickler):
    """Knows how tensors are put together from the archive's raw data, and nothing else."""

    def __init__(self, file: io.BytesIO, read_storage: Callable[[str], bytes]):
        super().__init__(file)
        self._read_storage = read_storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _rebuild_tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, requires_grad, hooks: tensor
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no tensor, and it is not run")

    def persistent_load(self, pid: Any) -> "_Storage":
        _, kind, key, _, count = pid
        return _Storage(np.frombuffer(self._read_storage(key), kind.dtype, count))


class _Storage:
    """What a tensor may be cut from: data of the archive, and not another tensor."""

    def __init__(self, data: np.ndarray):
        self.data = data


def _rebuild_tensor(source: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    if not isinstance(source, _Storage):
        raise ValueError("a tensor is made of something other than data")
    storage = source.data
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= len(storage)) or math.prod(size) > len(storage):
        raise ValueError("a tensor is larger than its data")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


def _read_pickled(path: Path) -> Tensors:
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed, which PyTorch's files are not")
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = index.removesuffix("data.pkl")
        unpickler = _Unpickler(io.BytesIO(archive.read(index)), lambda key: archive.read(f"{folder}data/{key}"))
        tensors = unpickler.load()
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, np.ndarray) for name, tensor in tensors.items()
    ):
        raise ValueError("it holds something other than named tensors")
    return dict(tensors)
