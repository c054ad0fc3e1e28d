"""Paged attention against float64 on the dequantised values, over shuffled and poisoned pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.pallas_kernels import append_kv, paged_attention, validate_paged_inputs
from qserve_jax.pallas_kernels.paged_attention import longest_first, mosaic_prefill, reference
from qserve_jax.quantization.numerics import fake_quantize_kv
from qserve_jax.quantization.qtensor import KVCache, kv_bytes_per_token

LENS = np.array([130, 0, 65, 1, 64, 3, 63])  # around the page size, in no order
S_P, H, MAX_PAGES, LAYERS = 64, 16, 3, 2
TOLERANCE = 1e-6  # of float32 sums over values of order one, relative to the largest output
STATIC = ("attends", "sm_scale", "window", "softcap")
attention = jax.jit(paged_attention, static_argnames=STATIC)
append = jax.jit(append_kv)
quantize = jax.jit(fake_quantize_kv, static_argnums=1)
read_pages = jax.jit(reference.read_pages)


def poisoned_cache(bits, heads, num_pages, dtype=jnp.float32):
    """Every 16-bit half of every page, so every scale too, is a NaN."""
    lead = (LAYERS, num_pages, heads)
    if bits == 16:
        return KVCache(jnp.full((*lead, 2, S_P, H), jnp.nan, dtype), 16, H)
    words = S_P * kv_bytes_per_token(H, bits) // 4
    return KVCache(jnp.full((*lead, words), 0x7E007E00, jnp.int32), bits, H)


def make_case(rng, bits, heads, lens=LENS):
    """Sequences appended to layer 1 of a poisoned cache, on shuffled pages.

    Returns the cache, its block table, raw K and V of each sequence [S, K, H], and stored ones.
    """
    needed = -(-lens // S_P)
    ids = rng.permutation(needed.sum() + 3)
    table = np.full((len(lens), MAX_PAGES), -1, np.int32)
    raw, stored, slots = [], [], []
    for row, length in enumerate(lens):
        table[row, : needed[row]], ids = np.split(ids, needed[row : row + 1])
        at = np.arange(length)
        slots.append(table[row, at // S_P] * S_P + at % S_P)
        spread = rng.uniform(0.5, 2, (2, length, heads, 1))
        raw.append((rng.standard_normal((2, length, heads, H)) * spread).astype(np.float32))
    k, v = jnp.asarray(np.concatenate(raw, axis=1))
    slots = jnp.asarray(np.concatenate(slots), jnp.int32)
    cache = poisoned_cache(bits, heads, needed.sum() + 3)
    cache = append(cache, k, v, slots, layer=jnp.int32(1))
    values = np.asarray(quantize(jnp.stack([k, v]), bits), np.float64)
    stored = np.split(values, np.cumsum(lens)[:-1], axis=1)
    return cache, jnp.asarray(table), raw, stored


def softmax_attention(q, k, v, position, *, sm_scale=None, window=None, softcap=None):
    """One query [N, H] at `position` over k, v [S, K, H] of positions 0..S-1, in float64."""
    if window is not None:
        first = max(position + 1 - window, 0)
        k, v = k[first:], v[first:]
    group = q.shape[0] // k.shape[1]
    out = np.zeros(q.shape)
    for head in range(q.shape[0]):
        scores = k[:, head // group] @ q[head] * (sm_scale or H**-0.5)
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        weights = np.exp(scores - scores.max())
        out[head] = weights / weights.sum() @ v[:, head // group]
    return out


def expected_output(q, raw, stored, lens, query_lens, attends, **options):
    """float64[B, T, N, H]; NaN for padding, which may be anything finite, zero for idle rows."""
    out = np.full(q.shape, np.nan)
    out[np.asarray(lens) == 0] = 0
    for row, (length, count) in enumerate(zip(lens, query_lens, strict=True)):
        start = length - count
        for t in range(count):
            k, v = stored[row][:, : start + t + 1].copy()
            if attends == "full":
                k[start:], v[start:] = raw[row][:, start : start + t + 1]
            query = q[row, t].astype(np.float64)
            out[row, t] = softmax_attention(query, k, v, start + t, **options)
    return out


def new_tokens(raw, lens, query_lens, width):
    """The last query_lens tokens of each sequence: float32[B, T, K, H] twice, NaN as padding."""
    shape = (2, len(lens), width, *raw[0].shape[2:])
    new = np.full(shape, np.nan, np.float32)
    for row, (length, count) in enumerate(zip(lens, query_lens, strict=True)):
        new[:, row, :count] = raw[row][:, length - count :]
    return jnp.asarray(new)


def check(rng, bits, attends, group, width, query_lens, lens=LENS, heads=2, **options):
    cache, table, raw, stored = make_case(rng, bits, heads, lens)
    q = rng.standard_normal((len(lens), width, heads * group, H)).astype(np.float32)
    new = new_tokens(raw, lens, query_lens, width)
    new_k, new_v = new if attends == "full" else (None, None)
    expected = expected_output(q, raw, stored, lens, query_lens, attends, **options)
    out = attention(
        jnp.asarray(q),
        cache,
        table,
        jnp.asarray(lens, jnp.int32),
        new_k=new_k,
        new_v=new_v,
        # Of an idle row context_lens says all.
        query_lens=jnp.asarray(np.where(lens == 0, width, query_lens), jnp.int32),
        attends=attends,
        layer=jnp.int32(1),
        **options,
    )
    assert np.isfinite(out).all()
    error = np.nan_to_num(np.abs(out - expected)).max()
    assert error <= TOLERANCE * np.nanmax(np.abs(expected))
    assert not np.asarray(out)[lens == 0].any()
    return cache, table, q, new, out


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("attends", ["full", "quantized"])
def test_decode(bits, attends, rng):
    check(rng, bits, attends, 4, 1, np.minimum(LENS, 1))


@pytest.mark.parametrize("group, heads", [(1, 3), (7, 2)])
def test_query_heads_per_kv_head(group, heads, rng):
    check(rng, 4, "full", group, 1, np.minimum(LENS, 1), heads=heads)


def test_decode_form_and_default_query_lens(rng):
    """[B, N, H] is T = 1; one new token is real except in an idle row."""
    cache, table, q, new, out = check(rng, 4, "full", 2, 1, np.minimum(LENS, 1))
    lens = jnp.asarray(LENS, jnp.int32)
    q = jnp.asarray(q)
    single = attention(
        q[:, 0], cache, table, lens, new_k=new[0][:, 0], new_v=new[1][:, 0], layer=jnp.int32(1)
    )
    assert single.shape == q[:, 0].shape
    np.testing.assert_array_equal(single, out[:, 0])


def test_default_query_lens_of_ragged_prompts(rng):
    """A row's last T tokens are new, or all that it has."""
    query_lens = np.minimum(LENS, 12)
    cache, table, q, new, out = check(rng, 4, "full", 2, 12, query_lens)
    lens, options = jnp.asarray(LENS, jnp.int32), {"layer": jnp.int32(1)}
    found = attention(jnp.asarray(q), cache, table, lens, new_k=new[0], new_v=new[1], **options)
    for row, count in enumerate(query_lens):
        np.testing.assert_array_equal(found[row, :count], out[row, :count])


