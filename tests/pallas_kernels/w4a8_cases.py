"""Operands of the W4A8 matmul and what its tests compare with: numpy, and the PTX ISA."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import mlir
from jaxlib.mlir import ir

from qserve_jax.pallas_kernels import w4a8_matmul
from qserve_jax.pallas_kernels.w4a8_matmul import layout, reference, to_kernel_layout
from qserve_jax.pallas_kernels.w4a8_matmul.layout import CODE_WORDS, LAYOUT, SCALE_WORDS
from qserve_jax.quantization.numerics import quantize_activation
from qserve_jax.quantization.qtensor import Int8Activation, Source, W4PerChannel, W4PerGroup

SOURCE = Source(("stack", "in", "out"), (0,), (0,), "float32")  # the matmul does not read it
SHAPES = [
    *[(28672, 4096), (4096, 4096), (4096, 14336), (6144, 4096)],  # Llama-3-8B
    *[(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)],  # Qwen2.5-7B
    *[(12288, 4096), (22016, 4096), (4096, 11008)],  # Llama-2-7B
    *[(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],  # Llama-3-70B
    *[(59136, 8192), (8192, 29568)],  # Qwen2.5-72B
]
SMALL_SHAPES = [(64, 128), (192, 384)]
CUT = [  # m, n, k: every kind of cut that the wgmma rules choose at SHAPES and TOKENS
    *[(m, 4096, 4096) for m in (64, 128, 256, 512, 1024)],
    *[(m, 28672, 4096) for m in (64, 128, 256, 512, 1024)],
    *[(m, 22016, 4096) for m in (64, 128, 1024)],
    *[(m, 4608, 3584) for m in (256, 512, 1024, 4096)],
    *[(m, 37888, 3584) for m in (64, 128, 256)],
    *[(256, 6144, 4096), (512, 6144, 4096), (64, 12288, 4096), (64, 10240, 8192)],
    *[(64, 3584, 3584), (32, 3584, 18944), (64, 3584, 18944), (128, 3584, 18944)],
]
every_kind = pytest.mark.parametrize("per_group", [True, False], ids=["per-group", "per-channel"])


# Operands


def make_weight(per_group: bool, rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
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


def make_packed(per_group: bool, rng: np.random.Generator, n: int, k: int) -> Any:
    """Two layers in the kernels' layout, made quickly: of extreme weights, and of random ones.

    Extreme: codes 0 and 15, with scale 17 and offset -128 per group, so that every weight is -128
    or 127. 64 channels have codes 0 only, and 64 others (if there are) 15 only.
    """
    lead = (n // 64, k // 128, 4)
    words = rng.integers(0, 2**32, (2, *lead, CODE_WORDS), np.uint32)
    words[0] &= 0x11111111
    words[0] *= 15
    words[0, -1] = 0xFFFFFFFF
    words[0, 0] = 0
    scale = jnp.asarray(rng.uniform(1e-3, 2e-3, (2, n)), jnp.float32)
    if not per_group:
        return W4PerChannel(jnp.asarray(words.view(np.int32)), scale, 7 * scale, SOURCE, LAYOUT)
    s2 = rng.integers(1, 18, (2, *lead, SCALE_WORDS, 2), np.uint32)
    offset = rng.integers(0, 256 - 15 * s2, dtype=np.uint32)  # plus 128
    s2[0], offset[0] = 17, 0
    pair = s2 | offset << 8
    scales = pair[..., 0] | pair[..., 1] << 16
    codes = jnp.asarray(np.concatenate([words, scales], axis=-1).view(np.int32))
    none = jnp.zeros((2, 0, 0), jnp.uint8)
    return W4PerGroup(codes, scale, none, none.astype(jnp.int8), 128, SOURCE, LAYOUT)


def make_activation(
    rng: np.random.Generator, m: int, k: int, *, extreme: bool = False
) -> Int8Activation:
    """Random codes; extreme: all are 127 or -127, in the first token 127 and the second -127."""
    codes = rng.integers(-127, 128, (m, k))
    codes[:, :8] = 127
    if extreme:
        codes = np.where(codes < 0, -127, 127)
        codes[:1], codes[1:2] = 127, -127
    scale = rng.uniform(0.01, 0.02, m)
    sums = codes.sum(-1)
    return Int8Activation(
        jnp.asarray(codes, jnp.int8), jnp.asarray(scale, jnp.float32), jnp.asarray(sums, jnp.int32)
    )


def shape_only(per_group: bool, m: int, n: int, k: int, layers: int = 2) -> tuple[Any, Any]:
    """x and stacked weights of a real model's size, without the arrays."""
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


