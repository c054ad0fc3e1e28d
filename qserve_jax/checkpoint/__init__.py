"""Checkpoints in and out: a directory <-> a model and its canonical parameters."""

import importlib
from typing import TYPE_CHECKING, Any

from qserve_jax.checkpoint.errors import CheckpointError
from qserve_jax.checkpoint.load import LoadedModel, load_model
from qserve_jax.checkpoint.native import save_native
from qserve_jax.checkpoint.qserve_format import export_qserve

if TYPE_CHECKING:
    from qserve_jax.checkpoint.orbax_io import (
        abstract_orbax,
        load_orbax,
        save_native_orbax,
        save_orbax,
    )

__all__ = [
    "CheckpointError",
    "LoadedModel",
    "abstract_orbax",
    "export_qserve",
    "load_model",
    "load_orbax",
    "save_native",
    "save_native_orbax",
    "save_orbax",
]
_ORBAX = ("abstract_orbax", "load_orbax", "save_native_orbax", "save_orbax")


def __getattr__(name: str) -> Any:
    """The functions that need Orbax, which takes a second to import, on first use."""
    if name not in _ORBAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.orbax_io"), name)
