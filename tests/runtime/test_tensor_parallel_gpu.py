"""The tokens of several GPUs are those of one, for models whose arithmetic is the same but for the
order of sums: `pytest -m gpu` on a machine with two."""

from pathlib import Path

import jax
import pytest

import qserve_jax
from qserve_jax import LLM, SamplingParams, load_model
from qserve_jax.models.sharding import tensor_mesh

pytestmark = pytest.mark.gpu

DEMO = Path(qserve_jax.__file__).parent / "assets" / "demo"
PROMPTS = ["Once upon a time", "The dog", "Lily and Ben went to the park. They saw"]


def tokens(ranks, precision, backend, dtype="float32"):
    loaded = load_model(DEMO, precision=precision, dtype=dtype, mesh=tensor_mesh(ranks))
    settings = {"max_model_len": 128, "num_pages": 32, "max_num_seqs": 4, "backend": backend}
    params = SamplingParams(max_tokens=48, ignore_eos=True)
    return [output.token_ids for output in LLM(loaded, **settings).generate(PROMPTS, params)]


@pytest.mark.parametrize("backend", ["reference", None], ids=["reference", "kernels"])
@pytest.mark.parametrize("precision", ["w16a16kv16", "w4a16kv4"])
def test_a_float32_model_makes_the_tokens_of_one_gpu(precision, backend):
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    assert tokens(2, precision, backend) == tokens(1, precision, backend)


def test_w4a8_kernels_run_on_two_gpus():
    """Inputs of o and down have a scale per rank, so tokens may differ where two nearly tie."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    one, two = (tokens(ranks, "w4a8kv4", None, "bfloat16") for ranks in (1, 2))
    assert [len(ids) for ids in two] == [48] * 3
    firsts = [next((i for i, (a, b) in enumerate(zip(*s, strict=True)) if a != b), 48)
              for s in zip(one, two, strict=True)]  # fmt: skip
    assert sum(firsts) > 24, firsts
