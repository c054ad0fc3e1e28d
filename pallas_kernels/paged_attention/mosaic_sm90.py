"""Decode attention on Hopper: a page of a KV head is one bulk copy, where workers share a row."""

from __future__ import annotations

import functools
from typing import Any

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import I32
from qserve_jax.pallas_kernels.paged_attention import mosaic_decode
from qserve_jax.pallas_kernels.paged_attention.decode_config import DecodeConfig
from qserve_jax.pallas_kernels.paged_attention.decode_problem import Problem
from qserve_jax.pallas_kernels.paged_attention.decode_thread import Thread, Work
from qserve_jax.pallas_kernels.paged_attention.mosaic_decode import Copies
from qserve_jax.pallas_kernels.paged_attention.mosaic_mma import ThreadCopies


class BulkCopies:
    """The first thread of a worker copies; the first pages its first threads, one each. Of each
    slot a barrier counts the bytes that came, and another the threads that have read it: one for
    its warp would do, but is no faster on the whole, and racecheck does not follow it."""

    def __init__(self, p: Problem, config: DecodeConfig, t: Thread, barriers: list[Any]):
        self.p, self.t, self.stages = p, t, config.stages
        (ref,) = barriers
        self.barriers = ptx.shared_address(ref) + t.warpgroup * (16 * config.stages)
        self.thread = t.index & 127
        self.copies = self.thread.is_(0)

    def _full(self, slot: I32) -> I32:
        return self.barriers + slot * 8

    def _empty(self, slot: I32) -> I32:
        return self.barriers + slot * 8 + 8 * self.stages

    def _copy(self, work: Work, slot: I32, page: I32) -> None:
        size = self.p.page.block_bytes
        ptx.expect_bytes(self._full(slot), size)
        target = self.t.ring + slot * size
        ptx.copy_to_shared(target, work.source(self.p, page), size, self._full(slot))

    def prepare(self) -> tuple[I32, I32]:
        page = self.t.page_id(self.p, ptx.minimum(self.t.lane, self.stages - 1))
        with ptx.when(self.copies):
            for slot in map(ptx.constant, range(self.stages)):
                ptx.init_barrier(self._full(slot), arrivals=1)
                ptx.init_barrier(self._empty(slot), arrivals=128)
            ptx.publish_barriers()
        ptx.sync_warp()
        return ptx.value_of_lane(page, 0), page

    def start(self, work: Work, mine: I32) -> None:
        with ptx.when((self.thread < self.stages) & (self.thread < work.count)):
            self._copy(work, self.thread, mine)

    def wait(self, work: Work, i: I32, slot: I32, parity: I32) -> I32:
        ptx.wait(self._full(slot), parity)
        return self.t.ring + slot * self.p.page.block_bytes

    def release(self, slot: I32) -> None:
        ptx.fence_reads()
        ptx.arrive(self._empty(slot))

    def refill(self, work: Work, i: I32, slot: I32, parity: I32, later: I32) -> None:
        with ptx.when(self.copies & (i + self.stages < work.count)):
            ptx.wait(self._empty(slot), parity)
            self._copy(work, slot, later)


def _copies(p: Problem, config: DecodeConfig, t: Thread, barriers: list[Any]) -> Copies:
    """One worker a row means many rows: warps that wait for no other read up to 8 % faster."""
    return (ThreadCopies if config.workers == 1 else BulkCopies)(p, config, t, barriers)


decode = functools.partial(
    mosaic_decode.attention,
    "mosaic_sm90",
    _copies,
    clusters=True,
    barriers=lambda config: 0 if config.workers == 1 else 2 * config.stages * config.warpgroups,
    arch=None,
)
