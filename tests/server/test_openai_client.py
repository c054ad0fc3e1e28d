"""The official client's calls, streaming and not, against what the LLM itself says."""

import asyncio
import dataclasses
from typing import Any

import pytest

from qserve_jax import SamplingParams

openai = pytest.importorskip("openai", reason="needs the extra dev")

PROMPT = "Once upon a time"
GREEDY = SamplingParams(max_tokens=24)
MESSAGES: list = [
    {"role": "developer", "content": "Once"},
    {"role": "user", "content": [{"type": "text", "text": t} for t in ("upon a ", "time")]},
]


@pytest.fixture(autouse=True)
def nothing_leaks(pages_return):
    yield


def expected(llm, prompt=PROMPT, **params):
    (output,) = llm.generate(prompt, dataclasses.replace(GREEDY, **params))
    return output


def complete(client, prompt: Any = PROMPT, **params):
    params = {"max_tokens": 24, "temperature": 0} | params
    return client.completions.create(model="demo", prompt=prompt, **params)


def converse(client, **params):
    params = {"max_tokens": 24, "temperature": 0, "messages": MESSAGES} | params
    return client.chat.completions.create(model="demo", **params)


def test_completion(client, llm):
    answer, output = complete(client), expected(llm)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (output.text, output.finish_reason)
    assert choice.logprobs is None and choice.index == 0
    assert (answer.object, answer.model) == ("text_completion", "demo")
    prompt = len(output.prompt_token_ids)
    assert answer.usage is not None
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": prompt,
        "completion_tokens": 24,
        "total_tokens": prompt + 24,
    }


def test_completion_streams(client, llm):
    *chunks, last = complete(client, stream=True, stream_options={"include_usage": True})
    assert "".join(c.choices[0].text for c in chunks) == expected(llm).text
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len(chunks) > 1 and len({c.id for c in chunks}) == 1
    assert last.choices == [] and last.usage.completion_tokens == 24
    assert all(c.usage is None for c in chunks)


def test_chat(client, llm):
    answer = converse(client)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == expected(llm).text
    assert answer.object == "chat.completion" and answer.usage.completion_tokens == 24


def test_chat_streams(client, llm):
    first, *chunks = list(converse(client, stream=True))
    assert first.choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected(llm).text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(c.object == "chat.completion.chunk" for c in chunks)


