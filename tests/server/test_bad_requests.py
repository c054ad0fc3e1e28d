"""Bad requests get 4xx and OpenAI's error object, which names what is wrong."""

import json
import re

import pytest

pytest.importorskip("openai", reason="needs the extra dev")
Limits = pytest.importorskip("qserve_jax.server.service").Limits

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KEY = "sk-only-the-tests-know"


@pytest.fixture(autouse=True)
def nothing_leaks(pages_return):
    yield


def refused(served, path, body, status=400, **headers):
    """The error object of a request that is answered with this status."""
    if not isinstance(body, (bytes, str)):
        body = json.dumps(body)
    got, answer, _ = served.request("POST", path, body, **headers)
    assert got == status, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and len(error["message"]) < 400
    return error


def good(**fields):
    return {"prompt": "Once", "max_tokens": 2, "temperature": 0} | fields


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"prompt": "a",}', "not JSON"),
        (b'{"prompt": "\xff\xfe"}', "not UTF-8"),
        ('{"prompt": "Ä"}'.encode("utf-16"), "not UTF-8"),
        (b"[1]", "send a JSON object"),
        (b'"text"', "send a JSON object"),
        (b"[" * 200_000, "not JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is no number of JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature=inf must be a finite number"),
        (b'{"prompt": "\\ud800"}', "lone surrogates"),
        (b'{"prompt": "a", "\\ud800": 1}', "is no field"),
        (b'{"prompt": "a", "stop": "\\ud800"}', "UTF-8"),
    ],
)  # fmt: skip
def test_malformed_bodies(served, body, words):
    assert words in refused(served, COMPLETIONS, body)["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": 5}, "prompt", "must be a string"),
        ({"prompt": {}}, "prompt", "must be a string"),
        ({"prompt": ["a", 1]}, "prompt", "must be a string"),
        ({"prompt": [[1], "a"]}, "prompt", "must be a string"),
        ({"prompt": [True]}, "prompt", "must be a string"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": [2048]}, "prompt", "2048 is outside the vocabulary"),
        ({"prompt": [-1]}, "prompt", "-1 is outside the vocabulary"),
        ({"prompt": [10**30]}, "prompt", "outside the vocabulary"),
        ({"prompt": "word " * 200}, "prompt", "the limit is 127"),
        ({"max_tokens": "5"}, "max_tokens", "an integer"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"max_tokens": 1.5}, "max_tokens", "an integer"),
        ({"temperature": "hot"}, "temperature", "a number"),
        ({"temperature": -1}, "temperature", ">= 0"),
        ({"top_p": 0}, "top_p", "(0, 1]"),
        ({"presence_penalty": 3}, "presence_penalty", "[-2, 2]"),
        ({"n": 129, "temperature": 1}, "n", "at most 128"),
        ({"n": 2}, "n", "temperature > 0"),
        ({"n": True}, "n", "an integer"),
        ({"seed": 2**64}, "seed", "2**64"),
        ({"seed": -(2**63) - 1}, "seed", "2**64"),
        ({"stop": 5}, "stop", "a string or a list"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": "a" * 257}, "stop", "256 characters"),
        ({"stop_token_ids": [9999]}, "stop_token_ids", "vocab_size=2048"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "'a' must be a token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "[-100, 100]"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ({"logprobs": 21}, "logprobs", "0..20"),
        ({"logprobs": True}, "logprobs", "an integer"),
        ({"logprobs": 1, "echo": True}, "echo", "not supported"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "'x'"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"best_of": True}, "best_of", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"max_token": 5}, "max_token", "no field"),
        ({"messages": []}, "messages", "no field"),
    ],
)
def test_wrong_fields(served, fields, param, words):
    """Also where a stream is asked for: nothing has been sent yet."""
    error = refused(served, COMPLETIONS, good(**fields))
    assert words in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == param
    if "stream" not in fields and "stream_options" not in fields:
        assert refused(served, COMPLETIONS, good(**fields, stream=True)) == error


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": None}, "missing or empty"),
        ({"messages": []}, "missing or empty"),
        ({"messages": "hello"}, "a list"),
        ({"messages": ["hello"]}, "messages[0] is 'hello'"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"content": "a"}]}, "messages[0]"),
        ({"messages": [{"role": 1, "content": "a"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "tool_calls"),
        ({"messages": [{"role": "refused", "content": "a"}]}, "no such role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogates"),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"logprobs": 2}, "true or false"),
        ({"tools": [{"type": "function"}]}, "tools="),
        ({"response_format": {"type": "json_object"}}, "response_format="),
        ({"max_completion_tokens": 0}, "max_completion_tokens=0 must be >= 1"),
        ({"max_tokens": -1, "max_completion_tokens": 2}, "max_tokens=-1 must be >= 1"),
    ],
)
def test_wrong_chats(served, fields, words):
    body = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 2} | fields
    assert words in refused(served, CHAT, body)["message"]


def test_what_asks_for_nothing_is_taken(served):
    neutral = {"best_of": 1, "suffix": None, "user": "me", "stop": None, "logit_bias": {}, "n": 1}
    assert served.complete(**good(**neutral))[0] == 200
    chat = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "store": False}
    message = {"role": "user", "content": "Once", "tool_calls": None, "annotations": []}
    body = json.dumps({"messages": [message], "max_tokens": 2, "temperature": 0, **chat})
    assert served.request("POST", CHAT, body)[0] == 200


