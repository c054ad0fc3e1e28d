"""With attends="quantized" a request's tokens are its own: not chunking, sharing, preemption nor
neighbours change them, and nothing is lost, said twice, or compiled anew."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qserve_jax
from qserve_jax import LLM, SamplingParams, load_model
from qserve_jax.runtime import scheduler
from qserve_jax.runtime.compile_time import compile_time

DEMO = Path(qserve_jax.__file__).parent / "assets" / "demo"
# One size of everything, so that all tests share their programs.
SETTINGS: dict[str, Any] = {
    "attends": "quantized",
    "max_model_len": 128,
    "page_size": 16,
    "num_pages": 14,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
}


@pytest.fixture(scope="module")
def loaded():
    return load_model(DEMO)  # W4A8KV4 g128, bfloat16


def requests(seed):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(5, 2000, rng.integers(1, 60)).tolist() for _ in range(50)]
    params = [
        SamplingParams(max_tokens=int(n), ignore_eos=True)
        for n in rng.integers(1, 60, len(prompts))
    ]
    return prompts, params


@pytest.fixture(scope="module")
def alone(loaded):
    """The tokens of each of the first requests, one at a time in the same engine."""
    llm = LLM(loaded, enable_prefix_caching=False, **SETTINGS)
    return [llm.generate(p, s)[0].token_ids for p, s in zip(*requests(0), strict=True)]


def test_a_pool_that_forces_preemption_changes_no_token(loaded, alone):
    llm = LLM(loaded, **SETTINGS)
    llm.generate(*requests(1))  # compiles
    warm, preempted = compile_time.seconds, llm.stats.preemptions
    outputs = llm.generate(*requests(0))
    assert [o.token_ids for o in outputs] == alone
    assert compile_time.seconds == warm
    assert llm.stats.preemptions - preempted > 3
    assert llm.pool.free_pages == 14 and llm.engine.idle and not llm.engine._calls


def test_pieces_of_a_prompt_in_the_rows_of_one_call_change_no_token(loaded, monkeypatch):
    rng = np.random.default_rng(5)
    prompts = [rng.integers(5, 2000, n).tolist() for n in (100, 3, 64, 81)]
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    settings: dict[str, Any] = SETTINGS | {"num_pages": 40, "max_num_batched_tokens": 256}
    tokens, calls = [], []
    for piece in (256, 16):
        monkeypatch.setattr(scheduler, "PIECE", piece)
        llm = LLM(loaded, enable_prefix_caching=False, **settings)
        prefill, shapes = llm.engine.device._prefill, []

        def watched(*args, prefill=prefill, shapes=shapes, **kwargs):
            shapes.append(args[5].shape)
            return prefill(*args, **kwargs)

        monkeypatch.setattr(llm.engine.device, "_prefill", watched)
        tokens.append([o.token_ids for o in llm.generate(prompts, params)])
        calls.append(shapes)
    assert tokens[0] == tokens[1]
    assert calls == [[(2, 128), (2, 128)], [(16, 16), (2, 16)]]


@pytest.mark.parametrize(
    ("attends", "piece"), [("quantized", 256), ("quantized", 16), ("full", 256)]
)
def test_after_a_warm_up_nothing_is_compiled(loaded, monkeypatch, attends, piece):
    """Whatever comes, together or one by one, greedy or not, longer than a chunk or preempted."""
    monkeypatch.setattr(scheduler, "PIECE", piece)
    settings: dict[str, Any] = SETTINGS | {"attends": attends, "max_num_seqs": 4}
    settings["max_num_batched_tokens"] = 48
    llm, rng = LLM(loaded, **settings), np.random.default_rng(9)
    assert llm.warm_up(SamplingParams(temperature=1.0, logprobs=2)) > 0
    assert llm.stats.prompt_tokens == 0 and llm.pool.free_pages == 14
    warm = compile_time.seconds
    for together in (1, 3, 30):
        prompts = [rng.integers(5, 2000, rng.integers(1, 100)).tolist() for _ in range(together)]
        params = [
            SamplingParams(max_tokens=int(n), temperature=float(n % 2), ignore_eos=True)
            for n in rng.integers(1, 28, together)
        ]
        assert [len(o.token_ids) for o in llm.generate(prompts, params)] == [
            p.max_tokens for p in params
        ]
    assert compile_time.seconds == warm
    assert llm.stats.preemptions > 0
    llm.warm_up(SamplingParams(temperature=1.0, top_p=0.9), max_len=20)  # beside the first, for all
    warm = compile_time.seconds
    llm.generate([[7] * 99], SamplingParams(max_tokens=3, temperature=1.0, top_p=0.5, logprobs=1))
    assert compile_time.seconds == warm
    with pytest.raises(ValueError, match=r"max_len=129 must be an integer in 2\.\.128"):
        llm.warm_up(max_len=129)


def test_requests_may_run_while_programs_are_compiled(loaded):
    """Tokens are what they are, times leave compilation out; penalties and biases are warm too."""
    settings: dict[str, Any] = SETTINGS | {"max_num_seqs": 2, "max_num_batched_tokens": 16}
    llm, outputs, ended = LLM(loaded, **settings), [], threading.Event()
    asked = [7] * 12, SamplingParams(max_tokens=9, ignore_eos=True)

    def requests_all_the_time():
        while not ended.is_set():
            outputs.append(llm.generate(*asked)[0])

    thread = threading.Thread(target=requests_all_the_time)
    thread.start()
    bias = {5: 1.0, 6: 1.0, 7: 1.0}
    llm.warm_up(SamplingParams(repetition_penalty=1.2, logit_bias=bias), max_len=40)
    ended.set()
    thread.join()
    assert len({tuple(o.token_ids) for o in outputs}) == 1
    assert min(o.time_to_first_token for o in outputs) >= 0
    assert all(o.total_time >= o.time_to_first_token for o in outputs)
    assert llm.stats.prefill_seconds >= 0 and llm.stats.decode_seconds >= 0
    warm = compile_time.seconds
    llm.generate([[5, 6]] * 3, SamplingParams(max_tokens=4, repetition_penalty=1.1))
    mixed = [SamplingParams(max_tokens=4, logit_bias=some) for some in (None, {9: 2.0}, bias)]
    llm.generate([[5, 6]] * 3, mixed)
    assert compile_time.seconds == warm


def test_streams_say_everything_once(loaded, alone):
    llm = LLM(loaded, **SETTINGS)
    prompts, params = requests(0)
    told, ends = [[] for _ in prompts], [0] * len(prompts)
    for piece in llm.stream(prompts, params):
        assert not ends[piece.index]
        told[piece.index] += piece.token_ids
        ends[piece.index] += piece.finish_reason is not None
    assert told == alone and ends == [1] * len(prompts)
    assert llm.stats.preemptions > 0


def test_a_shared_prefix_is_computed_once(loaded):
    """24 requests that begin with the same 96 tokens and end with 3 of their own."""
    rng = np.random.default_rng(3)
    prefix = rng.integers(5, 2000, 96).tolist()
    prompts = [prefix + rng.integers(5, 2000, 3).tolist() for _ in range(24)]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    tokens, computed = [], []
    for caching in (False, True):
        llm = LLM(loaded, enable_prefix_caching=caching, **SETTINGS)
        tokens.append([o.token_ids for o in llm.generate(prompts, params)])
        computed.append(llm.stats.prompt_tokens)
        assert llm.stats.prompt_tokens + llm.stats.shared_tokens == 24 * 99
        assert llm.pool.free_pages == 14
    assert tokens[0] == tokens[1]
    assert computed == [24 * 99, 99 + 23 * 3]
    assert llm.status().prefix_hit_rate == pytest.approx(23 * 96 / (24 * 99))


def test_a_later_request_goes_on_from_an_earlier_one(loaded):
    llm = LLM(loaded, **SETTINGS)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    first = llm.generate([list(range(5, 40))], params)[0]
    dialogue = [*range(5, 40), *first.token_ids, 77, 78]
    before = llm.stats.prompt_tokens
    second = llm.generate([dialogue], params)[0].token_ids
    assert llm.stats.prompt_tokens - before == 67 - 64  # 64 of its tokens were cached
    fresh = LLM(loaded, enable_prefix_caching=False, **SETTINGS)
    assert fresh.generate([dialogue], params)[0].token_ids == second


def test_sharing_is_off_where_it_would_change_tokens(loaded):
    for attends, share in (("full", False), ("quantized", True)):
        settings: dict[str, Any] = SETTINGS | {"attends": attends}
        llm = LLM(loaded, **settings)
        llm.generate([[5] * 40] * 3, SamplingParams(max_tokens=1))
        assert (llm.stats.shared_tokens > 0) == share
