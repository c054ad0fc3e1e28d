"""A path or a Hugging Face id -> a local directory."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

from qserve_jax.checkpoint.atomic import PARTIAL, partial_of
from qserve_jax.checkpoint.errors import CheckpointError, first_line, shorten

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# What a checkpoint needs, less the copy of the weights that Mistral ships in its own format.
WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
UNWANTED = ["consolidated*", "*/*"]
CURE = "pass a checkpoint's directory or an id like org/name"


def resolve(path_or_id: str | os.PathLike[str]) -> Path:
    """The directory that `path_or_id` names; an id `org/name` is downloaded, or found in the cache.

    An existing path goes before an id of the same spelling. Raises CheckpointError where there is
    neither, for what cannot be a path, and where the Hugging Face hub cannot be reached and the
    cache does not have the id.
    """
    if path_or_id == "":
        raise CheckpointError(f"the model path is empty: {CURE}")
    shown = shorten(path_or_id)
    try:
        path = Path(path_or_id).expanduser()
        refuse_partial(path)
        if path.is_dir():
            return path
        if path.exists():
            raise CheckpointError(f"{shown} is a file: pass the directory that holds config.json")
    except (TypeError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{shown} is no path ({_reason(error, path_or_id)}): {CURE}"
        ) from None
    if not HUB_ID.fullmatch(str(path_or_id)):
        raise CheckpointError(f"no such directory: {shown}; {CURE}")
    return _download(str(path_or_id))


def refuse_partial(path: Path) -> None:
    """Raises CheckpointError for what an interrupted run has left, by its own name or that of the
    checkpoint it was to become."""
    absolute = path.absolute()
    is_partial = absolute.name.endswith(PARTIAL) and absolute.is_dir()
    partial = absolute if is_partial else partial_of(absolute)
    if is_partial or (partial.is_dir() and not path.exists()):
        raise CheckpointError(
            f"{shorten(absolute.with_name(partial.name.removesuffix(PARTIAL)))} was not written to "
            f"its end ({partial.name} is what is left): run the command that writes it again"
        )


def _reason(error: Exception, path: Any) -> str:
    """Why the system takes no such path, without the path that OSError repeats."""
    if not isinstance(error, OSError):
        return first_line(error)
    if error.errno == errno.ENAMETOOLONG:
        return f"its {len(str(path))} characters exceed the system's limit, often 4096, 255 a name"
    return error.strerror or type(error).__name__


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(hub_id, allow_patterns=WANTED, ignore_patterns=UNWANTED)
    except Exception as error:  # the hub client has no common base for all that it raises
        raise CheckpointError(
            f"{shorten(repr(hub_id))} is no directory here and cannot be fetched from the Hugging "
            f"Face hub ({first_line(error)}): download it elsewhere and pass its directory"
        ) from None
    return Path(folder)
