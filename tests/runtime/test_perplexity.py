"""Perplexity against an independent numpy evaluation of a model that can be computed by hand."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.models import CausalLM, ModelConfig, RopeConfig, init_params
from qserve_jax.runtime.perplexity import agreement, loss_difference, perplexity, window_spans

V, CONTEXT = 7, 16
TABLE = np.random.default_rng(0).normal(size=(V, V)).astype(np.float32)


class Toy:
    """Logits of token i: TABLE[sum of tokens 0..i mod V], so that all of the context matters."""

    config = SimpleNamespace(vocab_size=V, context_length=CONTEXT)

    def __init__(self):
        self.traces = 0

    def apply(self, variables, tokens, *, positions, kv_bits):
        self.traces += 1
        return variables["params"][jnp.cumsum(tokens, axis=1) % V]


def log_prob(context, token):
    logits = TABLE[sum(context) % V].astype(np.float64)
    return logits[token] - np.log(np.exp(logits).sum())


def expected(ids, window, stride, bos=()):
    """(sum of losses, number of scored tokens) of each window, by a loop over tokens."""
    rows, done, begin = [], set(), 0
    while True:
        end = min(begin + window, len(ids))
        context = lambda i, begin=begin: [*bos, *ids[begin:i]]  # noqa: E731
        new = [i for i in range(begin, end) if i not in done and context(i)]
        if new:
            rows.append((sum(-log_prob(context(i), ids[i]) for i in new), len(new)))
        done.update(range(begin, end))
        if end == len(ids):
            return np.array(rows)
        begin += stride


@pytest.mark.parametrize("num_tokens", [2, 8, 17, 24, 41])
@pytest.mark.parametrize("stride", [None, 1, 3, 7, 8])
def test_matches_a_loop_over_tokens(num_tokens, stride):
    ids = np.random.default_rng(num_tokens).integers(0, V, num_tokens)
    result = perplexity(Toy(), TABLE, ids, seq_len=8, stride=stride, batch_size=3)  # type: ignore
    rows = expected(ids, 8, stride or 8)
    np.testing.assert_allclose(result.window_losses, rows[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(result.window_tokens, rows[:, 1])
    total, count = rows.sum(axis=0)
    assert result.num_tokens == count
    assert result.loss == pytest.approx(total / count, rel=1e-6)
    assert result.value == pytest.approx(math.exp(total / count), rel=1e-6)
    if stride not in (None, 8):
        assert result.num_tokens == num_tokens - 1  # all but the first


@pytest.mark.parametrize("stride", [None, 2, 7])
def test_bos_starts_every_window_and_scores_every_token(stride):
    ids = np.random.default_rng(1).integers(0, V, 30)
    toy = Toy()
    result = perplexity(toy, TABLE, ids, seq_len=8, stride=stride, bos_token_id=5)  # type: ignore
    total, count = expected(ids, 7, stride or 7, bos=(5,)).sum(axis=0)
    assert (result.num_tokens, count) == (30, 30)
    assert result.loss == pytest.approx(total / count, rel=1e-6)


def test_partial_windows_and_batches_do_not_compile_again():
    toy = Toy()
    for num_tokens in (5, 8, 30, 41):
        perplexity(toy, TABLE, np.ones(num_tokens, int), seq_len=8, batch_size=3)  # type: ignore
    assert toy.traces == 1


def test_standard_error_is_that_of_a_ratio_over_windows():
    ids = np.random.default_rng(2).integers(0, V, 45)
    result = perplexity(Toy(), TABLE, ids, seq_len=8)  # type: ignore
    sums, counts = expected(ids, 8, 8).T
    assert len(set(counts)) == 2  # the last window is partial
    loss = sums.sum() / counts.sum()
    variance = sum((s - loss * n) ** 2 for s, n in zip(sums, counts, strict=True)) / (len(sums) - 1)
    error = math.sqrt(variance * len(sums)) / counts.sum()
    assert result.loss_standard_error == pytest.approx(error, rel=1e-5)
    assert result.standard_error == pytest.approx(math.exp(loss) * error, rel=1e-5)
    assert str(result) == f"{result.value:.4g} ± {result.standard_error:.2g}"


def test_standard_error_of_equal_windows_is_their_sample_error():
    ids = np.random.default_rng(3).integers(0, V, 80)
    result = perplexity(Toy(), TABLE, ids, seq_len=8)  # type: ignore
    means = expected(ids, 8, 8)[:, 0] / 7
    assert result.loss_standard_error == pytest.approx(means.std(ddof=1) / len(means) ** 0.5)


def test_one_window_has_no_standard_error():
    result = perplexity(Toy(), TABLE, [1, 2, 3], seq_len=8)  # type: ignore
    assert math.isnan(result.standard_error) and math.isfinite(result.value)


def test_difference_is_paired():
    ids = np.random.default_rng(4).integers(0, V, 64)
    a, b = (perplexity(Toy(), t, ids, seq_len=8) for t in (TABLE, TABLE * 1.01))  # type: ignore
    difference, error = loss_difference(b, a)
    paired = (b.window_losses - a.window_losses) / 7
    assert difference == pytest.approx(b.loss - a.loss, abs=1e-12)
    assert error == pytest.approx(paired.std(ddof=1) / 8**0.5)
    assert error < 0.1 * a.loss_standard_error
    with pytest.raises(ValueError, match="windows differ .* use the same text"):
        loss_difference(a, perplexity(Toy(), TABLE, ids, seq_len=4))  # type: ignore


@pytest.mark.parametrize("stride", [None, 3])
def test_greedy_tokens_and_agreement(stride):
    """Each scored token's likeliest, in the text's order; agreement as a ratio over windows."""
    ids = np.random.default_rng(6).integers(0, V, 29)
    other = np.random.default_rng(7).normal(size=TABLE.shape).astype(np.float32)
    options = {"seq_len": 8, "stride": stride, "batch_size": 3}
    a, b = (perplexity(Toy(), t, ids, **options) for t in (TABLE, other))  # type: ignore
    rows, expected_tokens = [], []
    for begin, end, first in window_spans(29, 8, stride, scores_first=False):
        sums = [sum(ids[begin:i]) % V for i in range(first, end)]
        expected_tokens += [TABLE[s].argmax() for s in sums]
        rows.append((sum(TABLE[s].argmax() == other[s].argmax() for s in sums), len(sums)))
    np.testing.assert_array_equal(a.greedy_tokens, expected_tokens)
    same, counts = np.array(rows).T
    share = same.sum() / counts.sum()
    found, error = agreement(a, b)
    assert 0 < share < 1 and found == pytest.approx(share)
    variance = ((same - share * counts) ** 2).sum() * len(rows) / (len(rows) - 1)
    assert error == pytest.approx(math.sqrt(variance) / counts.sum())
    assert agreement(a, a) == (1, 0)


def test_spans_cover_each_token_once():
    for stride in (1, 5, 9):
        spans = window_spans(50, 9, stride, scores_first=True)
        scored = [i for _, end, first in spans for i in range(first, end)]
        assert scored == list(range(50))


MODEL = CausalLM(
    ModelConfig(
        model_type="llama",
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=6,
        rope=RopeConfig(rope_type="dynamic", factor=2.0),  # its base depends on the true length
    )
)


def test_model_windows_are_those_of_unpadded_calls():
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), MODEL.config)
    params = jax.tree.map(lambda w: w * 20 if w.ndim > 2 else w, params)  # attention that matters
    ids = np.random.default_rng(5).integers(0, 19, 18)
    result = perplexity(MODEL, params, ids, seq_len=12, stride=4, kv_bits=4, batch_size=2)
    apply = jax.jit(lambda window: MODEL.apply({"params": params}, window, kv_bits=4))
    losses = []
    for begin, end, first in [(0, 12, 1), (4, 16, 12), (8, 18, 16)]:
        logits = np.asarray(apply(jnp.asarray(ids[begin:end])[None])[0], np.float64)
        rows = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        losses.append(-sum(rows[i - begin - 1, ids[i]] for i in range(first, end)))
    np.testing.assert_allclose(result.window_losses, losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "the text has 0 tokens: give at least 2"),
        ([1], {}, "the text has 1 tokens: give at least 2"),
        ([[1, 2]], {}, r"token_ids is int64\[1, 2\]: give one text of integer ids"),
        ([1.0, 2.0], {}, r"token_ids is float64\[2\]: give one text of integer ids"),
        ([1, 7, 2], {}, r"token id 7 is outside 0\.\.6"),
        ([1, -1, 2], {}, r"token id -1 is outside 0\.\.6"),
        ([1, 2], {"bos_token_id": 9}, r"token id 9 is outside 0\.\.6"),
        ([1, 2], {"seq_len": 1}, r"seq_len=1 is outside 2\.\.16"),
        ([1, 2], {"seq_len": 17}, r"seq_len=17 is outside 2\.\.16: the model's context is 16"),
        ([1, 2], {"stride": 0}, r"stride=0 is outside 1\.\.8"),
        ([1, 2], {"stride": 9}, r"stride=9 is outside 1\.\.8"),
        ([1, 2], {"stride": 8, "bos_token_id": 1}, r"stride=8 is outside 1\.\.7"),
        ([1, 2], {"kv_bits": 5}, r"kv_bits=5 is not supported: use one of \(4, 8, 16\)"),
        ([1, 2], {"batch_size": 0}, "batch_size=0 is not positive"),
    ],
)
def test_bad_input_is_refused_in_one_line(ids, options, message):
    with pytest.raises(ValueError, match=message) as error:
        perplexity(Toy(), TABLE, ids, **{"seq_len": 8, **options})  # type: ignore
    assert "\n" not in str(error.value)
