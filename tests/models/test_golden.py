"""Parity with transformers, per family and rope type: the checkpoints of tests/golden."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax import LLM, SamplingParams
from qserve_jax.checkpoint import load_model

FOLDERS = sorted(p.parent for p in (Path(__file__).parents[1] / "golden").glob("*/config.json"))
PRECISION = "w16a16kv16"
apply = jax.jit(
    lambda model, params, tokens: model.apply({"params": params}, tokens), static_argnums=0
)
every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def expected(folder):
    with np.load(folder / "expected.npz") as arrays:
        return dict(arrays)


def rope_type(config):
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("rope_type") or rope.get("type") or "default"


def test_every_family_and_rope_type_has_a_folder():
    configs = [json.loads((folder / "config.json").read_text()) for folder in FOLDERS]
    assert {c["model_type"] for c in configs} == {"llama", "mistral", "qwen2", "qwen3"}
    ropes = {rope_type(c) for c in configs}
    assert ropes == {"default", "linear", "dynamic", "llama3", "yarn"}
    assert any(c["model_type"] == "qwen2" and c["use_sliding_window"] for c in configs)
    assert any(c["model_type"] == "qwen3" and c["attention_bias"] for c in configs)
    dtypes = {c.get("dtype") or c["torch_dtype"] for c in configs}
    assert dtypes == {"float32", "bfloat16", "float16"}


@every_folder
def test_logits_match_transformers(folder):
    want = expected(folder)
    m = load_model(folder, precision=PRECISION, dtype=jnp.float32)
    logits = apply(m.model, m.params, jnp.asarray(want["tokens"]))
    assert logits.shape == want["logits"].shape and logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits) - want["logits"]).max()
    assert error <= 1e-4 * np.abs(want["logits"]).max()


@every_folder
def test_greedy_tokens_match_transformers(folder):
    want = expected(folder)
    greedy = SamplingParams(max_tokens=len(want["greedy"]), ignore_eos=True)
    llm = LLM(str(folder), precision=PRECISION, dtype="float32")
    output = llm.generate([want["prompt"].tolist()], greedy)[0]
    assert list(output.token_ids) == want["greedy"].tolist()
