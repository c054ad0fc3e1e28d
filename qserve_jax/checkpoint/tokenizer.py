"""The tokenizer of a Hugging Face directory, through transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from qserve_jax.checkpoint.errors import CheckpointError, first_line

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load_tokenizer(folder: Path) -> Any:
    """The directory's tokenizer, chat template included, or None where it has no tokenizer files.

    transformers is imported only here; no code from the checkpoint is run. Raises CheckpointError
    where there are files but no tokenizer can be made of them.
    """
    if not any((folder / name).exists() for name in FILES):
        return None
    auto_tokenizer = _import_auto_tokenizer()
    try:
        return auto_tokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CheckpointError(
            f"{folder}: its tokenizer files cannot be loaded ({first_line(error)}): download them "
            "again, or remove them to work with token ids"
        ) from None


def _import_auto_tokenizer() -> Any:
    """transformers.AutoTokenizer, without its advice to install PyTorch, of no use here."""
    logger = logging.getLogger("transformers")
    logger.addFilter(_is_no_advice)
    try:
        from transformers import AutoTokenizer
    finally:
        logger.removeFilter(_is_no_advice)
    return AutoTokenizer


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()
