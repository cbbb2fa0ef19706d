"""Files of named tensors: safetensors, and PyTorch's older pickled files read without running what is in them."""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ddpm_jax.errors import UserError
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
        if path.suffix == ".safetensors":
            return load_file(path)
        return _read_pickled(path)
    except (SafetensorError, OSError, TypeError, KeyError, IndexError, ValueError, EOFError, AttributeError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}") from None
    except (zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}") from None


def write(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a .safetensors file, whole or not at all."""
    contiguous = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata or {}))


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

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, kind, key, _, count = pid
        return np.frombuffer(self._read_storage(key), kind.dtype, count)


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= len(storage)):
        raise ValueError("a tensor reaches beyond its data")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


def _read_pickled(path: Path) -> Tensors:
    with zipfile.ZipFile(path) as archive:
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = index.removesuffix("data.pkl")
        unpickler = _Unpickler(io.BytesIO(archive.read(index)), lambda key: archive.read(f"{folder}data/{key}"))
        tensors = unpickler.load()
    if not isinstance(tensors, dict) or not all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
        raise ValueError("it holds something other than named tensors")
    return dict(tensors)
