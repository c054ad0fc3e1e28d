"""The fields of a request's body: which there are, and of what kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from qserve_jax.runtime.sampling_params import SamplingParams
from qserve_jax.server.errors import ApiError

Kind = tuple[Callable[[Any], bool], str]
"""Whether a value is of the kind, and what the kind is called."""


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_texts(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and all(isinstance(text, str) for text in texts)


def is_integers(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_integer, value))


def is_prompt(value: Any) -> bool:
    lists = isinstance(value, list) and bool(value) and all(map(is_integers, value))
    return is_texts(value) or is_integers(value) or lists


INTEGER: Kind = (is_integer, "an integer")
NUMBER: Kind = (is_number, "a number")
BOOLEAN: Kind = (lambda v: isinstance(v, bool), "true or false")
TEXT: Kind = (lambda v: isinstance(v, str), "a string")
TEXTS: Kind = (is_texts, "a string or a list of strings")
INTEGERS: Kind = (is_integers, "a list of integers")
OBJECT: Kind = (lambda v: isinstance(v, dict), "an object")
LIST: Kind = (lambda v: isinstance(v, list), "a list")
PROMPT: Kind = (is_prompt, "a string, a list of strings, token ids, or a list of lists of them")

# Names and meanings are OpenAI's, then vLLM's. Those of SAMPLING are SamplingParams' own.
SAMPLING: dict[str, Kind] = {
    "n": INTEGER,
    "max_tokens": INTEGER,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "logit_bias": OBJECT,
    "seed": INTEGER,
    "stop": TEXTS,
    "top_k": INTEGER,
    "min_p": NUMBER,
    "repetition_penalty": NUMBER,
    "stop_token_ids": INTEGERS,
    "ignore_eos": BOOLEAN,
    "skip_special_tokens": BOOLEAN,
    "include_stop_str_in_output": BOOLEAN,
}
COMMON: dict[str, Kind] = {
    **SAMPLING,
    "model": TEXT,
    "stream": BOOLEAN,
    "stream_options": OBJECT,
}
COMPLETION: dict[str, Kind] = {**COMMON, "prompt": PROMPT, "echo": BOOLEAN, "logprobs": INTEGER}
CHAT: dict[str, Kind] = {
    **COMMON,
    "messages": LIST,
    "max_completion_tokens": INTEGER,
    "logprobs": BOOLEAN,
    "top_logprobs": INTEGER,
}

# What says something about the client or its bill, and nothing about the answer.
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
}
# What this server cannot do: taken where it asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}

MOST = {"n": 128, "stop": 16, "stop_token_ids": 64, "logit_bias": 1024}
"""A request that asks for more would cost all others: the engine looks at these at each token."""
LONGEST_STOP = 256


def checked_fields(body: dict[str, Any], known: dict[str, Kind]) -> dict[str, Any]:
    """The fields that are given, null being the same as not given. Raises ApiError 400."""
    fields = {}
    for name, value in body.items():
        if value is None or name in IGNORED:
            continue
        if name in known:
            check_kind(name, value, known[name])
            fields[name] = value
        elif name not in NEUTRAL:
            raise ApiError(400, f"{name!r:.60} is no field of this request: remove it", param=name)
        elif not any(type(value) is type(v) and value == v for v in NEUTRAL[name]):  # True == 1
            message = f"{name}={value!r:.60} is not supported: leave it out"
            raise ApiError(400, message, param=name, code="unsupported_value")
    return fields


def check_kind(name: str, value: Any, kind: Kind) -> None:
    allowed, description = kind
    if not allowed(value):
        raise ApiError(400, f"{name}={value!r:.60} must be {description}", param=name)


def sampling_params(fields: dict[str, Any], logprobs: int | None) -> SamplingParams:
    """SamplingParams of the fields of SAMPLING, temperature 1 by default as in OpenAI's API.

    Raises ApiError 400 on what SamplingParams refuses, and on more than MOST.
    """
    given = {name: fields[name] for name in SAMPLING if name in fields}
    for name, most in MOST.items():
        check_most(name, given.get(name, 0), most)
    stops = given.get("stop", ())
    if any(len(stop) > LONGEST_STOP for stop in ([stops] if isinstance(stops, str) else stops)):
        message = f"a stop string has more than {LONGEST_STOP} characters: shorten it"
        raise ApiError(400, message, param="stop")
    if -(2**63) <= given.get("seed", 0) < 0:  # a signed integer to OpenAI
        given["seed"] += 2**64
    if "logit_bias" in given:
        given["logit_bias"] = integer_keys(given["logit_bias"])
    try:
        return SamplingParams(**{"temperature": 1.0, **given}, logprobs=logprobs)
    except ValueError as error:
        raise ApiError(400, str(error), param=named_field(error)) from None


def named_field(error: ValueError) -> str | None:
    """The field that a message of SamplingParams begins with."""
    name = re.split(r"\W", str(error))[0]
    return name if name in SAMPLING else None


def check_most(name: str, value: Any, most: int) -> None:
    count = value if is_integer(value) else 1 if isinstance(value, str) else len(value)
    if count > most:
        what = f"{name}={value}" if is_integer(value) else f"{name} has {count} entries and"
        raise ApiError(400, f"{what} must be at most {most}: ask for fewer", param=name)


def integer_keys(bias: dict[str, Any]) -> dict[int, Any]:
    """JSON has no other keys than strings."""
    wrong = [key for key in bias if not (key.isascii() and key.isdigit() and len(key) < 12)]
    if wrong:
        message = f"logit_bias key {wrong[0]!r:.60} must be a token id: use its digits"
        raise ApiError(400, message, param="logit_bias")
    return {int(key): value for key, value in bias.items()}
