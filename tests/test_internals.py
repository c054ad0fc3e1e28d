"""JAX's internals, which move between releases, are touched by pallas_kernels/intrinsics only."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INTERNALS = re.compile(
    r"(jaxlib\.[a-z]\w*|jax\._src|jax\.interpreters|jax\.extend|jax\.experimental\.mosaic"
    r"|jax\.experimental\.pallas\.mosaic_gpu)(\.|$)"
)
ALLOWED = {"qserve_jax/benchmarks/clock.py": {"jax.experimental.mosaic.gpu.profiler"}}  # CUPTI


def internals_in(source: str) -> set[str]:
    """The internal modules that a file imports, reaches as attributes of jax, or names whole."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {node.value} if re.fullmatch(r"[\w.]+", node.value) else set()
    return {name for name in names if INTERNALS.match(name)}


def test_only_intrinsics_touch_the_internals():
    files = [  # not through the links
        p for top in ("qserve_jax", "models", "pallas_kernels") for p in ROOT.glob(f"{top}/**/*.py")
    ]
    found = {str(p.relative_to(ROOT)): internals_in(p.read_text()) for p in files}
    touching = {path: names for path, names in found.items() if names}
    inside = {path for path in touching if "pallas_kernels/intrinsics/" in path}
    assert "pallas_kernels/intrinsics/kernel.py" in inside
    assert {path: names for path, names in touching.items() if path not in inside} == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "import jaxlib.mlir.ir",
        "from jaxlib.mlir import ir",
        "import jax._src.core as core",
        "from jax import _src",
        "from jax.experimental import mosaic",
        "from jax.experimental.pallas import mosaic_gpu as plgpu",
        "import jax\ndef f(x):\n    return jax._src.core.Tracer(x)",
        "import importlib\nimportlib.import_module('jax.interpreters.mlir')",
    ],
)
def test_a_use_is_found(source):
    assert internals_in(source)


def test_public_names_are_not():
    assert not internals_in("import jaxlib\nprint(jaxlib.__version__)")
    assert not internals_in("import jax\nfrom jax.experimental import pallas\njax.numpy.zeros(3)")
