"""Where measured numbers come from, for the JSON files under docs/results."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tokenize
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parent
ASIDE = ("*_rules.py", "tuning.py", "api.py", "reference.py")
"""Files whose work a row shows in its "config", and those that no kernel is made of."""
NUMBERS = ("numerics", "packing", "qtensor")
OPS = {
    "matmul": ("w4a8_matmul",),
    "attention": ("paged_attention", "append_kv", "page_layout.py"),
}
BLANK = (tokenize.COMMENT, tokenize.NL)
LINE_ENDS = (tokenize.ENCODING, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
SHARED = ("pallas_kernels/intrinsics", *(f"quantization/{name}.py" for name in NUMBERS))


def provenance() -> dict[str, Any]:
    """Device, cores, versions, and the commit (see `commit`)."""
    return {
        "device": jax.devices()[0].device_kind,
        "cpu_cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "python": sys.version.split()[0],
        "commit": commit(),
    }


def kernels(op: str, package: Path = PACKAGE) -> str:
    """A hash of the code that the time of an operation (of OPS) with a given config depends on:
    by it a row of one commit is known to be of another commit's kernels too."""
    found = hashlib.sha256()
    for source in (*(f"pallas_kernels/{name}" for name in OPS[op]), *SHARED):
        top = (package / source).resolve()  # of a link, the folder
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.suffix == ".py" and not any(map(path.match, ASIDE)):
                found.update(f"{source} {path.relative_to(top)} {_code(path)} ".encode())
    return found.hexdigest()[:12]


def _code(path: Path) -> list[tuple[str, str]]:
    """A file's tokens, without comments, documentation and blanks."""
    with path.open("rb") as file:
        tokens = [t for t in tokenize.tokenize(file.readline) if t.type not in BLANK]
    lines = [[]]
    for token in tokens:
        lines[-1].append((tokenize.tok_name[token.type], token.string.strip()))
        if token.type in LINE_ENDS:
            lines.append([])
    documentation = ["STRING", "NEWLINE"]
    return [x for line in lines if [kind for kind, _ in line] != documentation for x in line]


def commit() -> str:
    """The commit of this checkout, with -dirty where tracked files differ; unknown without one."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    is_checkout = (ROOT / "pyproject.toml").exists()  # not a package inside someone else's
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git here
        return "unknown"
    return found.stdout.strip() if is_checkout and found.stdout.strip() else "unknown"
