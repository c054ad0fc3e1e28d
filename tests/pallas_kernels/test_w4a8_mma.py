"""The matmul for Ampere and newer: lowered as sm_80 on any host; on a GPU the reference's bits."""

import dataclasses
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu

from qserve_jax.benchmarks import shapes
from qserve_jax.pallas_kernels import backend, intrinsics, prepare, w4a8_matmul
from qserve_jax.pallas_kernels.w4a8_matmul import (
    layout,
    mma_config,
    mma_rules,
    mosaic_mma,
    reference,
    to_kernel_layout,
)
from qserve_jax.pallas_kernels.w4a8_matmul.mma_config import MmaConfig
from tests.pallas_kernels.w4a8_cases import (
    SHAPES,
    SMALL_SHAPES,
    every_kind,
    lower_matmul,
    make_activation,
    make_weight,
    mosaic_module,
    operations,
)

TOKENS = (1, 3, 8, 16, 17, 32, 33, 64, 65, 128, 256, 257, 512, 1024, 4096)


SM_80_PTX = {
    *["cp.async.cg.shared.global", "cp.async.commit_group", "cp.async.wait_group"],
    *["bar.sync", "bar.warp.sync", "ldmatrix.sync.aligned.m8n8.x4.shared.b16"],
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
    *["ld.shared.b32", "ld.shared.v4.b32", "ld.shared.f32", "ld.shared.v4.f32", "st.shared.b32"],
    *["ld.global.nc.b32", "ld.global.nc.v2.b32", "ld.global.nc.v4.f32"],
    *["st.global.v2.b32", "st.global.v4.b32"],
    "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
    *["mul.rn.f32", "add.rn.f32", "sub.rn.f32", "cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"],
}
HOPPER = "cp.async.bulk|mbarrier|wgmma|cluster|griddepcontrol|setmaxnreg|fence|elect\\.|nvvm|nvgpu"


@every_kind
@pytest.mark.parametrize("m, dtype", [(1, "bfloat16"), (16, "float32"), (257, "float16")])
def test_is_lowered_as_sm_80_with_its_instructions_only(per_group, m, dtype):
    """Also where the GPU is a Hopper, or none is found, which Mosaic takes for one."""
    arch, text = mosaic_module(lower_matmul("mosaic_mma", per_group, m, 4096, 4096, dtype))
    assert arch == (8, 0)
    assert f"w4a8_matmul_{'g128' if per_group else 'channel'}_mma" in text
    asm = re.findall(r'inline_asm"?[^"]*<?\{[^}]*asm_string = "([^"]*)"', text)
    assert len(asm) > 50
    assert {c if c[0] == "{" else c.split()[0].rstrip(";") for c in asm} <= SM_80_PTX
    assert not re.search(HOPPER, text)


def test_the_architecture_is_forced_only_inside():
    before = mgpu.utils._infer_arch()
    with intrinsics.architecture(8, 6):
        assert mgpu.utils._infer_arch() == (8, 6)
    assert mgpu.utils._infer_arch() == before


def check_lowered(per_group, m, n, k):
    """One kernel, weights read in place, and x touched by nothing but reshapes."""
    text = lower_matmul("mosaic_mma", per_group, m, n, k)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert operations(text) <= {"custom_call", "reshape", "convert"}  # of the bias to float32


@every_kind
@pytest.mark.parametrize("n, k", [(28672, 4096), (4096, 14336), (64, 128)])
@pytest.mark.parametrize("m", [17, 64, 4096])
def test_lowers_for_cuda_and_reads_the_layer_in_place(per_group, n, k, m):
    check_lowered(per_group, m, n, k)


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("n, k", SHAPES)
def test_every_shape_lowers_with_every_number_of_tokens(per_group, n, k):
    for m in (*shapes.TOKENS, 3, 17, 33, 257):
        check_lowered(per_group, m, n, k)


@pytest.mark.parametrize("n, k", [*SHAPES, *SMALL_SHAPES])
def test_the_heuristic_fits_every_shape(n, k):
    for m, per_group in itertools.product(TOKENS, (True, False)):
        chosen = mma_rules.choose_config(m, n, k, per_group)
        mma_config.check_config(chosen, k, per_group)
        assert chosen.tokens < max(2 * m, 9)  # no block is mostly beyond the tokens


def test_four_stages_fit_without_scales_of_groups():
    three, four = (mma_rules.choose_config(32, 59136, 8192, x) for x in (True, False))
    assert (three.stages, four.stages) == (3, 4) and dataclasses.replace(four, stages=3) == three
    assert mma_rules.choose_config(32, 28672, 4096, False) == three  # where they gain nothing
    with pytest.raises(ValueError, match="of shared memory"):
        mma_config.check_config(four, 8192, True)


GOOD = MmaConfig(row_warps=2, row_tiles=2, k_warps=4, tokens=16, stages=3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"row_tiles": 5}, "row_tiles must be at most 4"),
        ({"row_warps": 3, "k_warps": 3}, "must be 4, 8, 12 or 16"),
        ({"row_warps": 1, "k_warps": 12}, "k_warps must be at most K/128 = 8"),
        ({"tokens": 12}, "multiple of 8"),
        ({"stages": 1}, "at least 2"),
        ({"stages": 0}, "at least 1"),
        ({"row_warps": 4, "k_warps": 1, "tokens": 256}, "at most 128, the threads"),
        ({"row_warps": 4, "row_tiles": 4, "k_warps": 4, "tokens": 128}, "hold 256 sums of at most"),
        ({"stages": 5}, r"takes \d+ bytes of shared memory"),
    ],
)
def test_config_errors(change, message):
    mma_config.check_config(GOOD, 1024, True)
    with pytest.raises(ValueError, match=message):
        mma_config.check_config(dataclasses.replace(GOOD, **change), 1024, True)


