"""The Hopper matmul on any host: it lowers for CUDA, and its configs fit."""

import contextlib
import dataclasses
import functools
import itertools
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qserve_jax.benchmarks.shapes import TOKENS
from qserve_jax.pallas_kernels import backend, prepare, quantized_matmul, w4a8_matmul
from qserve_jax.pallas_kernels.w4a8_matmul import (
    mosaic_mma,
    mosaic_sm90,
    sm90_config,
    sm90_rules,
    sm90_tiles,
    to_kernel_layout,
    tuning,
)
from qserve_jax.pallas_kernels.w4a8_matmul.problem import INT32_SUMS
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_config import Sm90Config
from qserve_jax.quantization.qtensor import is_quantized
from tests.pallas_kernels.w4a8_cases import (
    CUT,
    SHAPES,
    SMALL_SHAPES,
    every_kind,
    lower,
    lower_matmul,
    make_activation,
    make_weight,
    mosaic_module,
    operations,
    shape_only,
)

FAMILIES = [  # a matrix of each model, with an M: 64-token tiles, whole and odd, up to clusters
    *[(64, 28672, 4096, "bfloat16"), (128, 4096, 4096, "float16"), (257, 4096, 14336, "float32")],
    *[(33, 3584, 18944, "bfloat16"), (129, 4096, 11008, "float16"), (17, 3584, 18944, "float32")],
    *[(4096, 57344, 8192, "bfloat16"), (1000, 8192, 29568, "bfloat16"), (65, 64, 128, "float16")],
]


def name_of(per_group: bool, design: str = "wgmma") -> str:
    return f"w4a8_matmul_{'g128' if per_group else 'channel'}_{design}"


def check_lowered(per_group: bool, m: int, n: int, k: int, dtype: str) -> None:
    """One kernel, weights read in place, and x touched by nothing but reshapes.

    convert: of the bias to float32. Of float32 residuals XLA does the addition.
    """
    text = lower_matmul("mosaic_sm90", per_group, m, n, k, dtype)
    design = tuning.chosen_design(m, n, k, per_group)
    assert name_of(per_group, design) in text
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    added = {"add"} if dtype == "float32" and design == "wgmma" else set()
    assert operations(text) <= {"custom_call", "reshape", "convert"} | added


@every_kind
@pytest.mark.parametrize("m, n, k, dtype", FAMILIES)
def test_lowers_for_cuda_and_reads_everything_in_place(per_group, m, n, k, dtype):
    check_lowered(per_group, m, n, k, dtype)


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("n, k", SHAPES)
def test_every_shape_lowers_with_every_number_of_tokens(per_group, n, k):
    for m in (*TOKENS, 3, 17, 33, 257):
        check_lowered(per_group, m, n, k, "bfloat16")


@pytest.mark.parametrize("m, n, k", [(64, 4096, 4096), (257, 28672, 4096), (16, 4096, 4096)])
@pytest.mark.parametrize("name", ["mosaic_sm90", "mosaic_mma"])
def test_an_instance_lowers_within_two_seconds(name, m, n, k):
    lower_matmul(name, True, 1, 64, 128)  # what is imported and built once
    start = time.process_time()
    lower_matmul(name, True, m, n, k, "float16")
    assert time.process_time() - start < 2


@pytest.mark.parametrize("m", [1, 16, 32])
def test_few_tokens_go_to_mma_sync(m):
    arch, text = mosaic_module(lower_matmul("mosaic_sm90", True, m, 4096, 4096))
    assert arch == (8, 0) and name_of(True, "mma") in text and "wgmma" not in text


LONG = [(4096, 14336), (3584, 18944), (4096, 11008), (8192, 28672), (8192, 29568)]
"""Where K is long. The first three have few enough tiles of 64 channels for pairs of blocks."""


@every_kind
@pytest.mark.parametrize("n, k", [*SHAPES, (4096, 9984), (4096, 10112)])
def test_from_17_tokens_on_long_k_goes_to_wgmma(per_group, n, k):
    found = [tuning.chosen_design(m, n, k, per_group) for m in (1, 16, 17, 32, 33)]
    few = "wgmma" if (n, k) in [*LONG, (4096, 10112)] else "mma"
    assert found == ["mma"] * 2 + [few] * 2 + ["wgmma"]


