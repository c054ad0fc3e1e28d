"""LLM: batches, streams, stops and refusals, on the embedded demo model."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qserve_jax
from qserve_jax import LLM, SamplingParams
from qserve_jax.checkpoint import LoadedModel, load_model
from qserve_jax.runtime import device_calls
from qserve_jax.runtime.batch import pad_rows, token_counts
from qserve_jax.runtime.engine import Call
from qserve_jax.runtime.kv_cache import init_cache
from qserve_jax.runtime.launches import Launched
from qserve_jax.runtime.sampling import SampleOutput
from qserve_jax.runtime.scheduler import Chunk
from qserve_jax.runtime.sequence import RequestOutput

DEMO = Path(qserve_jax.__file__).parent / "assets" / "demo"
PROMPTS = ["Once upon a time", "The cat", "Lily and Tom went to the park to play with a big ball."]


pytestmark = pytest.mark.usefixtures("in_thread")


@pytest.fixture(scope="module")
def exact() -> LoadedModel:
    return load_model(DEMO, precision="w16a16kv16", dtype="float32")


@pytest.fixture(scope="module")
def llm(exact) -> LLM:
    return LLM(exact, max_model_len=256, num_pages=64, max_num_seqs=8, seed=0)


@pytest.fixture(scope="module")
def greedy(llm) -> list[RequestOutput]:
    return llm.generate(PROMPTS, SamplingParams(max_tokens=24))


def test_a_batch_gives_what_each_prompt_gives_alone(llm, greedy):
    for prompt, together in zip(PROMPTS, greedy, strict=True):
        alone = llm.generate(prompt, SamplingParams(max_tokens=24))[0]
        assert alone.token_ids == together.token_ids and alone.text == together.text
    assert [output.index for output in greedy] == [0, 1, 2]
    assert all(output.finish_reason == "length" for output in greedy)


def test_greedy_tokens_are_the_argmax_of_the_whole_sequence(exact, greedy):
    for output in greedy:
        ids = jnp.asarray([output.prompt_token_ids + output.token_ids])
        best = np.asarray(jnp.argmax(exact.model.apply({"params": exact.params}, ids), axis=-1))[0]
        start = len(output.prompt_token_ids) - 1
        assert best[start:-1].tolist() == output.token_ids


def test_a_small_pool_serves_all_in_turn(exact, greedy):
    small = LLM(exact, max_model_len=256, num_pages=2, page_size=32, max_num_seqs=8)
    outputs = small.generate(PROMPTS, SamplingParams(max_tokens=24))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in greedy]
    assert small.pool.free_pages == 2


def compiled(llm) -> tuple[int, int]:
    """Programs compiled so far, of all LLMs: they share them."""
    return llm.engine.device._prefill._cache_size(), llm.engine.device._decode._cache_size()


def test_another_length_in_the_same_bucket_compiles_nothing(exact):
    llm = LLM(exact, max_model_len=1024, num_pages=32)
    llm.generate([[5] * 150], SamplingParams(max_tokens=120))
    before = compiled(llm)
    llm.generate([[7] * 250], SamplingParams(max_tokens=200))  # 5 and 8 pages, one bucket
    assert compiled(llm) == before


def test_a_batch_that_drains_compiles_little(exact):
    """Eight rows end one by one: programs for 8 and 2 rows, whatever each of them samples."""
    llm = LLM(exact, max_model_len=256, num_pages=64)
    params = [SamplingParams(max_tokens=4 + 3 * i) for i in range(7)]
    params += [SamplingParams(max_tokens=30, temperature=1.0, top_k=5, logprobs=2)]
    before = compiled(llm)
    llm.generate([PROMPTS[0]] * 8, params)
    prefill, decode = (now - then for now, then in zip(compiled(llm), before, strict=True))
    assert prefill == 1 and decode <= 2


def test_an_open_stream_holds_up_nobody(exact):
    """It runs on with the others, or gives its pages away, whether somebody reads it or not."""
    llm = LLM(exact, max_model_len=64, num_pages=2, page_size=32)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    alone = [llm.generate(prompt, params)[0].token_ids for prompt in PROMPTS[:2]]
    stream = llm.stream(PROMPTS[0], params)
    first = next(stream)
    assert llm.generate(PROMPTS[1], params)[0].token_ids == alone[1]
    assert first.token_ids + [t for piece in stream for t in piece.token_ids] == alone[0]
    assert llm.pool.free_pages == 2


def test_a_call_that_made_nothing_is_no_measure_of_a_step(exact):
    """It takes no time; the next call of who listens would be as long as calls get."""
    llm = LLM(exact, max_model_len=64, num_pages=4)
    engine = llm.engine
    (sequence,) = llm.sequences("The cat", None)
    sequence.listener = print
    engine.add([sequence])
    engine._accept()
    out = Launched(lambda: SampleOutput(jnp.zeros(1), jnp.ones(1)))
    call = Call([sequence], [(0, 64)], out, False, 0.0)
    engine._count(call, 4 * 0.1, np.asarray([4]))
    assert engine._most_steps() == 1
    engine._count(call, 1e-4, np.asarray([0]))
    assert engine._most_steps() == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_call_leaves_a_working_llm(exact, monkeypatch, when):
    """Whoever else runs goes on, without the cache too, and nothing is lost or said twice."""
    llm = LLM(exact, max_model_len=64, num_pages=4)
    params = SamplingParams(max_tokens=12)
    expected = [llm.generate(prompt, params)[0].token_ids for prompt in PROMPTS[:2]]
    other = llm.stream(PROMPTS[1], params)
    heard = next(other).token_ids
    decode = llm.engine.device._decode

    def interrupted(*args, **kwargs):
        if when == "after":
            decode(*args, **kwargs)  # the cache has been given away
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.device, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS[0], params)
    monkeypatch.undo()
    assert llm.generate(PROMPTS[0], params)[0].token_ids == expected[0]
    assert heard + [t for piece in other for t in piece.token_ids] == expected[1]
    assert llm.pool.free_pages == llm.pool.num_pages


def test_who_had_just_finished_when_a_call_was_interrupted_does_not_run_on(exact, monkeypatch):
    """Ctrl-C after a sequence's last token, before its pages are given back."""
    llm = LLM(exact, max_model_len=64, num_pages=4)
    (sequence,) = llm.sequences(PROMPTS[0], SamplingParams(max_tokens=5))
    share = llm.engine.scheduler.share_generated

    def interrupted(finished):
        if finished.done:
            raise KeyboardInterrupt
        share(finished)

    monkeypatch.setattr(llm.engine.scheduler, "share_generated", interrupted)
    llm.engine.add([sequence])
    with pytest.raises(KeyboardInterrupt):
        llm.engine.run_until(lambda: sequence.done)
    assert llm.engine.idle and llm.pool.free_pages == 4


