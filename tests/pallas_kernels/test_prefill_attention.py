"""Attention of many new tokens: the kernel's own code on numpy twins, lowered, and on a GPU."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qserve_jax.pallas_kernels import backend, paged_attention
from qserve_jax.pallas_kernels.paged_attention import (
    cudnn_prefill,
    mosaic_prefill,
    prefill_rows,
    prefill_tile,
)
from qserve_jax.pallas_kernels.paged_attention.prefill_problem import WARPS
from qserve_jax.quantization.qtensor import KVCache, kv_bytes_per_token
from tests.pallas_kernels import lanes
from tests.pallas_kernels.prefill_cases import expected_of, make_case, operands_of, worst_error
from tests.pallas_kernels.w4a8_cases import mosaic_module

HOPPER = "cp.async.bulk|mbarrier|wgmma|cluster|griddepcontrol|setmaxnreg|fence|elect\\.|nvvm|nvgpu"
SHAPES = [(32, 8, 128), (32, 8, 64), (14, 2, 64), (28, 4, 128), (32, 32, 128), (64, 8, 128)]


def emulate(case, attends="full", window=None, layer=1):
    """The kernel's code on twins, block by block."""
    p, memories, out = operands_of(case, attends, window, layer)
    for block in range(p.blocks):
        machine = lanes.Machine([block], 32 * WARPS, p.shared_bytes)
        with pytest.MonkeyPatch.context() as patch:
            for module in (mosaic_prefill, prefill_rows, prefill_tile):
                patch.setattr(module, "ptx", machine.namespace())
            mosaic_prefill._body(p, *memories, out, machine.shared)
    assert out.filled.all()
    return out.array()


CASES = [  # context, new, heads, kv_heads, head_dim, bits
    ([200, 0, 64], [66, 0, 64], 2, 1, 64, 4),
    ([130, 65], [2, 1], 7, 1, 64, 8),
    ([100], [40], 2, 1, 128, 16),
    ([150], [20], 6, 2, 128, 4),
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
        found = emulate(made, attends, window)
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


def test_the_emulation_notices(rng, monkeypatch):
    made = make_case(rng, [200], [70], 1, 1, 64, 4)
    expected = expected_of(made)
    with monkeypatch.context() as patch:
        patch.setattr(lanes.Machine, "sync_block", lambda self, threads: None)
        with pytest.raises(AssertionError, match="without meeting"):
            emulate(made)
    with monkeypatch.context() as patch:  # one key too many
        right = prefill_rows.seen
        patch.setattr(prefill_rows, "seen", lambda *a: (right(*a)[0], right(*a)[1] + 1))
        assert not worst_error(emulate(made), expected, made.query_lens) < 1e-2


# Lowered on any host


def shape(dims, dtype="bfloat16") -> Any:
    return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))


def lower(b, t, heads, kv_heads, head_dim, bits, width, attends="full", name="mosaic_sm90", **more):
    words = (16 * kv_bytes_per_token(head_dim, bits),)
    pages = (2, 64, head_dim) if bits == 16 else words
    dtype = "bfloat16" if bits == 16 else "int32"
    cache: Any = KVCache(shape((32, 40, kv_heads, *pages), dtype), bits, head_dim)
    new = shape((b, t, kv_heads, head_dim))

    def run(q, cache, table, lens, k, v, layer):
        options = {"attends": attends, "layer": layer, "backend": name, **more}
        return paged_attention(q, cache, table, lens, new_k=k, new_v=v, **options)

    lens, table = shape((b,), "int32"), shape((b, width), "int32")
    arguments = (shape((b, t, heads, head_dim)), cache, table, lens, new, new, shape((), "int32"))
    return jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("heads, kv_heads, head_dim", SHAPES)
def test_lowers_for_cuda(heads, kv_heads, head_dim):
    for bits, attends in [(4, "full"), (8, "quantized")]:
        text = lower(2, 1024, heads, kv_heads, head_dim, bits, 128, attends, "mosaic_mma").as_text()
        assert text.count("custom_call @mosaic_gpu") == 1


def test_mosaic_mma_has_no_instruction_of_hopper():
    arch, text = mosaic_module(lower(2, 1024, 32, 8, 128, 4, 128, name="mosaic_mma").as_text())
    assert arch == (8, 0) and "mma.sync.aligned.m16n8k16" in text
    assert not re.search(HOPPER, text)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["mosaic_sm90", "mosaic_mma"])
def test_shard_map_over_kv_heads(name, check_vma):
    """Each of two devices has half of the heads of q, of the cache and of the new tokens."""
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    heads = P(None, None, "heads")

    def run(q, pages, table, lens, new, layer):
        more = {"new_k": new, "new_v": new, "layer": layer, "backend": name}
        return paged_attention(q, KVCache(pages, 4, 128), table, lens, **more)

    in_specs = (heads, heads, P(), P(), heads, P())
    specs: Any = {"mesh": mesh, "in_specs": in_specs, "out_specs": heads}
    mapped = jax.shard_map(run, **specs, check_vma=check_vma)
    q, new, pages = (
        shape((2, 96, 16, 128)),
        shape((2, 96, 4, 128)),
        shape((3, 40, 4, 2176), "int32"),
    )
    lens = shape((2,), "int32")
    arguments = (q, pages, shape((2, 8), "int32"), lens, new, shape((), "int32"))
    assert jax.eval_shape(mapped, *arguments) == q
    text = jax.jit(mapped).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "memref<3x40x2x2176xi32" in mosaic_module(text)[1]