@every_kind
@pytest.mark.parametrize("n, k", LONG)
def test_pairs_of_blocks_have_the_smallest_tile_that_takes_all_tokens(per_group, n, k):
    """Per channel up to 64 tokens, where they gain enough by the estimate."""
    pairs = (n, k) in LONG[:3]
    few, more = Sm90Config(32, 1, 4, 4, 1), None
    if pairs:
        few, more = Sm90Config(32, 1, 2, 8, 1, k_blocks=2), Sm90Config(64, 1, 4, 4, 1, k_blocks=2)
    most = Sm90Config(128, 1, 2, 5, 1, k_blocks=2) if pairs and per_group else None
    for least, tokens, expected in ((17, 32, few), (33, 64, more), (65, 128, most)):
        for m in (least, tokens):
            chosen = sm90_rules.choose_config(m, n, k, per_group)
            assert chosen == expected if expected else chosen.k_blocks == 1


@pytest.mark.parametrize("n, k", [*SHAPES, *SMALL_SHAPES])
def test_the_heuristic_fits_every_shape_and_keeps_the_sms_busy(n, k):
    sizes = {1, 3, 8, 8192, 8191, *TOKENS, *(m + 1 for m in TOKENS), *(2**i - 1 for i in range(13))}
    for m, per_group in itertools.product(sizes - {0}, (True, False)):
        chosen = sm90_rules.choose_config(m, n, k, per_group)
        sm90_config.check_config(chosen, m, n, per_group)
        assert chosen.tokens < max(2 * m, 33)  # no tile is mostly beyond the tokens
        clusters, tiles = sm90_rules.grid(chosen, m, n)
        assert clusters * chosen.cluster_blocks <= sm90_rules.SMS
        if n * m >= 2**19:
            rounds = sm90_tiles.cut(chosen, m, n).quarters / 4
            assert tiles * chosen.cluster_blocks >= 0.5 * rounds * sm90_rules.SMS


@pytest.mark.parametrize("per_group", [True, False])
def test_shared_memory_regions_do_not_overlap(per_group):
    chosen = Sm90Config(tokens=64, row_warpgroups=2, k_warpgroups=2, stages=3, cluster=1)
    one_tile = sm90_config.shared_memory(chosen, 64, 4096, per_group)
    assert one_tile.x_bytes == 64 * 128 and one_tile.x_bytes % 1024 == 0  # swizzled from there
    assert one_tile.weight_bytes == 8 * (1056 if per_group else 1024)
    assert one_tile.weights == 6 * one_tile.x_bytes
    slots_end = one_tile.weights + 6 * one_tile.weight_bytes
    partial_bytes = 1 * 128 * 64 * 4  # from one warpgroup of each two, 128 channels
    assert one_tile.partials == 0 and one_tile.columns == max(slots_end, partial_bytes)
    assert one_tile.column_bytes == (1 if per_group else 2) * 4 * 64
    assert one_tile.size - one_tile.columns == 4 * 2 * one_tile.column_bytes
    assert one_tile.barriers == 12
    several = sm90_config.shared_memory(chosen, 640, 4096, per_group)  # 320 tiles
    assert several.partials == slots_end
    assert several.columns == slots_end + partial_bytes
    for offset in (one_tile.weights, one_tile.weight_bytes, one_tile.columns, several.partials):
        assert offset % 16 == 0


GOOD = Sm90Config(tokens=64, row_warpgroups=2, k_warpgroups=2, stages=2, cluster=1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": 0}, "all fields but lead must be at least 1"),
        ({"tokens": 72}, "tokens must be one of"),
        ({"row_warpgroups": 4}, r"row_warpgroups \* k_warpgroups must be at most 6"),
        ({"row_warpgroups": 5, "k_warpgroups": 1}, "row_warpgroups must be at most 4"),
        ({"last": 5}, "last must be 1, 2, 3 or 4 quarters"),
        ({"last": 2, "tokens": 96}, "last needs tokens of 64, 128 or 256"),
        ({"last": 3, "row_warpgroups": 1}, "last = 3 needs 2 row_warpgroups and no cluster"),
        ({"last": 3, "cluster": 2}, "last = 3 needs 2 row_warpgroups and no cluster"),
        ({"lead": -1}, "all fields but lead must be at least 1"),
        ({"lead": 1}, "lead needs several row_warpgroups and one k_warpgroup"),
        ({"lead": 4, "k_warpgroups": 1, "stages": 4}, "lead must be below the 4 chunks in flight"),
        ({"tokens": 24}, "tokens must be a multiple of 8 k_warpgroups"),
        (
            {"tokens": 24, "k_warpgroups": 1, "stages": 4, "cluster": 2},
            "tokens must be a multiple of 8 cluster",
        ),
        ({"k_blocks": 0}, "all fields but lead must be at least 1"),
        ({"k_blocks": 200}, "k_blocks must be at most 4"),
        ({"k_blocks": 2, "cluster": 2}, "k_blocks needs whole tiles, and neither a cluster"),
        ({"k_blocks": 2, "last": 2}, "k_blocks needs whole tiles"),
        ({"k_blocks": 4, "tokens": 48}, "tokens must be 8 k_warpgroups k_blocks or more"),
        ({"cluster": 4}, "cluster must be 1 or 2"),
        ({"cluster": 200}, "cluster must be 1 or 2"),  # more blocks than SMs
        ({"stages": 1}, "stages must be at least 2"),
        ({"row_warpgroups": 1, "k_warpgroups": 3, "tokens": 48}, "k_warpgroups must be 1, 2 or 4"),
        ({"k_warpgroups": 1, "stages": 3}, "k_warpgroups .* stages must be at least 4"),
        ({"tokens": 256}, r"needs 172 registers of \d+"),
        (
            {"tokens": 224, "row_warpgroups": 3, "k_warpgroups": 1, "stages": 4},
            "needs 142 registers of 128",
        ),
        ({"stages": 12}, r"takes \d+ bytes of shared memory"),
    ],
)
def test_config_errors(change, message):
    sm90_config.check_config(GOOD, 64, 1024, True)
    with pytest.raises(ValueError, match=message):
        sm90_config.check_config(dataclasses.replace(GOOD, **change), 64, 1024, True)