@pytest.mark.parametrize(
    "bits, attends, options",
    [
        (4, "full", {}),
        (8, "quantized", {}),
        (4, "full", {"window": 9}),  # within the chunk and across its start
        (4, "quantized", {"window": 66, "softcap": 1.5}),
        (16, "full", {"softcap": 1.5, "sm_scale": 0.7}),
    ],
)
def test_chunks(bits, attends, options, rng):
    """Up to 12 new tokens behind what is cached; all of it new where a sequence is short."""
    query_lens = np.array([12, 0, 5, 1, 12, 3, 11])
    check(rng, bits, attends, 2, 12, query_lens, **options)


def test_more_queries_than_one_block(rng):
    """T is no multiple of QUERY_BLOCK; two sequences, one of them short."""
    t = reference.QUERY_BLOCK + 8
    lens = np.array([t, 3])
    raw = [rng.standard_normal((2, n, 1, H)).astype(np.float32) for n in lens]
    q = rng.standard_normal((2, t, 1, H)).astype(np.float32)
    expected = expected_output(q, raw, raw, lens, lens, "full")
    k, v = new_tokens(raw, lens, lens, t)
    positions = jnp.broadcast_to(jnp.arange(t), (2, t))
    valid = positions < jnp.asarray(lens)[:, None]
    out = jax.jit(reference.attend)(
        jnp.asarray(q), k, v, q_positions=positions, k_positions=positions, k_valid=valid
    )
    assert out.shape == q.shape and np.isfinite(out).all()
    error = np.nan_to_num(np.abs(out - expected)).max()
    assert error <= TOLERANCE * np.nanmax(np.abs(expected))


