"""The decode attention kernels themselves, run by an emulated GPU, against float64.

What it cannot see is the memory model: that a fence makes reads precede a bulk copy, or an mbarrier
shows what a copy brought. test_decode_attention.py looks for the fence, test_decode_ring.py runs
the ring's warps in any order, and on a GPU there are racecheck (scripts/sanitize_kernels.py) and
test_decode_gpu.py.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.models import CausalLM, ModelConfig
from qserve_jax.models.llama import decode_step
from qserve_jax.pallas_kernels import intrinsics, paged_attention
from qserve_jax.pallas_kernels.paged_attention import (
    api,
    longest_first,
    mosaic_decode,
    mosaic_mma,
    mosaic_sm90,
)
from qserve_jax.pallas_kernels.paged_attention.decode_config import DecodeConfig
from qserve_jax.runtime import init_cache
from tests.pallas_kernels import emulator, meetings
from tests.pallas_kernels.attention_cases import make_case, worst_error

LENS = [130, 0, 65, 1, 64, 3, 63, 323]
TOLERANCE = 2.5e-3  # the error that is allowed; rounding the output to bf16 alone takes 1.7e-3
BACKENDS = ("mosaic_sm90", "mosaic_mma")


@pytest.fixture
def emulated(monkeypatch):
    """Run paged_attention's kernel on the emulated GPU, with this config."""

    def run(case, name, config=None, eager=True):
        launch = functools.partial(emulator.launch, monkeypatch, eager=eager)
        with monkeypatch.context() as patch:
            patch.setattr(intrinsics, "launch", launch)
            if config is not None:
                patch.setattr(mosaic_decode, "choose_config", lambda p, clusters: config)
            return paged_attention(**case.arguments, backend=name)

    return run


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("attends", ["full", "quantized"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("h", [64, 128])
def test_lengths_around_the_page(emulated, name, attends, bits, h, rng):
    """With both kinds of copies: landing at once, and as late as may be."""
    case = make_case(rng, LENS, bits=bits, h=h, attends=attends)
    out = emulated(case, name, DecodeConfig(3), eager=h == 64)
    assert out.dtype == jnp.bfloat16 and out.shape == (len(LENS), 8, h)
    assert worst_error(out, case.expected()) <= TOLERANCE


CONFIGS = [
    ("mosaic_sm90", 4, DecodeConfig(2, 4)),
    ("mosaic_sm90", 4, DecodeConfig(3, 1, cluster=4)),
    ("mosaic_sm90", 8, DecodeConfig(2, 2, cluster=8)),
    ("mosaic_sm90", 16, DecodeConfig(2, 1, splits=3)),
    ("mosaic_sm90", 16, DecodeConfig(2, 2, cluster=2)),
    ("mosaic_mma", 4, DecodeConfig(3, 2, splits=2)),
    ("mosaic_mma", 16, DecodeConfig(2, 1, splits=5)),
]


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("name, bits, config", CONFIGS)
def test_rows_cut_into_parts(emulated, name, bits, config, eager, rng):
    """Also into more parts than there are pages, and with rings that go round several times."""
    case = make_case(rng, [0, 1, 64, 129, 700], bits=bits, heads=6, h=64, softcap=20.0)
    assert worst_error(emulated(case, name, config, eager), case.expected()) <= TOLERANCE


@pytest.mark.parametrize(
    "bits, heads, kv_heads, options",
    [
        (4, 2, 2, {}),
        (4, 14, 2, {"attends": "quantized"}),
        (8, 24, 2, {"sm_scale": 0.05}),  # groups of 12: blocks of 8 query heads and of 4
        (16, 16, 1, {}),
        (4, 8, 2, {"window": 70}),
        (8, 8, 2, {"window": 1}),
        (16, 8, 2, {"window": 64, "attends": "quantized"}),
        (4, 8, 2, {"window": 10_000}),
        (4, 8, 2, {"softcap": 2.0}),
        (16, 8, 2, {"softcap": 2.0, "attends": "quantized", "sm_scale": 0.3}),
        (4, 8, 2, {"rising": True}),
        (8, 8, 2, {"rising": True, "attends": "quantized"}),
        (16, 8, 2, {"rising": True}),
        (4, 2, 2, {"sink": True, "attends": "quantized"}),
        (8, 2, 2, {"sink": True}),
        (16, 2, 2, {"sink": True}),
    ],
)
def test_groups_windows_caps_and_rising_scores(emulated, bits, heads, kv_heads, options, rng):
    lens = [200, 5, 1000]
    case = make_case(rng, lens, bits=bits, heads=heads, kv_heads=kv_heads, h=64, **options)
    name = BACKENDS[bits == 8]
    assert worst_error(emulated(case, name, DecodeConfig(3)), case.expected()) <= TOLERANCE


@pytest.mark.parametrize(
    "bits, dtype, cache_dtype, tolerance",
    [
        (4, "float16", "bfloat16", 5e-4),  # f16 rounds 8 times finer than bf16
        (4, "float32", "bfloat16", 4e-4),  # q and the weights are f16 to the tensor core
        (8, "float32", "bfloat16", 4e-4),
        (16, "float32", "bfloat16", 2e-5),  # as sums of two bf16, 2**-17 each
        (16, "float16", "bfloat16", 3e-4),
        (16, "float32", "float16", 4e-4),
        (16, "bfloat16", "float16", TOLERANCE),
    ],
)
def test_dtypes(emulated, bits, dtype, cache_dtype, tolerance, rng):
    case = make_case(rng, [130, 1, 321], bits=bits, h=64, dtype=dtype, cache_dtype=cache_dtype)
    out = emulated(case, "mosaic_sm90", DecodeConfig(3))
    assert out.dtype == dtype
    assert worst_error(out, case.expected()) <= tolerance


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("missing", [-1, -(2**31), 2**30, "num_pages"])
def test_pages_outside_the_cache_are_masked_and_not_read(emulated, bits, missing, rng):
    """The emulator reads no byte outside an array; page 0 is full of NaN here, or in use."""
    case = make_case(rng, [130, 200], bits=bits, h=64, attends="quantized")
    cache, table = case.arguments["cache"], case.arguments["block_table"]
    missing = cache.num_pages if missing == "num_pages" else missing
    case.arguments["block_table"] = table.at[0, 1].set(missing)
    out = emulated(case, "mosaic_sm90", DecodeConfig(2))
    seen = np.arange(130) // 64 != 1
    assert worst_error(out, case.expected({0: seen})) <= TOLERANCE


def test_a_length_beyond_the_table_and_no_table(emulated, rng):
    case = make_case(rng, [130, 130], h=64, attends="quantized", spare_columns=0)
    case.arguments["context_lens"] = jnp.asarray([130, 2**31 - 1], jnp.int32)
    case.arguments["block_table"] = case.arguments["block_table"][:, :2]
    out = emulated(case, "mosaic_sm90", DecodeConfig(3))
    seen = np.arange(130) < 128
    assert worst_error(out, case.expected({0: seen, 1: seen})) <= TOLERANCE
    case.arguments["block_table"] = case.arguments["block_table"][:, :0]
    assert not np.asarray(emulated(case, "mosaic_sm90", DecodeConfig(3))).any()


def test_the_order_of_rows_changes_no_bit(emulated, rng, monkeypatch):
    """Nor does one with rows that are not there, which are clamped: all rows again, so the emulator
    sees each written, and nothing outside the output."""
    monkeypatch.setattr(mosaic_decode, "SMS", 0)  # few rows start at once and need no order
    lens = [130, 0, 65, 700]
    case = make_case(rng, lens, h=64)
    out = emulated(case, "mosaic_sm90", DecodeConfig(3))
    order = longest_first(case.arguments["context_lens"])
    assert order.tolist() == [3, 0, 2, 1] and order.dtype == jnp.int32
    for rows in (order, jnp.asarray([2, 2**31 - 1, -(2**31), 1], jnp.int32)):
        case.arguments["order"] = rows
        np.testing.assert_array_equal(emulated(case, "mosaic_sm90", DecodeConfig(3)), out)


def test_the_order_says_which_rows_are_computed(emulated, rng, monkeypatch):
    """So two rows again and again leave the others as they were, full of NaN."""
    monkeypatch.setattr(mosaic_decode, "SMS", 0)
    case = make_case(rng, [130, 0, 65, 700], h=64)
    case.arguments["order"] = jnp.asarray([3, 1, 3, 1], jnp.int32)
    out = np.asarray(emulated(case, "mosaic_sm90", DecodeConfig(3)), np.float32)
    assert np.isnan(out[[0, 2]]).all() and np.isfinite(out[[1, 3]]).all()


@pytest.mark.parametrize(
    "layer, is_read", [(-1, 1), (2, 1), (2**31 - 1, 1), (-3, 0), (-(2**31), 0)]
)
def test_a_layer_counts_from_the_end_or_is_clamped(emulated, layer, is_read, rng, monkeypatch):
    """To one of the two; the other is full of NaN."""
    monkeypatch.setattr(api, "check_cache", lambda *_: None)  # a traced layer it lets pass
    case = make_case(rng, [130], h=64, attends="quantized")
    cache, arguments = case.arguments["cache"], case.arguments
    if is_read == 0:
        arguments["cache"] = dataclasses.replace(cache, pages=cache.pages[::-1])
    arguments["layer"] = jnp.int32(layer)
    assert worst_error(emulated(case, "mosaic_sm90", DecodeConfig(2)), case.expected()) <= TOLERANCE


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("window, first", [(None, 0), (60, 10), (61, 9), (130, 8)])
def test_pages_before_the_window_are_not_read(emulated, name, window, first, rng, monkeypatch):
    """Of 700 tokens, the last page with 60."""
    case = make_case(rng, [700], h=64, attends="quantized", window=window)
    cache, table = case.arguments["cache"], np.asarray(case.arguments["block_table"])
    places: list[int] = []

    def recording(copy):
        def record(gpu, target, source, *args, **kwargs):
            places.extend(np.broadcast_to(source.offset, gpu.count)[gpu.active])
            return copy(gpu, target, source, *args, **kwargs)

        return record

    for copy in ("copy_to_shared", "copy_16_bytes"):
        monkeypatch.setattr(emulator.Gpu, copy, recording(getattr(emulator.Gpu, copy)))
    emulated(case, name, DecodeConfig(3, 2 if name == "mosaic_sm90" else 1))
    of_layer_1 = np.asarray(places) // cache.pages[0, 0].nbytes - cache.num_pages
    assert set(of_layer_1) == set(table[0, first:11])


@pytest.mark.parametrize(
    "name, bits, config",
    [
        ("mosaic_mma", 4, DecodeConfig(3)),
        ("mosaic_mma", 16, DecodeConfig(2, 2, splits=2)),
        ("mosaic_sm90", 8, DecodeConfig(2, 2)),
        ("mosaic_sm90", 4, DecodeConfig(3, 1, cluster=4)),
    ],
)
def test_threads_meet_before_they_read_what_others_write(
    emulated, name, bits, config, rng, monkeypatch
):
    """Also no block ends while others of its cluster read from it."""
    monkeypatch.setattr(emulator, "Gpu", meetings.Gpu)
    case = make_case(rng, [400, 65], bits=bits, h=64)
    out = emulated(case, name, config, eager=False)
    assert worst_error(out, case.expected()) <= TOLERANCE


def test_no_rows(emulated, rng):
    case = make_case(rng, [3], h=64)
    for name in ("q", "block_table", "context_lens", "new_k", "new_v"):
        case.arguments[name] = case.arguments[name][:0]
    assert emulated(case, "mosaic_sm90").shape == (0, 8, 64)


@pytest.mark.parametrize("eager", [True, False])
def test_the_rules_choose_what_runs(emulated, eager, rng):
    """One row of many pages: several warpgroups, a cluster or splits."""
    case = make_case(rng, [1500], heads=4, kv_heads=1)
    for name in BACKENDS:
        assert worst_error(emulated(case, name, eager=eager), case.expected()) <= TOLERANCE


# A model


def test_a_model_decodes_with_the_kernel(monkeypatch):
    """Jitted, in the scan over layers: the logits of the reference, step by step."""
    config = ModelConfig("llama", 64, 128, 256, 2, 4, 2, 64, 256, tie_embeddings=True)
    model = CausalLM(config)
    tokens = jax.random.randint(jax.random.key(1), (3, 3), 0, 64)
    params: Any = model.init(jax.random.key(0), tokens)["params"]
    table = jnp.asarray([[2], [0], [1]], jnp.int32)
    first = jnp.asarray([1, 1, 0], jnp.int32)  # the last row stays idle at first
    cache = init_cache(config, num_pages=3, kv_bits=4)

    def steps(kernel):
        emulated, calls = pytest.MonkeyPatch(), []

        def launch(body, inputs, out, **sizes):
            def run(*arrays):
                calls.append(sizes["name"])
                return np.asarray(
                    emulator.launch(emulated, body, arrays, out, eager=False, **sizes)
                )

            return jax.pure_callback(run, out, *inputs)

        with monkeypatch.context() as patch:
            patch.setattr(intrinsics, "launch", launch)
            if kernel:  # what stands where the reference does; the other operations keep theirs
                patch.setitem(api.ATTENTION_BACKENDS, "reference", mosaic_sm90.decode)
            step = jax.jit(lambda *a: decode_step(model, params, *a))
            state, logits = cache, []
            for i in range(3):
                state, out = step(state, tokens[:, i], table, first + i)
                logits.append(np.asarray(out, np.float64))
        return np.stack(logits), len(calls)

    (expected, none), (found, calls) = steps(False), steps(True)
    assert (none, calls) == (0, 3 * config.num_layers)
    expected[0, 2] = found[0, 2]  # of an idle row they mean nothing
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() <= TOLERANCE


# That these tests can fail


@pytest.mark.parametrize(
    "meeting, name, config, says",
    [
        ("sync_warp", "mosaic_mma", DecodeConfig(3), "read without meeting the writer"),
        ("sync_warp", "mosaic_sm90", DecodeConfig(3, 2), "an mbarrier used without meeting"),
        ("sync_block", "mosaic_mma", DecodeConfig(3), "read without meeting the writer"),
        ("sync_block", "mosaic_sm90", DecodeConfig(3, 2), "an mbarrier used without meeting"),
        ("sync_cluster", "mosaic_sm90", DecodeConfig(3, 1, 4), "read without meeting the writer"),
        ("meet_cluster", "mosaic_sm90", DecodeConfig(3, 1, 4), "a block ends while another reads"),
    ],
)
def test_a_meeting_left_out_is_found(emulated, monkeypatch, meeting, name, config, says, rng):
    case = make_case(rng, [400], h=64, attends="quantized")
    monkeypatch.setattr(meetings.Gpu, meeting, lambda *_: None)
    monkeypatch.setattr(emulator, "Gpu", meetings.Gpu)
    with pytest.raises(AssertionError, match=says):
        emulated(case, name, config, eager=False)


def test_a_slot_refilled_before_it_is_read_is_found(emulated, monkeypatch, rng):
    case = make_case(rng, [700], h=64, attends="quantized")
    monkeypatch.setattr(mosaic_mma.ThreadCopies, "wait", _refill_this_slot)
    with pytest.raises(AssertionError):
        out = emulated(case, "mosaic_mma", DecodeConfig(2), eager=True)
        assert worst_error(out, case.expected()) <= TOLERANCE


def _refill_this_slot(self, work, i, slot, parity):
    mosaic_mma.ptx.wait_copies(self.stages - 2)
    later = i + (self.stages - 1)
    self._copy(work, slot, later, self.t.page_id(self.p, later))
    return self.t.ring + slot * self.p.page.block_bytes


@pytest.mark.parametrize("name, copies", [("mosaic_sm90", mosaic_sm90.BulkCopies)])
def test_a_page_read_before_it_has_come_is_found(emulated, monkeypatch, name, copies, rng):
    case = make_case(rng, [700], h=64, attends="quantized")
    wait = lambda self, work, i, slot, parity: self.t.ring + slot * self.p.page.block_bytes  # noqa: E731
    monkeypatch.setattr(copies, "wait", wait)
    with pytest.raises(AssertionError):
        out = emulated(case, name, DecodeConfig(2, 2), eager=False)
        assert worst_error(out, case.expected()) <= TOLERANCE
