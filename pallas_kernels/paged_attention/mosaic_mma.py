"""Decode attention for every NVIDIA GPU from Ampere on: a warp copies its own tokens by cp.async.

Lowered as sm_80 wherever it runs (`intrinsics.architecture`).
"""

from __future__ import annotations

import functools
from typing import Any

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import I32
from qserve_jax.pallas_kernels.paged_attention import mosaic_decode
from qserve_jax.pallas_kernels.paged_attention.decode_config import DecodeConfig
from qserve_jax.pallas_kernels.paged_attention.decode_problem import Problem
from qserve_jax.pallas_kernels.paged_attention.decode_thread import Thread, Work


class ThreadCopies:
    """A warp reads 16 tokens of a page, so it copies these and waits for no other warp. One barrier
    of the warp says both that a page has come and that the one before it has been read; the page
    stages - 1 ahead then goes where that one was."""

    def __init__(self, p: Problem, config: DecodeConfig, t: Thread, barriers: list[Any]):
        self.p, self.t, self.stages = p, t, config.stages

    def _copy(self, work: Work, slot: I32, i: I32, page: I32) -> None:
        """The warp's tokens of K and V, their scales, if there is such a page; a group anyway."""
        p, t = self.p, self.t
        with ptx.when(i < work.count):
            source = work.source(p, page)
            target = t.ring + slot * p.page.block_bytes
            part = 16 * p.page.side_bytes  # of K or V
            for side in range(2):
                first = t.quarter * part + t.lane * 16 + side * p.page.values_at
                for offset in range(0, part, 512):
                    ptx.copy_16_bytes(
                        target + first,
                        source.advance(first, 1),
                        offset=offset,
                        source_offset=offset,
                    )
            if p.bits != 16:
                first = t.quarter * 128 + t.lane * 16 + p.page.scales_at
                with ptx.when(t.lane < 8):
                    ptx.copy_16_bytes(target + first, source.advance(first, 1))
        ptx.commit_copies()

    def prepare(self) -> tuple[I32, I32]:
        first = self.t.page_id(self.p, 0)
        return first, first

    def start(self, work: Work, mine: I32) -> None:
        for i in range(self.stages - 1):
            self._copy(work, ptx.constant(i), ptx.constant(i), self.t.page_id(self.p, i))

    def wait(self, work: Work, i: I32, slot: I32, parity: I32) -> I32:
        later = self.t.page_id(self.p, i + (self.stages - 1))  # on its way before the wait
        ptx.wait_copies(self.stages - 2)
        ptx.sync_warp()
        previous = ptx.select(slot.is_(0), self.stages - 1, slot - 1)
        self._copy(work, previous, i + (self.stages - 1), later)
        return self.t.ring + slot * self.p.page.block_bytes

    def release(self, slot: I32) -> None:
        """The next barrier of the warp says it."""

    def refill(self, work: Work, i: I32, slot: I32, parity: I32, later: I32) -> None:
        """`wait` has done it, for the slot before."""


decode = functools.partial(
    mosaic_decode.attention,
    "mosaic_mma",
    ThreadCopies,
    clusters=False,
    barriers=lambda config: 0,
    arch=(8, 0),
)