def test_what_a_tokenizer_raises_is_its_sequences_alone(exact, monkeypatch):
    """Whoever has the turn gets its tokens; who owns the sequence gets the error."""
    llm = LLM(exact, max_model_len=64, num_pages=4)
    params = SamplingParams(max_tokens=12)
    expected = llm.generate(PROMPTS[0], params)[0].token_ids
    (broken,) = sequences = llm.sequences(PROMPTS[1], params)
    stream = llm._stream(sequences)
    next(stream)

    def fails(token):
        raise KeyError(token)

    monkeypatch.setattr(broken.detokenizer, "add", fails)
    assert llm.generate(PROMPTS[0], params)[0].token_ids == expected
    with pytest.raises(KeyError):
        list(stream)
    assert llm.engine.idle and llm.pool.free_pages == 4


def test_logits_that_are_not_finite_are_an_error(exact):
    params = jax.tree.map(lambda x: x, exact.params)
    params["final_norm"] = {"scale": jnp.full_like(params["final_norm"]["scale"], 1e38)}
    broken = LLM(dataclasses.replace(exact, params=params), max_model_len=64, num_pages=4)
    message = "prompt 0: the model's logits at token 0 are not finite in float32: use dtype"
    with pytest.raises(RuntimeError, match=message):
        broken.generate([[5, 6]] * 2, SamplingParams(max_tokens=3))
    assert broken.pool.free_pages == broken.pool.num_pages


