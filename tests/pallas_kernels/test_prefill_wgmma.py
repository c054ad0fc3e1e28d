"""The wgmma kernel of prefill attention: its own code on numpy twins, warpgroups in any order."""

import functools
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.pallas_kernels import paged_attention
from qserve_jax.pallas_kernels.backend import unavailable
from qserve_jax.pallas_kernels.intrinsics import tensor_cores
from qserve_jax.pallas_kernels.paged_attention import (
    mosaic_prefill,
    prefill_rows,
    prefill_tile,
    sm90_prefill,
    sm90_prefill_ring,
)
from qserve_jax.pallas_kernels.paged_attention.sm90_prefill_ring import Ring
from tests.pallas_kernels import lanes, warpgroups
from tests.pallas_kernels.prefill_cases import expected_of, make_case, operands_of, worst_error
from tests.pallas_kernels.w4a8_cases import mosaic_module

SHAPES = [(32, 8, 128), (32, 8, 64), (14, 2, 64), (28, 4, 128), (32, 32, 128), (64, 8, 128)]
MODULES = (prefill_rows, prefill_tile, sm90_prefill, sm90_prefill_ring)


def emulate(case, attends="full", window=None, layer=1, *, seed=0, blocks=2, late=True):
    """The kernel's code on twins, on so many blocks."""
    p, memories, out = operands_of(case, attends, window, layer)
    shared_bytes = sm90_prefill_ring.shared_bytes(p) + 1024
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sm90_prefill, "SMS", blocks)
        for block in range(min(blocks, p.blocks)):
            machine = warpgroups.Machine(
                block, sm90_prefill.THREADS, shared_bytes, (seed, block), late=late
            )
            for module in MODULES:
                patch.setattr(module, "ptx", machine.namespace())
                for kind in ("I32", "F32"):
                    patch.setattr(module, kind, getattr(lanes, kind), raising=False)
            sm90_prefill._body(p, *memories, out, machine.shared, "barriers")
    assert out.filled.all()
    return out.array()


CASES = [  # context, new, heads, kv_heads, head_dim, bits
    ([200, 0, 64], [66, 0, 64], 2, 1, 64, 4),
    ([130, 65], [2, 1], 7, 1, 64, 8),
    ([100], [40], 2, 1, 128, 16),
    ([150], [20], 6, 2, 128, 4),
    ([400], [90], 2, 1, 128, 8),
]


