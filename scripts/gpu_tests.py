"""Run the tests that speak of arithmetic, models and the engine on a GPU, and keep what they say.

`make test` runs them on a CPU; what must hold on every device is shown on a GPU by the same tests.
Writes docs/results/gpu_tests_<device>.json: where it ran, and each test file's counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

import jax

from qserve_jax.benchmarks.provenance import ROOT, provenance

FILES = (
    "tests/quantization/test_numerics.py",
    "tests/quantization/test_numerics_gpu.py",
    "tests/benchmarks",
    "tests/pallas_kernels",
    "tests/models/test_golden.py",
    "tests/runtime/test_engine.py",
)
OUTCOMES = ("failure", "error", "skipped")


def run_tests(report: Path, processes: int) -> int:
    """pytest's exit code; `gpu or not slow` keeps JAX on the GPU (tests/conftest.py)."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu or not slow", *FILES]
    return subprocess.call([*command, "-n", str(processes), f"--junitxml={report}"], cwd=ROOT)


def counts(report: Path) -> dict[str, dict[str, int]]:
    """Passed, failed and skipped tests of each file."""
    files: dict[str, Counter[str]] = defaultdict(Counter)
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((name for name in OUTCOMES if case.find(name) is not None), "passed")
        files[case.get("classname", "?")][outcome] += 1
    return {name: dict(files[name]) for name in sorted(files)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--output", type=Path, help="default: docs/results/gpu_tests_<device>.json")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("JAX finds no GPU: install the cuda12 or cuda13 extra on a machine with one")
    found = provenance()
    name = found["device"].lower().replace(" ", "_")
    output = args.output or ROOT / "docs" / "results" / f"gpu_tests_{name}.json"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = run_tests(report, args.processes)
        content = {**found, "exit_code": code, "files": counts(report)}
    output.write_text(json.dumps(content, indent=2) + "\n")
    for file, outcome in content["files"].items():
        print(f"{file}: {outcome}")
    return code


if __name__ == "__main__":
    sys.exit(main())
