"""A tiny float checkpoint on the disk, and tokens to calibrate it with."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from qserve_jax.checkpoint.export import export_hf
from qserve_jax.layerwise import open_source, quantize_checkpoint
from qserve_jax.models import ModelConfig, init_params
from qserve_jax.quantization.recipes import find_recipe

CONFIG = ModelConfig(
    model_type="qwen2",
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=64,
    tie_embeddings=True,
    qkv_bias=True,
    dtype="float32",
)
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 64)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """folder: of the checkpoint that holds `params` in float32."""

    config: ModelConfig
    params: dict
    folder: Path
    tokens: np.ndarray = dataclasses.field(default_factory=lambda: TOKENS)


def make_tiny(folder: Path, change=lambda params: params) -> Tiny:
    rng = np.random.default_rng(1)

    def leaf(path, w):
        normal = rng.standard_normal(w.shape).astype(np.float32)
        return {"scale": 1 + 0.2 * normal, "bias": 0.2 * normal}.get(path[-1].key, 4 * w)

    params = init_params(jax.random.key(0), CONFIG)
    params = change(jax.tree_util.tree_map_with_path(leaf, params))
    export_hf(folder, params, CONFIG, dtype="float32")
    return Tiny(CONFIG, params, folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def quantized(tiny, tmp_path_factory) -> tuple[Path, dict]:
    """(folder, report) of `tiny` after qoq-g128."""
    folder = tmp_path_factory.mktemp("made") / "out"
    recipe = find_recipe("qoq-g128")
    source = open_source(tiny.folder)
    report = quantize_checkpoint(folder, source, recipe, tiny.tokens)
    return folder, report


@pytest.fixture
def contents():
    """contents(folder): everything in it, bytes by name."""
    return lambda folder: {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