@pytest.mark.parametrize("k_blocks, clusters", [(2, 66), (3, 44), (4, 33)])
def test_k_blocks_have_one_round(k_blocks, clusters):
    config = dataclasses.replace(GOOD, k_blocks=k_blocks)
    sm90_config.check_config(config, 64, 128 * clusters, True)
    assert sm90_rules.grid(config, 64, 128 * clusters) == (clusters, clusters)
    with pytest.raises(ValueError, match=f"tiles for one round of {clusters} clusters at most"):
        sm90_config.check_config(config, 64, 128 * clusters + 64, True)


@pytest.mark.parametrize("k_blocks, part", [(2, 16), (3, 16), (4, 8)])
def test_what_blocks_send_lies_behind_what_warpgroups_send(k_blocks, part):
    """part: tokens of the 32 that a warpgroup has added up; four of them, 64 channels each."""
    config = dataclasses.replace(GOOD, stages=2, k_blocks=k_blocks)
    memory = sm90_config.shared_memory(config, 64, 1024, False)
    assert (memory.partials, memory.incoming) == (0, 128 * 64 * 4)
    slots_end = 4 * (64 * 128 + 128 * 64)
    sent = 4 * (k_blocks - 1) * 64 * part * 4
    assert memory.columns == max(slots_end, memory.incoming + sent)
    assert memory.barriers == 8 + 4


def test_shared_memory_is_counted_as_mosaic_counts_it(monkeypatch):
    """A config that takes all of it lowers; one that takes less than a kilobyte more does not."""
    full, over = Sm90Config(96, 2, 1, 11, 1), Sm90Config(64, 3, 1, 11, 1)
    x, w = shape_only(True, 256, 6144, 4096)

    def run(x, w, config):
        return mosaic_sm90.matmul(x, w, layer=0, config=config)

    lower(functools.partial(run, config=full), x, w)
    with pytest.raises(ValueError, match="takes 233472 bytes of shared memory of 232448"):
        sm90_config.check_config(over, 256, 6144, True)
    monkeypatch.setattr(mosaic_sm90, "check_config", lambda *_: None)
    with pytest.raises(ValueError, match="smem_bytes=233472 > max_smem_bytes=232448"):
        lower(functools.partial(run, config=over), x, w)


# Finer last rounds, leads, blocks along K

FINER = [  # m, n, k, config
    (256, 28672, 4096, Sm90Config(256, 2, 1, 5, 1, last=3, lead=3)),
    (512, 28672, 4096, Sm90Config(256, 2, 1, 5, 1, last=2)),
    (4096, 28672, 4096, Sm90Config(256, 2, 1, 5, 2, last=1, lead=2)),
    (256, 6144, 4096, Sm90Config(64, 3, 2, 4, 1)),
    (200, 6144, 4096, Sm90Config(128, 2, 2, 4, 1, last=3)),
    (256, 4096, 4096, Sm90Config(128, 2, 2, 4, 1, k_blocks=2)),
    (100, 4608, 3584, Sm90Config(128, 2, 2, 3, 1, k_blocks=3)),
    (256, 2048, 4096, Sm90Config(256, 2, 1, 5, 1, k_blocks=4)),
]


