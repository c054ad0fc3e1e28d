"""The sweep with a clock that is told the time: what is kept, rejected, resumed and written."""

import csv
import io
import json
import re

import jax
import jax.numpy as jnp
import pytest

from qserve_jax.benchmarks import baselines, ceilings, matmul, plot, provenance, report
from qserve_jax.pallas_kernels import w4a8_matmul
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_rules import choose_config

MEMORY = dict.fromkeys(ceilings.MEMORY, 4000.0) | {"hbm_read_max_gbps": 4400.0}
CEILINGS = MEMORY | {"bf16_tops": 800.0, "int8_tops": 1600.0}
HERE = {"kernels": provenance.kernels("matmul"), "commit": "c" * 40}
N, K = 64, 256
ONCE = N * K * (0.5 + 2 / 128) / 1e3  # microseconds of reading the weight at 1 GB/s


def make_report(**more):
    start = {"device": "a GPU", "jax": "1", "commit": "c" * 40, "versions": {"jax": "1"}}
    start["protocol"] = "a stopwatch"
    return start | {"ceilings": CEILINGS | {"commit": "c" * 40}, "baselines": [], "rows": []} | more


class FakeClock:
    """Makes one call, so that it must run, and says that 20 took `us`."""

    def __init__(self, us):
        self.us, self.calls = us, 0

    def __call__(self, call, wait=jax.block_until_ready):
        wait(call(0))
        self.calls += 1
        return [self.us] * 19 + [1e9]


@pytest.fixture(autouse=True)
def no_torch(monkeypatch, small_cache):
    monkeypatch.setattr(baselines, "why_no_torch", lambda: "torch is not installed")


def run(clock, start, tokens=(1, 3), group_sizes=(128, -1), backends=("reference",), **more):
    saved, said = [], []
    sweep = matmul.Sweep(((N, K),), tokens, group_sizes, backends, **more)
    bench = matmul.Bench(clock, start, lambda r: saved.append(json.dumps(r)), said.append)
    matmul.run_sweep(sweep, bench)
    return bench, saved, said


def test_every_row_has_the_promised_columns():
    clock = FakeClock(10.0)
    bench, saved, said = run(clock, make_report())
    rows = bench.report["rows"]
    assert [(r["group_size"], r["m"]) for r in rows] == [(128, 1), (128, 3), (-1, 1), (-1, 3)]
    for row in rows:
        assert tuple(row) == report.ROW
        assert (row["us"], row["bf16_us"], row["int8_us"], row["fp8_us"]) == (10.0,) * 4
        assert row["tops"] == pytest.approx(2 * row["m"] * N * K / 10 / 1e6)
        assert 1e-4 < row["rel_err"] < 2.5e-3  # of the rounding to bf16
    assert rows[0]["gbps"] == pytest.approx(N * K * (0.5 + 2 / 128) / 10 / 1e3)
    assert rows[2]["gbps"] == pytest.approx(N * K * 0.5 / 10 / 1e3)
    assert clock.calls == 2 * 3 + 4  # baselines once, not per group size
    assert len(saved) == 2 + 4 and not bench.problems
    assert any("fp8 is XLA's alone: torch is not installed" in line for line in said)


def test_only_ours():
    clock = FakeClock(10.0)
    bench, _, _ = run(clock, make_report(), tokens=(1,), others=False)
    assert [(r["us"], r["bf16_us"], r["fp8_us"]) for r in bench.report["rows"]] == [
        (10.0, None, None)
    ] * 2
    assert clock.calls == 2 and not bench.report["baselines"]


def test_what_a_report_has_is_not_measured_again():
    first, _, _ = run(FakeClock(10.0), make_report(), tokens=(1,))
    clock = FakeClock(20.0)
    bench, _, _ = run(clock, json.loads(json.dumps(first.report)))
    assert [(r["group_size"], r["m"], r["us"]) for r in bench.report["rows"]] == [
        *[(128, 1, 10.0), (-1, 1, 10.0), (128, 3, 20.0), (-1, 3, 20.0)]
    ]
    assert clock.calls == 3 + 2
    clock = FakeClock(30.0)
    run(clock, bench.report)
    assert clock.calls == 0


