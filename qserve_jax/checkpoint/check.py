"""Does a checkpoint hold the tensors that its config.json asks for? Told from headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from qserve_jax.checkpoint.errors import CheckpointError, listing
from qserve_jax.checkpoint.hf import TensorSpec
from qserve_jax.checkpoint.key_table import FLOATS, Target


def check_tensors(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    wanted: Mapping[str, Target],
    ignored: re.Pattern[str],
) -> None:
    """Raises one CheckpointError that lists, by name, all tensors that are missing, unexpected,
    misshapen, or of a dtype that is not wanted, float32, bfloat16 or float16 unless packed."""
    both = [name for name in wanted if name in specs]
    mistyped = [name for name in both if specs[name].dtype not in wanted[name].dtypes]
    problems = {
        "missing": [f"{name} {_show(wanted[name].shape)}" for name in wanted if name not in specs],
        "unexpected": [
            f"{name} {_show(spec.shape)}"
            for name, spec in specs.items()
            if name not in wanted and not ignored.fullmatch(name)
        ],
        "of another shape": [
            f"{name} {_show(specs[name].shape)} instead of {_show(wanted[name].shape)}"
            for name in both
            if specs[name].shape != wanted[name].shape
        ],
        f"not {', '.join(FLOATS)}": [
            f"{name} {specs[name].dtype}" for name in mistyped if wanted[name].dtypes == FLOATS
        ],
        "of another dtype": [
            f"{name} {specs[name].dtype} instead of {' or '.join(wanted[name].dtypes)}"
            for name in mistyped
            if wanted[name].dtypes != FLOATS
        ],
    }
    found = [f"{len(names)} {kind}: {listing(names)}" for kind, names in problems.items() if names]
    if found:
        is_packed = any(target.dtypes != FLOATS for target in wanted.values())
        weights = "weights" if is_packed else "unquantised weights"
        raise CheckpointError(
            f"{folder}: weights and config.json do not fit together: {'; '.join(found)}; "
            f"use the config.json and the {weights} of the same checkpoint"
        )


def _show(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