@every_kind
@pytest.mark.parametrize("m, n, k, config", FINER)
def test_finer_last_rounds_leads_and_k_blocks_lower(per_group, m, n, k, config):
    def run(x, w):
        return mosaic_sm90.matmul(x, w, layer=0, config=config)

    assert sm90_tiles.cut(config, m, n).last == config.last
    text = lower(run, *shape_only(per_group, m, n, k))
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("n, k", [*SHAPES, *SMALL_SHAPES])
def test_a_finer_last_round_saves_time(n, k):
    """Of all cuts of the tile that is chosen; where nothing is saved, tiles are whole."""
    for m, per_group in itertools.product((*TOKENS, 33, 100, 200, 257, 3000), (True, False)):
        chosen = sm90_rules.choose_config(m, n, k, per_group)
        times = {}
        for last in (4, 3, 2, 1):
            config = dataclasses.replace(chosen, last=last)
            with contextlib.suppress(ValueError):
                sm90_config.check_config(config, m, n, per_group)
                times[last] = sm90_rules.estimate(config, m, n, k, per_group)
        assert times[chosen.last] <= min(times.values()) + 0.1  # microseconds
        assert chosen.last == 4 or times[chosen.last] < times[4]
        assert chosen.lead == 0 and chosen.k_blocks <= 2 and chosen.warpgroups <= 4


@every_kind
@pytest.mark.parametrize(
    "m, n, k, wanted",
    [
        (256, 4096, 4096, (128, 2, 2, 2)),
        (128, 4608, 3584, (128, 2, 2, 3)),
        (128, 3584, 18944, (128, 2, 2, 4)),
    ],
)
def test_other_configs_share_k_and_fill_the_sms(per_group, m, n, k, wanted):
    whole, *found = sm90_rules.other_configs(m, n, k, per_group)
    assert whole.k_blocks == 1
    assert len(found) == len(set(found)) < 40
    for config in found:
        sm90_config.check_config(config, m, n, per_group)
        clusters, tiles = sm90_rules.grid(config, m, n)
        assert clusters == tiles <= {2: 66, 3: 38, 4: 28}[config.k_blocks]
        assert 86 <= clusters * config.k_blocks <= sm90_rules.SMS
    fields = ("tokens", "row_warpgroups", "k_warpgroups", "k_blocks")
    assert wanted in [tuple(getattr(config, name) for name in fields) for config in found]


@pytest.mark.parametrize(
    "m, n, k, per_group, pairs",  # microseconds on an H200 with and without k_blocks
    [
        (64, 4096, 14336, True, (64, 4)),  # 11.5, 14.3
        (128, 4096, 14336, True, (128, 2)),  # 15.8, 16.9
        (128, 3584, 18944, True, (128, 2)),  # 19.2, 21.0
        (64, 4096, 4096, True, (64, 4)),  # 6.0, 6.3
        (64, 3584, 3584, True, None),  # 5.8, 5.7
        (128, 4096, 4096, True, None),  # 7.4, 7.4
        (256, 4096, 4096, True, None),  # 10.4, 9.7
        (128, 6144, 4096, True, None),  # 10.5, 9.9
        (256, 6144, 4096, True, None),  # 14.5, 13.5
        (32, 4096, 11008, False, (32, 2)),  # 8.6, 9.5
        (64, 4096, 14336, False, (64, 4)),  # 11.1, 11.7
        (128, 3584, 18944, False, None),  # 17.2, 16.6
    ],
)
def test_pairs_of_blocks_where_they_were_faster(m, n, k, per_group, pairs):
    chosen = sm90_rules.choose_config(m, n, k, per_group)
    found = (chosen.tokens, chosen.k_warpgroups) if chosen.k_blocks == 2 else None
    assert found == pairs
    assert found is None or chosen.row_warpgroups == 1


MEASURED = [  # microseconds on an H200, of those that the rules were fitted to
    (64, 4096, 4096, True, Sm90Config(32, 1, 4, 4, 1), 6.3),
    (64, 28672, 4096, False, Sm90Config(64, 4, 1, 9, 1), 19.6),
    (128, 4608, 3584, True, Sm90Config(128, 1, 4, 2, 1), 8.9),
    (128, 28672, 4096, True, Sm90Config(128, 2, 2, 3, 1, last=3), 28.4),
    (256, 4608, 3584, False, Sm90Config(96, 2, 2, 5, 1), 10.7),
    (256, 28672, 4096, True, Sm90Config(256, 2, 1, 5, 1, last=3), 44.2),
    (256, 4096, 14336, True, Sm90Config(128, 1, 4, 2, 1), 24.2),
    (1024, 12288, 4096, True, Sm90Config(256, 2, 1, 5, 1), 68.0),
]
PAIRED = [  # the same with two blocks along K; those of 32 tokens were measured afterwards
    (32, 4096, 14336, True, Sm90Config(32, 1, 2, 8, 1, k_blocks=2), 11.33),
    (32, 4096, 11008, True, Sm90Config(32, 1, 2, 8, 1, k_blocks=2), 9.63),
    (64, 4096, 14336, True, Sm90Config(64, 1, 4, 4, 1, k_blocks=2), 11.5),
    (64, 4096, 4096, True, Sm90Config(64, 1, 4, 4, 1, k_blocks=2), 6.0),
    (128, 4096, 14336, True, Sm90Config(128, 1, 4, 2, 1, k_blocks=2), 16.4),
    (128, 4096, 14336, True, Sm90Config(128, 1, 2, 5, 1, k_blocks=2), 15.8),
    (128, 3584, 3584, False, Sm90Config(128, 1, 2, 5, 1, k_blocks=2), 6.6),
    (256, 3584, 18944, True, Sm90Config(256, 1, 2, 3, 1, k_blocks=2), 29.1),
    (256, 4096, 14336, False, Sm90Config(256, 1, 2, 3, 1, k_blocks=2), 23.5),
]