@pytest.mark.parametrize("kernels", ["of old", None])
def test_rows_of_other_kernels_are_measured_again_and_baselines_stay(kernels):
    first, _, _ = run(FakeClock(10.0), make_report(), tokens=(1,))
    old = json.loads(json.dumps(first.report)) | {"commit": "d" * 40}
    assert [row["commit"] for row in (*old["rows"], *old["baselines"])] == ["c" * 40] * 3
    old["rows"][1]["kernels"] = kernels
    clock = FakeClock(20.0)
    bench, _, _ = run(clock, old, tokens=(1,))
    assert clock.calls == 1
    found = [(r["group_size"], r["us"], r["bf16_us"], r["commit"]) for r in bench.report["rows"]]
    assert found == [(128, 10.0, 10.0, "c" * 40), (-1, 20.0, 10.0, "d" * 40)]
    assert bench.report["baselines"] == first.report["baselines"]


def test_a_row_of_another_config_is_measured_again(monkeypatch):
    first, _, _ = run(FakeClock(10.0), make_report(), group_sizes=(128,))
    other = {"tokens": 64}
    monkeypatch.setattr(matmul, "_config", lambda row: other if row["m"] == 3 else None)
    bench, _, _ = run(FakeClock(20.0), first.report, group_sizes=(128,))
    found = [(r["m"], r["us"], r["config"]) for r in bench.report["rows"]]
    assert found == [(1, 10.0, None), (3, 20.0, other)]


def test_configs_are_those_of_the_kernels():
    row = {"backend": "mosaic_sm90", "group_size": 128, "m": 64, "n": 4096, "k": 4096}
    assert matmul._config(row) == vars(choose_config(64, 4096, 4096, True))
    few = matmul._config(row | {"m": 32})
    assert few == matmul._config(row | {"m": 32, "backend": "mosaic_mma"})
    assert few and "row_warps" in few
    long = matmul._config(row | {"m": 32, "k": 14336})
    assert long and long == vars(choose_config(32, 4096, 14336, True))
    assert long["tokens"] == 32 and long["k_blocks"] == 2


def test_a_row_of_other_kernels_does_not_outlive_a_failure():
    first, _, _ = run(FakeClock(10.0), make_report(), tokens=(1,), group_sizes=(128,))
    first.report["rows"][0]["kernels"] = "of old"
    bench, _, _ = run(FakeClock(1e-9), first.report, tokens=(1,), group_sizes=(128,))
    assert bench.report["rows"] == [] and "rejected as a measuring error" in bench.problems[0]


def test_ceilings_that_lack_a_way_are_measured_again(monkeypatch):
    monkeypatch.setattr(matmul, "measure_ceilings", lambda _: dict(CEILINGS))
    old = {"hbm_copy_gbps": 1.0, "hbm_read_gbps": 1.0, "bf16_tops": 1.0, "int8_tops": 1.0}
    bench, saved, _ = run(FakeClock(10.0), make_report(ceilings=old), (1,), (128,), ())
    assert bench.report["ceilings"] == CEILINGS | {"commit": "c" * 40}
    assert json.loads(saved[0])["ceilings"] == bench.report["ceilings"]