def test_threads_take_turns(llm, greedy):
    params = SamplingParams(max_tokens=24)
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda p: llm.generate(p, params)[0], PROMPTS * 3))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in greedy] * 3
    assert llm.pool.free_pages == llm.pool.num_pages


def test_pieces_of_a_stream_are_the_text(llm, greedy):
    pieces, tokens, reasons = [""] * 3, [[], [], []], [None] * 3
    for event in llm.stream(PROMPTS, SamplingParams(max_tokens=24)):
        pieces[event.index] += event.text
        tokens[event.index] += event.token_ids
        reasons[event.index] = event.finish_reason
    assert pieces == [o.text for o in greedy]
    assert tokens == [o.token_ids for o in greedy]
    assert reasons == ["length"] * 3


def test_closing_a_stream_gives_its_pages_back(llm):
    stream = llm.stream(PROMPTS, SamplingParams(max_tokens=100))
    next(stream)
    assert llm.pool.free_pages < llm.pool.num_pages
    stream.close()
    assert llm.pool.free_pages == llm.pool.num_pages


def test_stop_strings_end_the_text_before_them(llm, greedy):
    text = greedy[0].text
    stop = text[10:16]  # across token boundaries
    output = llm.generate(PROMPTS[0], SamplingParams(max_tokens=24, stop=stop))[0]
    assert output.text == text[: text.index(stop)] and output.finish_reason == "stop"
    assert output.token_ids == greedy[0].token_ids[: len(output.token_ids)]
    kept = SamplingParams(max_tokens=24, stop=stop, include_stop_str_in_output=True)
    assert llm.generate(PROMPTS[0], kept)[0].text == text[: text.index(stop) + len(stop)]


def test_stop_token_ids_end_a_sequence_and_are_not_text(llm, greedy):
    stop = greedy[0].token_ids[5]
    output = llm.generate(PROMPTS[0], SamplingParams(max_tokens=24, stop_token_ids=[stop]))[0]
    first = greedy[0].token_ids.index(stop)
    assert output.token_ids == greedy[0].token_ids[: first + 1]
    assert output.text == llm.tokenizer.decode(output.token_ids[:-1])
    assert output.finish_reason == "stop"


def test_the_end_of_the_story_stops_unless_ignored(llm):
    end = llm.config.eos_token_ids[0]
    biased = {"max_tokens": 5, "logit_bias": {end: 100.0}}
    stopped, ignored = llm.generate(
        [PROMPTS[0]] * 2, [SamplingParams(**biased), SamplingParams(**biased, ignore_eos=True)]
    )
    assert (stopped.token_ids, stopped.finish_reason, stopped.text) == ([end], "stop", "")
    assert (ignored.token_ids, ignored.finish_reason) == ([end] * 5, "length")


def test_the_context_ends_a_sequence(exact):
    short = LLM(exact, max_model_len=20, num_pages=4)
    output = short.generate("Once upon a time", SamplingParams(max_tokens=100))[0]
    assert len(output.prompt_token_ids) + len(output.token_ids) == 20
    assert output.finish_reason == "length"


def test_a_seed_gives_the_same_tokens_in_any_batch(llm):
    params = SamplingParams(max_tokens=16, temperature=1.0, top_p=0.9, seed=7)
    alone = llm.generate(PROMPTS[1], params)[0].token_ids
    others = SamplingParams(max_tokens=30, temperature=1.5)
    batch = llm.generate(PROMPTS, [others, params, others])
    assert batch[1].token_ids == alone


def test_samples_of_one_prompt_differ_and_come_in_order(llm):
    outputs = llm.generate(PROMPTS[:2], SamplingParams(n=3, max_tokens=16, temperature=1.0, seed=1))
    assert [(o.index, o.sample) for o in outputs] == [(i, s) for i in (0, 1) for s in range(3)]
    assert len({tuple(o.token_ids) for o in outputs[:3]}) == 3


