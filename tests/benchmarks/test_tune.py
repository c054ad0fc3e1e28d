"""The search for configs, and the file it leaves."""

import dataclasses
import json

import pytest

from qserve_jax.benchmarks import tune
from scripts import tune_kernels


@dataclasses.dataclass(frozen=True)
class Config:
    width: int
    depth: int
    wide: bool = False


def check(config):
    if not (1 <= config.width <= 8 and config.depth >= 1):
        raise ValueError("too wide")


def test_neighbours_differ_in_one_field():
    found = list(tune.neighbours(Config(4, 1)))
    assert set(found) == {
        *(Config(width, 1) for width in (2, 3, 5, 8)),
        *(Config(4, depth) for depth in (0, 2)),
        Config(4, 1, True),
    }


def test_climbs_to_the_best_and_measures_nothing_twice():
    seen = []

    def measure(configs):
        seen.extend(configs)
        return [abs(c.width - 7) + 10.0 - 2 * c.wide if c.depth == 1 else None for c in configs]

    best, us, first = tune.climb(Config(1, 1), check, measure, rounds=5)
    assert (best, us, first) == (Config(7, 1, True), 8.0, 16.0)
    assert len(seen) == len(set(seen)) and all(c.width <= 8 for c in seen)
    assert tune.climb(Config(1, 1), check, measure, rounds=0) == (Config(1, 1), 16.0, 16.0)


def test_less_than_a_percent_is_no_gain():
    times = {Config(4, 1): 10.0, Config(5, 1): 9.95, Config(8, 1): 9.89}
    best, us, _ = tune.climb(
        Config(4, 1), check, lambda configs: [times.get(c) for c in configs], rounds=1
    )
    assert (best, us) == (Config(8, 1), 9.89)
    del times[Config(8, 1)]
    best, us, _ = tune.climb(
        Config(4, 1), check, lambda configs: [times.get(c) for c in configs], rounds=1
    )
    assert (best, us) == (Config(4, 1), 10.0)


def test_a_start_that_fails_is_told():
    with pytest.raises(RuntimeError, match="the heuristic's choice, gives no time"):
        tune.climb(Config(4, 1), check, lambda configs: [None for _ in configs], rounds=1)


def test_entries_replace_their_like(tmp_path):
    path = tmp_path / "tuned" / "x.json"
    entry = {"design": "mma", "m": 16, "n": 64, "k": 128, "per_group": True, "us": 2.0}
    for change in ({}, {"m": 8}, {"us": 1.5}):
        tune_kernels.merge(path, entry | change)
    content = json.loads(path.read_text())
    assert [(e["m"], e["us"]) for e in content["entries"]] == [(8, 2.0), (16, 1.5)]
    assert set(content) == {"device", "jax", "commit", "entries"}