def test_shared_memory_regions_do_not_overlap():
    memory = mma_config.shared_memory(GOOD, True)
    assert memory.tile_bytes == 1056 and memory.weight_slot == 2 * 1056
    assert memory.x_slot == 16 * 128
    assert memory.weights == 4 * 3 * memory.x_slot  # teams x stages
    assert memory.channels == memory.weights + 8 * 3 * memory.weight_slot  # warps x stages
    assert memory.channels >= 4 * 16 * memory.partial_stride
    assert memory.tokens - memory.channels == 3 * 4 * 64
    assert memory.size - memory.tokens == 2 * 4 * 16
    large = dataclasses.replace(GOOD, row_warps=4, k_warps=1, tokens=128, stages=2)
    assert mma_config.shared_memory(large, True).channels == 128 * 4 * (128 + 4)  # the partials


def ldmatrix(memory, addresses):
    """ldmatrix.x4 of the PTX ISA: 32 lanes' addresses -> u32[4, 32]."""
    out = np.zeros((4, 32), np.uint32)
    for lane in range(32):
        for matrix in range(4):
            start = addresses[8 * matrix + lane // 4] + 4 * (lane % 4)
            out[matrix, lane] = memory[start : start + 4].view(np.uint32)[0]
    return out


def mma_m16n8k32(a, b):
    """mma.m16n8k32 s8 of the PTX ISA: u32[4, 32], u32[2, 32] -> i32[4, 32]."""
    matrix_a, matrix_b = np.zeros((16, 32), np.int32), np.zeros((32, 8), np.int32)
    for lane in range(32):
        g, c = lane // 4, lane % 4
        for i in range(4):
            row, k = g + 8 * (i % 2), 4 * c + 16 * (i // 2)
            matrix_a[row, k : k + 4] = a[i, lane : lane + 1].view(np.int8)
        for i in range(2):
            k = 4 * c + 16 * i
            matrix_b[k : k + 4, g] = b[i, lane : lane + 1].view(np.int8)
    product = matrix_a @ matrix_b
    lanes = np.arange(32)
    g, c = lanes // 4, lanes % 4
    return np.stack([product[g + 8 * (i // 2), 2 * c + i % 2] for i in range(4)])


@every_kind
def test_formulas_against_an_emulation_of_the_warp(per_group, rng):
    """One tile of 16 channels x 128 features times 16 tokens, with the kernel's own formulas."""
    w = make_weight(per_group, rng, (64, 128))
    x = np.asarray(make_activation(rng, 16, 128).codes)
    words = np.asarray(to_kernel_layout(w).codes)[0, 0, 2].view(np.uint32)  # channels 32..47
    lane = np.arange(32)
    g, c = lane // 4, lane % 4
    shared = np.zeros(16 * 128, np.int8)
    for token in range(16):
        for piece in range(8):
            start = mosaic_mma.x_offset(token, piece)
            shared[start : start + 16] = x[token, 16 * piece : 16 * piece + 16]
    scales = layout.split_scales(words[256 + g]) if per_group else None
    y = np.zeros((16, 16), np.int64)
    for h in range(2):
        codes = words[h * 128 + lane * 4 + np.arange(4)[:, None]]  # [v, lane]
        pad = [np.zeros(32, np.uint32)] * (4 * h)
        a = mosaic_mma._fragments(([*pad, *codes], scales), h)
        for n in range(2):
            rows = mosaic_mma.x_offset(lane & 7, (lane >> 3) + 4 * h) + 8 * 128 * n
            b = ldmatrix(shared, rows)
            for half in range(2):
                acc = mma_m16n8k32(np.stack(a[half]), b[2 * half :][:2])
                for i in range(4):
                    channel = layout.channel_of_row(g) + layout.channel_of_row(8 * (i // 2))
                    np.add.at(y, (8 * n + 2 * c + i % 2, channel), acc[i])
    expected = x.astype(np.int64) @ np.asarray(reference.int8_weights(w))[32:48].T
    np.testing.assert_array_equal(y, expected)


def test_refusals(rng):
    w = make_weight(True, rng, (64, 256))
    packed = to_kernel_layout(w)
    with pytest.raises(NotImplementedError, match="layout 'canonical' is not 'mma_w4': use prep"):
        w4a8_matmul(make_activation(rng, 2, 256), w, backend="mosaic_mma")
    with pytest.raises(NotImplementedError, match="x has no tokens"):
        w4a8_matmul(make_activation(rng, 0, 256), packed, backend="mosaic_mma")
    with pytest.raises(NotImplementedError, match="out_dtype float8_e4m3fn is none of"):
        w4a8_matmul(
            make_activation(rng, 2, 256), packed, out_dtype=jnp.float8_e4m3fn, backend="mosaic_mma"
        )


def test_prepare_packs_for_it(rng):
    layers = {"o_proj": {"kernel": make_weight(True, rng, (2, 64, 128))}}
    packed = prepare.prepare_for_backend({"layers": layers}, "mosaic_mma")["layers"]
    expected = to_kernel_layout(layers["o_proj"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, packed["o_proj"]["kernel"], expected)


def test_why_it_cannot_run_here(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert "JAX computes on cpu" in str(backend.unavailable("mosaic_mma"))
    device = types.SimpleNamespace(compute_capability="7.5", platform="gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda platform: [device])
    assert "needs compute capability 8.0 or more (Ampere or newer), this GPU has 7.5" in str(
        backend.unavailable("mosaic_mma")
    )
    for capability in ("8.0", "8.6", "8.9", "9.0", "10.0"):
        device.compute_capability = capability
        assert backend.unavailable("mosaic_mma") is None
