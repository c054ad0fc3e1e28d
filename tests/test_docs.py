"""The Python in README.md and docs/architecture.md runs as printed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import qserve_jax
from qserve_jax.models import CausalLM, ModelConfig

ROOT = Path(__file__).parent.parent
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
    (pipeline,) = blocks("docs/architecture.md")
    names: dict = {}
    exec(pipeline, names)
    prompts = jnp.asarray([[1, 2, 3, 4], [5, 6, 0, 0]])
    _, first, second = names["best_next"](
        names["params"], names["cache"], prompts, jnp.asarray([4, 2])
    )
    model = names["m"].model
    for row, length in ((0, 4), (1, 2)):
        ids = jnp.append(prompts[row, :length], first[row])[None]
        logits = model.apply({"params": names["params"]}, ids)
        assert jnp.argmax(logits[0, length - 1]) == first[row]
    assert first.shape == second.shape == (2,)


@pytest.mark.parametrize("name", ["README.md", "docs/architecture.md"])
def test_named_files_exist(name):
    for path in re.findall(r"(?:scripts|tests|docs)/[\w./-]+\.\w+", (ROOT / name).read_text()):
        assert (ROOT / path).exists(), path
