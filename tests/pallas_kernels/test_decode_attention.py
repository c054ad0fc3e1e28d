"""Decode attention as a program: lowered for CUDA on any host, how it is cut, what it refuses."""

import dataclasses
import itertools
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qserve_jax.pallas_kernels import append_kv, intrinsics, paged_attention
from qserve_jax.pallas_kernels.paged_attention import (
    decode_codes,
    decode_config,
    decode_rules,
    half_codes,
    longest_first,
    mosaic_sm90,
)
from qserve_jax.pallas_kernels.paged_attention.decode_config import DecodeConfig
from qserve_jax.pallas_kernels.paged_attention.decode_problem import Problem
from qserve_jax.quantization.qtensor import KVCache, kv_bytes_per_token
from tests.pallas_kernels.attention_cases import POISON, make_case
from tests.pallas_kernels.w4a8_cases import lower, mosaic_module, operations

BACKENDS = ("mosaic_sm90", "mosaic_mma")
SHAPES = [  # query heads, KV heads, head_dim
    (32, 8, 128),  # Llama-3-8B
    (32, 8, 64),  # Llama-3.2-1B
    (14, 2, 64),  # Qwen2.5-0.5B
    (28, 4, 128),  # Qwen2.5-7B
    (32, 32, 128),  # Llama-2-7B
    (64, 8, 128),  # Llama-3-70B
]
BATCHES = (1, 16, 64, 128, 256)
S = jax.ShapeDtypeStruct


def cache_shape(bits, heads, h, layers=32, pages=4096):
    lead = (layers, pages, heads)
    words = 64 * kv_bytes_per_token(h, bits) // 4
    shape = S((*lead, 2, 64, h), jnp.bfloat16) if bits == 16 else S((*lead, words), jnp.int32)
    cache: Any = KVCache(shape, bits, h)  # pyright: ignore[reportArgumentType]
    return cache


def lower_decode(backend, bits, shape, b=64, pages=64, attends="full", dtype="bfloat16", **options):
    n, k, h = shape

    def run(q, cache, table, lens, new_k, new_v, layer):
        new = (new_k, new_v) if attends == "full" else (None, None)
        return paged_attention(
            q,
            cache,
            table,
            lens,
            new_k=new[0],
            new_v=new[1],
            layer=layer,
            attends=attends,
            order=longest_first(lens),
            backend=backend,
            **options,
        )

    kv, lens = S((b, k, h), dtype), S((b,), jnp.int32)
    q, table = S((b, n, h), dtype), S((b, pages), jnp.int32)
    args = (q, cache_shape(bits, k, h), table, lens, kv, kv, S((), jnp.int32))
    assert jax.eval_shape(run, *args) == q
    return lower(run, *args)


