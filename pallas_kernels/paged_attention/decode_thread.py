"""Where a thread of decode attention stands: its block's row and head, its worker's pages."""

from __future__ import annotations

import copy
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


class Thread:
    """Blocks of a cluster first, then KV heads, splits, rows: neighbours share a row's table."""

    def __init__(self, p: Problem, config: DecodeConfig, refs: dict[str, Any], shared: Any):
        self.gmem = {name: ptx.global_address(ref) for name, ref in refs.items()}
        self.memory: SharedMemory = shared_memory(p, config)
        self.shared = ptx.shared_address(shared)
        self.rank = ptx.cluster_rank() if config.cluster > 1 else ptx.constant(0)
        self._stand(p, config, ptx.thread_index(), ptx.warp_index(), ptx.block_index())
        self.row = self._row(p, self.index_of_row)
        self.ring = self.shared + self.warpgroup * self.memory.ring
        self.worker = (self.split * config.cluster + self.rank) * config.warpgroups
        self.worker = self.worker + self.warpgroup
        self.workers = config.workers
        self._ask(p)

    def _stand(self, p: Problem, config: DecodeConfig, index: I32, warp: I32, block: I32) -> None:
        self.index, self.warp, self.block = index, warp, block
        self.lane = index & 31
        self.g, self.c = self.lane >> 2, self.lane & 3
        one = config.warpgroups == 1
        self.warpgroup = ptx.constant(0) if one else warp >> 2
        self.quarter = warp if one else warp & 3
        unit = block // config.cluster
        head_block, rest = unit % p.head_blocks, unit // p.head_blocks
        self.split, self.index_of_row = rest % config.splits, rest // config.splits
        chunks = p.head_blocks // p.kv_heads
        self.kv_head, chunk = head_block // chunks, head_block % chunks
        self.first_head = self.kv_head * p.group + chunk * COLUMNS
        self.block_heads = ptx.constant(p.group)
        if chunks > 1:
            self.block_heads = ptx.minimum(p.group - chunk * COLUMNS, COLUMNS)

    def again(self, p: Problem, config: DecodeConfig) -> Thread:
        """The same place, found anew: through the main loop fewer registers are kept."""
        t = copy.copy(self)
        index = ptx.opaque(self.index)
        t._stand(p, config, index, index // 32, ptx.opaque(self.block))
        return t

    def _row(self, p: Problem, index: I32) -> I32:
        if not p.ordered:
            return index
        row = ptx.load_global(self.gmem["order"].advance(index, 4))[0]
        return ptx.minimum(ptx.maximum(row, 0), p.rows - 1)

    def _ask(self, p: Problem) -> None:
        """The numbers of the row are on their way; only a window makes use of one already."""
        self.table = self.gmem["table"].advance(self.row, 4 * p.width)
        self.length = ptx.load_global(self.gmem["context_lens"].advance(self.row, 4))[0]
        if p.new:
            self.query_len = ptx.load_global(self.gmem["query_lens"].advance(self.row, 4))[0]
        if p.layers is not None:
            self.layer = ptx.load_global(self.gmem["layer"])[0]
        self.first = ptx.constant(0)
        if p.window is not None:
            self.first = ptx.maximum(self.length - p.window, 0)
        self.first_page = self.first // PAGE

    def find_pages(self, p: Problem) -> None:
        """Cached tokens first .. last - 1 are seen, in pages first_page + worker + i workers."""
        self.last = self.length
        if p.new:
            self.has_new = (self.query_len > 0) & (self.length > 0)
            self.last = self.length - ptx.select(self.has_new, 1, 0)
        pages = (ptx.maximum(self.last, 0) + (PAGE - 1)) // PAGE
        mine = ptx.minimum(pages, p.width) - self.first_page - self.worker
        self.pages = (ptx.maximum(mine, 0) + (self.workers - 1)) // self.workers
        self._go_to_layer(p)

    def head_of_column(self, column: I32) -> I32:
        """The query head of one of the eight columns; those beyond the last repeat it."""
        return self.first_head + ptx.minimum(column, self.block_heads - 1)

    def page_id(self, p: Problem, i: I32 | int) -> I32:
        """Of the worker's i-th page, as the table has it; of the table's last beyond its end."""
        index = self.first_page + self.worker + i * self.workers
        return ptx.load_global(self.table.advance(ptx.minimum(index, p.width - 1), 4))[0]

    def page_source(self, p: Problem, page: I32) -> Address:
        """The block of this KV head in a page; in page 0 for ids outside the cache."""
        page = ptx.select(self.is_page(p, page), page, 0)
        return self.heads_pages.advance(page, p.kv_heads * p.page.block_bytes)

    def is_page(self, p: Problem, page: I32) -> Predicate:
        return (page > -1) & (page < p.num_pages)

    def _go_to_layer(self, p: Problem) -> None:
        """The address of this KV head's block of page 0, in the layer; that counts from the end
        below 0, and is clamped."""
        pages = self.gmem["pages"]
        if p.layers is not None:
            layer = ptx.select(self.layer < 0, self.layer + p.layers, self.layer)
            layer = ptx.minimum(ptx.maximum(layer, 0), p.layers - 1)
            pages = pages.advance(layer, p.num_pages * p.kv_heads * p.page.block_bytes)
        self.heads_pages = pages.advance(self.kv_head, p.page.block_bytes)