@pytest.mark.parametrize("m, n, k, per_group, config, us", MEASURED)
def test_estimates(m, n, k, per_group, config, us):
    assert sm90_rules.estimate(config, m, n, k, per_group) == pytest.approx(us, rel=0.12)


@pytest.mark.parametrize("m, n, k, per_group, config, us", PAIRED)
def test_estimates_of_pairs(m, n, k, per_group, config, us):
    assert sm90_rules.estimate(config, m, n, k, per_group) == pytest.approx(us, rel=0.05)


def test_every_kind_of_cut_runs_on_a_gpu():
    """CUT, of the GPU tests, has all that the rules choose, but for numbers of rounds."""

    def kind(m, n, k, per_group):
        chosen = sm90_rules.choose_config(m, n, k, per_group)
        found = sm90_tiles.cut(chosen, m, n)
        return dataclasses.replace(chosen, stages=0), per_group, found.rounds > 0

    sizes = [(m, *shape, kinds) for shape in SHAPES for m in TOKENS for kinds in (True, False)]
    chosen = {kind(*size) for size in sizes if tuning.chosen_design(*size) == "wgmma"}
    assert chosen == {kind(*size, per_group) for size in CUT for per_group in (True, False)}


@pytest.mark.parametrize(
    "m, n, k, last",
    [
        *[(256, 28672, 4096, 3), (512, 28672, 4096, 2), (1024, 28672, 4096, 4)],
        *[(4096, 28672, 4096, 1), (256, 6144, 4096, 3), (512, 6144, 4096, 3)],
        *[(1024, 6144, 4096, 2), (128, 6144, 4096, 4), (256, 4096, 14336, 4)],
        (4096, 4096, 4096, 4),
    ],
)
def test_the_heuristic_chooses_what_was_faster_on_an_h200(m, n, k, last):
    assert [sm90_rules.choose_config(m, n, k, g).last for g in (True, False)] == [last] * 2


@pytest.mark.parametrize(
    "last, m, n, rounds, parts",
    [
        *[(3, 256, 28672, 1, 124), (2, 512, 28672, 3, 104), (1, 256, 37888, 2, 128)],
        *[(3, 512, 6144, 0, 128), (2, 1024, 6144, 1, 120)],
        (3, 300, 28672, 3, 72),  # two token tiles: 52 tiles are 26 beside each other, 8 x 3 + 2
    ],
)
def test_a_finer_last_round_fills_the_sms(last, m, n, rounds, parts):
    found = sm90_tiles.cut(Sm90Config(256, 2, 1, 5, 1, last), m, n)
    assert (found.last, found.rounds, found.parts) == (last, rounds, parts)
    assert found.clusters == (132 if rounds else parts)
    whole = sm90_tiles.cut(Sm90Config(256, 2, 1, 5, 1), m, n)
    assert whole.rounds == rounds + 1 and whole.parts == 0


@pytest.mark.parametrize("last, m, n", [(2, 256, 28672), (3, 1024, 28672), (3, 1280, 28672)])
def test_what_cannot_be_cut_stays_whole(last, m, n):
    """Too many parts for the SMs, or three tiles beside each other of other tokens."""
    whole = sm90_tiles.cut(Sm90Config(256, 2, 1, 5, 1), m, n)
    assert sm90_tiles.cut(Sm90Config(256, 2, 1, 5, 1, last), m, n) == whole


def test_a_config_that_cannot_run_is_refused_by_the_matmul(rng):
    w = to_kernel_layout(make_weight(True, rng, (64, 256)))
    with pytest.raises(ValueError, match="stages=1, cluster=1, .* cannot run: stages must"):
        mosaic_sm90.matmul(
            make_activation(rng, 2, 256), w, config=dataclasses.replace(GOOD, stages=1)
        )


