"""Which tokens the wgmma kernel's epilogue stores of a tile, whole or cut finer."""

import contextlib
import types
from typing import Any

import pytest

from qserve_jax.pallas_kernels.w4a8_matmul import sm90_epilogue, sm90_thread
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_tiles import Sm90Config
from tests.pallas_kernels.test_w4a8_ring import Word

N = 17984  # 281 groups of 64 channels


def stored(config, m, part, k_group, warp, monkeypatch):
    """[first token, its sums] of each eight tokens that a warp stores of its part."""
    conditions, found = [], []

    @contextlib.contextmanager
    def when(condition):
        conditions.append(bool(condition))
        yield
        conditions.pop()

    def store(self, p, t, me, columns, first, j, sums):
        if all(conditions):
            found.append((int(self.token + first + 8 * j), sums))

    nothing = types.SimpleNamespace(
        when=when, wait_all_copies=lambda: None, sync_block=lambda *_: None
    )
    monkeypatch.setattr(sm90_epilogue, "ptx", nothing)
    monkeypatch.setattr(sm90_epilogue.Epilogue, "_store", store)
    flags: Any = {"per_group": True, "bias": False, "residual": None, "out_dtype": "bfloat16"}
    p = sm90_thread.WgmmaProblem(m, N, 128, None, **flags, config=config)
    epilogue = sm90_epilogue.Epilogue.__new__(sm90_epilogue.Epilogue)
    epilogue.row_tile = Word(64 * part.group + 16 * warp)
    epilogue.token, epilogue.quarters, epilogue.columns = Word(part.token), part.quarters, Word(0)
    t: Any = types.SimpleNamespace(warp=Word(4))
    first = k_group * (config.tokens // config.k_warpgroups)
    sums = list(range(config.tokens // 2 // config.k_warpgroups))
    epilogue.store(p, t, types.SimpleNamespace(c=Word(0)), Word(first), sums)  # pyright: ignore
    return found


@pytest.mark.parametrize("k_warpgroups", [1, 2, 4])
@pytest.mark.parametrize("quarters", [1, 2, 4])
def test_a_part_stores_its_tokens_and_no_more(k_warpgroups, quarters, monkeypatch):
    """Eight tokens of a warp are four registers a thread; each k_warpgroup has a share of them."""
    config = Sm90Config(64, 1, k_warpgroups, 4, 1, last=1 if quarters == 1 else 2)
    part = sm90_thread.Part(token=128, group=280, offset=0, quarters=quarters)
    found = []
    for k_group in range(k_warpgroups):
        for token, sums in stored(config, 64, part, k_group, 3, monkeypatch):
            register = (token - 128) // 2 - k_group * 32 // k_warpgroups
            assert sums == list(range(register, register + 4))
            found.append(token)
    assert found == list(range(128, 128 + 16 * quarters, 8))


@pytest.mark.parametrize("last", [2, 4])
def test_channels_beyond_n_are_not_stored(last, monkeypatch):
    config = Sm90Config(64, 1, 1, 4, 1, last=last)
    part = sm90_thread.Part(token=0, group=281, offset=0, quarters=4)
    assert not stored(config, 64, part, 0, 0, monkeypatch)
    assert len(stored(config, 64, part._replace(group=280), 0, 0, monkeypatch)) == 8


def test_a_tile_of_few_tokens_is_stored_whole(monkeypatch):
    """24 tokens have no quarters of eights, and need none."""
    part = sm90_thread.Part(token=24, group=0, offset=0, quarters=4)
    found = stored(Sm90Config(24, 1, 1, 4, 1), 48, part, 0, 0, monkeypatch)
    assert [token for token, _ in found] == [24, 32, 40]
