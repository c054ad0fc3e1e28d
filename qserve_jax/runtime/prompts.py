"""From what users write (text, chat messages, token ids) to token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

Prompt = str | Sequence[int] | Sequence[dict[str, str]]


def as_prompt_list(prompts: Any) -> list[Prompt]:
    """One bare prompt (a string, token ids, chat messages) or several, as a list of prompts.

    Raises ValueError on anything else.
    """
    if hasattr(prompts, "tolist"):  # a numpy or JAX array of token ids
        prompts = prompts.tolist()
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompt {prompts!r:.60} must be text, token ids or chat messages")
    if prompts and isinstance(prompts[0], (Integral, Mapping)):
        return [prompts]
    for prompt in prompts:
        if isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Sequence):
            raise ValueError(f"prompt {prompt!r:.60} must be text, token ids or chat messages")
    return list(prompts)


def encode_prompt(
    prompt: Any,
    tokenizer: Any,
    vocab_size: int,
    check_text: Callable[[str], None] = lambda text: None,
) -> list[int]:
    """Token ids of one prompt.

    tokenizer: a Hugging Face tokenizer, or None where the checkpoint has none.
    check_text: called with the text before it is tokenised, to refuse it by an exception.
    A string is encoded with the tokenizer's special tokens, chat messages go through its chat
    template (with the generation prompt), a list of ids is taken as it is.

    Raises ValueError on an empty prompt, text that is not UTF-8, ids outside the vocabulary, text
    without a tokenizer, or messages without a chat template.
    """
    if isinstance(prompt, str):
        check_text(prompt)
        ids = _encode_text(prompt, _require(tokenizer, "a text prompt")) if prompt else []
    elif len(prompt) and isinstance(prompt[0], dict):
        text = _text_of_messages(prompt, tokenizer)
        check_text(text)
        ids = _encode_text(text, tokenizer, add_special_tokens=False)  # the template has put them
    else:
        ids = [_token_id(token) for token in prompt]
    if not ids:
        raise ValueError("the prompt is empty: give at least one token")
    bad = [token for token in ids if not 0 <= token < vocab_size]
    if bad:
        raise ValueError(f"token id {bad[0]} is outside the vocabulary 0..{vocab_size - 1}")
    return ids


def _text_of_messages(messages: Sequence[dict[str, str]], tokenizer: Any) -> str:
    tokenizer = _require(tokenizer, "a chat prompt")
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template: give the prompt as text, or a template"
        )
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)


def _encode_text(text: str, tokenizer: Any, **options: Any) -> list[int]:
    if not is_utf8(text):
        raise ValueError(f"the prompt {text!r:.60} is not UTF-8 text: remove lone surrogates")
    return tokenizer.encode(text, verbose=False, **options)  # the engine tells if it is too long


def is_utf8(text: str) -> bool:
    """False for what Python makes of stray bytes in arguments, and of lone surrogates in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _require(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise ValueError(f"{what} needs a tokenizer, and the checkpoint has none: give token ids")
    return tokenizer


def _token_id(token: Any) -> int:
    if isinstance(token, bool) or not isinstance(token, Integral):
        raise ValueError(f"prompt holds {token!r}: a list prompt must be token ids or messages")
    return int(token)
