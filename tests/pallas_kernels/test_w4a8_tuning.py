"""Tuned configs: written, read, matched exactly, and refused where they cannot run."""

import dataclasses
import json
import types
import warnings

import jax
import pytest

from qserve_jax.benchmarks.operands import make_activation, make_weight
from qserve_jax.pallas_kernels import w4a8_matmul
from qserve_jax.pallas_kernels.w4a8_matmul import tuning
from qserve_jax.pallas_kernels.w4a8_matmul.mma_config import MmaConfig
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_config import Sm90Config

CHOSEN = MmaConfig(row_warps=1, row_tiles=2, k_warps=4, tokens=16, stages=3)
ENTRY = {
    **{"design": "mma", "m": 16, "n": 4096, "k": 4096, "per_group": True},
    **{"config": dataclasses.asdict(CHOSEN), "us": 5.1, "heuristic_us": 5.6},
}


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Writes the file of the device that JAX seems to have."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    device = types.SimpleNamespace(device_kind="NVIDIA X-1")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])

    def write(content):
        tuning.load_tuned.cache_clear()
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "nvidia_x_1.json").write_text(text)

    yield write
    tuning.load_tuned.cache_clear()


def test_exact_match_only(write):
    write({"entries": [ENTRY]})
    assert tuning.tuned_config("mma", 16, 4096, 4096, True) == CHOSEN
    assert tuning.tuned_config("mma", 9, 4096, 4096, True) == CHOSEN
    for other in [(8, 4096, 4096, True), (17, 4096, 4096, True), (16, 4160, 4096, True)]:
        assert tuning.tuned_config("mma", *other) is None
    assert tuning.tuned_config("mma", 16, 4096, 4224, True) is None
    assert tuning.tuned_config("mma", 16, 4096, 4096, False) is None
    assert tuning.tuned_config("other", 16, 4096, 4096, True) is None


def test_other_tiles_are_another_product(write):
    """Tiles of 16: 49 to 64 tokens are four, as the 64 that were measured; 48 are three."""
    write({"entries": [ENTRY | {"m": 64}]})
    found = [tuning.tuned_config("mma", m, 4096, 4096, True) for m in (64, 49, 48, 33)]
    assert found == [CHOSEN, CHOSEN, None, None]


def test_no_file_is_no_config(write):
    assert tuning.load_tuned("NVIDIA Y") == {}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"design": "huge_m"}, "design 'huge_m' is none of "),
        ({"m": 12}, "m=12, n=4096, k=4096 must be integers and m a power of two"),
        ({"m": "16"}, "m='16', n=4096"),
        ({"per_group": 1}, "per_group=1 must be true or false"),
        ({"config": {"row_warps": 2}}, "must have the fields row_warps, row_tiles, k_warps"),
        ({"config": ENTRY["config"] | {"k_warps": 8.0}}, "k_warps=8.0, which must be int"),
        ({"config": ENTRY["config"] | {"row_tiles": 5}}, "row_tiles must be at most 4"),
        ({"config": ENTRY["config"] | {"k_warps": 3}}, "must be 4, 8, 12 or 16"),
        ({"config": None}, "must have the fields"),
    ],
)
def test_a_bad_entry_is_refused_and_the_others_are_used(write, change, reason):
    write({"entries": [ENTRY | change, ENTRY | {"m": 8}]})
    with pytest.warns(
        UserWarning, match="nvidia_x_1.json: not used, entry 0, ValueError: "
    ) as found:
        assert tuning.tuned_config("mma", 16, 4096, 4096, True) is None
    (line,) = [str(warning.message) for warning in found]
    assert reason in line and line.endswith(": run scripts/tune_kernels.py again")
    assert "\n" not in line
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        assert tuning.tuned_config("mma", 8, 4096, 4096, True) == CHOSEN


