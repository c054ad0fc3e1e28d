"""The ablation's variants, lane by lane in numpy and lowered for CUDA; the sanitizer's verdicts."""

import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import mlir
from jaxlib.mlir import ir

from qserve_jax.pallas_kernels.w4a8_matmul import (
    layout,
    mma_config,
    mosaic_mma,
    sm90_config,
    sm90_tiles,
    to_kernel_layout,
)
from qserve_jax.quantization.qtensor import Int8Activation, Source, W4PerGroup
from scripts import ablation_w4a8 as ablation
from scripts import sanitize_kernels

SOURCE = Source(("stack", "in", "out"), (0,), (0,), "float32")
N, K, STAGES, K_WARPS = 64, 1024, 3, 2
LANE = np.arange(32, dtype=np.uint32)


def canonical(rng) -> W4PerGroup:
    """Random codes; scales and offsets that reach both ends of int8."""
    codes = rng.integers(0, 256, (N, K // 2), np.uint8)
    scale = rng.integers(1, 18, (N, K // 128))
    scale[0] = 17
    offset = np.where(rng.random(scale.shape) < 0.5, -128, 127 - 15 * scale)
    return W4PerGroup(
        jnp.asarray(codes),
        jnp.ones(N),
        jnp.asarray(scale, jnp.uint8),
        jnp.asarray(offset, jnp.int8),
        128,
        SOURCE,
    )


def product_tile(packed: W4PerGroup, tile: int, chunk: int) -> tuple[list[np.ndarray], Any]:
    """What `mosaic_mma._load_weights` reads of a tile."""
    words = np.asarray(packed.codes)[tile // 4, chunk, tile % 4].view(np.uint32)
    codes = [words[(h * 32 + LANE) * 4 + v] for h in range(2) for v in range(4)]
    return codes, layout.split_scales(words[256 + LANE // 4])


class GlobalBytes:
    """`ptx.Address`, one of each lane."""

    def __init__(self, data: np.ndarray, at: Any = 0):
        self.data, self.at = data, at

    def advance(self, index, stride):
        return GlobalBytes(self.data, self.at + np.asarray(index).astype(np.int64) * stride)

    def read(self, size, offset=0):
        at = np.broadcast_to(self.at + offset, 32)
        return np.stack([self.data[a : a + size] for a in at])


def permute(a, b, selector):
    octets = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], 1)
    picked = octets[:, [selector >> (4 * i) & 7 for i in range(4)]]
    return np.ascontiguousarray(picked).view(np.uint32)[:, 0]


@pytest.fixture
def machine(monkeypatch):
    """Shared memory of a warp whose 32 lanes are numpy arrays."""
    shared = np.full(STAGES * 2 * 1152, 0xEE, np.uint8)

    def write(target, octets):
        for to, row in zip(np.broadcast_to(target, 32), octets, strict=True):
            assert to % len(row) == 0
            shared[to : to + len(row)] = row

    def copy_16_bytes(target, source, source_offset=0):
        write(target, source.read(16, source_offset))

    def load(kind, address, offset):
        size = {"u8": 1, "u16": 2}[kind]
        at = address.astype(np.int64) + offset
        return sum(shared[at + i].astype(np.uint32) << (8 * i) for i in range(size))

    def choose(condition, yes, no):
        octets = [(yes if take else no) for take in condition]
        return SelectedBytes(octets)

    class SelectedBytes:
        def __init__(self, addresses):
            self.addresses = addresses

        def advance(self, index, stride):
            return SelectedBytes([a.advance(index, stride) for a in self.addresses])

        def read(self, size):
            return np.stack([a.read(size)[i] for i, a in enumerate(self.addresses)])

    fake = SimpleNamespace(
        minimum=np.minimum,
        copy_16_bytes=copy_16_bytes,
        copy_4_bytes=lambda target, source: write(target, source.read(4)),
    )
    monkeypatch.setattr(ablation, "ptx", fake)
    monkeypatch.setattr(ablation, "_load", load)
    monkeypatch.setattr(ablation, "_permute", permute)
    monkeypatch.setattr(ablation, "_choose", choose)
    monkeypatch.setattr(mosaic_mma.Thread, "__init__", lambda self, p, refs, shared: None)
    return shared


@pytest.mark.parametrize("team", range(K_WARPS))
def test_gathered_fragments_are_those_of_the_packed_weights(machine, rng, team):
    w = canonical(rng)
    packed = to_kernel_layout(w)
    config = SimpleNamespace(row_tiles=2, k_warps=K_WARPS, stages=STAGES)
    memory = SimpleNamespace(tile_bytes=1152, weight_slot=2 * 1152)
    p: Any = SimpleNamespace(n=N, k=K, chunks=K // 128, config=config, memory=memory)
    t: Any = object.__new__(ablation.CanonicalThread)
    t.lane, t.g, t.c, t.team = LANE, LANE >> 2, LANE & 3, np.uint32(team)
    t.first_row, t.row_warp, t.weight_ring = np.uint32(0), np.uint32(1), np.uint32(0)
    arrays = {"w": w.codes, "group_scale": w.group_scale, "group_offset": w.group_offset}
    t.gmem = {
        name: GlobalBytes(np.asarray(a).reshape(-1).view(np.uint8)) for name, a in arrays.items()
    }
    ablation.CanonicalThread.__init__(t, p, {}, None)
    for step in range(K // 128 // K_WARPS):
        slot: Any = np.uint32(step % STAGES)
        copied: Any = np.uint32(step)
        ablation.copy_weights(p, t, slot, copied)
        t.copied_step = np.uint32(step + STAGES - 1)  # as the loop says
        tiles = ablation.load_weights(p, t, slot)
        for r, h in itertools.product(range(2), range(2)):
            found = ablation.fragments(tiles[r], h)
            tile = product_tile(packed, 2 + r, team + step * K_WARPS)
            np.testing.assert_array_equal(found, mosaic_mma._fragments(tile, h))


def test_shared_memory_reads_and_writes_have_no_bank_conflicts():
    g, c = LANE >> 2, LANE & 3
    for piece, byte, further in itertools.product(range(4), (0, 8), (0, 2)):
        channel = layout.channel_of_row(g) + further
        read = ablation.code_offset(channel, piece) + byte + 2 * c
        assert len(set(read // 4 % 32)) == len(set(read // 4)) == 16
    for quarter in np.split(LANE, 4):
        written = ablation.code_offset(quarter >> 2, quarter & 3)
        assert len(set(written // 16 % 8)) == 8


@pytest.mark.parametrize("clamped", [True, False])
def test_scalar_expansion_is_that_of_whole_words(rng, monkeypatch, clamped):
    fake = SimpleNamespace(minimum=np.minimum, maximum=np.maximum)
    monkeypatch.setattr(ablation, "ptx", fake)
    packed = to_kernel_layout(canonical(rng))
    codes, scales = product_tile(packed, 1, 3)
    scale_words = np.asarray(packed.codes)[0, 3, 1].view(np.uint32)[256 + LANE // 4]
    plain = ablation.split_scales(scale_words.astype(np.int64))

    clamp: Any = ablation.to_int8 if clamped else lambda value: value
    for word in codes:
        found = ablation.expand(word.astype(np.int64), plain, clamp=clamp)
        np.testing.assert_array_equal(found, layout.expand(word, scales))
    outside = ((np.int64(17), np.int64(127)),) * 2
    (low, _) = ablation.expand(np.int64(0xF), outside, clamp=clamp)
    assert low & 0xFF == (127 if clamped else (15 * 17 + 127) & 0xFF)


def shapes(m: int, n: int, k: int, variant: str) -> tuple[Any, Any]:
    shape: Any = jax.ShapeDtypeStruct
    x: Any = Int8Activation(
        shape((m, k), jnp.int8), shape((m,), jnp.float32), shape((m,), jnp.int32)
    )
    w: Any = W4PerGroup(
        shape((2, n, k // 2), jnp.uint8),
        shape((2, n), jnp.float32),
        shape((2, n, k // 128), jnp.uint8),
        shape((2, n, k // 128), jnp.int8),
        128,
        SOURCE,
    )
    return x, w if variant == "no_reorder" else jax.eval_shape(to_kernel_layout, w)


def kernel_text(lowered: str) -> str:
    """The one Mosaic kernel of a program."""
    found = []

    def visit(op):
        if op.name == "stablehlo.custom_call" and "mosaic_gpu" in str(op):
            config = ir.DictAttr(op.attributes["mhlo.backend_config"])
            found.append(ir.StringAttr(config["module"]).value_bytes)
        return ir.WalkResult.ADVANCE

    with mlir.make_ir_context() as context:
        context.allow_unregistered_dialects = True
        ir.Module.parse(lowered).operation.walk(visit)
        (code,) = found
        return str(ir.Module.parse(code).operation)


@pytest.mark.parametrize("case", ablation.cases([16, 64]), ids=str)
def test_variants_lower_and_leave_the_product_as_it_was(case):
    design, m, variant = case
    before = (layout.expand, layout.split_scales, mosaic_mma.gather, mosaic_mma.Thread)
    x, w = shapes(m, 4096, 4096, variant)
    program = ablation.lower(design, variant, x, w, "bfloat16", "cuda")
    text = kernel_text(program.as_text())
    assert program.out_info.shape == (m, 4096)
    assert ("ld.shared.u16" in text) == (variant == "no_reorder")
    # 32 codes a lane and tile, one by one; the minima of the product are those of indices.
    clamps = text.count("arith.minsi")
    assert (clamps > 32) == (variant == "scalar")
    assert before == (layout.expand, layout.split_scales, mosaic_mma.gather, mosaic_mma.Thread)


def test_losses_and_table():
    base = {"design": "mma", "n": 64, "k": 512, "m": 16}
    rows = [
        {**base, "variant": "product", "us": 6.0},
        {**base, "variant": "no_reorder", "us": 8.0},
    ]
    product, slower = rows = ablation.with_losses(rows)
    assert product["loss"] == 0 and slower["loss"] == 0.25
    (_, line) = ablation.table(rows)
    assert line.split() == ["mma", "64", "x", "512", "16", "6.00", "8.00", "(-25%)"]


@pytest.fixture
def cpu(monkeypatch):
    """`measure` with the reference in place of the kernels, and a clock that stands still."""

    def lower(design, variant, x, w, out_dtype):
        assert (w.layout == "canonical") == (variant == "no_reorder")

        def run(x, w, layer):
            w = layout.from_kernel_layout(layout.take_layer(w, layer))
            sums = ablation.reference.int8_dot(x.codes, ablation.reference.int8_weights(w))
            if out_dtype == ablation.INT32_SUMS:
                return sums + wrong.get(variant, 0)
            return ablation.reference.epilogue(sums, x, w).astype(out_dtype)

        return jax.jit(run).lower(x, w, jnp.int32(0))

    wrong: dict[str, int] = {}
    monkeypatch.setattr(ablation, "lower", lower)
    monkeypatch.setattr(ablation, "copies_of", lambda nbytes: 2)
    monkeypatch.setattr(ablation, "call_times", lambda call: [call(0) is None or 2.0, 2.0, 2.0])
    monkeypatch.setattr(ablation, "VARIANTS", {"mma": ("product", "no_reorder")})
    return wrong


def test_a_wrong_sum_is_never_timed(cpu):
    rows = ablation.measure((64, 512), [16], check_sums=True)
    assert [(row["variant"], row["us"], row["loss"]) for row in rows] == [
        ("product", 2.0, 0.0),
        ("no_reorder", 2.0, 0.0),
    ]
    cpu["no_reorder"] = 1
    with pytest.raises(ArithmeticError, match="mma no_reorder 64x512 m=16: 1024 of 1024 int32"):
        ablation.measure((64, 512), [16], check_sums=True)


@pytest.mark.parametrize("racecheck", ["0 hazards displayed (0 errors, 0 warnings)", "3 hazards"])
def test_sanitizer_tells_clean_from_not(tmp_path, monkeypatch, capsys, racecheck):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"""#!/bin/sh
case $2 in
  memcheck) echo "========= ERROR SUMMARY: 0 errors" ;;
  racecheck) echo "========= RACECHECK SUMMARY: {racecheck}" ;;
esac
"""
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("sys.argv", ["sanitize_kernels.py", "--seconds", "20"])
    bad = racecheck.startswith("3")
    assert sanitize_kernels.main() == int(bad)
    said = capsys.readouterr().out
    assert "== memcheck: clean, exit status 0" in said
    assert f"== racecheck: {'NOT clean' if bad else 'clean'}, exit status 0" in said


def test_sanitizer_out_of_time_and_absent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sanitize_kernels.py", "--seconds", "0.2"])
    monkeypatch.setattr(sanitize_kernels, "sanitizer", lambda: None)
    assert sanitize_kernels.main() == 2
    tool = tmp_path / "slow"
    tool.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 0 errors'\nsleep 30\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize_kernels, "sanitizer", lambda: str(tool))
    assert sanitize_kernels.main() == 1
    assert "NOT clean, out of time" in capsys.readouterr().out


def test_sanitized_configs_can_run():
    """Among them one for each trait: teams of k, clusters, several tiles for a block."""
    traits = set()
    for matmul, m, n, config in sanitize_kernels.CONFIGS.values():
        for per_group in (True, False):
            if matmul is mosaic_mma.matmul:
                mma_config.check_config(config, sanitize_kernels.K, per_group)
            else:
                sm90_config.check_config(config, m, n, per_group)
                clusters, tiles = sm90_tiles.grid(config, m, n)
                traits |= {(config.k_warpgroups, config.cluster, tiles > clusters)}
    assert {(1, 1, True), (1, 1, False), (4, 1, False), (1, 2, False), (4, 2, True)} <= traits
