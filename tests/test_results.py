"""Tables under docs/results, and the documents' prose, say what the measured JSON says."""

import json
from pathlib import Path

import pytest

from qserve_jax import bench

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results"


@pytest.mark.parametrize("op, name", [("matmul", "w4a8_matmul"), ("attention", "paged_attention")])
def test_the_table_is_that_of_its_json(op, name, capsys):
    path = RESULTS / f"h200_{name}.json"
    argv = ["kernels", "--op", op, "--no-run", "--save", str(path), "--output", "table"]
    assert bench.main(argv) == 0
    assert capsys.readouterr().out == path.with_suffix(".md").read_text()


def prose(path: Path) -> str:
    """The text with single spaces, and hyphens for minus signs."""
    return " ".join(path.read_text().replace("−", "-").split())


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_what_options_of_quantize_are_worth():
    told = prose(DOCS / "quantization.md")
    rows = [row for row in result("quantize_options")["rows"] if "as it is" not in row["option"]]
    for row in rows:
        change, error = row["loss_change"], row["loss_change_standard_error"]
        assert f"{change:+.4f} ± {error:.4f}" in told, row
    assert len(rows) == 8


def test_what_the_readme_says_of_qoq():
    told, tables = prose(DOCS.parent / "README.md"), result("qoq_outliers")["tables"]
    trained, injected = (
        {row["name"]: row for row in tables[x]["rows"]} for x in ("trained", "all")
    )
    qoq = trained["qoq-g128"]
    change = f"{qoq['loss_change']:.4f} ± {qoq['loss_change_standard_error']:.4f}"
    percent = qoq["perplexity_change_percent"], trained["RTN g128"]["perplexity_change_percent"]
    assert f"costs the demo model {percent[0]:.2f} % of perplexity ({change} nats" in told
    assert f"round-to-nearest {percent[1]:.2f} %" in told
    assert f"it costs {injected['qoq-g128']['perplexity_change_percent']:.1f} %" in told


def test_what_an_8b_model_takes():
    """And that it is within 900 s and 24 GiB, 60 s for round to nearest, 15 s for loading."""
    told = prose(DOCS / "quantization.md")
    qoq, rtn, load = map(result, ("h200_quantize_8b", "h200_quantize_8b_rtn", "h200_load_8b"))
    for name, runs in (("qoq-g128", qoq), ("rtn", rtn)):
        gib = max(run["peak_bytes"] for run in runs["runs"]) / 2**30
        assert runs["runs"][-1]["finished"] and runs["settings"]["recipe"] == name and gib <= 24
        assert f"`{name}` takes {runs['total_seconds']:.0f} s and {gib:.1f} GiB" in told
    assert qoq["total_seconds"] <= 900 and rtn["total_seconds"] <= 60
    seconds = load["load_seconds"], load["layout_seconds"]
    assert f"loads in {seconds[0]:.1f} s from a warm disk cache" in told and sum(seconds) <= 15
    assert f"kernels' layout {seconds[1]:.1f} s later" in told
