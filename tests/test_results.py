"""Tables under docs/results say what the measured JSON beside them says."""

from pathlib import Path

import pytest

from qserve_jax import bench

RESULTS = Path(__file__).parents[1] / "docs" / "results"


@pytest.mark.parametrize("op, name", [("matmul", "w4a8_matmul"), ("attention", "paged_attention")])
def test_the_table_is_that_of_its_json(op, name, capsys):
    path = RESULTS / f"h200_{name}.json"
    argv = ["kernels", "--op", op, "--no-run", "--save", str(path), "--output", "table"]
    assert bench.main(argv) == 0
    assert capsys.readouterr().out == path.with_suffix(".md").read_text()