def test_requests_without_a_seed_draw_anew_and_an_engine_seed_repeats_them(exact):
    params = SamplingParams(max_tokens=12, temperature=1.0)

    def two_calls():
        llm = LLM(exact, max_model_len=64, num_pages=4, seed=3)
        return [llm.generate(PROMPTS[0], params)[0].token_ids for _ in range(2)]

    first = two_calls()
    assert first[0] != first[1]
    assert two_calls() == first


def test_logprobs_are_the_models_own(exact, llm):
    first, second = llm.generate(
        [PROMPTS[0]] * 2,
        [
            SamplingParams(max_tokens=6, logprobs=3),
            SamplingParams(max_tokens=6, logprobs=1, temperature=0.7, top_k=5, seed=1),
        ],
    )
    for output, count in ((first, 3), (second, 1)):
        ids = jnp.asarray([output.prompt_token_ids + output.token_ids])
        logits = jnp.asarray(exact.model.apply({"params": exact.params}, ids))
        want = np.asarray(jax.nn.log_softmax(logits, axis=-1))[0]
        assert output.logprobs is not None and len(output.logprobs) == 6
        for i, got in enumerate(output.logprobs):
            row = want[len(output.prompt_token_ids) - 1 + i]
            assert got.token_id == output.token_ids[i]
            np.testing.assert_allclose(got.logprob, row[got.token_id], atol=1e-4)
            assert [token for token, _ in got.top] == np.argsort(-row)[:count].tolist()
            np.testing.assert_allclose(
                [p for _, p in got.top], np.sort(row)[::-1][:count], atol=1e-4
            )


def test_penalties_count_across_device_calls(exact):
    """100 tokens take two calls of the decode loop; the counts must go on where they were."""
    llm = LLM(exact, max_model_len=256, num_pages=8)
    params = SamplingParams(max_tokens=100, frequency_penalty=2.0, ignore_eos=True)
    output = llm.generate(PROMPTS[0], params)[0]
    ids = jnp.asarray([output.prompt_token_ids + output.token_ids])
    logits = np.asarray(exact.model.apply({"params": exact.params}, ids), np.float32)[0]
    counts = np.zeros(logits.shape[-1], np.float32)
    start = len(output.prompt_token_ids) - 1
    for i, token in enumerate(output.token_ids):
        scores = logits[start + i] - 2.0 * counts
        assert scores[token] >= scores.max() - 1e-4
        counts[token] += 1


def test_penalties_see_all_pieces_of_a_prompt_and_all_tokens_of_a_preempted_one(exact, rng):
    """The pieces of a long prompt are rows of one call; what gives way is counted anew."""
    llm = LLM(exact, max_model_len=512, num_pages=13, page_size=32)
    prompts = [rng.integers(0, 2048, n).tolist() for n in (300, 40, 70)]
    bound = SamplingParams(max_tokens=30, frequency_penalty=2.0, ignore_eos=True)
    params = [dataclasses.replace(bound, repetition_penalty=r) for r in (5.0, 1.0, 1.0)]
    outputs = llm.generate(prompts, params)
    assert llm.stats.preemptions
    ids = pad_rows([o.prompt_token_ids + o.token_ids for o in outputs], 3, 330, 0)
    all_logits = np.asarray(exact.model.apply({"params": exact.params}, ids), np.float32)
    for prompt, p, output, logits in zip(prompts, params, outputs, all_logits, strict=True):
        for i, token in enumerate(output.token_ids):
            scores = logits[len(prompt) - 1 + i]
            seen = np.bincount(prompt + output.token_ids[:i], minlength=scores.size) > 0
            factor = np.where(scores > 0, 1 / p.repetition_penalty, p.repetition_penalty)
            scores = np.where(seen, scores * factor, scores)
            made = np.bincount(output.token_ids[:i], minlength=scores.size)
            scores = scores - p.frequency_penalty * made
            assert scores[token] >= scores.max() - 1e-3


