"""Reading a Hugging Face directory: config.json, headers of safetensors, rows of tensors."""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from qserve_jax.checkpoint import torch_file
from qserve_jax.checkpoint.errors import CheckpointError, first_line, listing
from qserve_jax.models.config import ModelConfig
from qserve_jax.models.hf_keys import read_token_ids
from qserve_jax.models.registry import config_from_hf

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NUMPY_DTYPES = {
    **{"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16},
    **{"U8": np.uint8, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64},
}
PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor as the header of its file tells it. dtype: safetensors' own name, like "BF16".

    start: its first byte in a file of safetensors. stored: where it is in a PyTorch file, None in
      safetensors.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    stored: torch_file.StoredTensor | None = None

    @property
    def nbytes(self) -> int:
        """Of the tensor in the file."""
        return math.prod(self.shape) * np.dtype(NUMPY_DTYPES[self.dtype]).itemsize


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file, which may begin with a byte order mark.

    Raises CheckpointError where there is none.
    """
    check_is_file(file)
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        message = f"{file} is not valid JSON ({first_line(error)}): correct it"
        raise CheckpointError(message) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}, not an object: correct it")
    return value


def check_is_file(file: Path) -> None:
    """Raises CheckpointError, saying what it is, for a directory, a dead link, a pipe..."""
    if file.is_file():
        return
    kind = "no regular file"
    if file.is_dir():
        kind = "a directory"
    elif file.is_symlink():
        kind = "a symbolic link that leads to no file"
    raise CheckpointError(f"{file} is {kind}: put the file itself there")


def read_config(folder: Path, *, is_quantized: bool = False) -> ModelConfig:
    """The ModelConfig of config.json; EOS tokens as generation_config.json has them, where it does.

    (So does transformers' `generate`: chat models often name their end-of-turn tokens only there.)
    is_quantized: a `quantization_config` is known and read elsewhere (formats.py).
    Raises CheckpointError, naming the file, where config.json is missing or no JSON, and for all
    that `config_from_hf` refuses.
    """
    file, generation = folder / "config.json", folder / "generation_config.json"
    if not _is_there(file):
        raise CheckpointError(f"{folder} has no config.json: pass a Hugging Face checkpoint")
    known = {"quantization_config"} if is_quantized else set()
    config = _parse(file, lambda hf: config_from_hf({k: hf[k] for k in hf if k not in known}))
    if not _is_there(generation):
        return config
    eos = _parse(generation, lambda hf: read_token_ids(hf, "eos_token_id", config.vocab_size))
    return dataclasses.replace(config, eos_token_ids=eos or config.eos_token_ids)


def _is_there(file: Path) -> bool:
    """Whether there is anything of that name, even a link that leads nowhere."""
    return file.exists() or file.is_symlink()


def _parse[T](file: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """parse(the object in a JSON file); its ValueErrors become CheckpointErrors naming the file."""
    hf = read_json(file)
    try:
        return parse(hf)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint, with transformers' order of preference:
    model.safetensors, then the shards of the index, then the only *.safetensors there is.

    Raises CheckpointError where there are none, where shards are missing, or where it is unclear.
    """
    if _is_there(folder / SINGLE):
        return [folder / SINGLE]
    if _is_there(folder / INDEX):
        return _shards(folder)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise CheckpointError(
            f"{folder} holds {len(files)} safetensors files ({listing([f.name for f in files])}) "
            f"and no {INDEX} to say which belong together: add it, or leave one file"
        )
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickled weights only ({listing(pickles)}), which can run any code: "
            "convert them with transformers (from_pretrained, then save_pretrained elsewhere)"
        )
    raise CheckpointError(f"{folder} has no {SINGLE} and no {INDEX}: download the weights into it")


def _shards(folder: Path) -> list[Path]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise CheckpointError(f"{folder / INDEX} maps no names to files: download it again")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not _is_there(file)]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(files)} shards that {INDEX} names "
            f"({listing(missing)}): download them"
        )
    return files


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def tensor_specs(files: list[Path]) -> dict[str, TensorSpec]:
    """Name -> TensorSpec of all tensors of the files, from their headers alone.

    Raises CheckpointError for what is no file, for a truncated or corrupt one, and for a tensor in
    two files.
    """
    specs: dict[str, TensorSpec] = {}
    for file in files:
        for name, spec in _read_header(file).items():
            if name in specs:
                raise CheckpointError(
                    f"tensor {name} is both in {specs[name].file.name} and in {file.name} of "
                    f"{file.parent}: remove one"
                )
            specs[name] = spec
    return specs


def _read_header(file: Path) -> dict[str, TensorSpec]:
    check_is_file(file)
    if file.suffix == ".bin":
        index = torch_file.read_index(file)
        return {name: TensorSpec(file, t.dtype, t.shape, stored=t) for name, t in index.items()}
    try:
        with safe_open(file, framework="numpy") as tensors:  # checks offsets, sizes, the file's end
            names = tensors.keys()
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
        return {name: _spec(file, 8 + length, header[name]) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} is truncated or corrupt ({first_line(error)}): download it again"
        ) from None


def _spec(file: Path, data: int, entry: dict[str, Any]) -> TensorSpec:
    """data: where in the file the tensors begin."""
    return TensorSpec(
        file, entry["dtype"], tuple(entry["shape"]), start=data + entry["data_offsets"][0]
    )


def read_rows(spec: TensorSpec, start: int, stop: int) -> np.ndarray:
    """Rows start:stop of the first axis, in the file's dtype (bfloat16 is that of ml_dtypes).

    Of safetensors a mapping of just these rows, which goes to the device without a copy on the
    host. Drop it soon: while it lives, its pages count as our memory.
    """
    dtype = np.dtype(NUMPY_DTYPES[spec.dtype])
    if spec.stored is not None:
        return torch_file.read_stored(spec.file, spec.stored, dtype, start, stop)
    shape = (stop - start, *spec.shape[1:])
    row = dtype.itemsize * math.prod(spec.shape[1:])
    if not math.prod(shape):
        return np.empty(shape, dtype)
    rows = np.memmap(spec.file, dtype, "r", offset=spec.start + start * row, shape=shape)
    return rows if rows.flags.aligned else rows.copy()


def torch_files(folder: Path) -> list[Path]:
    """The PyTorch archives that hold the weights where there are no safetensors; else none."""
    if any(folder.glob("*.safetensors")) or _is_there(folder / INDEX):
        return []
    files = sorted(f for f in folder.glob("*.bin") if f.is_file())
    return [file for file in files if zipfile.is_zipfile(file)]
