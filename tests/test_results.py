"""Tables under docs/results say what the measured JSON beside them says."""

from pathlib import Path

from qserve_jax import bench

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def test_the_matmul_table_is_that_of_its_json(capsys):
    path = RESULTS / "h200_w4a8_matmul.json"
    assert bench.main(["kernels", "--no-run", "--save", str(path), "--output", "table"]) == 0
    assert capsys.readouterr().out == path.with_suffix(".md").read_text()
