"""Output directories that are there whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from qserve_jax.checkpoint.errors import CheckpointError, first_line, listing, shorten
from qserve_jax.checkpoint.hf import INDEX, SINGLE

PARTIAL = ".partial"
SHARD_BYTES = 4 * 10**9
COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
"""What a checkpoint holds beside weights and config.json, and a converted one keeps."""


REPORT = "quantization_report.json"
"""What `quantize` keeps beside the weights, and in an unfinished output as its manifest."""
OURS = re.compile(
    "|".join(map(re.escape, (*COMPANIONS, "config.json", INDEX, REPORT, "params")))
    + r"|(shard-\d+|model(-\d+-of-\d+)?)\.safetensors"
)
"""The names that a run writes into an unfinished output, less what marks them temporary."""


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder `path`.partial to write into, which becomes `path` when all has gone well.

    After an error it is removed; where the process is killed it stays, which `load_model` refuses
    and the next run removes. Raises CheckpointError where `path` exists and is no empty directory,
    and as `open_partial`, also where `quantize` could go on with what it has left there.
    """
    final = Path(path).expanduser().absolute()
    check_free(final)
    with open_partial(final) as partial:
        if (partial / REPORT).exists():
            raise CheckpointError(
                f"{partial} is what a stopped run of quantize goes on with: let it, choose another "
                "output, or remove it"
            )
        empty_folder(partial)
        try:
            yield partial
            os.replace(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def open_partial(path: Path) -> Iterator[Path]:
    """The folder that stands for `path` until it is complete, made unless it is there, and ours
    alone within.

    Raises CheckpointError where it cannot be made, where another process is at it, and where it
    holds anything that no run has written, which is for the user to move.
    """
    folder = partial_of(path)
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link: remove it, or choose another output")
    make_folder(folder)
    lock = os.open(folder, os.O_RDONLY)
    try:
        _lock(lock, folder)
        foreign = sorted(file.name for file in folder.iterdir() if not _is_ours(file.name))
        if foreign:
            raise CheckpointError(
                f"{folder} holds what no run has left there ({listing(foreign)}): move it, or "
                "choose another output"
            )
        yield folder
    finally:
        os.close(lock)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            return  # else the run that had the lock has renamed its folder meanwhile
    except (BlockingIOError, FileNotFoundError):
        pass
    raise CheckpointError(
        f"another run is writing {folder}: wait for it, or choose another output"
    ) from None


def _is_ours(name: str) -> bool:
    """Libraries write into names of their own first: .tmpXXXX, params.orbax-checkpoint-tmp."""
    stem = name.removesuffix(".tmp").split(".orbax-checkpoint-tmp")[0]
    return name.startswith(".tmp") or OURS.fullmatch(stem) is not None


def empty_folder(folder: Path) -> None:
    """Remove all that is in it, of links only themselves."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_free(path: Path) -> None:
    """Raises CheckpointError where there is something at `path` already, for the user to decide,
    and where nothing can be: a folder is put there by renaming it."""
    try:
        if path.name in ("", "..") or (path.exists() and path.samefile(os.curdir)):
            raise CheckpointError(f"{path} cannot be replaced: name a new folder as output")
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            return  # a link, which a folder cannot be renamed to, is no empty directory
        taken = path.exists() or path.is_symlink()
    except OSError as error:
        raise _cannot_be_made(path, error) from None
    if taken:
        raise CheckpointError(f"{path} exists already: choose another output, or remove it")


def make_folder(path: Path) -> None:
    """With its parents, unless it is there. Raises CheckpointError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_be_made(path, error) from None


def _cannot_be_made(path: Path, error: OSError) -> CheckpointError:
    reason = error.strerror
    return CheckpointError(f"{shorten(path)} cannot be made ({reason}): choose another output")


def partial_of(path: Path) -> Path:
    """The folder that stands for `path` until it is complete."""
    return path.absolute().with_name(path.absolute().name + PARTIAL)


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], limit: int = SHARD_BYTES
) -> None:
    """Write safetensors: one file, or an index and shards of at most `limit` bytes (or one tensor).

    tensors: (name, array), in the order of the shards. Host memory: one shard.
    """
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = 0
    for name, tensor in tensors:
        if shard and _size(shard) + tensor.nbytes > limit:
            shards.append(_write_shard(folder, len(shards), shard))
            shard = {}
        shard[name] = tensor
        total += tensor.nbytes
    shards.append(_write_shard(folder, len(shards), shard))
    if len(shards) == 1:
        _shard_path(folder, 0).rename(folder / SINGLE)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        final = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _shard_path(folder, i).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX, index)


def _size(shard: Mapping[str, np.ndarray]) -> int:
    return sum(tensor.nbytes for tensor in shard.values())


def _shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index}.safetensors"


def _write_shard(folder: Path, index: int, shard: dict[str, np.ndarray]) -> list[str]:
    save_tensors(_shard_path(folder, index), shard)
    return list(shard)


def save_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One file of safetensors. Raises CheckpointError where it cannot be written."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    try:
        save_file(contiguous, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} cannot be written ({first_line(error)}): make room there, or choose another "
            "output"
        ) from None
    file.chmod(0o644)  # safetensors leaves it to its owner alone


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """One JSON object, indented."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path | None, folder: Path) -> None:
    """Tokenizer, chat template and generation_config.json of a checkpoint."""
    if source is None:
        return
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