@pytest.mark.parametrize("missing", [-1, 5, 2**30])
def test_pages_outside_the_cache_are_masked(missing, rng):
    lens = np.array([130])
    cache, table, _, stored = make_case(rng, 8, 1, lens)
    q = rng.standard_normal((1, 1, 1, H)).astype(np.float32)
    assert cache.num_pages <= 6
    missing = cache.num_pages if missing == 5 else missing
    k, v = stored[0][:, S_P:]
    expected = softmax_attention(q[0, 0].astype(np.float64), k, v, len(k) - 1)
    out = attention(
        jnp.asarray(q),
        cache,
        table.at[0, 0].set(missing),
        jnp.asarray(lens),
        attends="quantized",
        layer=jnp.int32(1),
    )
    np.testing.assert_allclose(out[0, 0], expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_pages_hold_what_was_appended(bits, rng):
    lens = np.array([70, 2])
    cache, table, _, stored = make_case(rng, bits, 2, lens)
    for side, values in enumerate(read_pages(cache, table, layer=1)):
        assert values.shape == (2, MAX_PAGES * S_P, 2, H)
        for row, length in enumerate(lens):
            np.testing.assert_array_equal(values[row, :length], stored[row][side])
    assert jnp.isnan(values[0, 70 : 2 * S_P]).all()


@pytest.mark.parametrize("attends", ["full", "quantized"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_no_sequences_and_no_pages(bits, attends, rng):
    """B = 0 has nothing to say; without pages there is nothing behind the new tokens."""
    cache = poisoned_cache(bits, 2, 3)
    for batch, pages in ((0, 3), (2, 0)):
        new = rng.standard_normal((2, batch, 1, 2, H)).astype(np.float32)
        new_k, new_v = jnp.asarray(new) if attends == "full" else (None, None)
        out = attention(
            jnp.ones((batch, 1, 4, H)),
            cache,
            jnp.zeros((batch, pages), jnp.int32),
            jnp.ones(batch, jnp.int32),
            new_k=new_k,
            new_v=new_v,
            attends=attends,
            layer=1,
        )
        expected = np.repeat(new[1], 2, axis=2) if attends == "full" else 0  # each sees itself
        np.testing.assert_array_equal(out, np.broadcast_to(expected, (batch, 1, 4, H)))


def test_dtypes():
    """Out as q; a bfloat16 cache does not round the new tokens of a float32 query."""
    cache = poisoned_cache(16, 1, 1, jnp.bfloat16)
    table, two = jnp.zeros((1, 1), jnp.int32), jnp.full(1, 2, jnp.int32)
    step = np.full((1, 2, 1, H), 1, np.float32)
    step[0, 1] += 2.0**-9  # 1 in bfloat16, but in float32 the second key wins by exp(64)
    out = attention(
        jnp.ones_like(step), cache, table, two, new_k=step, new_v=step, layer=0, sm_scale=2.0**11
    )
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, step)
    half = jnp.asarray(step, jnp.bfloat16)
    out = attention(half, cache, table, two, new_k=half, new_v=half, layer=0)
    assert out.dtype == jnp.bfloat16 and (out == 1).all()


def test_gradients_are_finite(rng):
    """With NaN in invalid keys, and queries that see nothing."""
    k_valid = np.array([[True, True, False, True], [False] * 4])
    positions = jnp.broadcast_to(jnp.arange(4), (2, 4))
    q, k, v = rng.standard_normal((3, 2, 4, 2, 8)).astype(np.float32)
    k[~k_valid] = v[~k_valid] = np.nan

    def loss(q, k, v):
        out = reference.attend(
            q,
            k,
            v,
            q_positions=positions,
            k_positions=positions,
            k_valid=jnp.asarray(k_valid),
            softcap=5.0,
        )
        return jnp.sum(out**2)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert gradient[0].any() and not gradient[1].any()
    step = 1e-2 * rng.standard_normal(q.shape).astype(np.float32)
    difference = (loss(q + step, k, v) - loss(q - step, k, v)) / 2
    np.testing.assert_allclose(jnp.vdot(gradients[0], step), difference, rtol=2e-3)


def call_with(**changes):
    kv = jnp.zeros((2, 1, 2, H))
    arguments = {
        "q": jnp.zeros((2, 1, 4, H)),
        "cache": poisoned_cache(4, 2, 3),
        "block_table": jnp.zeros((2, 3), jnp.int32),
        "context_lens": jnp.ones(2, jnp.int32),
        "new_k": kv,
        "new_v": kv,
        "layer": 0,
    }
    return paged_attention(**(arguments | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attends": "half"}, r"attends='half' is unknown: use one of \('full', 'quantized'\)"),
        ({"q": jnp.zeros((4, H))}, r"q has shape \(4, 16\): it must be \[B, T, N, H\]"),
        ({"q": jnp.zeros((2, 1, 3, H))}, r"q \(2, 1, 3, 16\) does not fit .* of 2 heads of 16"),
        ({"q": jnp.zeros((2, 1, 4, 8))}, r"q \(2, 1, 4, 8\) does not fit .* of 2 heads of 16"),
        ({"layer": None}, r"cache pages of shape .* do not go with layer=None"),
        ({"layer": 5}, r"layer=5 but the cache pages have layers 0\.\.1: use one"),
        ({"layer": -1}, r"layer=-1 but the cache pages have layers 0\.\.1: use one"),
        ({"block_table": jnp.zeros((1, 3), int)}, r"block_table \(1, 3\) and .* with B=2"),
        ({"context_lens": jnp.ones(3, int)}, r"context_lens \(3,\) must be .* with B=2"),
        ({"query_lens": jnp.ones(1, int)}, r"query_lens \(1,\) must be \[B\] with B=2"),
        ({"new_k": None}, r"needs new_k and new_v \(2, 1, 2, 16\), got \[None, \(2, 1, 2, 16\)\]"),
        ({"new_v": jnp.zeros((2, 2, 2, H))}, r"got \[\(2, 1, 2, 16\), \(2, 2, 2, 16\)\]"),
        ({"order": jnp.zeros(1, jnp.int32)}, r"order \(1,\) must be \[B\] with B=2"),
        ({"order": jnp.zeros(2)}, "order is float32, which is no integer: cast it to int32"),
        ({"context_lens": jnp.ones(2)}, "context_lens is float32, which is no integer"),
        ({"query_lens": jnp.ones(2)}, "query_lens is float32, which is no integer"),
        ({"block_table": jnp.zeros((2, 3))}, "block_table is float32, which is no integer"),
        ({"q": jnp.zeros((2, 1, 4, H), jnp.int32)}, "q is int32, which is no float: cast it"),
        ({"new_v": jnp.zeros((2, 1, 2, H), jnp.int8)}, "new_v is int8, which is no float"),
        ({"window": 0}, r"window=0 is no number of positions: use 1\.\.2\*\*31 - 1 or None"),
        ({"window": 2.5}, r"window=2\.5 is no number of positions"),
        ({"window": 2**31}, r"window=2147483648 is no number of positions"),
        ({"window": True}, r"window=True is no number of positions"),
        ({"softcap": 0.0}, r"softcap=0\.0 caps nothing: give a Python float in 1e-18\.\.1e\+18"),
        ({"softcap": float("inf")}, "softcap=inf caps nothing"),
        ({"softcap": 1e-40}, "softcap=1e-40 caps nothing"),
        ({"softcap": "5"}, "softcap=5 caps nothing"),
        ({"sm_scale": float("nan")}, r"sm_scale=nan is no number in -1e\+18\.\.1e\+18: give a Pyt"),
        ({"sm_scale": 10**60}, "sm_scale=10+ is no number"),
        ({"sm_scale": 1j}, "sm_scale=1j is no number"),
        ({"sm_scale": jnp.ones(H)}, "sm_scale=ArrayImpl is no number"),
        ({"sm_scale": "0.1"}, r"sm_scale=0\.1 is no number"),
        ({"q": [[1.0]]}, "q is a list: give an array"),
        ({"block_table": [[0]]}, "block_table is a list: give an array"),
        ({"q": None}, "q is None: give an array"),
        ({"context_lens": None}, "context_lens is None: give an array"),
        ({"context_lens": [1, 1]}, "context_lens is a list: give an array"),
        ({"q": jnp.zeros((2, 2, 0, H))}, r"q \(2, 2, 0, 16\) does not fit a cache of 2 heads"),
        (
            {"attends": "quantized", "new_k": jnp.zeros((2, 9))},
            r"attends='quantized' needs new_k and new_v \(2, 1, 2, 16\), got \[\(2, 9\)",
        ),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        call_with(**changes)


@pytest.mark.parametrize("option", ["sm_scale", "softcap"])
def test_options_are_not_traced(option):
    """The kernels are built with them: what ran here under jit would fail on a GPU."""
    with pytest.raises(ValueError, match=f"{option}=.*Tracer .* give a Python float"):
        jax.jit(lambda x: call_with(**{option: x}))(0.5)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_integers_of_any_dtype(dtype, rng):
    """More pages, and more new tokens, than a byte numbers."""
    pages, q = rng.standard_normal((300, 1, 2, 4, 8)), rng.standard_normal((1, 256, 1, 8))
    cache, q = KVCache(jnp.asarray(pages, jnp.float32), 16, 8), jnp.asarray(q, jnp.float32)
    table, lens = np.array([[100, 7]]), np.array([6])
    expected = attention(q, cache, table, lens, attends="quantized")
    out = attention(q, cache, table.astype(dtype), lens.astype(dtype), attends="quantized")
    np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)
    assert out[0, :6].any()


@pytest.mark.parametrize("width, query_lens", [(1, [9, -3, 0]), (4, [9, -3, 7])])
def test_query_lens_out_of_range_are_clamped(width, query_lens, rng):
    lens = np.array([70, 2, 5])
    cache, table, raw, _ = make_case(rng, 4, 2, lens)
    q = rng.standard_normal((3, width, 4, H)).astype(np.float32)
    new_k, new_v = new_tokens(raw, lens, np.minimum(lens, width), width)
    new_k, new_v = jnp.nan_to_num(new_k), jnp.nan_to_num(new_v)
    outs = [
        attention(q, cache, table, lens, new_k=new_k, new_v=new_v, query_lens=x, layer=1)
        for x in (np.array(query_lens), np.clip(query_lens, 0, np.minimum(lens, width)))
    ]
    np.testing.assert_array_equal(*outs)


def test_the_prefill_kernel_is_given_clamped_query_lens(monkeypatch):
    monkeypatch.setattr(mosaic_prefill, "_launch", lambda p, operands: operands[1])
    q, new = jnp.zeros((3, 4, 2, 64)), jnp.zeros((3, 4, 2, 64), jnp.bfloat16)
    lens, query_lens = jnp.array([9, 2, 5]), jnp.array([9, 3, -1])
    table, cache = jnp.zeros((3, 1), int), KVCache(jnp.zeros((1, 2, 64 * 18), jnp.int32), 4, 64)
    options = {"query_lens": query_lens, "backend": "mosaic_mma"}
    found = paged_attention(
        q.astype(new.dtype), cache, table, lens, new_k=new, new_v=new, **options
    )
    assert found.tolist() == [[9, 4], [2, 2], [5, 0]]


def test_longest_first():
    lens = np.array([3, 200, 0, 7])
    for dtype in ("int32", "uint8"):
        assert longest_first(jnp.asarray(lens, dtype)).tolist() == [1, 3, 0, 2]
    for wrong, message in (
        (jnp.ones(3), "context_lens is float32, which is no integer"),
        (jnp.ones((2, 2), int), r"context_lens \(2, 2\) must be \[B\]"),
    ):
        with pytest.raises(ValueError, match=message):
            longest_first(wrong)


def test_validate_paged_inputs():
    cache = poisoned_cache(4, 2, 5)
    table = np.array([[4, 0, -1], [-1, -1, -1]])
    validate_paged_inputs(cache, table, np.array([128, 0]))
    with pytest.raises(ValueError, match="sequence 1 has length 193 .* holds 3 pages of 64 tokens"):
        validate_paged_inputs(cache, table, np.array([128, 193]))
    with pytest.raises(ValueError, match="sequence 0 has length -1: use 0 or more"):
        validate_paged_inputs(cache, table, np.array([-1, 0]))
    with pytest.raises(ValueError, match="sequence 0 names page -1 .* 129 tokens .* pages 0..4"):
        validate_paged_inputs(cache, table, np.array([129, 0]))
    with pytest.raises(ValueError, match="sequence 1 names page 5 .* pages 0..4: allocate it"):
        validate_paged_inputs(cache, np.array([[4], [5]]), np.array([64, 1]))
    with pytest.raises(ValueError, match=r"block_table \(2, 3\) and context_lens \(3,\) must be"):
        validate_paged_inputs(cache, table, np.array([1, 1, 1]))
    with pytest.raises(ValueError, match=r"block_table \(3,\) and context_lens \(1,\) must be"):
        validate_paged_inputs(cache, table[0], np.array([1]))
    with pytest.raises(ValueError, match="context_lens is float64, which is no integer"):
        validate_paged_inputs(cache, table, np.array([1.5, 0]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([[0, 1], [2]], [1, 1]), "^block_table is ragged or traced: give an array of numbers$"),
        (([[0], [1]], [8, 7], [8, -1]), r"sequence 1 has query_lens -1 of length 7: use .* 0\.\.7"),
        (([[0], [1]], [8, 7], [9, 7]), "sequence 0 has query_lens 9 of length 8"),
        (([[0], [1]], [8, 7], [1.0, 1.0]), "query_lens is float64, which is no integer"),
        (([[0], [1]], [8, 7], [1]), r"query_lens \(1,\) must be \[B\] with B=2"),
        (([[0], [1]], [8, 7], None, [0, 0]), "order is no permutation of the 2 rows: use longest"),
        (([[0], [1]], [8, 7], None, [1, 2]), "order is no permutation of the 2 rows"),
    ],
)
def test_validate_what_goes_with_the_table(arguments, message):
    cache = poisoned_cache(4, 2, 5)
    validate_paged_inputs(cache, [[0], [1]], [8, 7], [8, 0], [1, 0])
    with pytest.raises(ValueError, match=message):
        validate_paged_inputs(cache, *arguments)
    with pytest.raises(ValueError, match="block_table is ragged or traced"):
        jax.jit(lambda table: validate_paged_inputs(cache, table, [8]))(np.array([[1]]))
    with pytest.raises(ValueError, match="a cache of bits=5 is none"):
        validate_paged_inputs(KVCache(cache.pages, 5, H), [[1]], [8])
