"""The examples for training repositories run as they stand, on four CPU devices."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p.stem for p in (ROOT / "examples").glob("*.py") if not p.name.startswith("_"))
PIPELINES = ["best_of_n"]  # of inference: test_best_of_n.py
NAMES = [name for name in FILES if name not in PIPELINES]


def test_there_is_one_for_each_kind():
    assert NAMES == ["flax_linen", "flax_nnx", "maxtext_like"] and set(PIPELINES) < set(FILES)


@pytest.mark.parametrize("name", NAMES)
def test_example(name, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    line = result.stdout.splitlines()[-1]
    found = re.search(
        r"loss ([\d.]+) in float, ([\d.]+) in W4A8; (\d+) kernels, codes (.*) in shar", line
    )
    assert found and line.endswith("restored from Orbax"), line
    exact, quantised = float(found[1]), float(found[2])
    assert exact < 0.9  # untrained: 1.4 and more
    assert 0 < abs(quantised - exact) < 0.1 * exact
    codes, shard = (eval(shape) for shape in re.findall(r"\(.*?\)", line))
    assert codes != shard  # sharded, not replicated
