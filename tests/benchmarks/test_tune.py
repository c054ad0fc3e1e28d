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


def test_others_are_tried_first_and_the_best_is_where_the_climb_begins():
    times = {Config(1, 1): 9.0, Config(1, 5): 8.0, Config(1, 6): 7.0, Config(1, 9): 12.0}

    def measure(configs):
        return [times.pop(c, None) for c in configs]  # each at most once

    others = [Config(1, 5), Config(1, 9)]
    found = tune.climb(Config(1, 1), check, measure, 2, others)
    assert found == (Config(1, 6), 7.0, 9.0)


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


CONFIG = {"row_warps": 1, "row_tiles": 2, "k_warps": 1, "tokens": 16, "stages": 3}
ENTRY = {"design": "mma", "m": 16, "n": 64, "k": 512, "per_group": True, "us": 2.0}
ENTRY |= {"config": CONFIG | {"k_warps": 4}}


def test_entries_replace_their_like(tmp_path):
    path = tmp_path / "tuned" / "x.json"
    for change in ({}, {"m": 8}, {"us": 1.5}):
        tune_kernels.merge(path, ENTRY | change)
    content = json.loads(path.read_text())
    assert [(e["m"], e["us"]) for e in content["entries"]] == [(8, 2.0), (16, 1.5)]
    assert set(content) == {"device", "jax", "commit", "entries"}
    assert all(set(e) == set(ENTRY) for e in content["entries"])
    assert list(path.parent.iterdir()) == [path]


def test_entries_of_another_run_say_so(tmp_path):
    path = tmp_path / "x.json"
    tune_kernels.merge(path, ENTRY)
    then = json.loads(path.read_text()) | {"commit": "of old", "jax": "0"}
    path.write_text(json.dumps(then))
    for m in (8, 32):
        tune_kernels.merge(path, ENTRY | {"m": m})
    content = json.loads(path.read_text())
    assert content["commit"] != "of old"
    found = [(e["m"], e.get("jax"), e.get("commit")) for e in content["entries"]]
    assert found == [(8, None, None), (16, "0", "of old"), (32, None, None)]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"device": "cpu"', "x.json is broken, JSONDecodeError"),
        ("[]", "x.json is broken, TypeError"),
        ('{"device": "cpu", "jax": "1", "commit": "c"}', r"broken, KeyError\('entries'\)"),
        (
            '{"device": "cpu", "jax": "1", "commit": "c", "entries": [{}]}',
            r"broken, KeyError\('design'\): mend it or name another --output",
        ),
        (
            '{"device": "B", "jax": "1", "commit": "c", "entries": []}',
            "x.json is of B, this is cpu: name another --output",
        ),
    ],
)
def test_a_file_that_is_broken_or_of_another_device_is_left_alone(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        tune_kernels.merge(path, ENTRY)
    assert path.read_text() == content


def test_what_the_rules_now_do_as_well_is_taken_away(tmp_path):
    path, beaten = tmp_path / "x.json", {k: v for k, v in ENTRY.items() if k != "config"}
    tune_kernels.merge(path, beaten)
    assert not path.exists()
    tune_kernels.merge(path, ENTRY)
    tune_kernels.merge(path, ENTRY | {"m": 32})
    before = path.read_text()
    tune_kernels.merge(path, beaten | {"m": 64})
    assert path.read_text() == before
    tune_kernels.merge(path, beaten)
    assert [e["m"] for e in json.loads(path.read_text())["entries"]] == [32]


@pytest.mark.parametrize("us, kept", [(99.5, False), (98.5, True)])
def test_a_config_is_kept_only_if_it_is_enough_faster(us, kept, monkeypatch, small_cache):
    monkeypatch.setattr(
        tune_kernels, "make_measure", lambda *_: lambda configs: [100.0] * len(configs)
    )
    monkeypatch.setattr(tune_kernels, "climb", lambda start, *_: (start, us, 100.0))
    entry = tune_kernels.tune("mma", 16, 64, 512, 128, 1)
    assert entry is not None and entry["m"] == 16 and ("config" in entry) == kept


def test_a_case_without_a_time_does_not_end_the_run(capsys, monkeypatch, small_cache):
    monkeypatch.setattr(
        tune_kernels, "make_measure", lambda *_: lambda configs: [None] * len(configs)
    )
    assert tune_kernels.tune("mma", 16, 64, 512, 128, 1) is None
    assert "the heuristic's choice, gives no time" in capsys.readouterr().out