# Programs


def lower(run: Any, *args: Any) -> str:
    """The program for CUDA, on any host."""
    return jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def lower_matmul(
    backend: str, per_group: bool, m: int, n: int, k: int, dtype: str = "bfloat16"
) -> str:
    """One product with everything: a bias, a residual and a traced layer of stacked weights."""

    def run(x, w, bias, residual, layer):
        return w4a8_matmul(
            x, w, bias=bias, residual=residual, layer=layer, out_dtype=dtype, backend=backend
        )

    x, w = shape_only(per_group, m, n, k)
    bias = jax.ShapeDtypeStruct((n,), jnp.bfloat16)
    residual = jax.ShapeDtypeStruct((m, n), dtype)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    assert jax.eval_shape(run, x, w, bias, residual, layer).shape == (m, n)
    return lower(run, x, w, bias, residual, layer)


def operations(text: str) -> set[str]:
    """The names of XLA's operations in a lowered program."""
    return set(re.findall(r"= \"?stablehlo\.(\w+)", text))


def mosaic_module(text: str) -> Any:
    """(arch, MLIR text) of the one Mosaic kernel in a lowered program."""
    found = []

    def visit(op):
        if op.name == "stablehlo.custom_call" and "mosaic_gpu" in str(op):
            config = ir.DictAttr(op.attributes["mhlo.backend_config"])
            found.append(ir.StringAttr(config["module"]).value_bytes)
        return ir.WalkResult.ADVANCE

    with mlir.make_ir_context() as context:
        context.allow_unregistered_dialects = True
        ir.Module.parse(text).operation.walk(visit)
        (code,) = found
        operation = ir.Module.parse(code).operation
        arch = [operation.attributes[f"mosaic_gpu.arch_{part}"] for part in ("major", "minor")]
        return tuple(ir.IntegerAttr(a).value for a in arch), str(operation)


# What numpy says, where nothing is contracted to a fused multiply-add


@jax.jit
def _int8_weights(w: Any, layer: Any) -> Any:
    w = w if layer is None else layout.take_layer(w, layer)
    return reference.int8_weights(layout.from_kernel_layout(w) if w.layout == LAYOUT else w)


def exact_sums(x: Int8Activation, w: Any, layer: int | None = None) -> np.ndarray:
    """int64[M, N] of one layer, canonical or packed.

    By numpy's float32 product, which is fast, as none of integers is, and of 1024 features exact in
    any order: 1024 * 127 * 128 < 2**24. XLA's own int8 product is not asked.
    """
    codes, weights = np.asarray(x.codes), np.asarray(_int8_weights(w, layer))
    sums = np.zeros((len(codes), len(weights)), np.int64)
    for k in range(0, codes.shape[1], 1024):
        a, b = (part[:, k : k + 1024].astype(np.float32) for part in (codes, weights))
        sums += (a @ b.T).astype(np.int64)
    return sums


def expected_output(
    x: Int8Activation, w: Any, dtype: Any, bias: Any = None, residual: Any = None, sums: Any = None
) -> np.ndarray:
    """The epilogue of the reference, operation by operation in float32, and one rounding.

    sums: `exact_sums`, where they are known; then w may be packed."""
    sums = exact_sums(x, w) if sums is None else sums
    y = sums.astype(np.float32) * np.asarray(w.channel_scale)
    if isinstance(w, W4PerChannel):
        y -= np.asarray(x.code_sum, np.float32)[:, None] * np.asarray(w.scaled_zero)
    y = y * np.asarray(x.scale)[:, None]
    for added in (bias, residual):
        y = y if added is None else y + np.asarray(added).astype(np.float32)
    return y.astype(dtype)
