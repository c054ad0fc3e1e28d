"""Random operands: valid in the kernels' layout, and scaled so that no epilogue rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.benchmarks import operands
from qserve_jax.benchmarks.shapes import MODEL_SHAPES, parse_shape
from qserve_jax.pallas_kernels.w4a8_matmul import from_kernel_layout, reference, to_kernel_layout


@pytest.mark.parametrize("group_size", [128, -1])
def test_weights_are_what_packing_gives(group_size):
    packed = operands.make_weight(2, 64, 384, group_size)
    canonical = from_kernel_layout(packed)
    jax.tree.map(np.testing.assert_array_equal, to_kernel_layout(canonical), packed)
    assert canonical.codes.shape == (2, 64, 192)
    assert len(np.unique(np.asarray(canonical.codes))) > 200
    if group_size == 128:
        s, offset = (
            np.asarray(a, np.int32) for a in (canonical.group_scale, canonical.group_offset)
        )
        assert (s.min(), s.max()) == (1, 16)
        assert offset.min() >= -128 and (15 * s + offset).max() <= 127
        assert abs(np.asarray(reference.int8_weights(canonical), np.float32).mean()) < 10


def test_float32_outputs_are_exact_integers_times_a_power_of_two():
    x = operands.make_activation(3, 256)
    for group_size in (128, -1):
        w = from_kernel_layout(operands.make_weight(1, 64, 256, group_size))
        w = jax.tree.map(lambda leaf: leaf[0], w)
        sums = np.asarray(x.codes, np.int64) @ np.asarray(reference.int8_weights(w), np.int64).T
        y = sums * np.asarray(w.channel_scale, np.float64)
        if group_size == -1:
            y -= np.asarray(x.code_sum, np.float64)[:, None] * np.asarray(w.scaled_zero)
        y *= np.asarray(x.scale, np.float64)[:, None]
        np.testing.assert_array_equal(reference.epilogue(jnp.asarray(sums), x, w), y)
        assert set(np.log2(np.unique(w.channel_scale))) == {-10, -9}


def test_copies_are_more_than_the_cache_holds():
    assert operands.copies_of(2**33) == 2
    assert operands.copies_of(10**7) * 10**7 >= operands.COLD_BYTES


def test_the_same_numbers_in_every_column():
    w = operands.make_plain_weights(64, 128, 0)
    codes = np.asarray(w.int8.codes, np.float32)
    np.testing.assert_array_equal(np.asarray(w.bf16, np.float32), codes)
    np.testing.assert_array_equal(w.fp8, (codes / 16).astype(jnp.float8_e4m3fn))
    assert (w.bf16 != operands.make_plain_weights(64, 128, 1).bf16).any()


def test_shapes():
    assert parse_shape("28672x4096") == (28672, 4096)
    for shapes in MODEL_SHAPES.values():
        assert [parse_shape(f"{n}x{k}") for n, k in shapes] == list(shapes)
    for text in ("28672", "4096 x 64", "0x128", "100x128", "64x64", "-64x128"):
        with pytest.raises(ValueError, match=repr(text)):
            parse_shape(text)
