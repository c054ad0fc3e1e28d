"""What a warpgroup multiplies, lane by lane: the kernel's formulas against the PTX ISA's maps."""

import numpy as np

from qserve_jax.pallas_kernels.intrinsics import tensor_cores
from qserve_jax.pallas_kernels.w4a8_matmul import layout, reference, to_kernel_layout
from tests.pallas_kernels.w4a8_cases import every_kind, make_activation, make_weight

TOKENS = 24
LANES = np.arange(32)
G, C = LANES // 4, LANES % 4


def swizzle(address):
    """The 128-byte mode: address bits 4-6 are XORed with bits 7-9."""
    return address ^ ((address >> 7) & 7) << 4


def copy_tile(memory, base, x):
    """What the copy engine writes of a box of 128 columns: rows one after another, swizzled."""
    for token, row in enumerate(x):
        address = base + 128 * token + np.arange(128)
        memory[swizzle(address)] = row


def read_b(memory, low, tokens):
    """B of wgmma by its descriptor, K-major: int8[tokens, 32] (PTX ISA, matrix descriptor)."""
    low, high = int(low), tensor_cores._DESCRIPTOR_HIGH
    assert high >> 30 == 1  # 128-byte swizzle; bits 49-51, the base offset, are 0
    start, stride = (low & 0x3FFF) << 4, (high & 0x3FFF) << 4
    token, k = np.arange(tokens)[:, None], np.arange(32)
    return memory[swizzle(start + token // 8 * stride + token % 8 * 128 + k)]


def wgmma_m64k32(acc, a, b):
    """acc i64[tokens / 2, 4 warps, 32 lanes] += a u32[4, 4, 32] @ b: 16 rows of A for each warp."""
    matrix = np.zeros((64, 32), np.int64)
    for warp in range(4):
        for r in range(4):
            octets = np.ascontiguousarray(a[r, warp]).view(np.int8).reshape(32, 4)
            for i in range(4):
                matrix[16 * warp + G + 8 * (r % 2), 4 * C + i + 16 * (r // 2)] = octets[:, i]
    d = matrix @ b.T.astype(np.int64)
    for warp in range(4):
        for register in range(len(acc)):
            j, i = divmod(register, 4)
            rows, columns = 16 * warp + G + 8 * (i // 2), 8 * j + 2 * C + i % 2
            acc[register, warp] += d[rows, columns]


def movmatrix(words):
    """8 x 8 half words, lane l holding row l // 4 and columns 2 (l % 4), + 1: transposed."""
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(8, 8)
    return np.ascontiguousarray(halves.T).reshape(-1).view(np.uint32)


def multiply(w, x, base):
    """The kernel's steps on 64 channels and all of K -> acc[tokens / 2, warp, lane]."""
    words = np.asarray(to_kernel_layout(w).codes).view(np.uint32)[1]  # channels 64..127
    acc = np.zeros((TOKENS // 2, 4, 32), np.int64)
    for chunk in range(words.shape[0]):
        memory = np.zeros(base + 128 * TOKENS, np.int8)
        copy_tile(memory, base, x[:, 128 * chunk : 128 * chunk + 128])
        descriptor = tensor_cores.wgmma_descriptor(base)  # pyright: ignore[reportArgumentType]
        tiles = words[chunk]
        scales = None
        if tiles.shape[-1] > layout.CODE_WORDS:
            scales = layout.split_scales(tiles[:, layout.CODE_WORDS + G])
        codes = [tiles[:, 128 * h + 4 * LANES + v] for h in range(2) for v in range(4)]
        for s in range(4):
            pair = [layout.expand(word, scales) for word in codes[2 * s : 2 * s + 2]]
            a = np.stack([*pair[0], *pair[1]]).astype(np.uint32)
            wgmma_m64k32(acc, a, read_b(memory, descriptor + 2 * s, TOKENS))  # pyright: ignore
    return acc


@every_kind
def test_a_warpgroup_multiplies(per_group, rng):
    """Accumulator 4 j + i of a lane: fragment row g + 8 (i // 2), token 8 j + 2 c + i % 2."""
    w = make_weight(per_group, rng, (128, 384))
    x = np.asarray(make_activation(rng, TOKENS, 384).codes)
    expected = x.astype(np.int64) @ np.asarray(reference.int8_weights(w), np.int64)[64:].T
    acc = multiply(w, x, base=5 * 1024)
    y = np.zeros((TOKENS, 64), np.int64)
    for register, warp in np.ndindex(TOKENS // 2, 4):
        j, i = divmod(register, 4)
        channel = 16 * warp + layout.channel_of_row(G + 8 * (i // 2))
        y[8 * j + 2 * C + i % 2, channel] = acc[register, warp]
    np.testing.assert_array_equal(y, expected)


def test_a_transposed_pair_is_four_channels_beside_each_other(rng):
    """`_store_halves`: of token 8 j + g, channels 4 c .. 4 c + 3 of the warp's 16."""
    y = rng.integers(0, 2**16, (8, 16)).astype(np.uint16)  # [token, channel]
    values = [y[2 * C + i % 2, layout.channel_of_row(G + 8 * (i // 2))] for i in range(4)]
    pairs = [values[i] | values[i + 1].astype(np.uint32) << 16 for i in (0, 2)]
    words = [movmatrix(pair.astype(np.uint32)) for pair in pairs]
    stored = np.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], axis=-1)
    np.testing.assert_array_equal(stored, y[G[:, None], 4 * C[:, None] + np.arange(4)])


def test_the_swizzled_tile_is_read_without_bank_conflicts():
    """16 bytes of eight tokens lie in eight different places of 128: what the mode is for."""
    address = swizzle(2048 + 128 * np.arange(8))
    assert sorted(address % 128) == list(range(0, 128, 16))
