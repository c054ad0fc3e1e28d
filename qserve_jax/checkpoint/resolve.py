"""A path or a Hugging Face id -> a local directory."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qserve_jax.checkpoint.errors import CheckpointError, first_line

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# What a checkpoint needs, less the copy of the weights that Mistral ships in its own format.
WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
UNWANTED = ["consolidated*", "*/*"]


def resolve(path_or_id: str | os.PathLike[str]) -> Path:
    """The directory that `path_or_id` names; an id `org/name` is downloaded, or found in the cache.

    An existing path goes before an id of the same spelling. Raises CheckpointError where there is
    neither, and where the Hugging Face hub cannot be reached and the cache does not have the id.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file: pass the directory that holds config.json")
    if not HUB_ID.fullmatch(str(path_or_id)):
        raise CheckpointError(
            f"no such directory: {path_or_id}; pass a checkpoint's directory or an id like org/name"
        )
    return _download(str(path_or_id))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(hub_id, allow_patterns=WANTED, ignore_patterns=UNWANTED)
    except Exception as error:  # the hub client has no common base for all that it raises
        raise CheckpointError(
            f"{hub_id!r} is no directory here and cannot be fetched from the Hugging Face hub "
            f"({first_line(error)}): download it elsewhere and pass its directory"
        ) from None
    return Path(folder)
