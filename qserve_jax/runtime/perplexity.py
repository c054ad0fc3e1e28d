"""Perplexity of a language model on a text, with the uncertainty that the text's length leaves."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from qserve_jax.models.llama import CausalLM
from qserve_jax.quantization.qtensor import Array

Span = tuple[int, int, int]
"""(begin, end, first): a window holds text tokens begin..end-1 and scores those from `first` on."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity exp(loss) of a text and its standard error.

    loss: mean negative log likelihood in nats over the `num_tokens` scored tokens.
    loss_standard_error: from the spread between windows. The loss is a ratio of sums over windows,
      sum S_w / sum n_w, and tokens of one window depend on each other, so windows are the samples:
      variance = W / (W - 1) * sum (S_w - loss * n_w)^2 / (sum n_w)^2 (the ratio estimator of
      cluster sampling). NaN for a single window, which says nothing of the spread.
    standard_error: that of `value`, by the delta method: value * loss_standard_error.
    window_losses, window_tokens: f64[W] S_w and i64[W] n_w of the windows that score tokens.
    greedy_tokens: i32[num_tokens], the model's likeliest token in place of each scored one.
    """

    value: float
    standard_error: float
    loss: float
    loss_standard_error: float
    num_tokens: int
    window_losses: np.ndarray = dataclasses.field(repr=False, compare=False)
    window_tokens: np.ndarray = dataclasses.field(repr=False, compare=False)
    greedy_tokens: np.ndarray = dataclasses.field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


def perplexity(
    model: CausalLM,
    params: Any,
    token_ids: Any,
    *,
    seq_len: int = 2048,
    stride: int | None = None,
    kv_bits: int = 16,
    batch_size: int = 1,
    bos_token_id: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of `model` with `params` (float or quantised) on one text, `token_ids` int[n].

    Windows of `seq_len` tokens begin every `stride` tokens, and each token is scored once, in the
    first window that holds it (Hugging Face's sliding-window convention). stride None means windows
    that do not overlap (the WikiText-2 convention): then the first token of each window has no
    context and is not scored. A smaller stride gives every token but the very first at least
    seq_len - stride tokens of context (where the text has them). The last, partial window counts.
    bos_token_id: put in front of every window, as one of its seq_len tokens; then the first token
      of each window is scored too.
    kv_bits: 4 or 8 quantises K and V as a cache of that many bits does, for every query.
    batch_size: windows per device call; logits f32[batch_size, seq_len, V] must fit in memory.
    progress: a bar on stderr.

    Losses are float32 per token, summed in float64. One shape, so one compilation per (model,
    kv_bits, batch_size, seq_len). Raises ValueError for arguments out of range.
    """
    ids = _checked_ids(token_ids)
    prefix = _checked_ids([] if bos_token_id is None else [bos_token_id])
    _check_vocabulary(np.concatenate([prefix, ids]), model.config.vocab_size)
    _check_options(model, seq_len, kv_bits, batch_size)
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens: give at least 2")
    spans = window_spans(len(ids), seq_len - len(prefix), stride, scores_first=len(prefix) > 0)
    sums, greedy = [], []
    for start in tqdm(range(0, len(spans), batch_size), disable=not progress, desc="perplexity"):
        batch = spans[start : start + batch_size]
        tokens, lengths = _pad_windows(ids, batch, prefix, batch_size, seq_len)
        scores = token_losses(model, params, tokens, lengths, kv_bits)
        losses, likeliest = np.asarray(scores[0], np.float64), np.asarray(scores[1])
        offset = len(prefix) - 1  # losses[:, i] is the loss of the window's token i + 1
        for row, (begin, end, first) in enumerate(batch):
            scored = slice(first - begin + offset, end - begin + offset)
            sums.append(losses[row, scored].sum())
            greedy.append(likeliest[row, scored])
    counts = np.array([end - first for _, end, first in spans])
    return _summarize(np.array(sums), counts, np.concatenate(greedy))


def loss_difference(a: Perplexity, b: Perplexity) -> tuple[float, float]:
    """(a.loss - b.loss, its standard error) in nats per token, of two runs over the same windows.

    Paired: what makes a window hard for both cancels, so this is far sharper than the two standard
    errors apart. Raises ValueError when the windows differ.
    """
    _check_same_windows(a, b)
    return _ratio(a.window_losses - b.window_losses, a.window_tokens)