@pytest.mark.parametrize("window", [None, 4096])
def test_fresh_prompts_are_cudnn_s(window, monkeypatch):
    """8 x 1024 tokens of Llama-3-8B: one call with lengths, and no scores in memory."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    text = lower(8, 1024, 32, 8, 128, 4, 0, window=window).as_text()
    (call,) = [line for line in text.splitlines() if "__cudnn$fmhaSoftmax" in line]
    assert "PADDING_CAUSAL" in call and call.count("tensor<8xi32>") == 2
    assert re.search(r"sliding_window_length\D+22: (\d+)", call)[1] == str(window or 0)  # pyright: ignore
    assert "mosaic_gpu" not in text and "1024x1024" not in text


def test_no_rows_are_not_cudnn_s(rng):
    """Which plans no graph without elements; the reference has nothing to do."""
    q, k = np.zeros((2, 5, 4, 64), np.float16), np.zeros((2, 5, 2, 64), np.float16)
    table = np.zeros((2, 0), np.int32)
    assert cudnn_prefill.takes(q, table, k, "full", None)  # pyright: ignore[reportArgumentType]
    assert not cudnn_prefill.takes(q[:0], table[:0], k[:0], "full", None)  # pyright: ignore


def test_refusals(rng):
    made = make_case(rng, [70], [3], 2, 1, 64, 4)
    call = functools.partial(made.call, backend="mosaic_sm90")
    with pytest.raises(NotImplementedError, match="^mosaic_sm90: q of float32, but prefill takes"):
        call(q_dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="a softcap of 30.0, but prefill takes none"):
        call(softcap=30.0)
    with pytest.raises(
        NotImplementedError, match="an sm_scale of -0.1, but prefill takes more than"
    ):
        call(sm_scale=-0.1)
    with pytest.raises(NotImplementedError, match="^fresh prompts are cuDNN's, but cuDNN is not"):
        options = {"window": None, "sm_scale": None}
        cudnn_prefill.attention(made.q, made.new_k, made.new_v, made.query_lens, options)


def test_fresh_prompts_without_cudnn_are_the_kernel_s(rng):
    text = lower(2, 96, 4, 2, 64, 4, 0).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1 and "fmha" not in text
    made = make_case(rng, [96, 5], [96, 5], 2, 1, 64, 4)
    made.table = made.table[:, :0]
    assert worst_error(emulate(made), expected_of(made), made.query_lens) < 8e-4


# On a GPU


@pytest.fixture
def gpu():
    if reason := backend.unavailable("mosaic_mma"):
        pytest.skip(reason)


@functools.partial(jax.jit, static_argnames=("attends", "window", "backend"))
def run(q, cache, table, context_lens, **options):
    return paged_attention(q, cache, table, context_lens, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("attends", ["full", "quantized"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("heads, kv_heads, head_dim", SHAPES)
def test_on_a_gpu(gpu, heads, kv_heads, head_dim, bits, attends, rng):
    context = [1, 3, 63, 64, 65, 1023, 0, 700]
    new = [1, 2, 63, 64, 1, 200, 0, 130]
    made = make_case(rng, context, new, heads, kv_heads, head_dim, bits, "bfloat16", attends)
    for window in (None, 100):
        with jax.default_device(jax.devices("cpu")[0]):  # where it compiles in no time
            options = {"attends": attends, "window": window}
            expected = made.call(run, q_dtype=jnp.float32, backend="reference", **options)
        found = made.call(run, attends=attends, window=window, backend="mosaic_mma")
        assert bool(jnp.isfinite(found).all())
        assert worst_error(found, expected, made.query_lens) < 2.5e-3


@pytest.mark.gpu
def test_repeated_launches_on_a_gpu(gpu, rng):
    made = make_case(rng, [900, 300], [500, 300], 32, 8, 128, 4, "bfloat16")
    first = np.asarray(made.call(run, backend="mosaic_mma"))
    for _ in range(100):
        np.testing.assert_array_equal(made.call(run, backend="mosaic_mma"), first)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_fresh_prompts_on_a_gpu(gpu, window, rng):
    lens = [1024, 1, 0, 63, 64, 65, 500, 1023]
    made = make_case(rng, lens, lens, 32, 8, 128, 4, "bfloat16")
    made.table = made.table[:, :0]
    # numpy's nan_to_num leaves bfloat16 as it is.
    made.new_k, made.new_v = (np.where(np.isnan(x), 0, x) for x in (made.new_k, made.new_v))
    options = {"window": window}
    found = made.call(run, backend="mosaic_mma", **options)
    expected = made.call(run, q_dtype=jnp.float32, backend="reference", **options)
    plain = plain_error(made, expected, window)
    assert worst_error(found, expected, made.query_lens) < max(2.5e-3, 2 * plain)
    padding = np.arange(1024) >= made.query_lens[:, None]
    assert not np.asarray(found)[padding].any()


def plain_error(made, expected, window):
    """Of the same maths in plain bf16."""
    k = made.new_k.astype(np.float32)
    group = made.q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(jnp.asarray(x, jnp.bfloat16), group, 2) for x in (k, made.new_v))
    t = made.q.shape[1]
    distance = jnp.arange(t)[:, None] - jnp.arange(t)
    seen = (distance >= 0) & (distance < (window or t))
    scores = jnp.einsum("BTNH,BSNH->BNTS", jnp.asarray(made.q), k) * made.q.shape[3] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1).astype(jnp.bfloat16)
    return worst_error(jnp.einsum("BNTS,BSNH->BTNH", weights, v), expected, made.query_lens)
