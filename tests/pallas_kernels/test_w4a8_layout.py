"""The kernel's weight layout: exact inverses, and what a warp makes of it, lane by lane."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qserve_jax.pallas_kernels.prepare import pack_layers
from qserve_jax.pallas_kernels.w4a8_matmul import from_kernel_layout, layout, to_kernel_layout
from qserve_jax.pallas_kernels.w4a8_matmul.reference import int8_weights
from qserve_jax.quantization.packing import int8_weight, unpack_nibbles
from qserve_jax.quantization.qtensor import Source, W4PerChannel, W4PerGroup, nbytes
from tests.pallas_kernels.w4a8_cases import make_packed

SOURCE = Source(("stack", "in", "out"), (256,), (64,), "bfloat16")
every_kind = pytest.mark.parametrize("kind", ["per-group", "per-channel"])


def random_weight(kind, rng, lead=(), n=64, k=256) -> Any:
    """Any bytes at all for the layout; for the arithmetic, see `valid_weight`."""
    codes = jnp.asarray(rng.integers(0, 256, (*lead, n, k // 2)), jnp.uint8)
    scale = jnp.asarray(rng.uniform(1, 2, (*lead, n)), jnp.float32)
    if kind == "per-channel":
        return W4PerChannel(codes, scale, scale * 3, SOURCE)
    groups = (*lead, n, k // 128)
    s2 = jnp.asarray(rng.integers(0, 256, groups), jnp.uint8)
    offset = jnp.asarray(rng.integers(-128, 128, groups), jnp.int8)
    return W4PerGroup(codes, scale, s2, offset, 128, SOURCE)


def valid_weight(rng, n, k):
    """Per group, with code * scale + offset in int8: scales up to 17, both ends of int8 reached."""
    s2 = rng.integers(1, 18, (n, k // 128))
    offset = rng.integers(-128, 127 - 15 * s2 + 1)
    s2[0], offset[0] = 17, -128
    w = random_weight("per-group", rng, (), n, k)
    return dataclasses.replace(
        w, group_scale=jnp.asarray(s2, jnp.uint8), group_offset=jnp.asarray(offset, jnp.int8)
    )


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(["per-group", "per-channel"]),
    lead=st.sampled_from([(), (2,), (1, 3)]),
    n=st.sampled_from([64, 192]),
    k=st.sampled_from([128, 384]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(kind, lead, n, k, seed):
    w = random_weight(kind, np.random.default_rng(seed), lead, n, k)
    packed = to_kernel_layout(w)
    words = 264 if kind == "per-group" else 256
    assert packed.codes.shape == (*lead, n // 64, k // 128, 4, words)
    assert packed.codes.dtype == jnp.int32
    assert packed.layout == "mma_w4" and packed.source == SOURCE
    assert nbytes(packed) == nbytes(w)
    assert layout.weight_shape(packed) == layout.weight_shape(w) == (n, k)
    back = from_kernel_layout(packed)
    assert jax.tree.structure(back) == jax.tree.structure(w)
    jax.tree.map(np.testing.assert_array_equal, back, w)


@every_kind
def test_a_slice_of_the_stack_is_the_layout_of_the_slice(kind, rng):
    w = random_weight(kind, rng, (3,))
    one = to_kernel_layout(layout.take_layer(w, 1))
    jax.tree.map(np.testing.assert_array_equal, layout.take_layer(to_kernel_layout(w), 1), one)


def warp_tile(block, per_group):
    """What `expand` makes of one packed block, put where the contract says: int8[16, 128].

    mma step s of 32 features, register pair j of it; the channels by the rule of the layout.
    """
    lanes = np.arange(32, dtype=np.uint32)
    g, c = lanes >> 2, lanes & 3
    scales = layout.split_scales(block[256 + g]) if per_group else None
    tile = np.zeros((16, 128), np.int8)
    for h in range(2):
        for v in range(4):
            expanded = layout.expand(block[(h * 32 + lanes) * 4 + v], scales)
            for hi, word in enumerate(expanded):
                octets = word.astype(np.uint32).view(np.int8).reshape(32, 4)
                channel = 4 * (g // 2) + 2 * hi + g % 2
                s, j = 2 * h + (v >> 1), v & 1
                for i in range(4):
                    tile[channel, 32 * s + 16 * j + 4 * c + i] = octets[:, i]
    return tile


def words_of(w):
    """[N/16, K/128, words]."""
    words = np.asarray(to_kernel_layout(w).codes).view(np.uint32)
    groups, chunks, blocks, size = words.shape
    assert layout.block_index(5, 1, 3) == (1 * 3 + 1) * 4 + 1
    return words.swapaxes(1, 2).reshape(groups * blocks, chunks, size)


def test_expanded_words_are_the_int8_weights(rng):
    w = valid_weight(rng, 64, 256)
    w8 = np.asarray(int8_weight(w))
    assert w8.min() == -128 and w8.max() == 127
    packed = words_of(w)
    for t, kc in np.ndindex(4, 2):
        expected = w8[16 * t : 16 * t + 16, 128 * kc : 128 * kc + 128]
        np.testing.assert_array_equal(warp_tile(packed[t, kc], True), expected)


def test_expanded_words_are_the_codes_per_channel(rng):
    w = random_weight("per-channel", rng)
    expected = np.asarray(unpack_nibbles(w.codes))[16:32, 128:]
    np.testing.assert_array_equal(warp_tile(words_of(w)[1, 1], False), expected)


def mma_m16n8k32(acc, a, b):
    """The tensor core's instruction on registers of 32 lanes, by the fragment map of the PTX ISA.

    a uint32[4, 32], b uint32[2, 32]: four int8 each; acc int64[4, 32].
    """
    lane, i = np.arange(32)[:, None], np.arange(4)
    group, in_group = lane >> 2, lane & 3
    matrix_a, matrix_b = np.zeros((16, 32), np.int64), np.zeros((32, 8), np.int64)
    for r in range(4):
        column = in_group * 4 + i + 16 * (r // 2)
        matrix_a[group + 8 * (r % 2), column] = a[r].view(np.int8).reshape(32, 4)
    for r in range(2):
        matrix_b[in_group * 4 + i + 16 * r, group] = b[r].view(np.int8).reshape(32, 4)
    d = matrix_a @ matrix_b
    group, in_group = group[:, 0], in_group[:, 0]
    return acc + np.stack([d[group + 8 * (r // 2), 2 * in_group + r % 2] for r in range(4)])


def ldmatrix_x4(memory, address):
    """ldmatrix.x4.b16: lane l names row l % 8 of matrix l // 8; -> uint32[4, 32], by the PTX ISA.

    Of matrix j, lane l receives bytes 4 (l % 4) .. + 3 of row l // 4.
    """
    lane = np.arange(32)
    rows = address.reshape(4, 8)[:, lane // 4] + 4 * (lane % 4)
    octets = np.ascontiguousarray(memory[rows[..., None] + np.arange(4)])
    return octets.view(np.uint32)[..., 0]


def test_a_warp_multiplies(rng):
    """The kernels' inner loop on lanes: 16 channels x 11 tokens of x as it lies in memory."""
    m, k = 11, 256
    w = valid_weight(rng, 64, k)
    x = rng.integers(-128, 128, (m, k)).astype(np.int8)
    blocks = words_of(w)[2]
    lanes = np.arange(32, dtype=np.uint32)
    acc = np.zeros((2, 4, 32), np.int64)
    for kc, h in np.ndindex(k // 128, 2):
        scales = layout.split_scales(blocks[kc][256 + (lanes >> 2)])
        codes = [blocks[kc][(h * 32 + lanes) * 4 + v] for v in range(4)]
        words = [layout.expand(word, scales) for word in codes]
        for tokens in range(2):
            row = np.minimum(lanes % 8 + 8 * tokens, m - 1)
            b = ldmatrix_x4(x.reshape(-1), row * k + 128 * kc + 64 * h + 16 * (lanes // 8))
            for half in (0, 2):
                a = np.stack([*words[half], *words[half + 1]]).astype(np.uint32)
                acc[tokens] = mma_m16n8k32(acc[tokens], a, b[half : half + 2])
    expected = np.asarray(int8_weight(w), np.int64)[32:48] @ x.T.astype(np.int64)
    for token, row in np.ndindex(m, 16):
        lane, register = (row % 8) * 4 + token % 8 // 2, token % 2 + 2 * (row // 8)
        channel = layout.channel_of_row(row)
        assert acc[token // 8, register, lane] == expected[channel, token]


def test_a_transposed_lane_has_four_channels_beside_each_other():
    channels = layout.channel_of_row(np.arange(16))
    assert sorted(channels) == list(range(16))
    for c in range(4):
        rows = [2 * c, 2 * c + 1, 2 * c + 8, 2 * c + 9]
        np.testing.assert_array_equal(channels[rows], 4 * c + np.arange(4))


@pytest.mark.parametrize("per_group", [True, False])
def test_weights_that_tests_make_in_the_layout(per_group, rng):
    """Of random words the layout gives what packing does, all of int8 or the extremes of it."""
    packed = make_packed(per_group, rng, 192, 256)
    canonical = from_kernel_layout(packed)
    jax.tree.map(np.testing.assert_array_equal, to_kernel_layout(canonical), packed)
    weights = np.asarray(int8_weights(canonical), np.int32)
    low, high = (-128, 127) if per_group else (0, 15)
    assert set(np.unique(weights[0])) == {low, high}
    assert (weights[0, :64] == low).all() and (weights[0, 128:] == high).all()
    assert weights[1].min() == low and weights[1].max() == high
    if per_group:  # nothing has wrapped round
        q = np.asarray(unpack_nibbles(canonical.codes), np.int32).reshape(2, 192, 2, 128)
        s, offset = (
            np.asarray(a, np.int32) for a in (canonical.group_scale, canonical.group_offset)
        )
        np.testing.assert_array_equal(
            (q * s[..., None] + offset[..., None]).reshape(weights.shape), weights
        )


def test_refusals(rng):
    w = random_weight("per-group", rng)
    odd = [
        random_weight("per-group", rng, (), 32),
        random_weight("per-channel", rng, (), 64, 64),
        dataclasses.replace(w, group_size=64),
        to_kernel_layout(w),
    ]
    for other in odd:
        assert not layout.fits(other)
        with pytest.raises(ValueError, match="cannot be packed: N must be a multiple of 64"):
            to_kernel_layout(other)
    assert layout.fits(w) and not layout.fits(w.codes)
    with pytest.raises(ValueError, match="layout 'other' is unknown: need 'canonical' or"):
        from_kernel_layout(dataclasses.replace(w, layout="other"))
    assert from_kernel_layout(w).layout == "canonical"


@pytest.mark.gpu
@every_kind
def test_packing_a_stack_takes_one_layer_more(kind):
    """XLA once gave the loop's output another order, and then transposed the whole of it."""
    stack = jax.eval_shape(lambda: random_weight(kind, np.random.default_rng(0), (32,), 512, 4096))
    memory: Any = pack_layers.lower(stack).compile().memory_analysis()
    assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 4
