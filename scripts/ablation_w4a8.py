"""What the offline weight reorder and register-level parallelism bring, as QServe section 5.2 asks.

python scripts/ablation_w4a8.py [--shapes NxK ...] [--tokens M ...] [--output FILE]

The product's own kernels with one thing changed and the same configuration, per group, bf16 out:

  no_reorder         canonical weights: codes u8[N, K/2] row-major, scales and offsets u8, i8
                     [N, K/128] in arrays of their own. As many copies bring the codes of a chunk to
                     shared memory, swizzled to be free of bank conflicts; then a thread computes
                     where each fragment's two bytes lie, gathers them with 16-bit loads, and puts
                     the nibbles into order. Expansion stays register-level parallel. (mosaic_mma)
  scalar             a weight at a time: shift, mask, multiply, add, clamp to a byte, insert
  scalar_unclamped   the same without the clamp, which weights of QoQ's protective range do not need

Before a variant is timed its int32 sums must be the reference's at the smallest shape, and the
output of the very program that is timed the reference's bit for bit at every shape. Times are those
of `benchmarks.clock`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from qserve_jax.benchmarks.clock import PROTOCOL, call_times, check_available
from qserve_jax.benchmarks.matmul import weight_bytes
from qserve_jax.benchmarks.operands import copies_of, first_tokens, make_activation, make_weight
from qserve_jax.benchmarks.provenance import ROOT, provenance
from qserve_jax.benchmarks.shapes import Shape, parse_shape
from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import I32
from qserve_jax.pallas_kernels.intrinsics._mlir import ptx_value
from qserve_jax.pallas_kernels.w4a8_matmul import (
    from_kernel_layout,
    layout,
    mma_config,
    mma_thread,
    mosaic_mma,
    mosaic_sm90,
    problem,
    reference,
    take_layer,
    tuning,
)
from qserve_jax.pallas_kernels.w4a8_matmul.problem import INT32_SUMS
from qserve_jax.quantization.qtensor import Array, W4PerGroup

SHAPES, TOKENS = ((28672, 4096), (4096, 4096)), (16, 64, 256)
OUTPUT = ROOT / "docs" / "results" / "h200_ablation.json"
MATMULS = {"mma": mosaic_mma.matmul, "wgmma": mosaic_sm90.matmul}
VARIANTS = {
    "mma": ("product", "no_reorder", "scalar", "scalar_unclamped"),
    "wgmma": ("product", "scalar", "scalar_unclamped"),
}
WGMMA_TOKENS = tuning.MMA_TOKENS + 1
"""From here on; the product takes mma below."""


# Scalar expansion


def split_scales(word: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """`layout.split_scales` -> (scale, offset) of fragment rows g and g + 8, plain integers."""

    def pair(shift: int) -> tuple[Any, Any]:
        return (word >> shift) & 0xFF, ((word >> (shift + 8)) & 0xFF) - 128

    return pair(0), pair(16)


def expand(word: Any, scales: Any, *, clamp: Callable[[Any], Any]) -> list[Any]:
    """`layout.expand`, a weight at a time."""
    rows = []
    for first_bit, (scale, offset) in zip((0, 4), scales, strict=True):
        octets = [
            clamp(((word >> (8 * i + first_bit)) & 15) * scale + offset) & 0xFF for i in range(4)
        ]
        rows.append(octets[0] | octets[1] << 8 | octets[2] << 16 | octets[3] << 24)
    return rows


def to_int8(value: I32) -> I32:
    return ptx.maximum(ptx.minimum(value, 127), -128)


# Canonical weights. A slot of shared memory has per tile of 16 channels x 128 features the codes,
# 64 bytes a channel, then the scales and the offsets of four chunks, 4 bytes a channel each: the
# least that can be copied.

ROW_BYTES = layout.FEATURES // 2
CODE_BYTES = layout.ROWS * ROW_BYTES
SCALE_WORDS = 2 * layout.ROWS
GROUPS = ("group_scale", "group_offset")


def gather(backend: str, x: Any, w: W4PerGroup, *rest: Any) -> tuple[problem.Problem, dict]:
    """`problem.gather` for canonical weights; K % 512 == 0."""
    n, k = layout.weight_shape(w)
    if k % (4 * layout.FEATURES):
        raise ValueError(
            f"no_reorder copies the scales of four chunks: K = {k} must be 512 times i"
        )
    tiles = (n // 64, k // layout.FEATURES, layout.BLOCKS, CODE_BYTES)
    view = w.codes.reshape(*w.codes.shape[:-2], *tiles)  # the same bytes
    packed = dataclasses.replace(w, codes=view, layout=layout.LAYOUT)
    found, operands = problem.gather(backend, x, packed, *rest)
    return found, operands | {name: getattr(w, name) for name in GROUPS}


def go_to_layer(p: problem.Problem, gmem: dict[str, ptx.Address]) -> None:
    """`problem.go_to_layer`; a chunk without scales has the size of canonical codes."""
    problem.go_to_layer(dataclasses.replace(p, per_group=False), gmem)
    if p.layers is not None:
        layer = ptx.load_global(gmem["layer"])[0]
        for name in GROUPS:
            gmem[name] = gmem[name].advance(layer, p.n * p.chunks)


def code_offset(channel: Any, piece: Any) -> Any:
    """Byte offset of 16 bytes of codes of a channel of a tile in shared memory."""
    return channel * ROW_BYTES + ((piece ^ ((channel >> 2) & 3)) << 4)


class CanonicalThread(mma_thread.Thread):
    """Copies 16 bytes of each of two channels of a tile, and four chunks' scales of one."""

    def __init__(self, p: Any, refs: dict[str, Any], shared: Any):
        super().__init__(p, refs, shared)
        tiles = [
            ptx.minimum(
                self.first_row // layout.ROWS + self.row_warp * p.config.row_tiles + r,
                p.n // layout.ROWS - 1,
            )
            for r in range(p.config.row_tiles)
        ]
        row, piece = self.lane >> 2, self.lane & 3
        self.code_target = [code_offset(row + 8 * i, piece) for i in range(2)]
        self.codes = [
            self.gmem["w"]
            .advance(tile * layout.ROWS + row, p.k // 2)
            .advance(self.team * ROW_BYTES + piece * 16, 1)
            for tile in tiles
        ]
        channels = [tile * layout.ROWS + (self.lane & 15) for tile in tiles]
        of = {name: [self.gmem[name].advance(c, p.chunks) for c in channels] for name in GROUPS}
        self.group_words = [
            _choose(self.lane < layout.ROWS, scale, offset)
            for scale, offset in zip(*of.values(), strict=True)
        ]
        self.copied_step: Any = None


def _choose(condition: ptx.Predicate, yes: ptx.Address, no: ptx.Address) -> ptx.Address:
    return ptx.Address(arith.select(condition.value, yes.value, no.value))


def copy_weights(p: Any, t: CanonicalThread, slot: I32, step: I32) -> None:
    """`mosaic_mma._copy_weights`: codes by all lanes, scales by 16 and offsets by 16."""
    t.copied_step = step
    target = t.weight_ring + slot * p.memory.weight_slot
    chunk_word = (t.team + step * p.config.k_warps) & 0xFFFFFFFC
    for r in range(p.config.row_tiles):
        source = t.codes[r].advance(step, p.config.k_warps * ROW_BYTES)
        tile = target + r * p.memory.tile_bytes
        for i, to in enumerate(t.code_target):
            ptx.copy_16_bytes(tile + to, source, source_offset=8 * i * (p.k // 2))
        words = tile + t.lane * 4 + CODE_BYTES
        ptx.copy_4_bytes(words, t.group_words[r].advance(chunk_word, 1))


def load_weights(p: Any, t: CanonicalThread, slot: I32) -> list[tuple[list[I32], Any]]:
    """`mosaic_mma._load_weights`: words of two bytes of codes of each of two channels."""
    step = t.copied_step - (p.config.stages - 1)  # the loop copies so far ahead
    chunk_byte = (t.team + step * p.config.k_warps) & 3
    channel = layout.channel_of_row(t.g)
    tiles = []
    for r in range(p.config.row_tiles):
        base = t.weight_ring + slot * p.memory.weight_slot + r * p.memory.tile_bytes
        words = []
        for piece in range(4):
            at = base + code_offset(channel, piece) + t.c * 2
            words += [_pair(at, byte) for byte in (0, 8)]
        scales = [
            _scales(base + CODE_BYTES + (channel + further) * 4 + chunk_byte) for further in (0, 2)
        ]
        tiles.append((words, scales))
    return tiles


def _pair(address: I32, offset: int) -> I32:
    """Two bytes of codes of the channel of fragment row g; in the high half those of g + 8."""
    low, high = (_load("u16", address, offset + further * ROW_BYTES) for further in (0, 2))
    return low | high << 16


def _scales(address: I32) -> tuple[I32, I32]:
    """scale, 4 x (offset + 128), as of `layout.split_scales`."""
    offset = _load("u8", address, 4 * layout.ROWS) ^ 0x80
    return _load("u8", address, 0), offset * 0x01010101


def _load(kind: str, address: I32, offset: int) -> I32:
    code = f"ld.shared.{kind} $0, [$1+{offset}];"
    return ptx_value(I32, code, address, effect=True)


def fragments(tile: tuple[list[I32], Any], h: int) -> list[list[I32]]:
    """`mosaic_mma._fragments`: even and odd features of both rows, put into order, expanded."""
    words, scales = tile
    made = []
    for word in words[4 * h : 4 * h + 4]:
        even, odd = word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F
        codes = [_permute(even, odd, selector) for selector in (0x5140, 0x7362)]
        made += [
            (q * scale + offset) ^ 0x80808080
            for q, (scale, offset) in zip(codes, scales, strict=True)
        ]
    return [made[:4], made[4:]]


def _permute(a: I32, b: I32, selector: int) -> I32:
    return ptx_value(I32, f"prmt.b32 $0, $1, $2, {selector};", a, b)


# Variants

_scalar = functools.partial(expand, clamp=to_int8)
_unclamped = functools.partial(expand, clamp=lambda value: value)
PATCHES: dict[str, list[tuple[Any, str, Any]]] = {
    "product": [],
    "no_reorder": [
        (mosaic_mma, "gather", gather),
        (mma_thread, "go_to_layer", go_to_layer),
        (mosaic_mma, "Thread", CanonicalThread),
        (mosaic_mma, "_copy_weights", copy_weights),
        (mosaic_mma, "_load_weights", load_weights),
        (mosaic_mma, "_fragments", fragments),
        (mma_config, "SCALE_WORDS", SCALE_WORDS),
    ],
    "scalar": [(layout, "split_scales", split_scales), (layout, "expand", _scalar)],
    "scalar_unclamped": [(layout, "split_scales", split_scales), (layout, "expand", _unclamped)],
}


@contextlib.contextmanager
def changed(variant: str) -> Iterator[None]:
    """What is traced and lowered inside is the variant."""
    with contextlib.ExitStack() as stack:
        for module, name, value in PATCHES[variant]:
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def config_of(design: str, m: int, n: int, k: int) -> Any:
    """What the product takes."""
    tuned = tuning.tuned_config(design, m, n, k, True)
    return tuned or tuning.DESIGNS[design].choose(m, n, k, True)


def lower(
    design: str, variant: str, x: Any, w: W4PerGroup, out_dtype: Any, platform: str | None = None
) -> Any:
    """The program of (x, w, layer). w: stacked, canonical for no_reorder and else packed."""
    m, (n, k) = x.codes.shape[0], layout.weight_shape(w)
    config = config_of(design, m, n, k)

    def run(x: Any, w: Any, layer: Any) -> Array:
        return MATMULS[design](x, w, layer=layer, out_dtype=out_dtype, config=config)

    with changed(variant):
        traced = jax.jit(run).trace(x, w, jax.ShapeDtypeStruct((), jnp.int32))
        return traced.lower(lowering_platforms=(platform,)) if platform else traced.lower()


def cases(tokens: list[int]) -> list[tuple[str, int, str]]:
    """(design, m, variant)."""
    return [
        (design, m, variant)
        for design, variants in VARIANTS.items()
        for m in tokens
        for variant in variants
        if design == "mma" or m >= WGMMA_TOKENS
    ]


# Measuring


@jax.jit  # with its autotuning: without, XLA 0.11.2 computed other int8 products on an H200
def _expected(x: Any, w: W4PerGroup) -> tuple[Array, Array]:
    """Exact sums, and what the epilogue makes of them."""
    sums = reference.int8_dot(x.codes, reference.int8_weights(w))
    return sums, reference.epilogue(sums, x, w).astype(jnp.bfloat16)


def measure(shape: Shape, tokens: list[int], check_sums: bool) -> list[dict[str, Any]]:
    """A row for each case of a shape."""
    n, k = shape
    packed = make_weight(copies_of(int(weight_bytes(n, k, 128))), n, k, 128)
    canonical = from_kernel_layout(packed)
    layers = [jnp.int32(i) for i in range(packed.channel_scale.shape[0])]
    x = make_activation(max(tokens), k)
    expected = jax.device_get(_expected(x, take_layer(canonical, 1)))
    x = {m: first_tokens(jax.device_get(x), m) for m in tokens}

    def arguments(case: tuple[str, int, str]) -> tuple[Any, Any]:
        return x[case[1]], canonical if case[2] == "no_reorder" else packed

    outputs = [INT32_SUMS, "bfloat16"] if check_sums else ["bfloat16"]
    with ThreadPoolExecutor() as pool:
        compiled = {
            (case, out): pool.submit(lower(case[0], case[2], *arguments(case), out).compile)
            for case in cases(tokens)
            for out in outputs
        }
    rows = []
    for case in cases(tokens):
        design, m, variant = case
        place = f"{design} {variant} {n}x{k} m={m}"
        print(place, end=" ", flush=True)
        for out in outputs:
            y = compiled[case, out].result()(*arguments(case), layers[1])
            wrong = int((jax.device_get(y) != expected[out == "bfloat16"][:m]).sum())
            if wrong:
                raise ArithmeticError(f"{place}: {wrong} of {y.size} {out} are not the reference's")
        us = statistics.median(_times(compiled[case, "bfloat16"].result(), arguments(case), layers))
        print(f"{us:.2f} us", flush=True)
        config = dataclasses.asdict(config_of(design, m, n, k))
        row = {"design": design, "variant": variant, "n": n, "k": k, "m": m, "us": us}
        rows.append(row | {"config": config, "sums_checked": check_sums})
    return with_losses(rows)


def _times(run: Any, arguments: tuple[Any, ...], layers: list[Array]) -> list[float]:
    return call_times(lambda i: run(*arguments, layers[i % len(layers)]))


def with_losses(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each with `loss`: the part of the product's speed that the variant lacks."""
    product = {key(row): row["us"] for row in rows if row["variant"] == "product"}
    return [row | {"loss": 1 - product[key(row)] / row["us"]} for row in rows]


def key(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in ("design", "n", "k", "m"))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Microseconds and lost speed, a line for each product."""
    names = VARIANTS["mma"]
    lines = [f"{'design':8}{'N x K':>14}{'M':>6}" + "".join(f"{name:>20}" for name in names)]
    for found in dict.fromkeys(map(key, rows)):
        of = {row["variant"]: row for row in rows if key(row) == found}
        cells = [_cell(of[v]) if v in of else "" for v in names]
        design, n, k, m = found
        lines.append(f"{design:8}{f'{n} x {k}':>14}{m:>6}" + "".join(f"{c:>20}" for c in cells))
    return lines


def _cell(row: dict[str, Any]) -> str:
    loss = "" if row["variant"] == "product" else f" ({-row['loss']:+.0%})"
    return f"{row['us']:.2f}{loss}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=SHAPES, metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    check_available()
    rows: list[dict[str, Any]] = []
    smallest = min(args.shapes)
    for shape in sorted(args.shapes):
        rows += measure(shape, args.tokens, check_sums=shape == smallest)
        result = {**provenance(), "protocol": PROTOCOL, "rows": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
