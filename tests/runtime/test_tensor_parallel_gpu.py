"""The tokens of several GPUs are those of one, for models whose arithmetic is the same but for the
order of sums: `pytest -m gpu` on a machine with two, or four."""

import functools
from pathlib import Path

import jax
import pytest

import qserve_jax
from qserve_jax import LLM, SamplingParams, load_model
from qserve_jax.models.sharding import tensor_mesh

pytestmark = pytest.mark.gpu

DEMO = Path(qserve_jax.__file__).parent / "assets" / "demo"
PROMPTS = ["Once upon a time", "The dog", "Lily and Ben went to the park. They saw"]


GROUPS = {2: 128, 4: -1}
"""The demo has two groups of o's inputs, so that four GPUs need kernels without."""


@pytest.fixture(params=GROUPS)
def ranks(request):
    if len(jax.devices()) < request.param:
        pytest.skip(f"needs {request.param} GPUs")
    return request.param


@functools.cache
def tokens(ranks, precision, group_size, backend, dtype="float32"):
    options = {"precision": precision, "group_size": group_size, "dtype": dtype}
    loaded = load_model(DEMO, **options, mesh=tensor_mesh(ranks))
    settings = {"max_model_len": 128, "num_pages": 32, "max_num_seqs": 4, "backend": backend}
    params = SamplingParams(max_tokens=48, ignore_eos=True)
    return [output.token_ids for output in LLM(loaded, **settings).generate(PROMPTS, params)]


@pytest.mark.parametrize("backend", ["reference", None], ids=["reference", "kernels"])
@pytest.mark.parametrize("precision", ["w16a16kv16", "w4a16kv4"])
def test_a_float32_model_makes_the_tokens_of_one_gpu(ranks, precision, backend):
    model = precision, None if precision == "w16a16kv16" else GROUPS[ranks], backend
    assert tokens(ranks, *model) == tokens(1, *model)


def test_w4a8_kernels_run_on_several_gpus(ranks):
    """Inputs of o and down have a scale per rank, so tokens may differ where two nearly tie."""
    model = "w4a8kv4", GROUPS[ranks], None, "bfloat16"
    one, several = tokens(1, *model), tokens(ranks, *model)
    assert [len(ids) for ids in several] == [48] * 3
    firsts = [next((i for i, (a, b) in enumerate(zip(*s, strict=True)) if a != b), 48)
              for s in zip(one, several, strict=True)]  # fmt: skip
    assert sum(firsts) > 24, firsts
