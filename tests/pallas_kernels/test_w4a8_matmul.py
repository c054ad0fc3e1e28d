"""Integer sums against numpy int64, exactly; the epilogue against float32 and float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.pallas_kernels import quantized_matmul, w4a8_matmul
from qserve_jax.pallas_kernels.w4a8_matmul import reference, to_kernel_layout
from qserve_jax.quantization import QuantConfig, quantize_kernel
from qserve_jax.quantization.packing import dequantize_weight
from qserve_jax.quantization.qtensor import (
    Int8Activation,
    Source,
    W4PerChannel,
    W4PerGroup,
    W8PerChannel,
    nbytes,
)

KINDS = ("per-group", "per-channel", "w8")
G = 128
SOURCE = Source(("in", "out"), (0,), (0,), "float32")  # the matmul does not read it
UNIT = 2.0**-24  # largest relative error of one float32 rounding
every_kind = pytest.mark.parametrize("kind", KINDS)
matmul = jax.jit(quantized_matmul, static_argnames=("out_dtype", "backend"))


def pack(codes):
    return jnp.asarray(codes[..., ::2] | codes[..., 1::2] << 4, jnp.uint8)


def group_weight(codes, group_scale, group_offset, channel_scale):
    """The container and its int8 weights in int64, which must hold the int8 invariant."""
    spread = [np.repeat(a, G, axis=-1).astype(np.int64) for a in (group_scale, group_offset)]
    w8 = codes * spread[0] + spread[1]
    assert w8.min() >= -128 and w8.max() <= 127
    w = W4PerGroup(
        pack(codes),
        jnp.asarray(channel_scale),
        jnp.asarray(group_scale, jnp.uint8),
        jnp.asarray(group_offset, jnp.int8),
        G,
        SOURCE,
    )
    return w, w8


def make_weight(kind, rng, shape) -> tuple[Any, np.ndarray]:
    """A random container of `shape` [..., N, K] and its integers int64[..., N, K]."""
    scale = rng.uniform(1e-3, 2e-3, shape[:-1]).astype(np.float32)
    if kind == "w8":
        codes = rng.integers(-127, 128, shape)
        return W8PerChannel(jnp.asarray(codes, jnp.int8), jnp.asarray(scale), SOURCE), codes
    if kind == "per-channel":
        codes = rng.integers(0, 16, shape)
        zero = rng.integers(0, 16, shape[:-1]).astype(np.float32) * scale
        return W4PerChannel(pack(codes), jnp.asarray(scale), jnp.asarray(zero), SOURCE), codes
    groups = (*shape[:-1], shape[-1] // G)
    s2, offset = rng.integers(1, 17, groups), rng.integers(-128, 128, groups)
    low, high = -((128 + offset) // s2), (127 - offset) // s2  # of codes that stay in int8
    low, high = np.repeat(np.maximum(low, 0), G, -1), np.repeat(np.minimum(high, 15), G, -1)
    return group_weight(rng.integers(low, high + 1), s2, offset, scale)


def activation(codes, scale=None):
    scale = np.ones(codes.shape[:-1]) if scale is None else scale
    sums = codes.sum(-1, dtype=np.int64)
    return Int8Activation(
        jnp.asarray(codes, jnp.int8), jnp.asarray(scale, jnp.float32), jnp.asarray(sums, jnp.int32)
    )


def make_activation(rng, shape):
    codes = rng.integers(-127, 128, shape)
    codes[..., :8] = 127  # a few extremes in every token
    return activation(codes, rng.uniform(0.01, 0.02, shape[:-1])), codes


@jax.jit
def int32_sums(x, w):
    return reference.int8_dot(x.codes, reference.int8_weights(w))


@every_kind
def test_sums_are_exact(kind, rng):
    w, w8 = make_weight(kind, rng, (48, 512))
    x, codes = make_activation(rng, (5, 512))
    sums = int32_sums(x, w)
    assert sums.dtype == jnp.int32
    np.testing.assert_array_equal(sums, codes @ w8.T)


def extreme_weight(kind, k):
    """Rows of the largest, the smallest and alternating integers that the kind can store."""
    rows = np.stack([np.ones(k), np.zeros(k), np.arange(k) % 2]) > 0
    ones = np.ones(3, np.float32)
    if kind == "w8":
        codes = np.where(rows, 127, -127)
        return W8PerChannel(jnp.asarray(codes, jnp.int8), jnp.asarray(ones), SOURCE), codes
    codes = np.where(rows, 15, 0)
    if kind == "per-channel":
        return W4PerChannel(pack(codes), jnp.asarray(ones), jnp.asarray(ones), SOURCE), codes
    full = np.full((3, k // G), 17)  # 15 * 17 - 128 = 127: all of int8, as imported weights may use
    return group_weight(codes, full, full - 145, ones)


@every_kind
def test_sums_of_extreme_codes_are_exact_up_to_k_65536(kind):
    w, w8 = extreme_weight(kind, 65536)
    assert len(np.unique(w8)) == 2
    codes = np.stack([np.full(65536, 127), np.where(np.arange(65536) % 2, -127, 127)])
    expected = codes @ w8.T
    np.testing.assert_array_equal(int32_sums(activation(codes), w), expected)
    if kind != "per-channel":
        assert np.abs(expected).max() > 2**29


@pytest.mark.parametrize("kind", ["per-group", "w8"])
def test_epilogue_is_float32_products_in_order(kind, rng):
    w, w8 = make_weight(kind, rng, (48, 512))
    x, codes = make_activation(rng, (5, 512))
    y = matmul(x, w, out_dtype=jnp.float32)
    acc = (codes @ w8.T).astype(np.float32)
    expected = acc * np.asarray(w.channel_scale) * np.asarray(x.scale)[:, None]
    np.testing.assert_array_equal(y, expected)
    for dtype in (jnp.bfloat16, jnp.float16):
        rounded = matmul(x, w, out_dtype=dtype)
        assert rounded.dtype == dtype
        np.testing.assert_array_equal(rounded, expected.astype(dtype))


@every_kind
@pytest.mark.parametrize("extras", [(), ("bias",), ("bias", "residual")])
def test_epilogue_against_float64(kind, extras, rng):
    w, w8 = make_weight(kind, rng, (48, 512))
    x, codes = make_activation(rng, (5, 512))
    shapes = {"bias": (48,), "residual": (5, 48)}
    added = {name: rng.standard_normal(shapes[name]).astype(np.float32) * 10 for name in extras}
    y = matmul(x, w, out_dtype=jnp.float32, **{k: jnp.asarray(v) for k, v in added.items()})
    scale, s_x = np.asarray(w.channel_scale, np.float64), np.asarray(x.scale, np.float64)[:, None]
    terms = [(codes @ w8.T) * scale * s_x, *(a.astype(np.float64) for a in added.values())]
    if kind == "per-channel":
        zeros = np.asarray(w.scaled_zero, np.float64)
        terms.append(-codes.sum(-1)[:, None] * zeros * s_x)
    # Each term is rounded at most three times, and once more by every addition.
    roundings = 3 + len(terms) - 1
    bound = roundings * UNIT * sum(np.abs(term) for term in terms)
    assert (np.abs(y - sum(terms)) <= bound).all()


@every_kind
def test_product_with_the_dequantised_weight(kind, rng):
    w, _ = make_weight(kind, rng, (16, 256))
    x, codes = make_activation(rng, (3, 256))
    weight = np.asarray(dequantize_weight(w), np.float64)
    expected = (codes * np.asarray(x.scale, np.float64)[:, None]) @ weight.T
    y = matmul(x, w, out_dtype=jnp.float32)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@every_kind
@pytest.mark.parametrize("m, n", [(0, 4), (2, 0)])
def test_no_tokens_and_no_outputs(kind, m, n, rng):
    x, _ = make_activation(rng, (m, 256))
    w, _ = make_weight("w8", rng, (n, 256))
    if kind != "w8":
        config = QuantConfig(group_size=G if kind == "per-group" else -1)
        w = quantize_kernel(jnp.ones((256, n)), config)
    assert quantized_matmul(x, w).shape == (m, n)


@every_kind
def test_leading_axes_and_layers(kind, rng):
    stacked, _ = make_weight(kind, rng, (3, 48, 256))
    x, _ = make_activation(rng, (2, 3, 256))
    flat = jax.tree.map(lambda a: a.reshape(6, *a.shape[2:]), x)
    for layer in range(3):
        one = jax.tree.map(lambda a, layer=layer: a[layer], stacked)
        expected = matmul(flat, one, out_dtype=jnp.float32)
        y = matmul(x, stacked, layer=layer, out_dtype=jnp.float32)
        np.testing.assert_array_equal(y, expected.reshape(2, 3, 48))


def test_layers_in_a_scan_are_not_copied(rng):
    stacked, _ = make_weight("per-group", rng, (64, 128, 128))
    x, _ = make_activation(rng, (2, 128))

    def model(x, w):
        def body(total, layer):
            return total + quantized_matmul(x, w, layer=layer, out_dtype=jnp.float32), None

        return jax.lax.scan(body, jnp.zeros((2, 128)), jnp.arange(64))[0]

    compiled = jax.jit(model).lower(x, stacked).compile()
    # Unpacked to int32 for the CPU's dot, one layer takes an eighth of the packed stack.
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < nbytes(stacked) / 2
    expected = sum(matmul(x, stacked, layer=i, out_dtype=jnp.float32) for i in range(64))
    # The same 64 numbers summed; a fused multiply-add may round each of them once less.
    largest = np.abs(expected).max()
    np.testing.assert_allclose(compiled(x, stacked), expected, rtol=0, atol=1e-6 * largest)


@every_kind
def test_int32_is_the_sums_as_in_the_kernels(kind, rng):
    w, weights = make_weight(kind, rng, (8, 256))
    x, codes = make_activation(rng, (2, 256))
    found = quantized_matmul(x, w, out_dtype=jnp.int32)
    np.testing.assert_array_equal(found, codes @ weights.T)
    added: tuple[dict[str, Any], ...] = ({"bias": jnp.ones(8)}, {"residual": jnp.ones((2, 8))})
    for more in added:
        with pytest.raises(ValueError, match="out_dtype=int32 is for the sums alone: leave bias"):
            quantized_matmul(x, w, out_dtype=jnp.int32, **more)


def test_default_output_is_bfloat16(rng):
    w, _ = make_weight("per-group", rng, (8, 128))
    x, _ = make_activation(rng, (2, 128))
    assert w4a8_matmul(x, w).dtype == jnp.bfloat16


def test_errors(rng):
    x, _ = make_activation(rng, (2, 256))
    w, _ = make_weight("per-group", rng, (8, 128))
    with pytest.raises(ValueError, match="x has k=256 but weight has K=128"):
        quantized_matmul(x, w)
    stacked, _ = make_weight("w8", rng, (3, 8, 256))
    with pytest.raises(ValueError, match=r"shape \(3, 8, 256\) do not go with layer=None"):
        quantized_matmul(x, stacked)
    with pytest.raises(
        ValueError, match=r"shape \(8, 64\) do not go with layer=0: leave layer out"
    ):
        quantized_matmul(activation(np.ones((2, 128), int)), w, layer=0)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 8, 256\): need \[N, K\] or \[L, N, K\]"):
        quantized_matmul(x, jax.tree.map(lambda a: a[None], stacked), layer=0)
    layers: Any = (7, 3, -1, np.int64(3), jnp.int32(-4))
    for layer in layers:
        with pytest.raises(ValueError, match=rf"layer={layer} but the weight codes .* 0\.\.2"):
            quantized_matmul(x, stacked, layer=layer)
    with pytest.raises(ValueError, match=r"layer=1\.0 is no integer: use 0\.\.2"):
        quantized_matmul(x, stacked, layer=1.0)  # pyright: ignore[reportArgumentType]
    floats = dataclasses.replace(x, codes=x.codes.astype(jnp.float32))
    with pytest.raises(ValueError, match="x codes are float32 but must be int8: quantise first"):
        quantized_matmul(floats, stacked, layer=0)
    unsigned = dataclasses.replace(stacked, codes=stacked.codes.astype(jnp.uint8))
    with pytest.raises(ValueError, match="weight codes are uint8 but must be int8"):
        quantized_matmul(x, unsigned, layer=0)
    plain: Any = jnp.zeros((2, 256), jnp.int8)
    with pytest.raises(ValueError, match="x is of Array.* but must be Int8Activation"):
        quantized_matmul(plain, stacked, layer=0)
    with pytest.raises(ValueError, match="the weight is of Array.*: quantize_params makes"):
        quantized_matmul(x, plain)
    for dtype in (jnp.int8, jnp.bool_, jnp.complex64):
        with pytest.raises(ValueError, match=rf"out_dtype={jnp.dtype(dtype).name} must be a float"):
            quantized_matmul(x, stacked, layer=0, out_dtype=dtype)
    with pytest.raises(ValueError, match="needs 4-bit weights, got W8PerChannel"):
        w4a8_matmul(x, stacked, layer=0)
    with pytest.raises(ValueError, match=r"bias is int32, which is no float: cast it to bfloat16"):
        quantized_matmul(x, stacked, layer=0, bias=jnp.ones(8, jnp.int32))
    with pytest.raises(ValueError, match=r"residual is a list: give an array"):
        quantized_matmul(x, stacked, layer=0, residual=[1.0])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"x scale is int32, which is no float"):
        whole = dataclasses.replace(x, scale=x.scale.astype(jnp.int32))
        quantized_matmul(whole, stacked, layer=0)
    with pytest.raises(ValueError, match=r"bias has shape \(1,\) but the product needs \(8,\)"):
        quantized_matmul(x, stacked, layer=0, bias=jnp.ones(1))
    with pytest.raises(ValueError, match=r"residual has shape \(8,\) .* needs \(2, 8\)"):
        quantized_matmul(x, stacked, layer=0, residual=jnp.ones(8))
    with pytest.raises(ValueError, match=r"x codes have shape \(\): need \[\.\.\., K\]"):
        quantized_matmul(jax.tree.map(lambda a: a.reshape(-1)[0], x), stacked, layer=0)
    flat: Any = jnp.zeros((8, 64), jnp.int32)
    lies = W4PerGroup(flat, flat, flat, flat, G, SOURCE, "mma_w4")
    with pytest.raises(ValueError, match=r"have shape \(8, 64\): need \[N, K\] or \[L, N, K\]"):
        quantized_matmul(x, lies)
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        quantized_matmul(x, stacked, layer=0, backend="cuda")


@pytest.mark.parametrize("found", [jnp.float32(1.5), jnp.ones(1, jnp.int32), jnp.bool_(True)])
@pytest.mark.parametrize("name", ["reference", "mosaic_sm90", "mosaic_mma"])
def test_a_traced_layer_is_an_integer(found, name, rng):
    """Or else a kernel would take layer 1 for 1.5."""
    x, _ = make_activation(rng, (2, 128))
    w, _ = make_weight("per-group", rng, (3, 64, 128))
    w = w if name == "reference" else to_kernel_layout(w)
    message = rf"a traced layer is {found.dtype}\[.*\], which is no integer: use an int32\[\]"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda layer: w4a8_matmul(x, w, layer=layer, backend=name), found)


def test_reference_refuses_another_layout(rng):
    x, _ = make_activation(rng, (2, 128))
    w, _ = make_weight("per-group", rng, (8, 128))
    packed = dataclasses.replace(w, layout="sm90")
    with pytest.raises(NotImplementedError, match="cannot read layout 'sm90'"):
        w4a8_matmul(x, packed)
