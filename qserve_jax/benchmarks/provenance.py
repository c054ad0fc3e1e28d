"""Where measured numbers come from, for the JSON files under docs/results."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[2]


def provenance() -> dict[str, Any]:
    """Device, cores, versions, and the commit (see `commit`)."""
    return {
        "device": jax.devices()[0].device_kind,
        "cpu_cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "python": sys.version.split()[0],
        "commit": commit(),
    }


def commit() -> str:
    """The commit of this checkout, with -dirty where tracked files differ; unknown without one."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    is_checkout = (ROOT / "pyproject.toml").exists()  # not a package inside someone else's
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git here
        return "unknown"
    return found.stdout.strip() if is_checkout and found.stdout.strip() else "unknown"
