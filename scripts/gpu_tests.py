"""Run the tests of kernels, arithmetic, models and the engine on a GPU, and keep what they say.

    python scripts/gpu_tests.py [TESTS ...]

`make test` runs them on a CPU; what must hold on every device is shown on a GPU by the same tests.
Writes docs/results/gpu_tests_<device>.json after each of the two sets: each test file's counts, the
commit, and hashes of the kernels' code. Files that did not run keep theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from qserve_jax.benchmarks.provenance import OPS, ROOT, kernels, provenance

EVERYWHERE = (
    "tests/quantization/test_numerics.py",
    "tests/models/test_golden.py",
    "tests/runtime/test_engine.py",
    "tests/runtime/test_launches.py",
)
"""What holds on every device, and so must hold on this one."""
NO_SEARCH = "--xla_gpu_enable_triton_gemm=false"
"""For those: XLA's search for its own fastest matmuls would take most of the time."""
SETS = (("gpu", ("tests",), ""), ("gpu or not slow", EVERYWHERE, NO_SEARCH))
"""(marker expression, tests, flags of XLA). One with `gpu` in it keeps JAX on the GPU."""
OUTCOMES = ("failure", "error", "skipped")


def sets_of(named: Sequence[str]) -> list[tuple[str, Sequence[str], str]]:
    """SETS, or the named tests in the set that they belong to."""
    if not named:
        return list(SETS)
    parts = (
        [test for test in named if test not in EVERYWHERE],
        [test for test in named if test in EVERYWHERE],
    )
    return [(e, part, flags) for (e, _, flags), part in zip(SETS, parts, strict=True) if part]


def run_tests(expression: str, tests: Sequence[str], flags: str, processes: int, xml: Path) -> int:
    """pytest's exit code; what it says of each test goes to xml."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", expression, *tests, "-n", str(processes)]
    command += ["--durations=12", f"--junitxml={xml}"]
    all_flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    more = {"XLA_FLAGS": all_flags} if all_flags else {}  # a blank is a file's name to XLA
    return subprocess.call(command, cwd=ROOT, env=os.environ | more)


def counts(folder: Path) -> dict[str, dict[str, float]]:
    """Passed, failed and skipped tests of each file, and the most of what tests record."""
    files: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(int))
    for report in folder.glob("*.xml"):
        for case in ElementTree.parse(report).iter("testcase"):
            outcome = next((name for name in OUTCOMES if case.find(name) is not None), "passed")
            found = files[case.get("classname", "?")]
            found[outcome] += 1
            for told in case.iter("property"):
                name = f"most {told.get('name')}"
                found[name] = max(found[name], float(told.get("value", 0)))
    return {name: dict(files[name]) for name in sorted(files)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", help="files (default: all)")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--output", type=Path, help="default: docs/results/gpu_tests_<device>.json")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("JAX finds no GPU: install the cuda12 or cuda13 extra on a machine with one")
    found = provenance()
    name = found["device"].lower().replace(" ", "_")
    output = args.output or ROOT / "docs" / "results" / f"gpu_tests_{name}.json"
    known = json.loads(output.read_text())["files"] if output.exists() else {}
    ran: dict[str, dict[str, Any]] = {}
    codes = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (expression, tests, flags) in enumerate(sets_of(args.tests)):
            xml = Path(folder) / f"{number}.xml"
            codes.append(run_tests(expression, tests, flags, args.processes, xml))
            here = {"commit": found["commit"], "kernels": {op: kernels(op) for op in OPS}}
            ran = {name: {**count, **here} for name, count in counts(Path(folder)).items()}
            # After each set: the next may be interrupted.
            content = {**found, "files": dict(sorted({**known, **ran}.items()))}
            output.write_text(json.dumps(content, indent=2) + "\n")
    for file, outcome in ran.items():
        print(f"{file}: {outcome}")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
