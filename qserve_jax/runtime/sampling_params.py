"""SamplingParams: how one request's tokens are chosen and when it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from numbers import Integral, Real

from qserve_jax.runtime.prompts import is_utf8

MAX_SAMPLES = 16384
MAX_LOGPROBS = 20
_FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127
_FLOAT32_TINY = 2.0**-126


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _int_from(low: int, high: int | None = None) -> Callable[[object], bool]:
    return lambda v: _is_int(v) and low <= v and (high is None or v <= high)  # type: ignore


def _real_in(low: float, high: float) -> Callable[[object], bool]:
    return lambda v: _is_real(v) and low <= v <= high  # type: ignore  # false for NaN


# field: (is the value allowed, the limit, the cure)
_LIMITS: dict[str, tuple[Callable[[object], bool], str, str]] = {
    "n": (
        _int_from(1, MAX_SAMPLES),
        f"an integer in [1, {MAX_SAMPLES}]", "use 1 for one completion"),
    "max_tokens": (
        lambda v: v is None or _int_from(1)(v),
        "an integer >= 1", "use 1 for the shortest completion"),
    "temperature": (_real_in(0, _FLOAT32_MAX), "a finite number >= 0", "use 0 for greedy"),
    "top_p": (lambda v: _is_real(v) and 0 < v <= 1, "in (0, 1]", "use 1 to turn it off"),  # type: ignore
    "top_k": (_int_from(-1), "an integer >= -1", "use 0 or -1 to turn it off"),
    "min_p": (_real_in(0, 1), "in [0, 1]", "use 0 to turn it off"),
    "repetition_penalty": (
        _real_in(_FLOAT32_TINY, _FLOAT32_MAX), "a finite number > 0", "use 1 to turn it off"),
    "presence_penalty": (_real_in(-2, 2), "in [-2, 2]", "use 0 to turn it off"),
    "frequency_penalty": (_real_in(-2, 2), "in [-2, 2]", "use 0 to turn it off"),
    "seed": (
        lambda v: v is None or _int_from(0, 2**64 - 1)(v),
        "an integer in [0, 2**64)", "use None for a seed chosen by the engine"),
    "logprobs": (
        lambda v: v is None or _int_from(0, MAX_LOGPROBS)(v),
        f"an integer in [0, {MAX_LOGPROBS}]", "use None for no log-probabilities"),
    "ignore_eos": (_is_bool, "True or False", "use False to end at the end-of-sequence token"),
    "include_stop_str_in_output": (_is_bool, "True or False", "use False to leave it out"),
    "skip_special_tokens": (_is_bool, "True or False", "use True to leave them out"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to sample one request. Fields and meanings are vLLM's; only `temperature` and
    `max_tokens` have other defaults (greedy, 256).

    n: completions per prompt, at most 16384. More than 1 needs temperature > 0: greedy ones would
      be equal.
    max_tokens: longest completion, in tokens; None for as many as the model's context has room for.
    temperature: logits are divided by it; 0 takes the most likely token (greedy, the default).
    top_k: only the k most likely tokens; 0 or -1 turns it off.
    top_p: only the fewest most likely tokens whose probabilities add up to top_p or more.
    min_p: only tokens at least min_p times as likely as the most likely one.
    repetition_penalty: > 1 makes tokens of the prompt and the output less likely (CTRL, HF).
    presence_penalty, frequency_penalty: subtracted from the logits of tokens in the output, once
      and once per occurrence (OpenAI).
    logit_bias: token id -> number in [-100, 100] added to its logit.
    seed: makes the completion reproducible, whatever else runs in the batch; None lets the engine
      choose.
    stop: a string or strings that end the completion; kept as a tuple.
    stop_token_ids: token ids that end the completion, as the end-of-sequence token does.
    ignore_eos: go on after the end-of-sequence token.
    logprobs: None, or how many of the most likely tokens' log-probabilities to return besides the
      chosen one's. They are the model's own, before all of the above.
    include_stop_str_in_output: keep the stop string at the end of the text.
    skip_special_tokens: leave special tokens out of the text.

    Not taken, so a TypeError: vLLM's min_tokens, bad_words, allowed_token_ids, prompt_logprobs,
    detokenize, spaces_between_special_tokens, truncate_prompt_tokens, logits_processors,
    structured_outputs, output_kind and extra_args.

    Raises ValueError, in one line, on any value outside its limits.
    """

    n: int = 1
    max_tokens: int | None = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: Sequence[str] | None = ()  # a str is a Sequence[str]; always a tuple once constructed
    stop_token_ids: Sequence[int] | None = ()  # so is this
    ignore_eos: bool = False
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self):
        for field, (allowed, limit, cure) in _LIMITS.items():
            value = getattr(self, field)
            if not allowed(value):
                raise ValueError(f"{field}={short(value)} must be {limit}: {cure}")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n={self.n} greedy completions would be equal: use temperature > 0, or n=1"
            )
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        object.__setattr__(self, "stop_token_ids", _checked_stop_ids(self.stop_token_ids))
        _check_bias(self.logit_bias)


def short(value: object) -> str:
    """The value in an error's line, without the middle of a long one."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]} ... {text[-20:]}"


def _checked_stop(stop: object) -> tuple[str, ...]:
    stop = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, Sequence):
        raise ValueError(f"stop={short(stop)} must be a string or strings: use [text, ...]")
    for string in stop:
        if not isinstance(string, str) or not string:
            raise ValueError(
                f"stop={short(stop)} must hold non-empty strings only: remove {short(string)}"
            )
        if not is_utf8(string):
            raise ValueError(
                f"stop={short(stop)} must hold UTF-8 text only: correct {short(string)}"
            )
    return tuple(stop)


def _checked_stop_ids(ids: object) -> tuple[int, ...]:
    ids = () if ids is None else ids
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise ValueError(f"stop_token_ids={short(ids)} must be a list of token ids: use [id, ...]")
    for token in ids:
        if not _int_from(0)(token):
            raise ValueError(
                f"stop_token_ids={short(ids)} must hold integers >= 0 only: remove {short(token)}"
            )
    return tuple(int(token) for token in ids)


def _check_bias(bias: object) -> None:
    if bias is None:
        return
    if not isinstance(bias, dict):
        raise ValueError(f"logit_bias={short(bias)} must be a dict: use {{token_id: bias}}")
    for token, value in bias.items():
        if not _int_from(0)(token):
            raise ValueError(
                f"logit_bias key {short(token)} must be an integer >= 0: use a token id"
            )
        if not _real_in(-100, 100)(value):
            raise ValueError(
                f"logit_bias[{token}]={short(value)} must be in [-100, 100]: "
                "use -100 to ban the token"
            )


def validate_vocab(params: SamplingParams, vocab_size: int) -> None:
    """Checks what SamplingParams cannot know alone: its token ids against the model's vocabulary.

    Raises ValueError if a `logit_bias` or `stop_token_ids` entry is not below `vocab_size`, or if
    `logprobs` asks for more than `vocab_size` tokens.
    """
    for field, ids in (
        ("logit_bias", params.logit_bias or {}),
        ("stop_token_ids", params.stop_token_ids or ()),
    ):
        for token in ids:
            if token >= vocab_size:
                raise ValueError(
                    f"{field} has token id {token}, but {vocab_size=}: use an id below it"
                )
    if params.logprobs is not None and params.logprobs > vocab_size:
        raise ValueError(f"logprobs={params.logprobs} exceeds {vocab_size=}: ask for fewer")