def _check_same_windows(a: Perplexity, b: Perplexity) -> None:
    if not np.array_equal(a.window_tokens, b.window_tokens):
        raise ValueError(
            f"windows differ ({a.num_tokens} tokens in {len(a.window_tokens)} windows against "
            f"{b.num_tokens} in {len(b.window_tokens)}): use the same text, seq_len and stride"
        )


def window_spans(
    num_tokens: int, window: int, stride: int | None, *, scores_first: bool
) -> list[Span]:
    """The windows over a text, see `perplexity`; those that would score nothing are left out.

    scores_first: whether the first token of a window has context (a BOS before it).
    Raises ValueError for a stride outside 1..window.
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(
            f"stride={stride} is outside 1..{window}: every token must lie in a window, so use at "
            "most the text tokens of a window"
        )
    spans, scored = [], 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        first = max(scored, begin if scores_first else begin + 1)
        if first < end:
            spans.append((begin, end, first))
        scored = end
        if end == num_tokens:
            break
    return spans


def _checked_ids(token_ids: Any) -> np.ndarray:
    ids = np.asarray(token_ids)
    if ids.size and (ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"token_ids is {ids.dtype}{list(ids.shape)}: give one text of integer ids")
    return ids.reshape(-1).astype(np.int64)


def _check_vocabulary(ids: np.ndarray, vocab_size: int) -> None:
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise ValueError(
            f"token id {outside[0]} is outside 0..{vocab_size - 1}: use this model's tokenizer"
        )


def _check_options(model: CausalLM, seq_len: int, kv_bits: int, batch_size: int) -> None:
    limit = model.config.context_length
    if not 2 <= seq_len <= limit:
        raise ValueError(
            f"seq_len={seq_len} is outside 2..{limit}: the model's context is {limit} tokens"
        )
    if kv_bits not in (4, 8, 16):
        raise ValueError(f"kv_bits={kv_bits} is not supported: use one of (4, 8, 16)")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not positive: use at least 1")


def _pad_windows(
    ids: np.ndarray, spans: list[Span], prefix: np.ndarray, batch_size: int, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """tokens i32[batch_size, seq_len] and their true lengths i32[batch_size], at least 1."""
    tokens = np.zeros((batch_size, seq_len), np.int32)
    lengths = np.ones(batch_size, np.int32)
    for row, (begin, end, _) in enumerate(spans):
        window = np.concatenate([prefix, ids[begin:end]])
        tokens[row, : len(window)], lengths[row] = window, len(window)
    return tokens, lengths


def agreement(a: Perplexity, b: Perplexity) -> tuple[float, float]:
    """(share of scored tokens for which both models have the same likeliest token, its standard
    error by `Perplexity`'s estimator). Raises ValueError when the windows differ."""
    _check_same_windows(a, b)
    same = (a.greedy_tokens == b.greedy_tokens).astype(np.float64)
    starts = np.cumsum(a.window_tokens) - a.window_tokens
    return _ratio(np.add.reduceat(same, starts), a.window_tokens)


@functools.partial(jax.jit, static_argnums=(0, 4))
def token_losses(
    model: CausalLM, params: Any, tokens: Array, lengths: Array, kv_bits: int
) -> tuple[Array, Array]:
    """(-log p f32[B, T-1] of each next token, the likeliest next token i32[B, T-1]) of right-padded
    tokens i32[B, T]; entries at and beyond `lengths` i32[B] - 1 mean nothing."""
    # Padding repeats the last position: a rope that depends on the length sees the true one, and
    # no query before the last token, whose prediction is not scored, attends to padding.
    positions = jnp.minimum(jnp.arange(tokens.shape[1]), lengths[:, None] - 1)
    variables = {"params": params}
    logits: Any = model.apply(variables, tokens, positions=positions, kv_bits=kv_bits)
    logits = logits[:, :-1]
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.argmax(logits, axis=-1)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """sum(sums) / sum(counts) and its standard error, see `Perplexity`."""
    n, total = len(sums), counts.sum()
    mean = sums.sum() / total
    if n < 2:
        return float(mean), math.nan
    residuals = sums - mean * counts
    return float(mean), float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / total)


def _summarize(sums: np.ndarray, counts: np.ndarray, greedy: np.ndarray) -> Perplexity:
    loss, error = _ratio(sums, counts)
    with np.errstate(over="ignore"):
        value = float(np.exp(loss))
    return Perplexity(value, value * error, loss, error, int(counts.sum()), sums, counts, greedy)