def check_lowered(text, splits=False):
    """One kernel that reads the cache in place; beside it lengths, the order, and splits' sums."""
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    small = {"custom_call", "reshape", "minimum", "negate", "sort", "iota", "compare", "return"}
    small |= {"constant", "broadcast_in_dim", "convert"}
    if not splits:
        assert operations(text) <= small, operations(text) - small


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits, backend", [(4, "mosaic_sm90"), (8, "mosaic_mma")])
def test_shapes_lower_for_cuda_and_read_the_layer_in_place(backend, bits, shape):
    check_lowered(lower_decode(backend, bits, shape))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_shape_lowers(backend, bits, shape):
    for b, context in itertools.product(BATCHES, (1024, 16384)):
        p = problem(b, shape, context // 64, bits)
        chosen = decode_rules.choose_config(p, clusters=backend == "mosaic_sm90")
        text = lower_decode(backend, bits, shape, b, context // 64)
        check_lowered(text, splits=chosen.splits > 1)


@pytest.mark.parametrize("backend, splits", [("mosaic_sm90", False), ("mosaic_mma", True)])
def test_one_row_lowers(backend, splits):
    text = lower_decode(backend, 16, (32, 8, 128), 1, 256, attends="quantized", window=5000)
    check_lowered(text, splits)


def test_kernels_have_names():
    _, text = mosaic_module(lower_decode("mosaic_sm90", 4, SHAPES[0]))
    assert "paged_attention_kv4_sm90" in text


SM_80_PTX = {
    *["cp.async.cg.shared.global", "cp.async.commit_group", "cp.async.wait_group"],
    *["bar.sync", "bar.warp.sync", "mov.b32", "movmatrix.sync.aligned.m8n8.trans.b16"],
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    *["shfl.sync.bfly.b32", "shfl.sync.idx.b32", "lop3.b32", "prmt.b32"],
    *["ld.shared.b32", "ld.shared.v2.b32", "ld.shared.v4.b32", "ld.shared.f32"],
    *["ld.shared.v2.f32", "ld.shared.v4.f32"],
    *["st.shared.f32", "st.shared.b32", "st.shared.v2.b32", "st.shared.v4.b32"],
    *["ld.global.nc.b32", "ld.global.nc.v4.b32"],
    *["st.global.b32", "st.global.v2.b32", "st.global.v4.b32"],
    *["add.rn.f32", "sub.rn.f32", "mul.rn.f32", "fma.rn.f32", "max.NaN.f32"],
    *["add.rn.f16x2", "fma.rn.f16x2", "cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"],
    *["ex2.approx.ftz.f32", "rcp.approx.ftz.f32"],
}
HOPPER = "cp.async.bulk|mbarrier|wgmma|cluster|griddepcontrol|setmaxnreg|fence|elect\\.|nvvm|nvgpu"


@pytest.mark.parametrize(
    "bits, b, options", [(4, 64, {}), (8, 1, {"softcap": 30.0}), (16, 16, {"dtype": "float32"})]
)
def test_mosaic_mma_is_lowered_as_sm_80_with_its_instructions_only(bits, b, options):
    arch, text = mosaic_module(lower_decode("mosaic_mma", bits, SHAPES[0], b, **options))
    assert arch == (8, 0)
    asm = re.findall(r'inline_asm"?[^"]*<?\{[^}]*asm_string = "([^"]*)"', text)
    assert len(asm) > 50
    words = {c.split()[0].rstrip(";") for c in asm if c[0] != "{"}
    assert words <= SM_80_PTX, words - SM_80_PTX
    for braced in {c for c in asm if c[0] == "{"}:
        assert re.search(r"cvt\.f32\.f16|vote\.sync\.any", braced), braced
    assert not re.search(HOPPER, text)


def test_reads_of_a_slot_are_fenced_before_it_is_given_back():
    """Else the copy engine may overwrite what is still being read: no emulation knows of it."""
    _, text = mosaic_module(lower_decode("mosaic_sm90", 4, SHAPES[0], 16))
    asm = re.findall(r'asm_string = "([^"]*)"', text)
    arrives = [i for i, code in enumerate(asm) if code.startswith("mbarrier.arrive.shared::cta")]
    assert len(arrives) == 1  # on a slot's second barrier; copies are expected by another kind
    assert asm[arrives[0] - 1] == "fence.proxy.async.shared::cta;"
    assert any(code.startswith("ld.shared") for code in asm[arrives[0] - 9 : arrives[0] - 1])


# A scan over layers, and shards


def scan_program(bits, kernel, append):
    """(append and attend on every layer of a donated cache, its operands, the cache's shape)."""
    b, (n, k, h), layers = 64, SHAPES[0], 32

    def step(cache, q, kv, table, lens, slots):
        order = longest_first(lens)

        def layer(cache, i):
            cache = append_kv(cache, kv, kv, slots, layer=i, backend=append)
            new = {"new_k": kv, "new_v": kv, "order": order}
            out = paged_attention(q, cache, table, lens, **new, layer=i, backend=kernel)
            return cache, out

        return jax.lax.scan(layer, cache, jnp.arange(layers))

    ints = S((b,), jnp.int32)
    bf16 = [S((b, heads, h), jnp.bfloat16) for heads in (n, k)]
    cache = cache_shape(bits, k, h, layers)
    return step, (cache, *bf16, S((b, 64), jnp.int32), ints, ints), cache.pages.shape


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("append, how", [("reference", "scatter"), ("mosaic_sm90", "custom_call")])
def test_a_scan_of_append_and_attention_makes_no_other_cache(append, how, bits):
    """In the program that XLA is given: the cache goes round the loop, is scattered into, or an
    operand of a kernel that is its output, and read by the other kernel as it is."""
    step, operands, shape = scan_program(bits, "mosaic_sm90", append)
    text = lower(step, *operands)
    size = "x".join(map(str, shape)) + "x"
    results = [line for line in text.splitlines() if re.search(r"-> \(?tensor<" + size, line)]
    made = {m for line in results for m in re.findall(r" = \"?stablehlo\.(\w+)", line)}
    assert made <= {how}, made
    kernels = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    *appends, attends = sorted(kernels, key=lambda line: "output_operand_alias<" not in line)
    assert size in attends and "output_operand_alias<" not in attends
    assert [size in line for line in appends] == [True] * (how == "custom_call")


@pytest.mark.parametrize("bits", [4, 16])
def test_xla_compiles_that_scan_without_a_copy_of_the_cache(bits, monkeypatch):
    """On the CPU, with a callback where the kernel is; of the GPU see test_decode_gpu.py."""

    def launch(body, inputs, out, **_):
        return jax.pure_callback(lambda *_: np.zeros(out.shape, out.dtype), out, *inputs)

    monkeypatch.setattr(intrinsics, "launch", launch)
    step, operands, shape = scan_program(bits, "mosaic_sm90", "reference")
    text = jax.jit(step, donate_argnums=0).lower(*operands).compile().as_text() or ""
    size = re.escape("[" + ",".join(map(str, shape)) + "]")
    assert "custom-call" in text
    copies = [line for line in text.splitlines() if re.search(size + r"\S* copy", line)]
    assert not copies, copies[0]


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", BACKENDS)
def test_shard_map_over_kv_heads(name, check_vma):
    """Each of two devices has half of the heads of q, of the cache and of the new token."""
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    heads = P(None, "heads")

    def run(q, pages, table, lens, kv, layer):
        cache = KVCache(pages, 4, 128)
        new = {"new_k": kv, "new_v": kv, "layer": layer}
        return paged_attention(q, cache, table, lens, **new, backend=name)

    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(heads, P(None, None, "heads"), P(), P(), heads, P()),
        out_specs=heads,
        check_vma=check_vma,
    )
    q, kv = S((64, 32, 128), jnp.bfloat16), S((64, 8, 128), jnp.bfloat16)
    table, lens = S((64, 64), jnp.int32), S((64,), jnp.int32)
    args = (q, cache_shape(4, 8, 128).pages, table, lens, kv, S((), jnp.int32))
    assert jax.eval_shape(mapped, *args) == q
    assert "memref<32x4096x4x2176xi32" in mosaic_module(lower(mapped, *args))[1]


@pytest.mark.parametrize("name", BACKENDS)
def test_kernels_have_no_derivative_and_say_so(name, rng):
    """Rather than leave it to the next backend: q is the operand that is differentiated."""
    case = make_case(rng, [3], h=64, attends="quantized").arguments
    q = case.pop("q").astype(jnp.float32)

    def loss(q):
        return paged_attention(q, **case, backend=name).sum()

    with pytest.raises(TypeError, match="paged_attention_kv4_.* has no derivative: differentiate"):
        jax.grad(loss)(q)
    with pytest.raises(TypeError, match="paged_attention_kv4_.* has no derivative: differentiate"):
        jax.jit(jax.grad(loss)).trace(q)


# How it is cut


def problem(b, shape, pages, bits=4, **changes):
    n, k, h = shape
    sizes = {"num_pages": 4096, "layers": 32, "q_dtype": "bfloat16", "new": None, "ordered": False}
    more = {"sm_scale": 1.0, "window": None, "softcap": None, "stored": "bfloat16"}
    return Problem(b, n, k, h, bits, width=pages, **(sizes | more | changes))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_choice_can_run(shape, bits):
    for b, pages, clusters in itertools.product(BATCHES, (1, 16, 64, 256, 2048), (True, False)):
        p = problem(b, shape, pages, bits)
        config = decode_rules.choose_config(p, clusters=clusters)
        decode_config.check_config(p, config)
        assert config.cluster == 1 or clusters
        assert config.workers <= pages  # none without a page, if the table is full
        assert 1 in (config.cluster, config.splits)
        blocks = b * p.head_blocks
        assert config.alone or blocks * config.cluster * config.splits <= decode_rules.SMS
        if blocks >= decode_rules.FEW_BLOCKS:
            assert config == DecodeConfig(config.stages)


@pytest.mark.parametrize("limit", [99 * 1024, 163 * 1024])
def test_choices_fit_smaller_gpus(limit, monkeypatch):
    """Of compute capability 8.6 and 8.9, and 8.0."""
    gpu = types.SimpleNamespace(shared_memory_per_block_optin=limit)
    monkeypatch.setattr(decode_config, "default_device", lambda: gpu)
    for shape, bits, b, pages in itertools.product(SHAPES, (4, 8, 16), BATCHES, (16, 64, 2048)):
        p = problem(b, shape, pages, bits)
        config = decode_rules.choose_config(p, clusters=False)
        decode_config.check_config(p, config)
        assert decode_config.shared_memory(p, config).size <= limit
    with pytest.raises(ValueError, match=f"bytes of shared memory, at most {limit}"):
        decode_config.check_config(p, DecodeConfig(6, 4))


def test_choices_for_llama_3_8b():
    def choose(b, pages, bits=4, **changes):
        p = problem(b, SHAPES[0], pages, bits, **changes)
        return decode_rules.choose_config(p, clusters=True)

    assert choose(64, 64) == choose(64, 64, 8) == choose(64, 64, 16) == DecodeConfig(3)
    assert choose(64, 64, ordered=True) == DecodeConfig(3, 2)  # what waits is balanced
    assert choose(64, 24, ordered=True) == choose(128, 64, ordered=True) == DecodeConfig(3)
    assert choose(32, 64) == DecodeConfig(3, 2)
    assert choose(32, 64, ordered=True) == DecodeConfig(3, 1, 2)  # so is what runs at once
    assert choose(16, 16) == choose(16, 24) == DecodeConfig(3, 2)
    assert choose(16, 64) == DecodeConfig(3, 4)
    assert choose(16, 64, ordered=True) == DecodeConfig(3, 2, 2)
    assert choose(8, 64) == choose(8, 64, ordered=True) == DecodeConfig(3, 4, 2)
    assert choose(4, 16) == DecodeConfig(3, 1, 1, 4)  # 32 clusters of four may not fit at once
    assert choose(4, 64) == DecodeConfig(3, 2, 1, 4)
    assert choose(2, 16) == DecodeConfig(3, 1, 4)
    assert choose(2, 64) == DecodeConfig(3, 2, 1, 8)
    assert choose(2, 256) == DecodeConfig(3, 4, 1, 8)
    assert choose(1, 4) == DecodeConfig(3, 1, 2)
    assert choose(1, 16) == DecodeConfig(3, 1, 8)  # two pages for each of eight blocks
    assert choose(1, 64) == DecodeConfig(3, 2, 8)
    assert choose(1, 256) == DecodeConfig(3, 2, 1, 16)
    assert choose(1, 2048) == DecodeConfig(3, 4, 1, 16)
    assert choose(1, 2048, window=1000) == DecodeConfig(3, 1, 8)  # 17 pages at most


def test_choices_without_clusters():
    """Splits take what clusters would, and what they would not."""

    def choose(b, pages):
        return decode_rules.choose_config(problem(b, SHAPES[0], pages), clusters=False)

    assert choose(1, 16) == DecodeConfig(3, 1, 1, 4)
    assert choose(1, 64) == DecodeConfig(3, 2, 1, 8)
    assert choose(8, 64) == DecodeConfig(3, 4, 1, 2)
    assert choose(16, 64) == DecodeConfig(3, 4)


GOOD = DecodeConfig(3, 4, cluster=2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stages": 1}, "stages must be at least 2"),
        ({"warpgroups": 3}, "warpgroups must be 1, 2 or 4"),
        ({"cluster": 16}, "cluster must be 1, 2, 4 or 8"),
        ({"splits": 0}, "splits must be at least 1"),
        ({"splits": 2}, "a cluster has no splits: leave one of the two at 1"),
        ({"stages": 7}, r"takes \d+ bytes of shared memory, at most 232448"),
    ],
)
def test_config_errors(change, message):
    p = problem(64, SHAPES[0], 64)
    decode_config.check_config(p, GOOD)
    with pytest.raises(ValueError, match=message):
        decode_config.check_config(p, dataclasses.replace(GOOD, **change))


