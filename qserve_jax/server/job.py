"""A request, checked as far as it can be without the model: what to generate, and how to answer."""

from __future__ import annotations

import dataclasses
from typing import Any

from qserve_jax.runtime.prompts import Prompt
from qserve_jax.runtime.sampling_params import MAX_LOGPROBS, SamplingParams
from qserve_jax.server.errors import ApiError
from qserve_jax.server.fields import (
    BOOLEAN,
    CHAT,
    COMPLETION,
    check_kind,
    checked_fields,
    is_integer,
    sampling_params,
)

COMPLETION_TOKENS = 16
"""max_tokens of /v1/completions, by OpenAI's default. Chats go on as far as there is room."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A request for completions.

    prompts: as `LLM.generate` takes them; params serve all of them, but for max_tokens: None is as
    many as there is room for. model: None for the only one. echo: the prompt precedes its text.
    """

    chat: bool
    model: str | None
    prompts: list[Prompt]
    params: SamplingParams
    max_tokens: int | None
    stream: bool
    include_usage: bool
    echo: bool

    @property
    def num_sequences(self) -> int:
        """Completions asked for."""
        return len(self.prompts) * self.params.n


def completion_job(body: dict[str, Any]) -> Job:
    """The job of a body of /v1/completions. Raises ApiError 400."""
    fields = checked_fields(body, COMPLETION)
    logprobs = fields.get("logprobs")
    check_logprobs("logprobs", logprobs)
    echo = fields.get("echo", False)
    if echo and logprobs is not None:
        message = "logprobs of the prompt are not supported: leave out echo or logprobs"
        raise ApiError(400, message, param="echo", code="unsupported_value")
    prompt = fields.get("prompt")
    if prompt is None:
        raise ApiError(400, "prompt is missing: give a string or token ids", param="prompt")
    prompts: list[Prompt] = prompt
    if isinstance(prompt, str) or not prompt or is_integer(prompt[0]):
        prompts = [prompt]
    return make_job(
        fields,
        chat=False,
        prompts=prompts,
        logprobs=logprobs,
        max_tokens=fields.get("max_tokens", COMPLETION_TOKENS),
        echo=echo,
    )


def chat_job(body: dict[str, Any]) -> Job:
    """The job of a body of /v1/chat/completions. Raises ApiError 400."""
    fields = checked_fields(body, CHAT)
    for name in ("max_tokens", "max_completion_tokens"):  # of two the second counts
        if fields.get(name, 1) < 1:
            raise ApiError(400, f"{name}={fields[name]} must be >= 1: ask for more", param=name)
    top = fields.get("top_logprobs")
    check_logprobs("top_logprobs", top)
    if top is not None and not fields.get("logprobs"):
        message = f"top_logprobs={top} needs logprobs: set it to true"
        raise ApiError(400, message, param="top_logprobs")
    if not fields.get("messages"):
        message = 'messages is missing or empty: give [{"role": "user", "content": TEXT}]'
        raise ApiError(400, message, param="messages")
    return make_job(
        fields,
        chat=True,
        prompts=[[checked_message(i, m) for i, m in enumerate(fields["messages"])]],
        logprobs=(top or 0) if fields.get("logprobs") else None,
        max_tokens=fields.get("max_completion_tokens", fields.get("max_tokens")),
        echo=False,
    )


def make_job(
    fields: dict[str, Any],
    *,
    chat: bool,
    prompts: list[Prompt],
    logprobs: int | None,
    max_tokens: int | None,
    echo: bool,
) -> Job:
    """What both kinds share."""
    stream, options = fields.get("stream", False), fields.get("stream_options", {})
    if options and not stream:
        message = "stream_options are for streams: leave them out, or set stream"
        raise ApiError(400, message, param="stream_options")
    if unknown := options.keys() - {"include_usage", "include_obfuscation"}:
        message = f"stream_options has {min(unknown)!r:.60}: use include_usage"
        raise ApiError(400, message, param="stream_options")
    include_usage = options.get("include_usage")
    if include_usage is not None:
        check_kind("stream_options.include_usage", include_usage, BOOLEAN)
    given = {name: value for name, value in fields.items() if name != "max_tokens"}
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    return Job(
        chat=chat,
        model=fields.get("model"),
        prompts=prompts,
        params=sampling_params(given, logprobs),
        max_tokens=max_tokens,
        stream=stream,
        include_usage=bool(include_usage),
        echo=echo,
    )


def check_logprobs(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        message = f"{name}={value} must be in 0..{MAX_LOGPROBS}: ask for fewer"
        raise ApiError(400, message, param=name)


def checked_message(index: int, message: Any) -> dict[str, str]:
    """A message as chat templates take it. Raises ApiError 400 on anything but text."""
    place = f"messages[{index}]"
    if not isinstance(message, dict):
        raise ApiError(400, f"{place} is {message!r:.60}: give an object", param="messages")
    given = {name: value for name, value in message.items() if value not in (None, [])}
    role, content = given.pop("role", None), content_text(given.pop("content", None))
    name = given.pop("name", None)
    if not isinstance(role, str) or content is None or not isinstance(name, str | None):
        form = '{"role": ..., "content": TEXT}, as "name" text too'
        raise ApiError(400, f"{place} is {message!r:.60}: give {form}", param="messages")
    if given:
        text = f"{place} has {min(given)!r:.60}, which is not supported: remove it"
        raise ApiError(400, text, param="messages", code="unsupported_value")
    role = "system" if role == "developer" else role  # OpenAI's new name, which no template knows
    return {"role": role, "content": content} | ({} if name is None else {"name": name})


def content_text(content: Any) -> str | None:
    """The text of a message's content, which may be in parts; None where it is not text alone."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in content
    ]
    if not texts or not all(isinstance(text, str) for text in texts):
        return None
    return "".join(text for text in texts if text is not None)
