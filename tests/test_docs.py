"""The Python in README.md and docs/architecture.md runs as printed; what pages name is there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qserve_jax
from qserve_jax import LLM, SamplingParams
from qserve_jax.models import CausalLM, ModelConfig

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "models", "pallas_kernels", "qserve_jax", "scripts", "tests")
FILES = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
ELSEWHERE = {"config.json", "generation_config.json", "results.json"}
"""Of checkpoints, or made by a command."""
DEMO = Path(qserve_jax.__file__).parent / "assets" / "demo"


def blocks(name: str) -> list[str]:
    text = (ROOT / name).read_text()
    return [
        b.replace('"DIR"', repr(str(DEMO))) for b in re.findall(r"```python\n(.*?)```", text, re.S)
    ]


def test_readme_generates(capsys):
    generate, _ = blocks("README.md")
    exec(generate, {})
    assert ", there was a little girl named Lily" in capsys.readouterr().out


def test_readme_quantises(capsys):
    _, quantise = blocks("README.md")
    config = ModelConfig("llama", 64, 128, 256, 2, 4, 2, 32, 64, tie_embeddings=True)
    params = CausalLM(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    names = {"jax": jax, "params": params}
    exec(quantise, names)
    assert "layers/q_proj/kernel" in capsys.readouterr().out
    assert isinstance(
        names["quantized"]["layers"]["q_proj"]["kernel"], qserve_jax.quantization.W4PerGroup
    )


def test_architecture_pipeline():
    """Its samples and their log-probabilities are those of the LLM with the same seeds."""
    (pipeline,) = blocks("docs/architecture.md")
    names: dict = {}
    exec(pipeline, names)
    prompt = names["m"].tokenizer.encode("Once upon a time")
    _, tokens, score = names["best_of_n"](names["params"], names["cache"], jnp.asarray(prompt))
    llm = LLM(DEMO, max_model_len=128, num_pages=8, attends="full")
    samples = [
        SamplingParams(temperature=1.0, logprobs=0, seed=i, max_tokens=names["new"])
        for i in range(names["n"])
    ]
    outputs = llm.generate([prompt] * names["n"], samples)
    scores = [sum(t.logprob for t in o.logprobs or ()) for o in outputs]
    best = outputs[int(np.argmax(scores))]
    np.testing.assert_allclose(score, max(scores), rtol=1e-3)
    assert tokens.size == names["new"]
    assert [t for t in tokens.tolist() if t >= 0] == best.token_ids  # -1 follows the end


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("name", PAGES)
def test_named_files_exist(name):
    text = (ROOT / name).read_text()
    for path in re.findall(r"(?:scripts|tests|docs)/[\w./-]+\.\w+", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"(?<![*\w])\w+\.(?:py|json)\b", text):
        assert path in FILES or path in ELSEWHERE, path


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for path, anchor in re.findall(
        r"\]\((?!http)([^)#\s]*)(?:#([^)\s]*))?\)", (ROOT / name).read_text()
    ):
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text()), f"{path}#{anchor}"


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