def test_only_penalties_of_rows_that_end_a_prompt_are_counted(exact):
    llm = LLM(exact, max_model_len=256, num_pages=8)
    free, bound = SamplingParams(), SamplingParams(presence_penalty=1.0)
    unpenalized, ended, begun = llm.sequences([[1, 2], [3, 4, 4], [5, 6]], [free, bound, bound])
    ended.tokens, ended.goal = [7, 7], 4
    unpenalized.goal = begun.goal = 2
    chunks = [Chunk(unpenalized, 0, 2, True), Chunk(ended, 0, 4, False), Chunk(begun, 0, 1, False)]
    counts = token_counts(chunks, rows=4, vocab_size=9)
    assert np.argwhere(counts.prompt_mask).tolist() == [[1, 3], [1, 4]]
    assert np.argwhere(counts.output_counts).tolist() == [[1, 7]]


def test_chat_messages_go_through_the_template(llm, monkeypatch):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    monkeypatch.setattr(llm.tokenizer, "chat_template", template, raising=False)
    messages = [{"role": "user", "content": "Tell me a story."}]
    output = llm.generate(messages, SamplingParams(max_tokens=2))[0]
    assert llm.tokenizer.decode(output.prompt_token_ids) == "user: Tell me a story.\n"


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("", {}, "the prompt is empty: give at least one token"),
        ([[]], {}, "the prompt is empty"),
        ([[5], [99999]], {}, "prompt 1: token id 99999 is outside the vocabulary 0..2047"),
        ([[1] * 300], {}, "prompt has 300 tokens but the context holds 256: at most 255 leave"),
        ([["a"]], {}, "prompt holds 'a': a list prompt must be token ids or messages"),
        ([[{"role": "user", "content": "x"}]], {}, "the tokenizer has no chat template"),
        ({"prompt_token_ids": [3, 4]}, {}, "must be text, token ids or chat messages"),
        (b"hello", {}, "prompt b'hello' must be text, token ids or chat messages"),
        (None, {}, "prompt None must be text, token ids or chat messages"),
        ([5, "a"], {}, "prompt holds 'a'"),
        ([[5], None], {}, "prompt None must be text, token ids or chat messages"),
        ([[5]], {"stop_token_ids": [4000]}, "stop_token_ids has token id 4000"),
    ],
)
def test_bad_requests_are_refused_in_one_line(llm, prompts, params, message):
    with pytest.raises(ValueError) as error:
        llm.generate(prompts, SamplingParams(**params))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert llm.pool.free_pages == llm.pool.num_pages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 5000}, "max_model_len=5000 must be an integer in 2..1024"),
        ({"num_pages": -1}, "num_pages=-1 must be an integer of at least 1"),
        ({"page_size": 0}, "page_size=0 must be an integer in 1..4096"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be an integer of at least 1"),
        ({"num_pages": 0}, "num_pages=0 must be an integer of at least 1"),
        ({"page_size": 2.5}, "page_size=2.5 must be an integer in 1..4096"),
        ({"max_num_seqs": "4"}, "max_num_seqs='4' must be an integer of at least 1"),
        (
            {"enable_prefix_caching": "no"},
            "enable_prefix_caching='no' must be True or False: use None for the default",
        ),
        ({"seed": "x"}, "seed='x' must be an integer in 0..18446744073709551615"),
        ({"attends": "half"}, "attends='half' is unknown: use one of ('full', 'quantized')"),
        ({"backend": "mosaic"}, "backend='mosaic' is unknown: use auto or one of mosaic_sm90"),
    ],
)
def test_bad_settings_are_refused_in_one_line(exact, settings, message):
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        LLM(exact, **{"num_pages": 4, **settings})
    assert message in str(error.value)


def test_settings_may_be_numpys(exact):
    names = ("num_pages", "page_size", "max_num_seqs", "max_model_len", "max_num_batched_tokens")
    settings: dict[str, Any] = {name: np.int64(64) for name in names}
    settings["seed"] = np.uint64(2**64 - 1)
    llm = LLM(exact, **settings)
    assert len(llm.generate([[5, 6]] * 2, SamplingParams(max_tokens=3, temperature=1.0))) == 2


def test_a_pool_too_small_for_one_request_is_refused(exact):
    tiny = LLM(exact, max_model_len=256, num_pages=1, page_size=16)
    with pytest.raises(ValueError, match="need 2 pages of 16 tokens but the pool has 1: raise"):
        tiny.generate("Once upon a time", SamplingParams(max_tokens=20))