def test_a_chat_goes_on_to_the_end_of_the_context(client, llm):
    answer = converse(client, max_tokens=None, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == llm.max_model_len
    assert converse(client, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3


def test_stop(client, llm):
    text = expected(llm).text
    stopped = text[: text.index("little")]
    (choice,) = complete(client, stop=["nowhere", "little"]).choices
    assert (choice.text, choice.finish_reason) == (stopped, "stop")
    chunks = list(converse(client, stop="little", stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == stopped
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_n_and_seed(client, llm):
    """Samples are those of the LLM, in any order of arrival."""
    params: dict[str, Any] = {"n": 3, "seed": 11, "temperature": 1.0, "max_tokens": 8}
    texts = [o.text for o in llm.generate(PROMPT, SamplingParams(**params))]
    assert len(set(texts)) > 1
    answer = complete(client, **params)
    assert [c.text for c in answer.choices] == texts
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert answer.usage is not None and answer.usage.completion_tokens == 24
    streamed = ["", "", ""]
    for chunk in converse(client, **params, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    negative: dict[str, Any] = params | {"seed": -5, "n": 1}
    same = SamplingParams(seed=2**64 - 5, temperature=1.0, max_tokens=8)
    (output,) = llm.generate(PROMPT, same)
    assert complete(client, **negative).choices[0].text == output.text


def test_several_prompts_and_token_ids(client, llm):
    prompts = ["Once upon a time", "The cat"]
    ids = [llm.tokenizer.encode(p) for p in prompts]
    texts = [expected(llm, i).text for i in ids]
    for given in (prompts, ids):
        answer = complete(client, prompt=given)
        assert [(c.index, c.text) for c in answer.choices] == list(enumerate(texts))
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert complete(client, prompt=ids[0]).choices[0].text == texts[0]
    assert complete(client, echo=True).choices[0].text == PROMPT + texts[0]
    assert complete(client, prompt=ids[0], echo=True).choices[0].text == PROMPT + texts[0]
    echo = complete(client, prompt=prompts, echo=True, stream=True)
    streamed = ["", ""]
    for chunk in echo:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [p + t for p, t in zip(prompts, texts, strict=True)]


def test_logprobs_of_completions(client, llm):
    output = expected(llm, logprobs=2)
    logprobs = complete(client, logprobs=2).choices[0].logprobs
    assert "".join(logprobs.tokens) == output.text
    assert logprobs.token_logprobs == pytest.approx([t.logprob for t in output.logprobs], abs=1e-6)
    for top, token, text in zip(
        logprobs.top_logprobs, output.logprobs, logprobs.tokens, strict=True
    ):
        assert list(top.values()) == pytest.approx([value for _, value in token.top], abs=1e-6)
        assert next(iter(top)) == text  # greedy: the likeliest is the chosen one
    starts = [output.text.index(logprobs.tokens[0])]
    for token in logprobs.tokens[:-1]:
        starts.append(starts[-1] + len(token))
    assert logprobs.text_offset == starts
    chunks = [c.choices[0].logprobs for c in complete(client, logprobs=2, stream=True)]
    for field in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        streamed = [value for chunk in chunks for value in getattr(chunk, field)]
        assert streamed == getattr(logprobs, field), field


def test_logprobs_of_chats(client, llm):
    output = expected(llm, logprobs=2)
    content = converse(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert "".join(t.token for t in content) == output.text
    assert b"".join(bytes(t.bytes) for t in content) == output.text.encode()
    values = [t.logprob for t in content]
    assert values == pytest.approx([t.logprob for t in output.logprobs], abs=1e-6)
    assert [t.top_logprobs[0].token for t in content] == [t.token for t in content]
    assert {len(t.top_logprobs) for t in content} == {2}
    chunks = converse(client, logprobs=True, top_logprobs=2, stream=True)
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == content


def test_every_field_reaches_the_engine(client):
    """Under its own name, with the temperature and max_tokens of OpenAI's API."""
    job = pytest.importorskip("qserve_jax.server.job")
    fields: dict[str, Any] = {
        **{"n": 2, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3, "top_k": 4},
        **{"presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.5},
        **{"min_p": 0.1, "stop_token_ids": [7], "ignore_eos": True, "skip_special_tokens": False},
        **{"include_stop_str_in_output": True, "logit_bias": {"5": -1.5}, "stop": ["a"]},
    }
    with_integers: dict[str, Any] = fields | {"logit_bias": {5: -1.5}}
    expected = SamplingParams(**with_integers)
    given = fields | {"logprobs": 2}
    completion = job.completion_job({"prompt": "a"} | given)
    assert completion.params == dataclasses.replace(expected, logprobs=2)
    chat = {"messages": [{"role": "user", "content": "a"}], **fields, "user": "me"}
    assert job.chat_job(chat | {"logprobs": True, "top_logprobs": 3}).params == (
        dataclasses.replace(expected, logprobs=3)
    )
    bare = job.completion_job({"prompt": "a"})
    assert (bare.params.temperature, bare.max_tokens) == (1.0, 16)
    assert job.chat_job({"messages": chat["messages"]}).max_tokens is None


@pytest.mark.slow
def test_bias_and_penalties(client, llm):
    first = expected(llm).token_ids[0]
    params: dict[str, Any] = {
        "presence_penalty": 1.5,
        "frequency_penalty": 1.0,
        "temperature": 0.01,
    }
    extra = {"repetition_penalty": 1.8, "top_k": 1, "min_p": 0.5, "top_p": 0.5, "max_tokens": 12}
    output = expected(llm, **params, **extra, logit_bias={first: -100})
    answer = complete(
        client, **params, logit_bias={str(first): -100}, extra_body=extra | {"user": "me"}
    )
    assert first not in output.token_ids and answer.choices[0].text == output.text


def test_models(client, llm):
    (model,) = client.models.list()
    assert model.id == "demo" and model.max_model_len == llm.max_model_len
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="use 'demo'"):
        client.models.retrieve("gpt/4")


def test_two_hundred_streams_at_once(served, llm):
    """They all come at once, wait in the queue, and get what they would have got alone."""
    texts = {n: expected(llm, max_tokens=n).text for n in (4, 7)}

    async def stream(client, tokens):
        params = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True}
        chunks = await client.completions.create(model="demo", **params)
        return tokens, "".join([c.choices[0].text async for c in chunks])

    async def main():
        url = f"http://127.0.0.1:{served.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(stream(client, (4, 7)[i % 2]) for i in range(200)))

    answers = asyncio.run(main())
    assert len(answers) == 200
    assert all(text == texts[tokens] for tokens, text in answers)