def test_refusals(rng):
    w = make_weight(True, rng, (64, 256))
    packed = to_kernel_layout(w)
    x = make_activation(rng, 65, 256)
    with pytest.raises(NotImplementedError, match="layout 'canonical' is not 'mma_w4': use prep"):
        w4a8_matmul(x, w, backend="mosaic_sm90")
    with pytest.raises(NotImplementedError, match="x has no tokens, but needs at least 1"):
        w4a8_matmul(make_activation(rng, 0, 256), packed, backend="mosaic_sm90")
    with pytest.raises(NotImplementedError, match="out_dtype float8_e4m3fn is none of"):
        w4a8_matmul(x, packed, out_dtype=jnp.float8_e4m3fn, backend="mosaic_sm90")
    with pytest.raises(NotImplementedError, match="residual float64 is none of"):
        residual: Any = jax.ShapeDtypeStruct((65, 64), np.float64)
        mosaic_sm90.gather("mosaic_sm90", x, packed, None, residual, None, "float16")


@pytest.mark.parametrize("name", ["mosaic_sm90", "mosaic_mma"])
def test_operands_that_do_not_fit_are_refused_and_casts_are_undone(name, rng):
    x, w = make_activation(rng, 64, 256), to_kernel_layout(make_weight(False, rng, (64, 256)))
    for change, message in (
        ({"channel_scale": w.channel_scale[:, None]}, r"channel_scale has shape \(64, 1\) but"),
        ({"scaled_zero": w.scaled_zero[:32]}, r"scaled_zero has shape \(32,\) but"),
        ({"codes": jnp.zeros((1, 2, 4, 264), jnp.int32)}, r"need \[..., 4, 256\]"),
    ):
        with pytest.raises(ValueError, match=message):
            w4a8_matmul(x, dataclasses.replace(w, **change), backend=name)
    for field in ("scale", "code_sum"):
        with pytest.raises(ValueError, match=rf"x {field} has shape \(1, 64\) but"):
            bad = dataclasses.replace(x, **{field: getattr(x, field)[None]})
            w4a8_matmul(bad, w, backend=name)
    with pytest.raises(NotImplementedError, match="k=65664 may leave int32, at most 65536"):
        shapes = shape_only(True, 64, 64, 65536 + 128)
        jax.eval_shape(lambda x, w: w4a8_matmul(x, w, layer=0, backend=name), *shapes)
    halves = jax.tree.map(lambda a: a if a.dtype == jnp.int32 else a.astype(jnp.bfloat16), w)
    text = lower(lambda x, w: w4a8_matmul(x, w, backend=name), x, halves)
    assert "tensor<64xbf16>) -> tensor<64xf32>" in text


# Transformations


@pytest.mark.parametrize("name", ["mosaic_sm90", "mosaic_mma"])
def test_has_no_derivative_and_says_so(name, rng):
    x, w = make_activation(rng, 64, 256), to_kernel_layout(make_weight(True, rng, (64, 256)))

    def loss(scale):
        return w4a8_matmul(dataclasses.replace(x, scale=scale), w, backend=name).sum()

    with pytest.raises(TypeError, match="g128_.* has no derivative: differentiate the"):
        jax.jit(jax.grad(loss)).trace(x.scale)


@pytest.mark.parametrize("name", ["mosaic_sm90", "mosaic_mma"])
def test_vmap_is_a_loop_over_one_kernel(name):
    x, w = shape_only(True, 64, 256, 256)
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), x)

    def run(x, w):
        return jax.vmap(lambda x: w4a8_matmul(x, w, layer=1, backend=name))(x)

    assert jax.eval_shape(run, batch, w).shape == (3, 64, 256)
    text = lower(run, batch, w)
    assert "while" in operations(text)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1