def test_shared_memory_regions_do_not_overlap():
    p = problem(64, SHAPES[0], 64)
    memory = decode_config.shared_memory(p, GOOD)
    assert memory.ring == 3 * 8704 and memory.head_stride == 528
    assert memory.tops == 4 * memory.ring > 16 * 8 * 528  # rings, then sums of 16 warps
    assert memory.block - memory.tops == 16 * 2 * 8 * 4
    assert memory.block_tops - memory.block == 8 * 128 * 4
    assert memory.size - memory.block_tops == 8 * 2 * 4
    small = problem(64, (32, 8, 64), 64)
    assert decode_config.shared_memory(small, DecodeConfig(2, 1)).tops == 2 * 4608


def test_four_blocks_of_three_pages_fit_an_sm():
    for bits in (4, 8):
        p = problem(64, SHAPES[0], 64, bits)
        size = decode_config.shared_memory(p, DecodeConfig(3)).size
        assert 4 * (size + 1024 + 8 * 6) <= 233_472  # CUDA keeps 1 KiB of each block's


# Formulas


def test_rows_of_a_tile_are_all_tokens_and_spread_over_the_banks():
    rows = [decode_codes.row_of_tile(g) for g in range(8)]  # pyright: ignore[reportArgumentType]
    assert sorted(rows) == list(range(8))
    first = rows[0::2]  # the tokens 2 c: 64 bytes each, so their parity is their half of the banks
    assert [token % 2 for token in first] == [0, 1, 0, 1]