def test_unknown_model_route_method_and_content_type(served):
    error = refused(served, COMPLETIONS, good(model="gpt-4"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "use 'demo'" in error["message"]
    refused(served, COMPLETIONS, good(model="\ud800"), 404)
    refused(served, "/v1/embeddings", good(), 404)
    assert served.request("GET", COMPLETIONS)[0] == 405
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refused(served, COMPLETIONS, good(), 415, Content_Type=kind)
    kind = "Application/JSON; charset=utf-8"
    assert served.request("POST", COMPLETIONS, json.dumps(good()), Content_Type=kind)[0] == 200


def test_oversized_bodies(llm, serve):
    with serve(llm, limits=Limits(max_body_bytes=1000)) as served:
        limit = json.dumps(good(user=""))
        assert served.complete(**good(user="x" * (1000 - len(limit))))[0] == 200
        error = refused(served, COMPLETIONS, good(user="x" * (1001 - len(limit))), 413)
        assert "1001 bytes" in error["message"] and "limit is 1000" in error["message"]
        chunks = iter([b"x" * 700, b"x" * 700])  # without a Content-Length
        assert served.request("POST", COMPLETIONS, chunks)[0] == 413
        assert served.request("POST", COMPLETIONS, b"x" * 2**23)[0] == 413  # sent to its end
        assert served.complete(**good())[0] == 200


@pytest.mark.parametrize("chat", [False, True])
def test_what_cannot_but_be_too_long_is_not_tokenised(served, llm, monkeypatch, chat):
    """Tokens of the demo have at most the 13 characters of <|endoftext|>, and one comes before."""
    encoded, encode = [], llm.tokenizer.encode
    monkeypatch.setattr(llm.tokenizer, "encode", lambda t, **o: encoded.append(t) or encode(t, **o))

    def body(text):
        messages = [{"role": "user", "content": text}]
        return good(prompt=None, messages=messages) if chat else good(prompt=text)

    path, field, start = COMPLETIONS, "prompt", ""
    if chat:
        path, field, start = CHAT, "messages", "<|endoftext|>"
    longest = "<|endoftext|>" * 126
    assert served.request("POST", path, json.dumps(body(longest)))[0] == 200
    assert encoded.pop() == start + longest
    error = refused(served, path, body("a" * (13 * (127 - chat))))
    assert f" {13 * (127 - chat) + 1} tokens" in error["message"] and encoded.pop()
    error = refused(served, path, body("a" * (2**22 - 200)))
    assert (error["code"], error["param"]) == ("context_length_exceeded", field)
    assert not encoded and "the limit is 127 tokens" in error["message"]


def test_chat_without_a_template(served, llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    body = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 2}
    error = refused(served, CHAT, body)
    assert "no chat template: use /v1/completions" in error["message"]
    assert error["param"] == "messages"
    assert served.complete(**good())[0] == 200


def test_prompt_and_queue_limits(llm, serve):
    with serve(llm, limits=Limits(max_prompt_tokens=5, max_queue=1)) as served:
        assert served.complete(**good(prompt=[5] * 5))[0] == 200
        error = refused(served, COMPLETIONS, good(prompt=[5] * 6))
        assert error["code"] == "context_length_exceeded" and "6 tokens" in error["message"]
        too_many = good(n=4, temperature=1)
        assert "the limit is 3" in refused(served, COMPLETIONS, too_many)["message"]
        with served.client() as client:
            long = {"max_tokens": 120, "temperature": 1, "extra_body": {"ignore_eos": True}}
            params = {"model": "demo", "prompt": [5, 6], "stream": True, **long}
            stream = client.completions.create(n=3, **params)  # two run, one waits
            next(stream)
            error = refused(served, COMPLETIONS, good(), 429)
            assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
            message = (
                "3 completions are accepted and 1 more would exceed 2 places and the queue of 1"
            )
            assert error["message"].startswith(message)
            assert len({c.choices[0].index for c in stream}) == 3  # nor does it harm the others
        assert served.complete(**good())[0] == 200


def test_api_key(llm, serve, capfd):
    with serve(llm, api_key=KEY) as served:
        assert served.request("GET", "/health")[0] == 200
        for path in ("/v1/models", "/v1/models/demo", "/metrics", "/", "/health/", "/v1/health"):
            assert served.request("GET", path)[0] == 401, path
        wrong = (KEY, f"Basic {KEY}", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer ü")
        for headers in ({}, *({"Authorization": value} for value in wrong)):
            for path in (COMPLETIONS, CHAT):
                error = refused(served, path, good(), 401, **headers)
                assert error["code"] == "invalid_api_key" and KEY not in json.dumps(error)
        right = {"Authorization": f"Bearer {KEY}"}
        assert served.request("GET", "/v1/models", **right)[0] == 200
        assert served.request("POST", COMPLETIONS, json.dumps(good()), **right)[0] == 200
        _, text, headers = served.request("GET", "/metrics", **right)
        assert re.search(r'requests_total\{route="/v1/completions",status="401"\} 7', text)
        assert headers["www-authenticate"] is None
    assert KEY not in "".join(capfd.readouterr())
