"""The info command, on any machine and for machines that are not here."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from qserve_jax import info
from qserve_jax.pallas_kernels import BACKENDS, backend

ROOT = Path(__file__).resolve().parent.parent


def run(*argv, **environment):
    return subprocess.run(
        [sys.executable, "-m", "qserve_jax.info", *argv],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )


def test_on_a_cpu(tmp_path):
    (tmp_path / "jit_f-0-cache").touch()
    (tmp_path / "jit_f-0-atime").touch()
    found = run("--output", "json", QSERVE_JAX_CACHE=str(tmp_path))
    assert (found.returncode, found.stderr) == (0, "")
    answer = json.loads(found.stdout)
    assert answer["versions"]["jax"] == jax.__version__
    assert answer["platform"] == "cpu" and answer["cuda"] is None
    assert answer["devices"][0]["compute_capability"] is None
    assert answer["compile_cache"] == {"folder": str(tmp_path), "programs": 1}
    elementwise = {"quantize_activation", "rms_norm_quantize", "silu_mul_quantize"}
    assert set(answer["backends"]) == {"w4a8_matmul", *elementwise, "paged_attention", "append_kv"}
    for op in answer["backends"].values():
        assert tuple(op) == BACKENDS
        assert op["reference"] == {"runs": True, "by_default": True, "reason": None}
    assert answer["backends"]["w4a8_matmul"]["mosaic_sm90"] == {
        "runs": False,
        "by_default": False,
        "reason": "mosaic_sm90 needs an NVIDIA Hopper GPU, but JAX computes on cpu",
    }
    assert answer["backends"]["append_kv"]["mosaic_sm90"]["reason"].startswith("mosaic_sm90 needs")


def test_text_and_wrong_flags():
    found = run()
    assert (found.returncode, found.stderr) == (0, "")
    lines = found.stdout.splitlines()
    assert lines[0].startswith("qserve_jax ") and f"jax {jax.__version__}" in lines[0]
    assert "cpu 0: cpu" in lines
    first = lines.index("w4a8_matmul:")
    assert lines[first + 1].startswith("  mosaic_sm90  no: mosaic_sm90 needs an NVIDIA Hopper GPU")
    assert lines[first + 3] == "  reference    yes"
    found = run("--output", "xml")
    assert found.returncode == 2 and found.stdout == "" and found.stderr.count("\n") == 1
    assert "invalid choice: 'xml'" in found.stderr


def test_platform_that_is_not_here():
    found = run(JAX_PLATFORMS="nonsense")
    assert found.returncode == 0, found.stderr
    assert "nonsense" in found.stdout and "compiled programs: " in found.stdout
    assert "w4a8_matmul" not in found.stdout


@pytest.fixture
def h200(monkeypatch, tmp_path):
    """A machine with a Hopper GPU."""
    device = types.SimpleNamespace(
        id=0,
        platform="gpu",
        device_kind="NVIDIA H200",
        compute_capability="9.0",
        memory_stats=lambda: {"bytes_limit": 3 * 2**30},
        client=types.SimpleNamespace(platform_version="PJRT C API\ncuda 13000"),
    )
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(info, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
        "GCC version:  gcc version 12.3.0\n"
    )


def test_on_a_hopper_gpu(h200):
    found = info.gather()
    assert (found["driver"], found["cuda"], found["advice"]) == ("580.95.05", "13.0", None)
    text = info.as_text(found).splitlines()
    assert "NVIDIA driver 580.95.05, CUDA 13.0" in text
    assert "gpu 0: NVIDIA H200, compute capability 9.0, 3.0 GiB for JAX" in text
    answer = found["backends"]["w4a8_matmul"]["mosaic_sm90"]
    assert answer["runs"] and answer["by_default"] == ("mosaic_sm90" in backend.usable(None))


def test_a_backend_that_runs_where_it_is_named():
    answer = {"runs": True, "by_default": False, "reason": None}
    assert info._answer(answer) == "yes, where it is named"


@pytest.mark.parametrize(
    "driver, versions, environment, cure",
    [
        ("580.95.05", {}, "", "pip install 'qserve_jax[cuda13]'"),
        ("550.54.15", {}, "", "pip install 'qserve_jax[cuda12]'"),
        ("550.54.15", {"jax-cuda13-plugin": "1"}, "", "CUDA 13 needs driver 580 or newer"),
        ("580.95.05", {"jax-cuda13-plugin": "1"}, "", "--debug shows"),
        ("580.95.05", {}, "cpu", "JAX_PLATFORMS=cpu says so, unset it"),
    ],
)
def test_advice_where_the_gpu_is_not_used(monkeypatch, driver, versions, environment, cure):
    monkeypatch.setenv("JAX_PLATFORMS", environment)
    line = info.advice(driver, "cpu", {"jax": "0.12", **versions})
    assert line is not None and cure in line and "\n" not in line
    assert info.advice(driver, "gpu", versions) is None
    assert info.advice(None, "cpu", versions) is None
