"""The wheel: nothing but qserve_jax at its top level, and everything in it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import qserve_jax

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("qserve_jax", "models", "pallas_kernels", "scripts", "tests")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel built from a copy of the repository."""
    copy = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "out"]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (copy / "out").glob("*.whl")
    return path


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_only_top_level_is_qserve_jax(wheel):
    info = f"qserve_jax-{qserve_jax.__version__}.dist-info"
    assert {name.split("/")[0] for name in names(wheel)} == {"qserve_jax", info}
    top_level = zipfile.ZipFile(wheel).read(f"{info}/top_level.txt")
    assert top_level.split() == [b"qserve_jax"]


def test_wheel_holds_every_module(wheel):
    """A folder without __init__.py would be left out silently."""
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "qserve_jax").rglob("*.py")}
    for linked in ("models", "pallas_kernels"):
        modules |= {f"qserve_jax/{p.relative_to(ROOT)}" for p in (ROOT / linked).rglob("*.py")}
    assert "qserve_jax/models/config.py" in modules
    assert {name for name in names(wheel) if name.endswith(".py")} == modules


def test_wheel_holds_the_data(wheel):
    assets = {p for p in (ROOT / "qserve_jax" / "assets").rglob("*") if p.is_file()}
    tuned = (ROOT / "pallas_kernels" / "w4a8_matmul" / "tuned").glob("*.json")
    data = {"qserve_jax/py.typed"} | {str(path.relative_to(ROOT)) for path in assets}
    data |= {f"qserve_jax/{path.relative_to(ROOT)}" for path in tuned}
    assert data <= names(wheel)
