"""Where a thread of decode attention stands: its block's row and head, its worker's pages.

In three stages, as the numbers come: a `Place` is found from indices alone, a `Thread` has asked
for the row's numbers, and its `Work` is known when they are here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import I32, Address, Predicate
from qserve_jax.pallas_kernels.paged_attention.decode_config import (
    DecodeConfig,
    SharedMemory,
    shared_memory,
)
from qserve_jax.pallas_kernels.paged_attention.decode_problem import COLUMNS, Problem
from qserve_jax.pallas_kernels.paged_attention.problem import PAGE


@dataclasses.dataclass(frozen=True)
class Place:
    """index, warp: of the thread in its block. lane: in the warp, (g, c) as the tensor core has it.
    warpgroup: of the block; quarter: the warp's number in it. The block takes block_heads query
    heads from first_head on, of the row whose turn it is, or of a split of that row."""

    index: I32
    warp: I32
    block: I32
    lane: I32
    g: I32
    c: I32
    warpgroup: I32
    quarter: I32
    split: I32
    turn: I32
    kv_head: I32
    first_head: I32
    block_heads: I32


def _stand(p: Problem, config: DecodeConfig, index: I32, warp: I32, block: I32) -> Place:
    """Blocks of a cluster first, then KV heads, splits, rows: neighbours share a row's table."""
    lane = index & 31
    g, c = lane >> 2, lane & 3
    one = config.warpgroups == 1
    warpgroup = ptx.constant(0) if one else warp >> 2
    quarter = warp if one else warp & 3
    unit = block // config.cluster
    head_block, rest = unit % p.head_blocks, unit // p.head_blocks
    split, turn = rest % config.splits, rest // config.splits
    chunks = p.head_blocks // p.kv_heads
    kv_head, chunk = head_block // chunks, head_block % chunks
    first_head = kv_head * p.group + chunk * COLUMNS
    block_heads = ptx.constant(p.group)
    if chunks > 1:
        block_heads = ptx.minimum(p.group - chunk * COLUMNS, COLUMNS)
    return Place(
        *(index, warp, block, lane, g, c, warpgroup, quarter),
        *(split, turn, kv_head, first_head, block_heads),
    )


@dataclasses.dataclass(frozen=True)
class Thread(Place):
    """gmem: operands and output by name. shared: where the block's memory begins, of which `memory`
    are the offsets; ring: the worker's. rank: of the block in its cluster. worker: its number, of
    `workers` of the row.

    On their way: length, of the row with its new token, query_len (0 or 1), layer. Its first token
    that a window leaves is `first`, in page first_page of the table.
    """

    gmem: dict[str, Address]
    memory: SharedMemory
    shared: I32
    ring: I32
    rank: I32
    row: I32
    worker: I32
    workers: int
    table: Address
    length: I32
    query_len: I32 | None
    layer: I32 | None
    first: I32
    first_page: I32

    def again(self, p: Problem, config: DecodeConfig) -> Thread:
        """The same place, found anew: through the main loop fewer registers are kept."""
        index = ptx.opaque(self.index)
        place = _stand(p, config, index, index // 32, ptx.opaque(self.block))
        return dataclasses.replace(self, **vars(place))

    def head_of_column(self, column: I32) -> I32:
        """The query head of one of the eight columns; those beyond the last repeat it."""
        return self.first_head + ptx.minimum(column, self.block_heads - 1)

    def page_id(self, p: Problem, i: I32 | int) -> I32:
        """Of the worker's i-th page, as the table has it; of the table's last beyond its end."""
        index = self.first_page + self.worker + i * self.workers
        return ptx.load_global(self.table.advance(ptx.minimum(index, p.width - 1), 4))[0]


def thread_of(p: Problem, config: DecodeConfig, refs: dict[str, Any], shared_ref: Any) -> Thread:
    """Nothing of it waits for memory, but for the order of rows and, with a window, the length."""
    gmem = {name: ptx.global_address(ref) for name, ref in refs.items()}
    memory, shared = shared_memory(p, config), ptx.shared_address(shared_ref)
    rank = ptx.cluster_rank() if config.cluster > 1 else ptx.constant(0)
    place = _stand(p, config, ptx.thread_index(), ptx.warp_index(), ptx.block_index())
    row = _row(p, gmem, place.turn)
    ring = shared + place.warpgroup * memory.ring
    worker = (place.split * config.cluster + rank) * config.warpgroups + place.warpgroup
    table = gmem["table"].advance(row, 4 * p.width)
    length, query_len = ptx.load_global(gmem["context_lens"].advance(row, 4))[0], None
    if p.new:
        query_len = ptx.load_global(gmem["query_lens"].advance(row, 4))[0]
    layer = ptx.load_global(gmem["layer"])[0] if p.layers is not None else None
    first = ptx.constant(0)
    if p.window is not None:
        first = ptx.maximum(length - p.window, 0)
    return Thread(
        **vars(place),
        **{"gmem": gmem, "memory": memory, "shared": shared, "ring": ring, "rank": rank},
        **{"row": row, "worker": worker, "workers": config.workers, "table": table},
        **{"length": length, "query_len": query_len, "layer": layer},
        **{"first": first, "first_page": first // PAGE},
    )


def _row(p: Problem, gmem: dict[str, Address], turn: I32) -> I32:
    if not p.ordered:
        return turn
    row = ptx.load_global(gmem["order"].advance(turn, 4))[0]
    return ptx.minimum(ptx.maximum(row, 0), p.rows - 1)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a worker attends to: cached tokens from the thread's `first` to before `end`, in `count`
    pages, the i-th of which is first_page + worker + i workers of the table. has_new: whether the
    row has a new token, None where none is attended. blocks: this KV head's of all pages."""

    has_new: Predicate | None
    end: I32
    count: I32
    blocks: Address

    def source(self, p: Problem, page: I32) -> Address:
        """The block of this KV head in a page; in page 0 for ids outside the cache."""
        page = ptx.select(is_page(p, page), page, 0)
        return self.blocks.advance(page, p.kv_heads * p.page.block_bytes)


def is_page(p: Problem, page: I32) -> Predicate:
    return (page > -1) & (page < p.num_pages)


def find_work(p: Problem, t: Thread) -> Work:
    """The first statement that waits for the row's numbers."""
    has_new, end = None, t.length
    if t.query_len is not None:
        has_new = (t.query_len > 0) & (t.length > 0)
        end = t.length - ptx.select(has_new, 1, 0)
    pages = (ptx.maximum(end, 0) + (PAGE - 1)) // PAGE
    mine = ptx.minimum(pages, p.width) - t.first_page - t.worker
    count = (ptx.maximum(mine, 0) + (t.workers - 1)) // t.workers
    return Work(has_new, end, count, _blocks(p, t))


def _blocks(p: Problem, t: Thread) -> Address:
    """In the layer, which counts from the end below 0, and is clamped."""
    pages = t.gmem["pages"]
    if t.layer is not None:
        assert p.layers is not None
        layer = ptx.select(t.layer < 0, t.layer + p.layers, t.layer)
        layer = ptx.minimum(ptx.maximum(layer, 0), p.layers - 1)
        pages = pages.advance(layer, p.num_pages * p.kv_heads * p.page.block_bytes)
    return pages.advance(t.kv_head, p.page.block_bytes)