@pytest.mark.parametrize("attends", ["full", "quantized"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_s_own_code(case, attends, rng):
    made = make_case(rng, *case, attends=attends)
    found, expected = emulate(made, attends), expected_of(made, attends=attends)
    assert np.isfinite(found).all()
    assert worst_error(found, expected, made.query_lens) < 8e-4
    assert not found[made.context_lens == 0].any()


@pytest.mark.slow
@pytest.mark.parametrize("attends", ["full", "quantized"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("heads, kv_heads, head_dim", SHAPES)
def test_every_shape(heads, kv_heads, head_dim, bits, attends, rng):
    """With two KV heads; more of them are the same code."""
    case = [200, 0, 63], [70, 0, 63], 2 * heads // kv_heads, 2, head_dim, bits, "bfloat16"
    made = make_case(rng, *case, attends=attends)
    for window in (None, 65):
        found = emulate(made, attends, window, blocks=3)
        expected = expected_of(made, attends=attends, window=window)
        assert worst_error(found, expected, made.query_lens) < 2.5e-3


@pytest.mark.parametrize("attends, window", [("full", 1), ("full", 50), ("quantized", 100)])
def test_window(attends, window, rng):
    made = make_case(rng, [230], [90], 2, 1, 64, 4, attends=attends)
    found = emulate(made, attends, window)
    expected = expected_of(made, attends=attends, window=window)
    assert worst_error(found, expected, made.query_lens) < 8e-4


def test_rising_scores_and_bfloat16(rng):
    """Each key's score is far above the ones before: the running maximum always moves."""
    made = make_case(rng, [200], [60], 2, 1, 64, 4, "bfloat16")
    made.q = (made.q.astype(np.float32) * 12).astype(made.q.dtype)
    found, expected = emulate(made), expected_of(made)
    assert worst_error(found, expected, made.query_lens) < 2.5e-3


@pytest.mark.parametrize("attends", ["full", "quantized"])
def test_pages_outside_the_cache_are_masked(attends, rng):
    made = make_case(rng, [250], [60], 2, 1, 64, 4, attends=attends)
    made.table[0, 0], made.table[0, 2] = 10**6, -1
    found, expected = emulate(made, attends), expected_of(made, attends=attends)
    assert worst_error(found, expected, made.query_lens) < 8e-4


@pytest.mark.parametrize("attends", ["full", "quantized"])
def test_a_length_beyond_the_table(attends, rng):
    """There is nothing where the table ends."""
    made = make_case(rng, [200], [66], 2, 1, 64, 4, attends=attends)
    made.table = made.table[:, :1]
    found, expected = emulate(made, attends), expected_of(made, attends=attends)
    assert worst_error(found, expected, made.query_lens) < 8e-4


def test_a_layer_counts_from_the_end_or_is_clamped(rng):
    made = make_case(rng, [70], [3], 1, 1, 64, 4)
    right = [emulate(made, layer=layer) for layer in range(2)]
    assert worst_error(right[1], expected_of(made), made.query_lens) < 8e-4
    assert worst_error(right[0], right[1], made.query_lens) > 0.1
    for layer, is_read in [(-1, 1), (2, 1), (2**31 - 1, 1), (-2, 0), (-3, 0), (-(2**31), 0)]:
        np.testing.assert_array_equal(emulate(made, layer=layer), right[is_read])


def test_any_order_of_warpgroups_gives_the_same_bits(rng):
    """And any number of blocks, which then have several blocks of rows each, or one."""
    made = make_case(rng, [400, 90], [130, 90], 2, 1, 64, 4)
    first = emulate(made)
    for seed, blocks, late in ((1, 1, True), (2, 3, False), (3, 5, True)):
        found = emulate(made, seed=seed, blocks=blocks, late=late)
        np.testing.assert_array_equal(found, first)


def test_no_pages(rng):
    """Fresh prompts where there is no cuDNN; and nothing at all to attend to."""
    made = make_case(rng, [96, 5], [96, 5], 2, 1, 64, 4)
    made.table = made.table[:, :0]
    assert worst_error(emulate(made), expected_of(made), made.query_lens) < 8e-4
    made = make_case(rng, [96], [96], 2, 1, 64, 4, attends="quantized")
    made.table = made.table[:, :0]
    out = made.call(call, attends="quantized")
    assert out.shape == made.q.shape and not np.asarray(out).any()


# Formulas


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_stores_have_no_bank_conflicts(bits):
    """Eight threads beside each other store to eight different places of 128 bytes."""
    p: Any = types.SimpleNamespace(head_dim=128)
    source: Any = types.SimpleNamespace(bits=bits)
    thread: Any = np.arange(128)
    items: Any = list(sm90_prefill_ring._items(p, source, thread))
    taken = [(part, *both) for part, *columns in items for both in zip(*columns, strict=True)]
    assert len(set(taken)) == len(taken) == 2 * 64 * bits // 2
    for _, token, chunk in items:
        places = sm90_prefill_ring._piece(token, chunk, 16 // bits).reshape(-1, 8)
        assert all(len(set(eight)) == 8 for eight in places)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_wgmma_reads_tiles_as_they_are_stored(head_dim):
    """Dimension d of token t: K-major for the scores, transposed for the values."""
    token, dim = np.arange(64)[:, None], np.arange(head_dim)
    piece = sm90_prefill_ring._piece(token, dim % 64 // 8, 1)
    stored = 3072 + dim // 64 * 8192 + token * 128 + piece * 16 + dim % 8 * 2
    for i in range(head_dim // 16):
        low: Any = tensor_cores.wgmma_descriptor(3072)  # pyright: ignore
        low += (i // 4 * 8192 + i % 4 * 32) // 16
        np.testing.assert_array_equal(
            warpgroups.addresses(low, 64, False), stored[:, 16 * i : 16 * i + 16].T
        )
    for i in range(4):
        low = tensor_cores.wgmma_descriptor(3072, columns_apart=8192)  # pyright: ignore
        found = warpgroups.addresses(low + i * 128, head_dim, True)
        np.testing.assert_array_equal(found, stored[16 * i : 16 * i + 16])


# That these tests can fail


@pytest.mark.parametrize(
    "where, name, wrong, says",
    [
        (Ring, "wait_full", lambda self, n: None, "before it was written|without meeting"),
        (Ring, "wait_empty", lambda self, n: None, "without meeting who has read|more arrivals"),
        (warpgroups.Machine, "fence_writes", lambda self: None, "no fence has shown"),
        (warpgroups.Machine, "wgmma_fence", lambda self, registers: registers, "not fenced"),
    ],
)
def test_the_emulation_notices(where, name, wrong, says, rng, monkeypatch):
    made = make_case(rng, [500], [70], 1, 1, 64, 4, attends="quantized")
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError, match=says):
        emulate(made, "quantized")


def test_a_slot_released_too_early_is_found(rng, monkeypatch):
    made = make_case(rng, [900], [70], 1, 1, 64, 4, attends="quantized")
    right = Ring.release
    monkeypatch.setattr(Ring, "release", lambda self, n, lane: right(self, n + 1, lane))
    with pytest.raises(AssertionError):
        emulate(made, "quantized")


def test_values_read_as_keys_are_found(rng, monkeypatch):
    made = make_case(rng, [200], [70], 1, 1, 64, 4)
    right = warpgroups.Machine.wgmma_halves
    wrong = lambda self, *a, transposed=False: right(self, *a)  # noqa: E731
    monkeypatch.setattr(warpgroups.Machine, "wgmma_halves", wrong)
    with pytest.raises(AssertionError):  # wrong numbers, or memory that nobody may read
        assert worst_error(emulate(made), expected_of(made), made.query_lens) < 1e-2


# Lowered on any host


@functools.partial(jax.jit, static_argnames=("attends", "window", "backend"))
def call(q, *args, window=None, attends="full", backend="mosaic_sm90", **options):
    """Without cuDNN's part."""
    options |= {"window": window, "attends": attends, "sm_scale": None, "softcap": None}
    return mosaic_prefill.attention(backend, q, *args, **options)


@pytest.mark.parametrize("heads, kv_heads, head_dim", SHAPES)
@pytest.mark.parametrize("attends", ["full", "quantized"])
def test_lowers_for_cuda(heads, kv_heads, head_dim, attends, rng):
    made = make_case(rng, [200, 70], [130, 70], heads, kv_heads, head_dim, 4, "bfloat16", attends)
    traced = made.call(call.trace, attends=attends)
    arch, text = mosaic_module(traced.lower(lowering_platforms=("cuda",)).as_text())
    assert arch == (9, 0)
    kinds = set(re.findall(r"wgmma.mma_async.sync.aligned.(m64n\d+k16).f32.f16.f16", text))
    assert kinds == {"m64n64k16", f"m64n{head_dim}k16"}


@pytest.mark.parametrize("backend, has", [("mosaic_sm90", True), ("mosaic_mma", False)])
def test_what_a_backend_takes(backend, has, rng):
    made = make_case(rng, [200], [130], 2, 1, 64, 4, "bfloat16")
    run = jax.jit(functools.partial(paged_attention, backend=backend))
    lowered = made.call(run.trace).lower(lowering_platforms=("cuda",))
    assert ("_wgmma" in lowered.as_text()) == has


# On a GPU


@pytest.fixture
def gpu():
    if reason := unavailable("mosaic_sm90"):
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("attends", ["full", "quantized"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("heads, kv_heads, head_dim", SHAPES)
def test_on_a_gpu(gpu, heads, kv_heads, head_dim, bits, attends, rng):
    context = [1, 3, 63, 64, 65, 1023, 0, 700]
    new = [1, 2, 63, 64, 1, 200, 0, 130]
    made = make_case(rng, context, new, heads, kv_heads, head_dim, bits, "bfloat16", attends)
    for window in (None, 100):
        options = {"attends": attends, "window": window}
        with jax.default_device(jax.devices("cpu")[0]):  # where it compiles in no time
            expected = made.call(reference, q_dtype=jnp.float32, **options)
        found = made.call(call, **options)
        assert bool(jnp.isfinite(found).all())
        assert worst_error(found, expected, made.query_lens) < 2.5e-3


reference = functools.partial(paged_attention, backend="reference")


@pytest.mark.gpu
@pytest.mark.parametrize("attends", ["full", "quantized"])
def test_repeated_launches_on_a_gpu(gpu, attends, rng):
    """Several rounds of blocks, and long rows: the same bits, as the mma kernel has them nearly."""
    context, new = [2500, 900, 1030], [1024, 900, 1]
    made = make_case(rng, context, new, 32, 8, 128, 4, "bfloat16", attends)
    first = np.asarray(made.call(call, attends=attends))
    other = made.call(call, attends=attends, backend="mosaic_mma")
    assert worst_error(first, other, made.query_lens) < 2.5e-3
    for _ in range(100):
        np.testing.assert_array_equal(made.call(call, attends=attends), first)