def test_halves():
    assert half_codes.MAGIC == 0x64006400
    assert half_codes.two_halves(-72) == 0xD480D480
    assert half_codes.two_halves(-1032, -72) == 0xD480E408


def test_the_poison_is_nan():
    for dtype in (np.float16, jnp.bfloat16):
        assert np.isnan(np.array([POISON], np.uint16).view(dtype).astype(np.float32)).all()


# Refusals


def test_refusals(rng):
    def refuses(message, **arguments):
        with pytest.raises(NotImplementedError, match=f"mosaic_sm90: {message}"):
            paged_attention(**arguments, backend="mosaic_sm90")

    small = make_case(rng, [3], h=16).arguments
    refuses("a head_dim of 16, but the kernel takes one of .64, 128.", **small)
    case = make_case(rng, [3], h=64, bits=16, attends="quantized").arguments
    wide = dataclasses.replace(case["cache"], pages=case["cache"].pages.astype(jnp.float32))
    refuses("a 16-bit cache of float32, but the kernel takes one of", **case | {"cache": wide})
    short = dataclasses.replace(case["cache"], pages=case["cache"].pages[..., :32, :])
    refuses("pages of 32 tokens, but the kernel takes 64", **case | {"cache": short})
    refuses("a softcap of 20000.0, but the kernel takes up to 10000", **case | {"softcap": 2e4})
    tiny = case["q"].astype(jnp.float8_e4m3fn)
    refuses("q of float8_e4m3fn, but the kernel takes one of", **case | {"q": tiny})


def test_decode_refuses_several_tokens(rng):
    """`paged_attention` does not send them here."""
    case = make_case(rng, [3], h=64, attends="quantized").arguments
    q = jnp.stack([case.pop("q")] * 2, axis=1)
    lens = case["context_lens"]
    none = ("new_k", "new_v", "layer", "sm_scale", "window", "softcap", "order")
    options: Any = dict.fromkeys(none) | {"attends": "quantized", "query_lens": lens}
    with pytest.raises(NotImplementedError, match="2 new tokens a row, but the kernel takes one"):
        mosaic_sm90.decode(q, case["cache"], case["block_table"], lens, **options)


def test_by_default_the_reference_runs(rng):
    """Here there is no GPU."""
    case = make_case(rng, [70], h=64, heads=2)
    out = paged_attention(**case.arguments)
    expected = paged_attention(**case.arguments, backend="reference")
    np.testing.assert_array_equal(out, expected)
    error = np.asarray(out.astype(jnp.float32)) - case.expected()
    assert np.linalg.norm(error) <= 2.5e-3 * np.linalg.norm(case.expected())  # of the cases, too
