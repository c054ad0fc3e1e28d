"""Decode attention on a GPU against float64 on the stored values, over poisoned caches."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.pallas_kernels import append_kv, backend, paged_attention
from qserve_jax.pallas_kernels.paged_attention import longest_first, mosaic_mma, mosaic_sm90
from qserve_jax.pallas_kernels.paged_attention.decode_config import DecodeConfig
from tests.pallas_kernels.attention_cases import make_case, worst_error

pytestmark = pytest.mark.gpu

DECODE = {"mosaic_sm90": mosaic_sm90.decode, "mosaic_mma": mosaic_mma.decode}
LENS = [1, 3, 63, 64, 65, 0, 1023, 130]
TOLERANCE = 2.5e-3
CONFIGS = {
    "mosaic_sm90": [
        *[DecodeConfig(3), DecodeConfig(2, 2), DecodeConfig(2, 4), DecodeConfig(3, 1, 8)],
        *[DecodeConfig(2, 4, 4), DecodeConfig(4, 2, 2), DecodeConfig(3, 2, splits=5)],
    ],
    "mosaic_mma": [DecodeConfig(3), DecodeConfig(2, 2), DecodeConfig(2, 4, splits=3)],
}


@pytest.fixture
def can_run():
    """Skips where the GPU is too old for a backend."""

    def check(name):
        if reason := backend.unavailable(name):
            pytest.skip(reason)

    return check


def run(case, name, config=None, poison=False):
    """The output of one launch; poison: over a buffer full of NaN."""
    arguments = {"sm_scale": None, "window": None, "softcap": None, "order": None}
    arguments |= case.arguments
    static = {k: arguments.pop(k) for k in ("attends", "sm_scale", "window", "softcap")}

    def call(place, arguments):
        q, new = arguments["q"][:, None], {}
        for key in ("new_k", "new_v"):
            new[key] = None if arguments[key] is None else arguments[key][:, None]
        lens = arguments["context_lens"]
        rest = {"layer": arguments["layer"], "order": arguments["order"], "config": config}
        out = DECODE[name](
            *(q, arguments["cache"], arguments["block_table"], lens),
            **(new | rest | static),
            query_lens=jnp.minimum(lens, 1),
        )
        return out[:, 0]

    place = jnp.full(arguments["q"].shape, jnp.nan, arguments["q"].dtype)
    pointer = place.unsafe_buffer_pointer()
    out = jax.jit(call, donate_argnums=0, keep_unused=True)(place, arguments)
    if poison:
        assert out.unsafe_buffer_pointer() == pointer
    return out


MATRIX = [
    (name, bits, h, attends, (1, 4, 7)[(i + j) % 3])
    for i, (bits, h) in enumerate([(b, h) for b in (4, 8, 16) for h in (64, 128)])
    for j, attends in enumerate(("full", "quantized"))
    for name in DECODE
]


@pytest.mark.parametrize("name, bits, h, attends, group", MATRIX)
def test_every_format_and_cut(can_run, name, bits, h, attends, group, rng):
    """The rules' own choice over a poisoned output, then every way to cut the rows."""
    can_run(name)
    case = make_case(rng, LENS, bits=bits, h=h, heads=2 * group, attends=attends)
    expected = case.expected()
    assert worst_error(run(case, name, DecodeConfig(2), poison=True), expected) <= TOLERANCE
    assert worst_error(run(case, name), expected) <= TOLERANCE
    for config in CONFIGS[name]:
        if 2 * config.warpgroups * config.stages * h * bits * 8 + 70_000 < 232_448:
            assert worst_error(run(case, name, config), expected) <= TOLERANCE, config


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 12])
def test_groups(can_run, name, bits, group, rng):
    can_run(name)
    case = make_case(rng, LENS, bits=bits, h=64, heads=3 * group, kv_heads=3)
    assert worst_error(run(case, name), case.expected()) <= TOLERANCE


SHAPES = [(32, 8, 128), (32, 8, 64), (14, 2, 64), (28, 4, 128), (32, 32, 128), (64, 8, 128)]


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("heads, kv_heads, h", SHAPES)
def test_models(can_run, name, bits, heads, kv_heads, h, rng):
    """Of 40 ragged rows, longest first."""
    can_run(name)
    lens = rng.integers(1, 700, 40)
    case = make_case(rng, lens, bits=bits, heads=heads, kv_heads=kv_heads, h=h)
    plain = run(case, name)
    assert worst_error(plain, case.expected()) <= TOLERANCE
    case.arguments["order"] = longest_first(case.arguments["context_lens"])
    np.testing.assert_array_equal(run(case, name), plain)


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 64, "attends": "quantized"},
        {"window": 100},
        {"softcap": 2.0},
        {"softcap": 20.0, "sm_scale": 0.3},
        {"rising": True},
        {"rising": True, "attends": "quantized"},
        {"sink": True, "heads": 2, "h": 64},
        {"sink": True, "heads": 2, "attends": "quantized"},
    ],
)
def test_windows_caps_and_rising_scores(can_run, name, bits, options, rng):
    can_run(name)
    case = make_case(rng, [600, 5, 321, 1023], bits=bits, **options)
    for config in (None, DecodeConfig(2)):
        assert worst_error(run(case, name, config), case.expected()) <= TOLERANCE


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize(
    "bits, dtype, cache_dtype, tolerance",  # as in test_decode_emulated.py
    [
        (4, "float16", "bfloat16", 5e-4),
        (4, "float32", "bfloat16", 4e-4),
        (8, "float32", "bfloat16", 4e-4),
        (16, "float32", "bfloat16", 2e-5),
        (16, "float16", "bfloat16", 3e-4),
        (16, "float32", "float16", 4e-4),
    ],
)
def test_dtypes(can_run, name, bits, dtype, cache_dtype, tolerance, rng):
    can_run(name)
    case = make_case(rng, [130, 1, 321], bits=bits, h=64, dtype=dtype, cache_dtype=cache_dtype)
    assert worst_error(run(case, name), case.expected()) <= tolerance


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize("bits", [4, 16])
def test_a_long_context(can_run, name, bits, rng):
    """Beyond 131 072 tokens, by every cut that the rules know for one row."""
    can_run(name)
    case = make_case(rng, [131_200], bits=bits, heads=4, kv_heads=1, h=64)
    cuts = [None, DecodeConfig(2), DecodeConfig(2, 2, splits=16)]
    cuts += [DecodeConfig(2, 2, 8)] if name == "mosaic_sm90" else []
    for config in cuts:
        assert worst_error(run(case, name, config), case.expected()) <= TOLERANCE


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("missing", [-1, -(2**31), 2**30, "num_pages"])
def test_pages_outside_the_cache_are_masked(can_run, name, bits, missing, rng):
    can_run(name)
    case = make_case(rng, [130, 200], bits=bits, h=64, attends="quantized")
    missing = case.arguments["cache"].num_pages if missing == "num_pages" else missing
    case.arguments["block_table"] = case.arguments["block_table"].at[0, 1].set(missing)
    seen = np.arange(130) // 64 != 1
    for config in (None, DecodeConfig(2)):
        assert worst_error(run(case, name, config), case.expected({0: seen})) <= TOLERANCE