@pytest.mark.parametrize("attends", ["full", "quantized"])
def test_w4a8kv4_tells_a_story(attends):
    llm = LLM(DEMO, max_model_len=128, num_pages=8, attends=attends)
    output = llm.generate("Once upon a time", SamplingParams(max_tokens=40))[0]
    assert output.text.startswith(", there was a little girl named Lily. She loved to play")


def test_an_array_of_ids_is_a_prompt(llm):
    params = SamplingParams(max_tokens=3)
    expected = llm.generate([5, 6, 7], params)[0].token_ids
    for prompt in (np.array([5, 6, 7]), jnp.array([5, 6, 7]), np.array([[5, 6, 7]])):
        assert llm.generate(prompt, params)[0].token_ids == expected


def test_a_loaded_model_takes_the_backend_it_is_given(exact, monkeypatch):
    monkeypatch.setattr("qserve_jax.runtime.llm.unavailable", lambda name: None)
    llm = LLM(exact, num_pages=4, backend="mosaic_sm90")
    with pytest.raises(NotImplementedError, match="mosaic_sm90"):
        llm.generate([5, 6], SamplingParams(max_tokens=2))


def test_a_cache_that_no_piece_of_memory_holds_gets_fewer_pages(exact, monkeypatch):
    asked = []

    def pieces_of_40_pages(*args, num_pages, **kwargs):
        asked.append(num_pages)
        if num_pages > 40:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return init_cache(*args, num_pages=num_pages, **kwargs)

    monkeypatch.setattr(device_calls, "init_cache", pieces_of_40_pages)
    with pytest.warns(UserWarning, match="holds 51 pages: trying 40 .*ALLOCATOR=cuda_async"):
        llm = LLM(exact, max_model_len=64, max_num_seqs=64)
    assert asked == [64, 51, 40] and llm.pool.num_pages == 40
    assert llm.generate("The cat", SamplingParams(max_tokens=3))[0].token_ids
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        LLM(exact, num_pages=41)  # not fewer than was asked for
    refused = pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED")
    with pytest.warns(UserWarning), refused:
        LLM(exact, max_model_len=64, max_num_seqs=256)
    assert min(asked) == 40


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU may run it")
def test_a_backend_that_cannot_run_is_refused_at_once():
    with pytest.raises(ValueError, match="'mosaic_mma' cannot run: mosaic_mma needs an NVIDIA"):
        LLM(DEMO, backend="mosaic_mma")
    LLM(DEMO, backend="auto", max_model_len=32, num_pages=1)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_the_cache_lies_where_the_llm_was_made(exact):
    """Also a new one, though a device that is the default of one thread is none to another."""
    there = jax.devices()[1]
    with jax.default_device(there):
        llm = LLM(exact, max_model_len=64, num_pages=4)
    for _ in range(2):
        assert llm.generate([[5, 6]], SamplingParams(max_tokens=3))[0].token_ids
        assert cache_of(llm).pages.devices() == {there}
        llm.engine.device.forget_arrays()


def cache_of(llm) -> Any:
    """As the calls so far leave it."""
    return llm.engine.device._launcher.launch(lambda: llm.engine.device._cache).result()


def test_the_cache_is_donated_to_every_call(llm):
    before = cache_of(llm).pages
    llm.generate([[5, 6]], SamplingParams(max_tokens=2))
    assert before.is_deleted() and not cache_of(llm).pages.is_deleted()
    assert llm.engine.cache_bytes == cache_of(llm).pages.nbytes


def test_every_token_is_read_as_the_cache_stores_it_by_default(exact):
    assert LLM(exact, max_model_len=64, num_pages=2).attends == "quantized"


def test_the_status_is_logged(exact, caplog):
    llm = LLM(exact, max_model_len=64, num_pages=2)
    with caplog.at_level("INFO", "qserve_jax.engine"):
        llm.generate([[5, 6]], SamplingParams(max_tokens=2))
    assert any("running" in line and "pages " in line for line in caplog.messages)
