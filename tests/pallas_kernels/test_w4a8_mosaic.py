"""The Hopper matmul: lowered for CUDA on any host; on the GPU equal to the reference."""

import dataclasses
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.pallas_kernels import backend, prepare, quantized_matmul, w4a8_matmul
from qserve_jax.pallas_kernels.w4a8_matmul import (
    config,
    layout,
    mosaic_sm90,
    reference,
    to_kernel_layout,
)
from qserve_jax.quantization.numerics import quantize_activation
from qserve_jax.quantization.qtensor import (
    Int8Activation,
    Source,
    W4PerChannel,
    W4PerGroup,
    is_quantized,
)

SOURCE = Source(("stack", "in", "out"), (0,), (0,), "float32")  # the matmul does not read it
LLAMA_3_8B = [(28672, 4096), (4096, 4096), (4096, 14336), (6144, 4096)]
OTHERS = [
    *[(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)],  # Qwen2.5-7B
    *[(12288, 4096), (22016, 4096), (4096, 11008)],  # Llama-2-7B
    *[(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],  # Llama-3-70B
    *[(59136, 8192), (8192, 29568)],  # Qwen2.5-72B
]
every_kind = pytest.mark.parametrize("per_group", [True, False], ids=["per-group", "per-channel"])


def make_weight(per_group, rng, shape) -> Any:
    """A random canonical container; per group all of int8 is reached and never left."""
    *lead, n, k = shape
    codes = jnp.asarray(rng.integers(0, 256, (*lead, n, k // 2)), jnp.uint8)
    scale = jnp.asarray(rng.uniform(1e-3, 2e-3, (*lead, n)), jnp.float32)
    if not per_group:
        zero = jnp.asarray(rng.uniform(0, 15, (*lead, n)), jnp.float32) * scale
        return W4PerChannel(codes, scale, zero, SOURCE)
    s2 = rng.integers(1, 18, (*lead, n, k // 128))
    offset = rng.integers(-128, 127 - 15 * s2 + 1)
    s2, offset = jnp.asarray(s2, jnp.uint8), jnp.asarray(offset, jnp.int8)
    return W4PerGroup(codes, scale, s2, offset, 128, SOURCE)


def make_activation(rng, m, k):
    codes = rng.integers(-127, 128, (m, k))
    codes[:, :8] = 127
    scale = rng.uniform(0.01, 0.02, m)
    sums = codes.sum(-1)
    return Int8Activation(
        jnp.asarray(codes, jnp.int8), jnp.asarray(scale, jnp.float32), jnp.asarray(sums, jnp.int32)
    )


def shape_only(per_group, m, n, k, layers=2):
    """Arguments of a real model's size, without the arrays."""
    w = jax.eval_shape(
        lambda codes, scale, s2, offset: to_kernel_layout(
            W4PerGroup(codes, scale, s2, offset, 128, SOURCE)
            if per_group
            else W4PerChannel(codes, scale, scale, SOURCE)
        ),
        jax.ShapeDtypeStruct((layers, n, k // 2), jnp.uint8),
        jax.ShapeDtypeStruct((layers, n), jnp.float32),
        jax.ShapeDtypeStruct((layers, n, k // 128), jnp.uint8),
        jax.ShapeDtypeStruct((layers, n, k // 128), jnp.int8),
    )
    x = jax.eval_shape(quantize_activation, jax.ShapeDtypeStruct((m, k), jnp.float32))
    return x, w


def lower(run, *args) -> str:
    return jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@every_kind
@pytest.mark.parametrize("n, k", LLAMA_3_8B)
@pytest.mark.parametrize("m, dtype", [(1, "bfloat16"), (17, "float16"), (64, "float32")])
def test_lowers_for_cuda_and_reads_the_layer_in_place(per_group, n, k, m, dtype):
    def run(x, w, bias, layer):
        return w4a8_matmul(x, w, bias=bias, layer=layer, out_dtype=dtype, backend="mosaic_sm90")

    x, w = shape_only(per_group, m, n, k)
    bias = jax.ShapeDtypeStruct((n,), jnp.bfloat16)
    text = lower(run, x, w, bias, jax.ShapeDtypeStruct((), jnp.int32))
    kind = "g128" if per_group else "channel"
    assert f"w4a8_matmul_{kind}_sm90" in text
    assert "dynamic_slice" not in text and "dynamic_update_slice" not in text
    assert jax.eval_shape(run, x, w, bias, 1).shape == (m, n)


@pytest.mark.parametrize("n, k", LLAMA_3_8B + OTHERS)
def test_the_heuristic_fits_every_shape(n, k):
    for per_group in (True, False):
        for m in (1, 3, 8, 16, 17, 31, 32, 33, 48, 64):
            chosen = config.choose_config(m, n, k, per_group)
            config.check_config(chosen, m, k, per_group)
            assert chosen.warpgroups <= 8
            # No fewer than 60 % of the SMs at work, and blocks enough for all rows.
            blocks = math.ceil(n / chosen.rows)
            waves = math.ceil(blocks / config.SMS)
            assert blocks * chosen.rows - n < chosen.rows
            assert blocks >= 0.6 * waves * config.SMS


def test_shared_memory_regions_do_not_overlap():
    chosen = config.SmallMConfig(row_warps=2, row_tiles=1, k_warps=8, weight_stages=4, x_stages=2)
    memory = config.shared_memory(chosen, 17, True)
    assert memory.tile_bytes == 1056
    assert memory.x == 16 * 4 * 1056
    assert memory.x_step_bytes == 8 * 17 * 128
    partials = 8 * 24 * memory.partial_stride  # k_warps x three 8-token tiles
    assert memory.channels == max(memory.x + 2 * memory.x_step_bytes, partials)
    assert memory.tokens - memory.channels == 3 * 4 * 32
    assert memory.size - memory.tokens == 2 * 4 * 64
    assert memory.barriers == 16 * 4 + 2 * 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"row_tiles": 3}, "row_tiles must be 1 or 2"),
        ({"row_warps": 33}, r"row_warps \* k_warps must be at most 32"),
        ({"k_warps": 9}, "k_warps must be at most K/128 = 8"),
        ({"weight_stages": 3}, "weight_stages must be at most 2"),
        ({"x_stages": 1}, "x_stages: 2 to 2"),
        ({"x_stages": 3}, "x_stages: 2 to 2"),
        ({"weight_stages": 0}, "at least 1"),
        ({"row_warps": 8, "row_tiles": 2, "x_stages": 2}, r"takes \d+ bytes of shared memory"),
    ],
)
def test_config_errors(change, message):
    good = config.SmallMConfig(row_warps=1, row_tiles=1, k_warps=4, weight_stages=2, x_stages=2)
    config.check_config(good, 64, 1024, True)
    with pytest.raises(ValueError, match=message):
        config.check_config(dataclasses.replace(good, **change), 64, 1024, True)


def test_refusals(rng):
    w = make_weight(True, rng, (64, 256))
    packed = to_kernel_layout(w)
    x = make_activation(rng, 65, 256)
    with pytest.raises(NotImplementedError, match="layout 'canonical' is not 'mma_sm90': use prep"):
        w4a8_matmul(x, w, backend="mosaic_sm90")
    with pytest.raises(NotImplementedError, match=r"65 tokens, but 1\.\.64 are supported"):
        w4a8_matmul(x, packed, backend="mosaic_sm90")
    with pytest.raises(NotImplementedError, match="out_dtype int32 is none of"):
        w4a8_matmul(x, packed, out_dtype=jnp.int32, backend="mosaic_sm90")


@every_kind
def test_the_reference_reads_the_packed_layout(per_group, rng):
    """What default dispatch does where the kernel cannot: no GPU, or too many tokens."""
    w = make_weight(per_group, rng, (3, 64, 256))
    x = make_activation(rng, 5, 256)
    packed = to_kernel_layout(w)
    for layer in (0, 2):
        expected = quantized_matmul(x, w, layer=layer, backend="reference")
        np.testing.assert_array_equal(quantized_matmul(x, packed, layer=layer), expected)
    with pytest.raises(ValueError, match="layer=3 but the weight codes have layers 0..2"):
        quantized_matmul(x, packed, layer=3)
    with pytest.raises(ValueError, match="x has k=256 but weight has K=128"):
        quantized_matmul(x, to_kernel_layout(make_weight(per_group, rng, (64, 128))))


def test_prepare_packs_what_fits_for_a_named_backend(rng):
    layers = {
        "o_proj": {"kernel": make_weight(True, rng, (2, 64, 128))},
        "down_proj": {"kernel": make_weight(True, rng, (2, 32, 128))},
        "attn_norm": {"scale": jnp.ones((2, 128))},
    }
    canonical = prepare.prepare_for_backend({"layers": layers}, "reference")
    assert canonical["layers"]["o_proj"]["kernel"].layout == "canonical"
    packed = prepare.prepare_for_backend({"layers": layers}, "mosaic_sm90")["layers"]
    expected = to_kernel_layout(layers["o_proj"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, packed["o_proj"]["kernel"], expected)
    assert packed["down_proj"]["kernel"].layout == "canonical"
    assert all(not is_quantized(leaf) for leaf in packed["attn_norm"].values())


def test_runs_only_where_it_is_named(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    assert backend.usable("mosaic_sm90") == ("mosaic_sm90",)
    assert backend.usable(None) == ("mosaic_mma", "reference")
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "mosaic_sm90")
    assert backend.usable(None) == ("mosaic_sm90",)


def test_why_it_cannot_run_here(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert "JAX computes on cpu" in str(backend.unavailable("mosaic_sm90"))
    device = types.SimpleNamespace(compute_capability="8.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda platform: [device])
    assert "needs compute capability 9.0 (Hopper), this GPU has 8.0" in str(
        backend.unavailable("mosaic_sm90")
    )
    device.compute_capability = "9.0"
    assert backend.unavailable("mosaic_sm90") is None


@pytest.fixture
def hopper():
    if reason := backend.unavailable("mosaic_sm90"):
        pytest.skip(reason)


CONFIGS = [  # m, n, k, config: rings of x, short last steps, idle warps, a last block part empty
    (1, 64, 128, None),
    (3, 192, 384, config.SmallMConfig(1, 1, 2, 2, 2)),
    (17, 256, 1024, config.SmallMConfig(3, 1, 3, 1, 2)),
    (33, 320, 896, config.SmallMConfig(3, 2, 2, 3, 4)),
    (64, 448, 1152, config.SmallMConfig(5, 2, 1, 2, 3)),
]


@pytest.mark.gpu
@every_kind
@pytest.mark.parametrize("m, n, k, chosen", CONFIGS)
def test_sums_and_outputs_equal_the_reference(hopper, per_group, m, n, k, chosen, rng):
    w = make_weight(per_group, rng, (3, n, k))
    packed = to_kernel_layout(w)
    x = make_activation(rng, m, k)
    bias = jnp.asarray(rng.standard_normal(n), jnp.bfloat16)
    sums_of = jax.jit(mosaic_sm90.int32_sums, static_argnames="config")
    matmul = jax.jit(mosaic_sm90.matmul, static_argnames=("out_dtype", "config"))
    for layer in range(3):
        one = layout.take_layer(w, layer)
        expected = np.asarray(x.codes, np.int64) @ np.asarray(reference.int8_weights(one)).T
        sums = sums_of(x, packed, layer=jnp.int32(layer), config=chosen)
        np.testing.assert_array_equal(sums, expected)
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            y = matmul(
                x, packed, bias=bias, residual=None, layer=layer, out_dtype=dtype, config=chosen
            )
            # In numpy, where nothing is contracted to a fused multiply-add.
            f = expected.astype(np.float32) * np.asarray(one.channel_scale)
            if not per_group:
                zero = np.asarray(one.scaled_zero)
                f -= np.asarray(x.code_sum, np.float32)[:, None] * zero
            f = f * np.asarray(x.scale)[:, None] + np.asarray(bias, np.float32)
            np.testing.assert_array_equal(y, f.astype(dtype))


@pytest.mark.gpu
@every_kind
def test_repeats_are_bit_identical(hopper, per_group, rng):
    """A slot refilled before it was read shows as a few other outputs in some launches."""
    packed = to_kernel_layout(make_weight(per_group, rng, (4096, 4096)))
    x = make_activation(rng, 16, 4096)
    run = jax.jit(mosaic_sm90.int32_sums, static_argnames="config")
    for chosen in (None, config.SmallMConfig(14, 1, 2, 2, 4)):
        first = np.asarray(run(x, packed, config=chosen))
        for _ in range(100):
            np.testing.assert_array_equal(run(x, packed, config=chosen), first)


@pytest.mark.gpu
def test_dispatch_by_name_takes_the_kernel(hopper, rng):
    w = make_weight(True, rng, (2, 64, 256))
    packed = prepare.prepare_for_backend({"layers": {"o_proj": {"kernel": w}}}, "mosaic_sm90")
    packed = packed["layers"]["o_proj"]["kernel"]
    x = quantize_activation(jnp.asarray(rng.standard_normal((5, 256)), jnp.float32))

    def run(x, w, backend):
        return quantized_matmul(x, w, layer=1, out_dtype=jnp.float32, backend=backend)

    by_name = jax.jit(run, static_argnames="backend")
    text = by_name.lower(x, packed, backend="mosaic_sm90").as_text()
    assert "w4a8_matmul_g128_sm90" in text
    expected = by_name(x, w, backend="reference")
    np.testing.assert_array_equal(by_name(x, packed, backend="mosaic_sm90"), expected)
