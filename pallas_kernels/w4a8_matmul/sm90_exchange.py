"""Between `mosaic_sm90`'s sums and its epilogue: those who share a tile along K add them.

exchange         k_warpgroups > 1: sums of a part of the tokens to each warpgroup
exchange_blocks  k_blocks > 1: of what it then has, a part to each block of the cluster
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import I32
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_thread import Block, Consumer, WgmmaProblem


def exchange(
    p: WgmmaProblem, t: Block, me: Consumer, acc: list[I32]
) -> tuple[I32 | int, list[I32]]:
    """Add the k_warpgroups: each gets the sums of a part of the tokens -> its first token, sums.

    A thread holds the same channels and tokens in each of them, so that words go from thread to
    thread. partials: [row group][to][from, but itself][word / 4][thread], 16 bytes each.
    """
    parts = p.config.k_warpgroups
    if parts == 1:
        return 0, acc
    size = len(acc) // parts
    starts = range(0, len(acc), size)
    base = t.shared + p.memory.partials + me.row_group * (parts * (parts - 1) * size * 512)
    base = base + me.thread * 16
    barrier = me.row_group + 2
    if p.memory.partials == 0:  # where others may still read their slots
        ptx.sync_block(128 * p.config.warpgroups)

    def store(to: int, sender: I32, words: list[I32]) -> None:
        target = base + (sender + to * (parts - 1)) * (size * 512)
        for v in range(0, size, 4):
            ptx.store_shared_words(target, words[v : v + 4], 512 * v)

    _send(me.k_group, acc, starts, size, store)
    ptx.sync_block(128 * parts, barrier)
    mine = _own(me.k_group, acc, starts, size)
    for sender in range(parts - 1):
        _add(mine, base + (me.k_group * (parts - 1) + sender) * (size * 512))
    ptx.sync_block(128 * parts, barrier)  # before the next tile's sums
    return me.k_group * (p.config.tokens // parts), mine


def exchange_blocks(
    p: WgmmaProblem, t: Block, me: Consumer, first: I32 | int, acc: list[I32]
) -> tuple[I32, list[I32]]:
    """The same with the k_blocks, warpgroup by warpgroup: sums of tokens from `first` on -> the
    first token of the part that this block has added up, sums.

    Parts are of equal size, and so may overlap: two blocks then store the same. incoming:
    [warpgroup][from, but itself][word / 4][thread], which others write, where slots were: the
    blocks meet first, having arrived after their last slot. A block ends when it has all that
    others send it, so that nobody sends to one that has ended.
    """
    parts, size = p.config.k_blocks, p.config.part_tokens // 2
    starts = [min(part * size, len(acc) - size) for part in range(parts)]
    rank = ptx.cluster_rank()
    base = t.shared + p.memory.incoming + ((t.warp >> 2) - 1) * ((parts - 1) * size * 512)
    base = base + me.thread * 16
    arrived = t.arrived(p, (t.warp >> 2) - 1)

    def send(to: int, sender: I32, words: list[I32]) -> None:
        target = ptx.address_in_block(base + sender * (size * 512), to)
        barrier = ptx.address_in_block(arrived, to)
        for v in range(0, size, 4):
            ptx.send_words(target, words[v : v + 4], barrier, 512 * v)

    with ptx.when(me.thread.is_(0)):
        ptx.expect_bytes(arrived, (parts - 1) * size * 512)
    ptx.wait_for_cluster()
    _send(rank, acc, starts, size, send)
    ptx.wait(arrived, ptx.constant(0))
    mine = _own(rank, acc, starts, size)
    for sender in range(parts - 1):
        _add(mine, base + sender * (size * 512))
    return ptx.minimum(rank * size, starts[-1]) * 2 + first, mine


def _send(own: I32, acc: list[I32], starts: Sequence[int], size: int, store: Callable) -> None:
    """Calls store(to, sender, words) with each part but the own one."""
    for to, start in enumerate(starts):
        with ptx.when(~own.is_(to)):
            # Senders are numbered without the receiver.
            sender = own - ptx.select(ptx.constant(to) < own, 1, 0)
            store(to, sender, acc[start : start + size])


def _own(own: I32, acc: list[I32], starts: Sequence[int], size: int) -> list[I32]:
    """The part of this number."""
    return [
        functools.reduce(
            lambda kept, part: ptx.select(own.is_(part), acc[starts[part] + i], kept),
            range(1, len(starts)),
            acc[i],
        )
        for i in range(size)
    ]


def _add(sums: list[I32], source: I32) -> None:
    """To the sums, in place, what another has stored of them."""
    for v in range(0, len(sums), 4):
        for i, word in enumerate(ptx.load_shared(source, 512 * v, count=4)):
            sums[v + i] = sums[v + i] + word