def sharded(x, w, backend: str, check_vma: bool) -> dict[str, Any]:
    """The product of two devices, each of which has half the channels, or half the features: then
    the sums are added. What a per-channel epilogue takes of x is of the features at hand."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    nothing = jax.tree.map(lambda _: P(), w)
    per_channel = {
        field: P(None, "d") for field in ("channel_scale", "scaled_zero") if hasattr(w, field)
    }
    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)

    def over_n(x, w):
        return w4a8_matmul(x, w, layer=0, out_dtype=jnp.float32, backend=backend)

    def over_k(x, w):
        own = dataclasses.replace(x, code_sum=jnp.sum(x.codes, -1, dtype=jnp.int32))
        y = w4a8_matmul(own, w, layer=0, out_dtype=jnp.float32, backend=backend)
        return jax.lax.psum(y, "d")

    channels = dataclasses.replace(nothing, codes=P(None, "d"), **per_channel)
    features = dataclasses.replace(nothing, codes=P(None, None, "d"))
    if hasattr(w, "group_scale"):  # canonical: a kernel's scales lie beside its codes
        groups = ("group_scale", "group_offset")
        channels = dataclasses.replace(channels, **{name: P(None, "d") for name in groups})
        features = dataclasses.replace(features, **{name: P(None, None, "d") for name in groups})
    whole = jax.tree.map(lambda _: P(), x)
    columns = dataclasses.replace(whole, codes=P(None, "d"))
    return {
        "n": mapped(over_n, in_specs=(whole, channels), out_specs=P(None, "d")),
        "k": mapped(over_k, in_specs=(columns, features), out_specs=P()),
    }


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["mosaic_sm90", "mosaic_mma"])
@every_kind
def test_a_kernel_of_a_shard_lowers(name, per_group, check_vma):
    x, w = shape_only(per_group, 64, 256, 512, layers=1)
    words, modules = 264 if per_group else 256, {}
    for axis, run in sharded(x, w, name, check_vma).items():
        assert jax.eval_shape(run, x, w).shape == (64, 256)
        modules[axis] = mosaic_module(lower(run, x, w))[1]
    assert f"memref<1x2x4x4x{words}xi32" in modules["n"]  # N/64, K/128
    assert f"memref<1x4x2x4x{words}xi32" in modules["k"]


@every_kind
def test_products_of_shards_are_the_product(per_group, rng):
    w = make_weight(per_group, rng, (1, 128, 512))
    x = make_activation(rng, 16, 512)
    expected = w4a8_matmul(x, w, layer=0, out_dtype=jnp.float32, backend="reference")
    runs = sharded(x, w, "reference", True)
    assert np.array_equal(runs["n"](x, w), expected)
    error = jnp.linalg.norm(runs["k"](x, w) - expected) / jnp.linalg.norm(expected)
    assert error < 1e-6  # the sums of two shards are rounded before they are added


# Dispatch


@every_kind
def test_the_reference_reads_the_packed_layout(per_group, rng):
    """What default dispatch does where no kernel can run."""
    w = make_weight(per_group, rng, (3, 64, 256))
    x = make_activation(rng, 5, 256)
    packed = to_kernel_layout(w)
    for layer in (0, 2):
        expected = quantized_matmul(x, w, layer=layer, backend="reference")
        np.testing.assert_array_equal(
            quantized_matmul(x, packed, layer=layer, backend="reference"), expected
        )
    with pytest.raises(ValueError, match="layer=3 but the weight codes have layers 0..2"):
        quantized_matmul(x, packed, layer=3)
    with pytest.raises(ValueError, match="x has k=256 but weight has K=128"):
        quantized_matmul(x, to_kernel_layout(make_weight(per_group, rng, (64, 128))))


def test_prepare_packs_what_fits_for_a_named_backend(rng):
    layers = {
        "o_proj": {"kernel": make_weight(True, rng, (2, 64, 128))},
        "down_proj": {"kernel": make_weight(True, rng, (2, 32, 128))},
        "attn_norm": {"scale": jnp.ones((2, 128))},
    }
    canonical = prepare.prepare_for_backend({"layers": layers}, "reference")
    assert canonical["layers"]["o_proj"]["kernel"].layout == "canonical"
    packed = prepare.prepare_for_backend({"layers": layers}, "mosaic_sm90")["layers"]
    expected = to_kernel_layout(layers["o_proj"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, packed["o_proj"]["kernel"], expected)
    assert packed["down_proj"]["kernel"].layout == "canonical"
    assert all(not is_quantized(leaf) for leaf in packed["attn_norm"].values())


@pytest.fixture
def device(monkeypatch):
    """A GPU whose compute capability a test sets."""
    found = types.SimpleNamespace(compute_capability="9.0", device_kind="NVIDIA X", platform="gpu")
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [found])
    return found


@pytest.mark.parametrize(
    "capability, m, design",
    [
        *[("9.0", 64, "wgmma"), ("9.0", 16, "mma"), ("8.0", 64, "mma"), ("8.9", 64, "mma")],
        *[("10.0", 64, "mma"), ("7.5", 64, None)],
    ],
)
def test_the_device_decides(device, capability, m, design):
    device.compute_capability = capability
    x, w = shape_only(True, m, 256, 256)
    text = lower(lambda x, w: w4a8_matmul(x, w, layer=0), x, w)
    assert ("mosaic_gpu" in text) == (design is not None)
    if design:
        assert name_of(True, design) in text


def test_why_it_cannot_run_here(device, monkeypatch):
    assert backend.unavailable("mosaic_sm90") is None
    assert backend.usable(None) == backend.BACKENDS
    device.compute_capability = "8.0"
    assert "needs compute capability 9.0 (Hopper), this GPU has 8.0" in str(
        backend.unavailable("mosaic_sm90")
    )
    device.platform = "cpu"
    assert "JAX computes on cpu" in str(backend.unavailable("mosaic_sm90"))
    assert backend.usable(None) == ("reference",)
    assert backend.usable("mosaic_sm90") == ("mosaic_sm90",)  # named: to lower it for elsewhere
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "mosaic_sm90")
    assert backend.usable(None) == ("mosaic_sm90",)


def test_the_default_device_decides(device, monkeypatch):
    """Of several GPUs, and where a GPU is there but not used."""
    other = types.SimpleNamespace(compute_capability="8.0", device_kind="Y", platform="gpu")
    cpu = types.SimpleNamespace(device_kind="cpu", platform="cpu")
    for chosen, kind, reason in (
        (None, "NVIDIA X", None),
        (other, "Y", "needs compute capability 9.0 (Hopper), this GPU has 8.0"),
        (cpu, "cpu", "but JAX computes on cpu"),
    ):
        monkeypatch.setattr(backend.jax, "config", types.SimpleNamespace(jax_default_device=chosen))
        assert backend.default_device().device_kind == kind
        found = backend.unavailable("mosaic_sm90")
        assert found is None if reason is None else reason in str(found)


def test_sums_are_int32():
    x, w = shape_only(True, 64, 256, 256)
    run = jax.eval_shape(
        lambda x, w: w4a8_matmul(x, w, layer=0, out_dtype=INT32_SUMS, backend="mosaic_sm90"), x, w
    )
    assert run.dtype == jnp.int32


@pytest.mark.parametrize("name", ["mosaic_sm90", "mosaic_mma"])
def test_a_named_backend_says_in_one_line_that_this_is_no_gpu(name, rng):
    """Eagerly and in a jit, which is lowered long after the call."""
    x, w = make_activation(rng, 64, 256), to_kernel_layout(make_weight(True, rng, (64, 256)))

    def run(x, w):
        return w4a8_matmul(x, w, backend=name)

    message = r"^w4a8_matmul_g128_\w+ is a kernel for NVIDIA GPUs, but is compiled for cpu: use "
    for call in (run, jax.jit(run)):
        with pytest.raises(ValueError, match=message) as found:
            call(x, w)
        assert "\n" not in str(found.value)


def test_refusals_name_the_backend_that_was_named(rng):
    """Up to 32 tokens mosaic_sm90 calls mosaic_mma."""
    x, w = make_activation(rng, 2, 256), to_kernel_layout(make_weight(True, rng, (64, 256)))
    for name in ("mosaic_sm90", "mosaic_mma"):
        with pytest.raises(
            NotImplementedError, match=f"^{name}: out_dtype float8_e4m3fn is none of"
        ):
            w4a8_matmul(x, w, out_dtype=jnp.float8_e4m3fn, backend=name)


@pytest.mark.parametrize("n, k", [(64, 192), (96, 256)])
def test_a_weight_that_cannot_be_packed_is_told_so(n, k, rng):
    x, w = make_activation(rng, 2, k), make_weight(False, rng, (n, k))
    message = f"^mosaic_sm90: a weight of N={n}, K={k} cannot be packed: N must be a multiple of 64"
    with pytest.raises(NotImplementedError, match=message):
        w4a8_matmul(x, w, backend="mosaic_sm90")
    np.testing.assert_array_equal(
        quantized_matmul(x, w), quantized_matmul(x, w, backend="reference")
    )


@pytest.mark.parametrize("name, module", [("mosaic_sm90", mosaic_sm90), ("mosaic_mma", mosaic_mma)])
def test_a_call_outside_of_jit_is_traced_once(name, module, monkeypatch, rng):
    x, w = make_activation(rng, 7, 384), to_kernel_layout(make_weight(True, rng, (2, 64, 384)))
    traced = []

    def matmul(x, w, *, layer, out_dtype, **_):
        traced.append(layer)
        return quantized_matmul(x, w, layer=layer, out_dtype=out_dtype, backend="reference")

    monkeypatch.setattr(module, "matmul", matmul)
    for layer in (0, 1, jnp.int32(1)):
        found = w4a8_matmul(x, w, layer=layer, backend=name)
        expected = w4a8_matmul(x, w, layer=layer, backend="reference")
        np.testing.assert_array_equal(found, expected)
    assert len(traced) <= 2  # of a Python integer, and of an array