def test_the_kernels_are_the_contents_of_their_files(tmp_path):
    """As in a package, where pallas_kernels is a link or a folder; nothing else counts."""

    def write(name, text):
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).write_text(text)
        return provenance.kernels("matmul", tmp_path / "package")

    for name in ("numerics", "packing"):
        (tmp_path / "package" / "quantization").mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / "quantization" / f"{name}.py").write_text(name)
    (tmp_path / "package" / "pallas_kernels" / "w4a8_matmul").mkdir(parents=True)
    found = [write("quantization/qtensor.py", "a"), write("pallas_kernels/w4a8_matmul/b.py", "b")]
    found += [write("pallas_kernels/w4a8_matmul/b.py", "c")]
    found += [write("quantization/qtensor.py", "b"), write("pallas_kernels/intrinsics/e.py", "")]
    assert len(set(found)) == 5 and all(re.fullmatch("[0-9a-f]{12}", name) for name in found)
    for other in ("quantization/params.py", "pallas_kernels/w4a8_matmul/b.pyc"):
        assert write(other, "d") == found[-1]
    for other in ("paged_attention/f.py", "w4a8_matmul/any_rules.py", "w4a8_matmul/tuning.py"):
        assert write(f"pallas_kernels/{other}", "d") == found[-1]
    for aside in ("api.py", "reference.py"):
        assert write(f"pallas_kernels/w4a8_matmul/{aside}", "d") == found[-1]
    (tmp_path / "package" / "pallas_kernels").rename(tmp_path / "kernels")
    (tmp_path / "package" / "pallas_kernels").symlink_to("../kernels")
    assert provenance.kernels("matmul", tmp_path / "package") == found[-1]


def test_the_kernels_are_their_code_alone(tmp_path):
    """No comment, documentation or blank line; every name, number, string and indent."""

    def code(text):
        path = tmp_path / "a.py"
        path.write_text(text)
        return provenance._code(path)

    plain = code("A = 1\ndef f(x):\n    if x:\n        return 's'\n    return 2\n")
    told = (
        '"""Of a\nfile."""\n# x\n\nA = 1  # y\n"""An A."""\n\ndef f(x):\n    """F."""\n    if x:\n'
    )
    assert code(told + "        return 's'\n    # z\n    return 2\n") == plain
    for other in (
        "A = 2\ndef f(x):\n    if x:\n        return 's'\n    return 2\n",
        "A = 1\ndef f(x):\n    if x:\n        return 't'\n    return 2\n",
        "A = 1\ndef f(x):\n    if x:\n        return 's'\n        return 2\n",
    ):
        assert code(other) != plain


def test_a_row_above_the_memory_ceiling_is_rejected():
    """The ceiling is the better of copy and read; a baseline above it is null."""
    bench, _, _ = run(FakeClock(ONCE / 4401), make_report(), tokens=(1,), group_sizes=(128,))
    assert bench.report["rows"] == []
    assert bench.report["baselines"][0]["int8_us"] is None
    assert "reference 64x256 group size 128 m=1: 4401 GB/s is above the 4400" in bench.problems[0]
    bench, _, _ = run(FakeClock(ONCE / 4399), make_report(), tokens=(1,), group_sizes=(128,))
    (row,) = bench.report["rows"]
    assert row["gbps"] == pytest.approx(4399)
    assert row["bf16_us"] is row["int8_us"] is row["fp8_us"] is None  # they read more in that time


def test_a_wrong_output_is_no_row(monkeypatch):
    def one_off(x, w, **kwargs):
        y = w4a8_matmul(x, w, **kwargs)
        one_ulp = y[0, 5] * 2.0**-7
        return y.at[0, 5].add(one_ulp) if y.dtype == jnp.bfloat16 else y

    monkeypatch.setattr(matmul, "w4a8_matmul", one_off)
    bench, _, _ = run(FakeClock(10.0), make_report(), tokens=(3,), group_sizes=(128,))
    assert bench.report["rows"] == []
    assert "1 of 192 outputs are not the reference's" in bench.problems[0]