@pytest.mark.parametrize("name", DECODE)
def test_a_length_beyond_the_table(can_run, name, rng):
    can_run(name)
    case = make_case(rng, [130, 130], h=64, attends="quantized", spare_columns=0)
    case.arguments["context_lens"] = jnp.asarray([130, 2**31 - 1], jnp.int32)
    case.arguments["block_table"] = case.arguments["block_table"][:, :2]
    seen = np.arange(130) < 128
    assert worst_error(run(case, name), case.expected({0: seen, 1: seen})) <= TOLERANCE


# Repeated launches


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(
    ("rows", "h", "attends"),
    [(64, 128, "full"), (16, 128, "full"), (1, 128, "full"), (64, 64, "quantized")],
)
def test_100_launches_give_the_same_bits(can_run, name, bits, rows, h, attends, rng):
    """Full blocks, several warpgroups, a cluster. A slot refilled too early shows as a few other
    outputs in some launches; between them others leave other shared memory."""
    can_run(name)
    sizes: dict[str, Any] = {"bits": bits, "heads": 16, "kv_heads": 4, "h": h, "attends": attends}
    case = make_case(rng, rng.integers(900, 1024, rows), **sizes)
    other = make_case(rng, [777], **sizes, rising=True)
    attend = jax.jit(functools.partial(paged_attention, backend=name), static_argnames=("attends",))
    same = jax.jit(lambda y, first: (y == first).all())
    first = attend(**case.arguments)
    answers = []
    for i in range(100):
        if i % 3 == 2:
            attend(**other.arguments)
        answers.append(same(attend(**case.arguments), first))
    assert np.asarray(answers).all()
    assert worst_error(first, case.expected()) <= TOLERANCE


# Programs


@pytest.mark.parametrize("append", ["kernel", "reference"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", DECODE)
def test_a_scan_over_layers_copies_no_cache(can_run, name, bits, append, rng):
    """Append and attend on 32 layers, every other of NaN, in the program as XLA has compiled it."""
    can_run(name)
    lens = [130, 65, 700]
    case = make_case(rng, lens, bits=bits, attends="quantized")
    a = case.arguments
    whole = jax.tree.map(lambda x: jnp.concatenate([x] * 16), a["cache"])
    last = np.asarray(lens) - 1
    slots = a["block_table"][np.arange(3), last // 64] * 64 + last % 64
    kv = jnp.asarray(rng.standard_normal((2, 3, 2, 128)), jnp.bfloat16)

    @functools.partial(jax.jit, donate_argnums=0, static_argnames="used")
    def step(cache, kv, used):
        def layer(cache, i):
            appends = used if append == "kernel" else "reference"
            cache = append_kv(cache, kv[0], kv[1], slots, layer=i, backend=appends)
            out = paged_attention(
                *(a["q"], cache, a["block_table"], a["context_lens"]),
                attends="quantized",
                layer=i,
                backend=used,
            )
            return cache, out

        return jax.lax.scan(layer, cache, jnp.arange(32))

    text = step.lower(whole, kv, name).compile().as_text() or ""
    size = ",".join(map(str, whole.pages.shape))
    assert f"[{size}]" in text
    copies = [line for line in text.splitlines() if re.search(rf"\[{size}\].* copy", line)]
    assert not copies, copies
    again = jax.tree.map(jnp.copy, whole)
    _, expected = step(again, kv, "reference")
    _, out = step(whole, kv, name)
    expected = np.asarray(expected.astype(jnp.float32), np.float64)
    for i in range(1, 32, 2):
        assert worst_error(out[i], expected[i]) <= 2 * TOLERANCE  # both round their output to bf16


@pytest.mark.parametrize("name", DECODE)
def test_vmap_equals_one_by_one(can_run, name, rng):
    can_run(name)
    case = make_case(rng, [130, 65], h=64)
    q = jnp.stack([case.arguments["q"] * factor for factor in (1, 0.5, -1)])

    def one(q):
        return paged_attention(**case.arguments | {"q": q}, backend=name)

    together = jax.jit(jax.vmap(one))(q)
    for x, y in zip(q, together, strict=True):
        np.testing.assert_array_equal(y, jax.jit(one)(x))
