"""RoPE and append in one kernel: its own code on numpy twins, lowered for CUDA, and on a GPU."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qserve_jax.pallas_kernels import append_kv, backend, intrinsics, page_layout, rope_append_kv
from qserve_jax.pallas_kernels.append_kv import codes, mosaic, places, problem, reference
from qserve_jax.quantization.numerics import quantize_kv
from qserve_jax.quantization.qtensor import KVCache, kv_bytes_per_token
from tests.pallas_kernels.lanes import Machine, Memory
from tests.pallas_kernels.w4a8_cases import mosaic_module

KERNEL = "mosaic_sm90"
LAYERS, PAGES = 2, 3
SHAPES = [(32, 8, 128), (32, 8, 64), (14, 2, 64), (28, 4, 128), (32, 32, 128), (64, 8, 128)]


def make_cache(rng, bits, kv_heads, head_dim, page_size, dtype="bfloat16"):
    """Full of garbage."""
    lead = (LAYERS, PAGES, kv_heads)
    if bits == 16:
        pages = rng.standard_normal((*lead, 2, page_size, head_dim)).astype(jnp.dtype(dtype))
    else:
        words = page_size * kv_bytes_per_token(head_dim, bits) // 4
        pages = rng.integers(-(2**31), 2**31, (*lead, words), dtype=np.int32)
    return KVCache(pages, bits, head_dim)


def make_inputs(rng, tokens, heads, kv_heads, head_dim, dtype, spread=30):
    """qkv [tokens, N + 2K, H] whose heads differ in scale and offset, and angles."""
    shape = (tokens, heads + 2 * kv_heads, head_dim)
    scale, offset = rng.uniform(0.1, spread, (2, *shape[:2], 1))
    qkv = rng.standard_normal(shape) * scale + offset
    angles = rng.uniform(-3, 3, (tokens, head_dim // 2)).astype(np.float32)
    return qkv.astype(jnp.dtype(dtype)), np.cos(angles), np.sin(angles)


def make_slots(rng, tokens, page_size):
    """Different ones, among them none and some outside the cache."""
    slots = rng.permutation(PAGES * page_size)[:tokens].astype(np.int32)
    slots[1::5] = np.resize([-1, PAGES * page_size, 2**30, -7], slots[1::5].shape)
    return slots


def rotated(x, cos, sin, center=0.0):
    """numpy, float32, uncontracted."""
    x1, x2 = np.split(x.astype(np.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    found = np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
    return (found - center).astype(x.dtype)


def emulate(qkv, turn, cache, slots, layer, heads, center=None):
    """The kernel's code on twins -> (what it returns but v, as arrays; pages)."""
    turn = [*turn, center] if turn else [None] * 3
    p = problem.problem(qkv, heads, turn, cache, layer)
    turn = [x for x in turn if x is not None]
    inputs = [Memory(x) for x in (*qkv, slots, np.array([layer], np.int32), *turn)]
    pages = Memory(cache.pages)
    rows = functools.partial(np.zeros, dtype=qkv[0].dtype)
    counts = [p.heads] * p.rotate + [p.kv_heads] * (p.rotate + p.fused)
    outs = [Memory(rows((p.tokens, n, p.head_dim)), filled=False) for n in counts]
    blocks = -(-p.tokens * p.warps // problem.WARPS)
    machine = Machine(range(blocks), 32 * problem.WARPS)
    with pytest.MonkeyPatch.context() as patch:
        for module in (codes, mosaic, places):
            patch.setattr(module, "ptx", machine.namespace())
        mosaic._body(p, *inputs, pages, *outs, machine.shared)
    assert all(out.filled.all() for out in outs)
    return [out.array() for out in outs], pages.array()


def split(qkv, heads, kv_heads):
    return np.split(qkv, [heads, heads + kv_heads], axis=1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bits, dtype", [(4, "bfloat16"), (8, "float16"), (16, "bfloat16")])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(8, 2, 128), (7, 1, 64), (3, 3, 256)])
def test_the_kernel_s_own_code(heads, kv_heads, head_dim, bits, dtype, fused, rng):
    """Rotated as numpy does, and the cache as the reference leaves it, bit for bit."""
    tokens, page_size = 11, 8
    qkv, *turn = make_inputs(rng, tokens, heads, kv_heads, head_dim, dtype)
    cache, slots = make_cache(rng, bits, kv_heads, head_dim, page_size), make_slots(rng, 11, 8)
    q, k, v = split(qkv, heads, kv_heads)
    center = rng.standard_normal((kv_heads, head_dim)).astype(np.float32) if fused else None
    given = [qkv] if fused else [q, k, v]
    found, pages = emulate(given, turn, cache, slots, 1, heads, center)
    rotated_k = rotated(k, *turn, *([center] if fused else []))
    wanted = [rotated(q, *turn), rotated_k, v][: len(found)]
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(x, y)
    on_device = KVCache(jnp.asarray(cache.pages), bits, head_dim)
    arguments = (*map(jnp.asarray, (wanted[1], v, slots)),)
    expected = append_kv(on_device, *arguments, layer=1, backend="reference")
    np.testing.assert_array_equal(pages, expected.pages)
    assert (pages[1] != cache.pages[1]).any()


def hard_rows(rng, head_dim):
    """[n, 1, H]: constants, ties, cancelling centres, saturation, signs, 2^-30 to 3e38."""
    x = rng.standard_normal((400, head_dim)).astype(np.float32)
    x[:100] *= np.exp2(rng.uniform(-30, 20, (100, 1))).astype(np.float32)
    x[100:150] = x[100:150, :1]
    x[150:200] = np.rint(x[150:200] * 20) * np.exp2(rng.integers(-9, 9, (50, 1)))
    x[200:250] += 1000 * rng.standard_normal((50, 1))
    x[250:260] *= 1e38
    x[260:270, 0] = 65504 * 20
    x[270:280] = np.abs(x[270:280])
    x[280:290] = -np.abs(x[280:290])
    x[290:300] = rng.choice([0.0, -0.0, 1.0], (10, head_dim))
    x[300:310] = 0
    return x[:, None]


@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_hard_rows(bits, head_dim, rng):
    """Of k and v that are stored as they are given (`append_kv`), against quantize_kv's words."""
    k = hard_rows(rng, head_dim)
    v = k[::-1].copy()
    pages: Any = np.zeros((1, 50, 1, 8 * kv_bytes_per_token(head_dim, bits) // 4), np.int32)
    cache, slots = KVCache(pages, bits, head_dim), rng.permutation(400).astype(np.int32)
    _, found = emulate([k, v], [], cache, slots, 0, 0)
    cache = KVCache(jnp.asarray(pages), bits, head_dim)
    arguments = (*map(jnp.asarray, (k, v, slots)),)
    expected = append_kv(cache, *arguments, layer=0, backend="reference")
    np.testing.assert_array_equal(found, expected.pages)
    codes = np.asarray(quantize_kv(jnp.asarray(k), bits)[0])
    assert (np.bincount(codes.ravel(), minlength=2**bits) > 0).all()


@pytest.mark.parametrize("kept, given", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_16_bits_of_another_dtype(kept, given, rng):
    qkv, *turn = make_inputs(rng, 5, 2, 1, 32, given)
    cache, slots = make_cache(rng, 16, 1, 32, 8, kept), np.array([3, 23, -1, 9, 0], np.int32)
    (_, k, v), pages = emulate([qkv], turn, cache, slots, 0, 2)
    expected = cache.pages.copy()
    for i in (0, 1, 3, 4):
        page, offset = divmod(slots[i], 8)
        expected[0, page, :, 0, offset] = k[i].astype(expected.dtype)
        expected[0, page, :, 1, offset] = v[i].astype(expected.dtype)
    np.testing.assert_array_equal(pages, expected)


@pytest.mark.parametrize("layer", [LAYERS, -LAYERS - 1])
def test_a_layer_outside_writes_nothing(layer, rng):
    qkv, *turn = make_inputs(rng, 4, 4, 2, 64, "bfloat16")
    cache, slots = make_cache(rng, 4, 2, 64, 8), np.arange(4, dtype=np.int32)
    found, pages = emulate([qkv], turn, cache, slots, layer, 4)
    np.testing.assert_array_equal(pages, cache.pages)
    np.testing.assert_array_equal(found[0], rotated(split(qkv, 4, 2)[0], *turn))


def test_the_emulation_notices(rng, monkeypatch):
    """A kernel that skips the range of other lanes, or writes beyond a page, does not pass."""
    qkv, *turn = make_inputs(rng, 4, 2, 1, 64, "bfloat16")
    cache, slots = make_cache(rng, 4, 1, 64, 8), np.arange(4, dtype=np.int32)
    _, right = emulate([qkv], turn, cache, slots, 0, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Machine, "exchange", lambda self, value, lanes: value)
        assert (emulate([qkv], turn, cache, slots, 0, 2)[1] != right).any()
    with monkeypatch.context() as patch:
        patch.setattr(page_layout.PageLayout, "block_bytes", 2**20)
        with pytest.raises(AssertionError, match="out of bounds"):
            emulate([qkv], turn, cache, slots, 1, 2)


# Lowered on any host


def shape(dims, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))


def lower(tokens, heads, kv_heads, head_dim, bits, dtype="bfloat16", fused=True, name=KERNEL):
    counts = [heads + 2 * kv_heads] if fused else [heads, kv_heads, kv_heads]
    qkv = [shape((tokens, n, head_dim), dtype) for n in counts]
    turn = shape((tokens, head_dim // 2), "float32")
    pages: Any
    if bits == 16:
        pages = shape((32, 40, kv_heads, 2, 64, head_dim))
    else:
        pages = shape((32, 40, kv_heads, 16 * kv_bytes_per_token(head_dim, bits)), "int32")

    def step(cache, qkv, cos, sin, slots):
        def layer(cache, i):
            *out, cache = rope_append_kv(qkv, cos, sin, cache, slots, layer=i, backend=name)
            return cache, out

        return jax.lax.scan(layer, cache, jnp.arange(32))

    cache: Any = KVCache(pages, bits, head_dim)
    arguments = (cache, qkv, turn, turn, shape((tokens,), "int32"))
    traced = jax.jit(step, donate_argnums=0).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("heads, kv_heads, head_dim", SHAPES)
@pytest.mark.parametrize("bits, fused, name", [(4, True, KERNEL), (8, False, "mosaic_mma")])
def test_lowers_for_cuda_in_place(heads, kv_heads, head_dim, bits, fused, name):
    """One kernel in the loop over layers, and the cache goes through it aliased: no copy of it."""
    bits = 16 if (bits, kv_heads) == (8, 32) else bits
    text = lower(256, heads, kv_heads, head_dim, bits, fused=fused, name=name)
    lines = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert len(lines) == 1 and "output_operand_alias<" in lines[0]
    whole = "x".join(map(str, (32, 40, kv_heads)))  # how the pages' type begins
    uses = [line for line in text.splitlines() if f"<{whole}x" in line]
    kinds = ("stablehlo.while", "custom_call", "stablehlo.return", "func.", "return", "cond")
    assert all(any(kind in line for kind in kinds) for line in uses), uses


def test_has_no_instruction_of_hopper():
    """Lowered for an Ampere GPU, as on one: what Mosaic adds depends on the GPU."""
    hopper = r"cp.async.bulk|mbarrier|wgmma|cluster|griddepcontrol|fence|elect\.|nvvm|nvgpu"
    with intrinsics.architecture(8, 0):
        arch, text = mosaic_module(lower(3, 32, 8, 128, 4, name="mosaic_mma"))
    assert arch == (8, 0) and "shfl.sync.bfly" in text
    assert not re.search(hopper, text)


def test_refusals(rng):
    qkv, cos, sin = (jnp.asarray(x) for x in make_inputs(rng, 2, 2, 1, 64, "float32"))
    cache, slots = make_cache(rng, 4, 1, 64, 8), jnp.zeros(2, jnp.int32)
    cache = KVCache(jnp.asarray(cache.pages), 4, 64)
    call = functools.partial(rope_append_kv, layer=0, backend=KERNEL)
    with pytest.raises(
        ValueError, match=r"q, k and v \[\(2, 4, 64\)\] must .* tokens=3, K=1, H=64"
    ):
        call([qkv], cos, sin, cache, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"q, k and v \[\] must be"):
        call([], cos, sin, cache, slots)
    with pytest.raises(ValueError, match=r"cos \(2, 16\) and sin \(2, 32\) must be \(2, 32\)"):
        call([qkv], cos[:, :16], sin, cache, slots)
    with pytest.raises(ValueError, match=r"center \(64,\) must be \[K, H\] = \(1, 64\)"):
        call([qkv], cos, sin, cache, slots, center=jnp.zeros(64))
    for dtype in ("bool", "int32", "complex64"):
        with pytest.raises(ValueError, match=f"cos is {dtype}, which is no float"):
            call([qkv], cos.astype(dtype), sin, cache, slots)
    with pytest.raises(ValueError, match="sin is a list: give an array"):
        call([qkv], cos, [1], cache, slots)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="sin is None: give an array"):
        call([qkv], cos, None, cache, slots)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="slot_mapping is None: give an array"):
        call([qkv], cos, sin, cache, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="center is int32, which is no float"):
        call([qkv], cos, sin, cache, slots, center=jnp.zeros((1, 64), jnp.int32))
    with pytest.raises(ValueError, match="layer=5 but the cache pages have layers"):
        call([qkv], cos, sin, cache, slots, layer=5)
    with pytest.raises(ValueError, match=r"qkv\[0\] is int32, which is no float: cast it to bf"):
        call([qkv.astype(jnp.int32)], cos, sin, cache, slots)
    with pytest.raises(ValueError, match=r"qkv is a ArrayImpl: give \[q, k, v\], or \[qkv\]"):
        call(qkv, cos, sin, cache, slots)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"q, k and v \[\(2,\)\] must be"):
        call([cos[:, 0]], cos, sin, cache, slots)
    with pytest.raises(ValueError, match=r"slot_mapping \(2, 1\) must be \[tokens\]: reshape it"):
        call([qkv], cos, sin, cache, slots[:, None])
    with pytest.raises(NotImplementedError, match=r"q, k and v are \['float8_e4m3fn'\], but the"):
        call([qkv.astype(jnp.float8_e4m3fn)], cos, sin, cache, slots)
    with pytest.raises(NotImplementedError, match="no tokens"):
        call([qkv[:0]], cos[:0], sin[:0], cache, slots[:0])


def test_on_a_cpu_the_kernel_says_what_it_needs(rng):
    qkv, cos, sin = (jnp.asarray(x) for x in make_inputs(rng, 2, 2, 1, 64, "bfloat16"))
    made = make_cache(rng, 4, 1, 64, 8)
    cache, slots = KVCache(jnp.asarray(made.pages), 4, 64), jnp.arange(2)
    with pytest.raises(ValueError, match="rope_append_kv is a kernel for NVIDIA GPUs, but is comp"):
        rope_append_kv([qkv], cos, sin, cache, slots, layer=0, backend=KERNEL)
    with pytest.raises(TypeError, match="append_kv has no derivative: differentiate the float"):
        jax.grad(
            lambda k: append_kv(cache, k, k, slots, layer=0, backend=KERNEL).pages.sum() * 1.0
        )(qkv[:, 3:])


@pytest.mark.parametrize("name", [KERNEL, "mosaic_mma"])
def test_shard_map_over_kv_heads(name, rng):
    """Each of two devices appends to its half of the heads."""
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, pages = P(None, "heads"), P(None, None, "heads")

    def run(pages, k, slots):
        return append_kv(KVCache(pages, 4, 128), k, k, slots, layer=1, backend=name).pages

    def lower_with(**options):
        specs = {"in_specs": (pages, heads, P()), "out_specs": pages}
        mapped = jax.shard_map(run, mesh=mesh, **specs, **options)
        cache: Any = shape((2, 40, 8, 2176), "int32")
        traced = jax.jit(mapped).trace(cache, shape((64, 8, 128)), shape((64,), "int32"))
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    assert "memref<2x40x4x2176xi32" in mosaic_module(lower_with(check_vma=False))[1]
    with pytest.raises(NotImplementedError, match=r"varies over \['heads'\].* check_vma=False"):
        lower_with()


def test_reference_in_two_parts_is_the_reference(rng):
    qkv, cos, sin = (jnp.asarray(x) for x in make_inputs(rng, 6, 4, 2, 16, "float32"))
    pages = jnp.zeros((PAGES, 2, 8 * kv_bytes_per_token(16, 4) // 4), jnp.int32)
    cache, slots = KVCache(pages, 4, 16), jnp.arange(6)
    q, k, v, fused = rope_append_kv([qkv], cos, sin, cache, slots)
    parts = reference.split_heads([qkv], 2)
    for x, y in zip((q, k, v), rope_append_kv(parts, cos, sin, cache, slots)[:3], strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(fused.pages, append_kv(cache, k, v, slots).pages)
    exact = rotated(np.asarray(parts[0], np.float64), np.asarray(cos), np.asarray(sin))
    np.testing.assert_allclose(q, exact, rtol=0, atol=1e-5)


# On a GPU


@pytest.fixture
def gpu():
    if reason := backend.unavailable("mosaic_mma"):
        pytest.skip(reason)


@functools.partial(jax.jit, static_argnames="name", donate_argnums=0)
def run(cache, qkv, cos, sin, slots, layer, center=None, name=KERNEL):
    options = {"center": center, "layer": layer, "backend": name}
    return rope_append_kv(qkv, cos, sin, cache, slots, **options)


# One program, not an operation at a time, of which each would be compiled for every shape.
stored = jax.jit(functools.partial(append_kv, layer=1, backend="reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", problem.DTYPES)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("heads, kv_heads, head_dim", SHAPES)
def test_on_a_gpu(gpu, heads, kv_heads, head_dim, bits, dtype, rng):
    """Rotated as the twin does, bit for bit; stored as the reference stores the same k and v."""
    for tokens in (1, 3, 257):
        size = 128
        qkv, cos, sin = make_inputs(rng, tokens, heads, kv_heads, head_dim, dtype)
        cache = make_cache(rng, bits, kv_heads, head_dim, size)
        slots = make_slots(rng, tokens, size)
        center = rng.standard_normal((kv_heads, head_dim)).astype(np.float32)
        on_device = [jnp.asarray(x) for x in (qkv, cos, sin, slots)]
        for fused in (True, False):
            q, k, v = split(qkv, heads, kv_heads)
            wanted = [rotated(q, cos, sin), rotated(k, cos, sin, center if fused else 0.0), v]
            pages = KVCache(jnp.asarray(cache.pages), bits, head_dim)
            whole = [on_device[0]]
            given = whole if fused else reference.split_heads(whole, kv_heads)
            more = (jnp.int32(1), jnp.asarray(center) if fused else None)
            *found, written = run(pages, given, *on_device[1:], *more)
            for x, y in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(x, y)
            pages = KVCache(jnp.asarray(cache.pages), bits, head_dim)
            arguments = (jnp.asarray(wanted[1]), jnp.asarray(wanted[2]), on_device[3])
            np.testing.assert_array_equal(written.pages, stored(pages, *arguments).pages)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_hard_rows_on_a_gpu(gpu, bits, rng):
    k = jnp.asarray(hard_rows(rng, 128))
    pages = jnp.zeros((1, 50, 1, 8 * kv_bytes_per_token(128, bits) // 4), jnp.int32)
    arguments = (KVCache(pages, bits, 128), k, k[::-1], jnp.arange(400))
    found, expected = (append_kv(*arguments, layer=0, backend=b) for b in (KERNEL, "reference"))
    np.testing.assert_array_equal(found.pages, expected.pages)


@pytest.mark.gpu
def test_in_place_and_repeatable_on_a_gpu(gpu, rng):
    qkv, cos, sin = (jnp.asarray(x) for x in make_inputs(rng, 64, 32, 8, 128, "bfloat16"))
    cache, slots = make_cache(rng, 4, 8, 128, 64), jnp.asarray(make_slots(rng, 64, 64))
    first = None
    for _ in range(100):
        pages = jnp.asarray(cache.pages)
        before = pages.unsafe_buffer_pointer()
        q, k, v, written = run(KVCache(pages, 4, 128), [qkv], cos, sin, slots, jnp.int32(0))
        assert written.pages.unsafe_buffer_pointer() == before
        found = [np.asarray(x) for x in (q, k, v, written.pages)]
        first = first or found
        for x, y in zip(found, first, strict=True):
            np.testing.assert_array_equal(x, y)