def test_a_cluster_of_more_blocks_than_the_gpu_has_is_refused(write):
    """Such a config divides by nothing in the rules."""
    chosen = dataclasses.asdict(tuning.DESIGNS["wgmma"].choose(64, 4096, 4096, True))
    bad = ENTRY | {"design": "wgmma", "m": 64, "config": chosen | {"cluster": 200}}
    write({"entries": [bad, ENTRY]})
    with pytest.warns(UserWarning, match="nvidia_x_1.json: not used, entry 0, .*: run scripts/tun"):
        assert tuning.tuned_config("wgmma", 64, 4096, 4096, True) is None
    assert tuning.tuned_config("mma", 16, 4096, 4096, True) == CHOSEN


BROKEN = ["{", "[]", "3", '{"entries": 3}', '{"rows": []}', "[" * 100_000]


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: content[:9])
def test_a_broken_file_is_refused_whole(write, content):
    write(content)
    with pytest.warns(UserWarning, match="nvidia_x_1.json: not used, .*: run scripts/tune_kernels"):
        assert tuning.tuned_config("mma", 16, 4096, 4096, True) is None


@pytest.mark.parametrize("missing", ["design", "m", "config"])
def test_a_missing_field_is_refused(write, missing):
    write({"entries": [{name: value for name, value in ENTRY.items() if name != missing}]})
    with pytest.warns(UserWarning, match=f"entry 0, KeyError: '{missing}'"):
        assert tuning.load_tuned("NVIDIA X-1") == {}


def test_buckets():
    assert [tuning.bucket(m) for m in (1, 2, 3, 16, 17, 4096)] == [1, 2, 4, 16, 32, 4096]


@pytest.mark.parametrize("path", sorted(tuning.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_the_files_here_hold_good_entries(path):
    content = json.loads(path.read_text())
    assert path == tuning.tuned_path(content["device"])
    for entry in content["entries"]:
        tuning.entry_of(entry)
        assert entry["us"] < entry["heuristic_us"]
        m, n, k, per_group = (entry[name] for name in ("m", "n", "k", "per_group"))
        chosen = tuning.DESIGNS[entry["design"]].choose(m, n, k, per_group)
        kind = tuning.DESIGNS[entry["design"]].config
        assert tuning.config_from_dict(kind, entry["config"]) != chosen
    tuning.load_tuned.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(tuning.load_tuned(content["device"])) == len(content["entries"])


def test_every_design_is_generic(write):
    """What the files and the tuner need of a design: integers, a backend, rules that pass."""
    assert list(tuning.DESIGNS) == ["mma", "wgmma"]
    for design in tuning.DESIGNS.values():
        chosen = design.choose(64, 4096, 4096, True)
        design.check(chosen, 64, 4096, 4096, True)
        fields = json.loads(json.dumps(dataclasses.asdict(chosen)))
        assert tuning.config_from_dict(design.config, fields) == chosen


def test_a_field_newer_than_the_entry_has_its_default():
    config = Sm90Config(64, 2, 2, 3, 1)
    fields = dataclasses.asdict(config)
    del fields["k_blocks"]
    assert tuning.config_from_dict(Sm90Config, fields) == config
    for bad in (fields | {"new": 1}, {k: v for k, v in fields.items() if k != "stages"}):
        with pytest.raises(ValueError, match="must have the fields tokens, .*, lead, k_blocks"):
            tuning.config_from_dict(Sm90Config, bad)


@pytest.mark.parametrize("design, m", [("mma", 16), ("wgmma", 64)])
def test_the_kernels_take_the_tuned_config(design, m, monkeypatch):
    """One that is refused shows that it was taken; other sizes go on as before."""
    found = tuning.DESIGNS[design]
    wrong = dataclasses.replace(found.choose(m, 1024, 4096, True), stages=1)
    monkeypatch.setattr(tuning, "load_tuned", lambda _: {(design, m, 1024, 4096, True): wrong})

    def shape(m):
        x, w = make_activation(m, 4096), make_weight(2, 1024, 4096, 128)
        return w4a8_matmul(x, w, layer=0, backend=found.backend)

    with pytest.raises(ValueError, match="stages=1.* cannot run.*: stages must be at least 2"):
        jax.eval_shape(lambda: shape(m))
    assert jax.eval_shape(lambda: shape(m + 1)).shape == (m + 1, 1024)
