"""Tensors of a PyTorch `.bin`, without PyTorch and without running anything that the file holds.

Such a file is a zip archive of one pickle, which says what there is, and of the tensors' bytes.
A pickle is a program that may call any function by its name. Here the names that tensors need lead
to stand-ins that only note down what they are called with; every other name is refused before
anything of that name is imported or called.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qserve_jax.checkpoint.errors import CheckpointError, first_line, shorten

STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
}
"""PyTorch's name of a storage -> safetensors' name of its dtype."""
ALLOWED = {"torch": tuple(STORAGES), "torch._utils": ("_rebuild_tensor_v2", "_rebuild_parameter")}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8}
LARGEST_PICKLE = 2**28
"""Bytes; that of a model with 100 000 tensors takes a tenth of it."""
CURE = "use the checkpoint's safetensors, or one saved by torch.save of a plain state_dict"


class StoredTensor(NamedTuple):
    """Where a tensor's bytes are. offset: in the file. strides: in bytes, one per axis."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


def read_index(file: Path) -> dict[str, StoredTensor]:
    """Name -> StoredTensor of all tensors in a file that `torch.save(state_dict)` wrote.

    Raises CheckpointError for what is no such file, naming what it asks for: a pickle that names
    anything but tensors and dicts, a truncated archive, compressed or too small storages.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            found = _load(file, archive)
    except CheckpointError:
        raise
    except Exception as error:  # a made-up pickle can make the unpickler raise anything
        raise CheckpointError(
            f"{file} is no file of tensors that can be read ({first_line(error)}): {CURE}"
        ) from None
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{file} holds a {type(found).__name__}, not a state_dict: {CURE}")
    tensors = {name: value for name, value in found.items() if isinstance(value, StoredTensor)}
    others = [name for name in found if not isinstance(name, str) or name not in tensors]
    if others:
        raise CheckpointError(
            f"{file} holds {shorten(repr(others[0]))}, which is no named tensor: {CURE}"
        )
    return tensors


def _load(file: Path, archive: zipfile.ZipFile) -> Any:
    pickles = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{file} holds {len(pickles)} data.pkl instead of one: {CURE}")
    if pickles[0].file_size > LARGEST_PICKLE:
        raise CheckpointError(
            f"{file} holds a pickle of {pickles[0].file_size} bytes, beyond the limit of "
            f"{LARGEST_PICKLE}: {CURE}"
        )
    folder = pickles[0].filename.removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise CheckpointError(f"{file} is not little-endian: {CURE}")
    return _TensorUnpickler(file, archive, folder, archive.read(pickles[0])).load()


class _Named(NamedTuple):
    """Stands for a global of PyTorch. As a named tuple it cannot be changed by a pickle."""

    name: str

    def __call__(self, *args: Any) -> Any:
        if self.name == "_rebuild_tensor_v2":
            return _rebuild_tensor(*args[:4])
        if self.name == "_rebuild_parameter":
            return args[0]
        raise ValueError(f"its pickle calls {self.name}")


class _Storage(NamedTuple):
    dtype: str
    offset: int
    size: int


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, file: Path, archive: zipfile.ZipFile, folder: str, content: bytes):
        super().__init__(io.BytesIO(content))
        self._file, self._archive, self._folder = file, archive, folder

    def find_class(self, module: str, name: str) -> Any:
        """The only place from which a pickle gets anything that can be called."""
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if name in ALLOWED.get(module, ()):
            return _Named(name)
        raise CheckpointError(
            f"{self._file} asks for {shorten(f'{module}.{name}')}, which is no part of a tensor "
            f"(nothing of it was run): {CURE}"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, size = pid
        if kind != "storage" or not isinstance(storage, _Named) or storage.name not in STORAGES:
            raise CheckpointError(f"{self._file} holds a storage of unknown kind: {CURE}")
        dtype = STORAGES[storage.name]
        info = self._archive.getinfo(f"{self._folder}data/{key}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < size * ITEM_BYTES[dtype]:
            raise CheckpointError(
                f"{self._file}: storage {shorten(key)} is compressed or shorter than the "
                f"{size} elements that are asked of it: {CURE}"
            )
        return _Storage(dtype, _data_offset(self._file, info), size)


def _data_offset(file: Path, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its local header of 30 bytes, a name, and padding."""
    with file.open("rb") as stream:
        stream.seek(info.header_offset)
        header = stream.read(30)
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    offset = info.header_offset + 30 + name + extra
    if header[:4] != b"PK\x03\x04" or offset + info.file_size > file.stat().st_size:
        raise CheckpointError(f"{file} is truncated or corrupt: download it again")
    return offset


def _rebuild_tensor(storage: Any, start: Any, shape: Any, strides: Any) -> StoredTensor:
    """What PyTorch's function of this name says, checked to stay within its storage."""
    numbers = (start, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"a tensor of shape {shorten(shape)} is malformed")
    last = start + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.size:
        raise ValueError(f"a tensor of shape {shorten(shape)} exceeds its storage")
    item = ITEM_BYTES[storage.dtype]
    offset, steps = storage.offset + start * item, tuple(step * item for step in strides)
    return StoredTensor(storage.dtype, tuple(shape), offset, steps)


def read_stored(file: Path, tensor: StoredTensor, dtype: Any, start: int, stop: int) -> np.ndarray:
    """Rows start:stop of the first axis, copied out of a mapping of the file.

    dtype: the numpy dtype of `tensor.dtype`.
    """
    shape = (stop - start, *tensor.shape[1:])
    if 0 in shape:
        return np.empty(shape, dtype)
    first = tensor.offset + start * tensor.strides[0]
    size = sum((n - 1) * step for n, step in zip(shape, tensor.strides, strict=True))
    item = np.dtype(dtype).itemsize
    content = np.memmap(file, np.uint8, mode="r", offset=first, shape=(size + item,))
    view = np.ndarray(shape, dtype, buffer=content, strides=tensor.strides)
    return np.array(view)