def test_a_backend_that_cannot_is_told_and_one_that_fails_is_a_problem(monkeypatch):
    def refuse(x, w, **kwargs):
        if kwargs["out_dtype"] == jnp.bfloat16:
            raise [NotImplementedError("too many tokens"), KeyError("x")][x.codes.shape[0] == 3]
        return w4a8_matmul(x, w, **kwargs)

    monkeypatch.setattr(matmul, "w4a8_matmul", refuse)
    bench, _, said = run(FakeClock(10.0), make_report(), group_sizes=(128,))
    place = "reference 64x256 group size 128"
    assert f"{place} m=1: NotImplementedError: too many tokens" in said
    assert bench.problems == [f"{place} m=3: KeyError: 'x'"]


@pytest.mark.parametrize(
    "lacking, what",
    [
        ("make_weight", "w4a8 64x256 group size 128"),
        ("make_plain_weights", "bf16, int8 and "),
    ],
)
def test_weights_that_do_not_fit_are_a_problem_and_the_rest_goes_on(monkeypatch, lacking, what):
    def too_many(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more")

    monkeypatch.setattr(matmul, lacking, too_many)
    bench, _, _ = run(FakeClock(10.0), make_report(), tokens=(1,))
    ours, others = len(bench.report["rows"]), len(bench.report["baselines"])
    assert (ours, others) == ((0, 1) if lacking == "make_weight" else (2, 0))
    assert bench.problems[0].startswith(what)
    assert bench.problems[0].endswith(": RuntimeError: RESOURCE_EXHAUSTED: Out of memory")


def test_baselines_that_failed_are_measured_again(monkeypatch):
    """With all columns that can be measured here; others stay."""
    with monkeypatch.context() as broken:
        broken.setitem(baselines.XLA, "int8_us", lambda *_: 1 // 0)
        first, _, _ = run(FakeClock(10.0), make_report(), tokens=(1,), group_sizes=(128,))
    assert [line.split(": ")[:2] for line in first.problems] == [
        [f"int8 {N}x{K} m=1", "ZeroDivisionError"]
    ]
    first.report["baselines"][0]["fp8_torch_row_us"] = 5.0
    bench, _, _ = run(FakeClock(20.0), first.report, tokens=(1,), group_sizes=(128,))
    (found,) = bench.report["baselines"]
    assert (found["bf16_us"], found["int8_us"], found["fp8_torch_row_us"]) == (20.0, 20.0, 5.0)
    assert [row["int8_us"] for row in bench.report["rows"]] == [20.0]
    clock = FakeClock(30.0)
    run(clock, bench.report, tokens=(1,), group_sizes=(128,))
    assert clock.calls == 0
    monkeypatch.setattr(baselines, "why_no_torch", lambda: None)  # and the torch that came fails
    run(clock, bench.report, tokens=(1,), group_sizes=(128,))
    assert clock.calls == len(baselines.XLA)


def test_ceilings_are_rates_of_the_work_done():
    def clock(call):
        results.append(call(0))
        return [2.0]

    results, words = [], 2**14
    found = ceilings.measure_ceilings(clock, words, size=64)
    assert found == {  # bytes read and written, in 2 us
        "hbm_copy_gbps": 4 * words / 2e3,
        "hbm_merge_gbps": pytest.approx(4 * words * 17 / 16 / 2e3),
        "hbm_read_max_gbps": (4 * words + 4) / 2e3,
        "hbm_read_rows_gbps": (4 * words + 4 * 2) / 2e3,
        "hbm_read_bf16_gbps": (4 * words + 4 * 4) / 2e3,
        "bf16_tops": pytest.approx(64**3 / 1e6),
        "int8_tops": pytest.approx(64**3 / 1e6),
    }


def test_memory_is_as_fast_as_the_fastest_way():
    assert ceilings.memory_ceiling(CEILINGS | {"commit": "c" * 40}) == 4400
    assert ceilings.memory_ceiling({"hbm_copy_gbps": 4277.0, "hbm_read_gbps": 4224.0}) == 4277


def test_the_ceiling_that_binds():
    row = {"gbps": 2200.0, "tops": 400.0}
    assert ceilings.roofline_share(row, CEILINGS) == (0.5, "memory")
    assert ceilings.roofline_share(row | {"tops": 1200.0}, CEILINGS) == (0.75, "int8")


ROW = dict(
    zip(
        report.ROW,
        (
            *("mosaic_sm90", -1, 16, 4096, 128, 5.0, 10.0, None, 7.5, 2200.0, 40.0, 1.66e-3, None),
            *HERE.values(),
        ),
        strict=True,
    )
)
BASELINE = {
    **{"m": 16, "n": 4096, "k": 128, "bf16_us": 10.0, "int8_us": None},
    **{"fp8_xla_us": 9.0, "fp8_torch_tensor_us": 7.5, "fp8_torch_row_us": None},
}


def test_formats():
    """Commits are those of the rows."""
    found = make_report(rows=[ROW], baselines=[BASELINE])
    last = report.FORMATS["table"](found).splitlines()[-1]
    first, second, *_ = report.FORMATS["table"](found | {"commit": "e" * 40}).splitlines()
    assert first == "a GPU, jax 1, commit cccccccccccc"
    assert "HBM copy 4000, merge 4000, read max 4400, read rows 4000, read bf16 4000 GB/s" in second
    assert last == (
        "| mosaic_sm90 | channel | 4096x128 | 16 | 5.0 | 2200 | 40 | 50% memory | 10.0 (2.00x) | - "
        "| 7.5 (1.50x) torch_tensor | 1.7e-03 |"
    )
    (line,) = csv.DictReader(io.StringIO(report.FORMATS["csv"](found)))
    assert (line["us"], line["int8_us"], line["fp8"]) == ("5.0", "", "torch_tensor")
    assert (line["share"], line["ceiling"]) == ("0.5", "memory")
    assert json.loads(report.FORMATS["json"](found)) == found


def test_files(tmp_path):
    path = tmp_path / "r.json"
    assert report.read_report(path) is None
    found = make_report(rows=[ROW])
    report.write_report(path, found)
    assert report.read_report(path) == found and list(tmp_path.iterdir()) == [path]
    old = {name: value for name, value in ROW.items() if name not in HERE}
    report.write_report(path, found | {"rows": [old], "baselines": [BASELINE]})
    read = report.read_report(path)
    assert read and read["rows"] == [old | HERE | {"kernels": None}]
    assert read["baselines"] == [BASELINE | {"commit": "c" * 40}]
    names = json.dumps(list(found))
    for text in ("{", "[]", "{}", "3", names, json.dumps(names), "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="r.json holds no results of this command: name ano"):
            report.read_report(path)


def test_another_commit_goes_on_and_other_origins_do_not_mix():
    here = make_report(commit="d" * 40, versions={"jax": "1", "python": "4"})
    found = report.continued(make_report(rows=[ROW], versions={}), here)
    assert found == here | {"rows": [ROW]}
    for name in ("device", "jax", "protocol"):
        with pytest.raises(ValueError, match=f"the saved results are of {name} 'other', this is "):
            report.continued(make_report(**{name: "other"}), here)


def test_an_empty_report_says_where_it_is_from():
    here = report.empty_report()
    assert set(here) == set(make_report())
    assert here["jax"] == jax.__version__ and len(here["commit"]) >= 40
    assert set(here["versions"]) >= {"jax", "jaxlib", "python"}


def test_roofline_curves(tmp_path):
    rows = [ROW | {"m": m, "tops": tops} for m, tops in ((64, 1200.0), (16, 40.0))]
    found = make_report(rows=rows)
    assert plot.roofline_curves(found) == {
        "mosaic_sm90, per channel": {"4096 x 128": [(16, 0.5), (64, 0.75)]}
    }
    with pytest.raises(ValueError, match="there is no row to plot"):
        plot.plot_roofline(make_report(), tmp_path / "p.png")
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    plot.plot_roofline(found, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
