"""What importing costs, where names come from, and that imports point downwards."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qserve_jax

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("models", "pallas_kernels")


def run_python(code: str, *, cwd: Path, path: Path = ROOT) -> str:
    """Standard output of a fresh interpreter that runs `code` in `cwd` with `path` importable."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def copy_sources(target: Path, *, links: bool) -> None:
    """Copies the package to `target` with the links, or as a checkout without links has it."""
    ignore = shutil.ignore_patterns("__pycache__", "assets")
    for name in ("qserve_jax", *LINKED):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
    for name in () if links else LINKED:
        (target / "qserve_jax" / name).unlink()
        (target / "qserve_jax" / name).write_text(f"../{name}")  # what git writes then


def test_import_is_light(tmp_path):
    code = "import sys, qserve_jax; print(*sys.modules)"
    loaded = set(run_python(code, cwd=tmp_path).split())
    assert loaded.isdisjoint({"flax", "transformers", "orbax", "tokenizers", "torch"})


def test_quantize_params_needs_neither_flax_nor_transformers(tmp_path):
    code = "import sys; from qserve_jax import quantize_params; print(*sys.modules)"
    loaded = set(run_python(code, cwd=tmp_path).split())
    assert "qserve_jax.quantization" in loaded
    assert loaded.isdisjoint({"flax", "transformers", "orbax", "tokenizers", "torch"})


@pytest.mark.parametrize("name", qserve_jax.__all__)
def test_public_name(name):
    assert getattr(qserve_jax, name).__name__ == name
    assert name in dir(qserve_jax)


def test_unknown_name():
    with pytest.raises(AttributeError, match="'qserve_jax' has no attribute 'quantise'"):
        _ = qserve_jax.quantise


def test_beside_a_models_package_of_its_own(tmp_path):
    """A training repository's `models` and ours do not see each other, from its root."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("owner = 'training repository'")
    code = """
import jax.numpy as jnp, models, qserve_jax.models.config
from qserve_jax import QuantConfig, dequantize_params, quantize_params
weights = {"dense": {"kernel": jnp.eye(128)}}
same = dequantize_params(quantize_params(weights, QuantConfig()))["dense"]["kernel"]
print(models.owner, qserve_jax.models.config.ModelConfig.__module__, float(same[3, 3]))
"""
    words = run_python(code, cwd=tmp_path).strip().rsplit(" ", 2)
    assert words[:2] == ["training repository", "qserve_jax.models.config"]
    assert float(words[2]) == pytest.approx(1, abs=1 / 15)


def test_checkout_without_links(tmp_path):
    copy_sources(tmp_path, links=False)
    code = "from qserve_jax.models import config; import qserve_jax.pallas_kernels as k; "
    code += "print(config.__name__, config.__file__, k.__name__)"
    name, file, kernels = run_python(code, cwd=ROOT.parent, path=tmp_path).split()
    assert (name, kernels) == ("qserve_jax.models.config", "qserve_jax.pallas_kernels")
    assert Path(file) == tmp_path / "models" / "config.py"


@pytest.mark.parametrize(
    ("file", "module", "imported"),
    [
        ("models/config.py", "models.config", "runtime"),
        ("pallas_kernels/backend.py", "pallas_kernels.backend", "models.config"),
        ("pallas_kernels/backend.py", "pallas_kernels.backend", "quantization.params"),
        ("qserve_jax/quantization/qtensor.py", "quantization.qtensor", "quantization.params"),
        ("qserve_jax/quantization/params.py", "quantization.params", "pallas_kernels.backend"),
    ],
)
def test_upward_imports_are_found(tmp_path, file, module, imported):
    """The contracts of import-linter see an upward import, behind the links too."""
    copy_sources(tmp_path, links=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / file, "a") as source:
        source.write(f"\nimport qserve_jax.{imported}\n")
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint, "--no-cache"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    broken = result.stdout.partition("Broken contracts")[2]
    assert f"qserve_jax.{module} -> qserve_jax.{imported}" in " ".join(broken.split())
