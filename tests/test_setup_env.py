"""scripts/setup_env.sh chooses a Python and a CUDA by what PATH, pyenv and the driver offer."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "setup_env.sh"
TOOLS = ("sh", "dirname", "grep", "ls", "sort", "tail", "tr", "xargs", "echo")


@pytest.fixture
def bin_dir(tmp_path) -> Path:
    """A PATH with the tools of the script and nothing else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool) or pytest.fail(f"no {tool} on PATH"))
    return folder


def fake(path: Path, answer: str, *, code: int = 0) -> None:
    """An executable that prints `answer`: as a Python it answers the script's probe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{answer}'\nexit {code}\n")
    path.chmod(0o755)


def dry_run(bin_dir: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the script with only `bin_dir` on PATH and its parent folder as home."""
    return subprocess.run(
        ["sh", str(SCRIPT), "--dry-run", str(bin_dir.parent / "venv"), "dev"],
        env={"PATH": str(bin_dir), "HOME": str(bin_dir.parent), **env},
        capture_output=True,
        text=True,
    )


def chosen(result: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """(what is installed, the Python) of a successful dry run."""
    assert result.returncode == 0, result.stderr
    words = result.stdout.split()
    return words[2], words[-1]


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a failed dry run."""
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    return line


def test_no_python(bin_dir):
    line = refusal(dry_run(bin_dir))
    assert "Python >= 3.12" in line and "none on PATH or under pyenv" in line
    assert "make PYTHON=" in line


def test_python_too_old(bin_dir):
    fake(bin_dir / "python3", "3.11")
    line = refusal(dry_run(bin_dir))
    assert f"found only {bin_dir}/python3 (3.11)" in line and "make PYTHON=" in line


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ("sys.version_info = (3, 12, 0)", None),
        ("sys.version_info = (3, 11, 9)", "3.11"),
        ("sys.modules['venv'] = None", "no venv module"),
        ("sys.modules['ensurepip'] = None", "no venv module"),
    ],
)
def test_probe_of_a_real_python(bin_dir, change, answer):
    """The probe itself, run by this interpreter made older or poorer."""
    python = bin_dir / "python3"
    fake(python, "")
    python.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; {change}; exec(sys.argv[1])" "$2"\n'
    )
    if answer:
        assert f"{python} ({answer})" in refusal(dry_run(bin_dir))
    else:
        assert chosen(dry_run(bin_dir))[1] == str(python)


def test_no_venv_module(bin_dir):
    fake(bin_dir / "python3.12", "no venv module")
    assert "apt install python3-venv" in refusal(dry_run(bin_dir))


def test_a_python_that_has_venv_is_preferred(bin_dir):
    fake(bin_dir / "python3.12", "no venv module")
    fake(bin_dir / "python3.13", "ok")
    assert chosen(dry_run(bin_dir))[1] == f"{bin_dir}/python3.13"


def test_tried_versions_come_first(bin_dir):
    for name in ("python3", "python3.14", "python3.12"):
        fake(bin_dir / name, "ok")
    assert chosen(dry_run(bin_dir))[1] == f"{bin_dir}/python3.12"


@pytest.mark.parametrize("set_root", [False, True])
def test_pyenv_behind_shims_that_fail(bin_dir, set_root):
    """Newest patch of the best minor version; no free-threaded builds or previews."""
    root = bin_dir.parent / ("elsewhere" if set_root else ".pyenv")
    for version in ("3.11.9", "3.12.9", "3.12.10", "3.12.11t", "3.13.0", "3.12-dev"):
        fake(root / "versions" / version / "bin" / "python", "ok")
    fake(bin_dir / "python3.12", "", code=127)
    fake(bin_dir / "python3", "3.11")
    env = {"PYENV_ROOT": str(root)} if set_root else {}
    assert chosen(dry_run(bin_dir, **env))[1] == f"{root}/versions/3.12.10/bin/python"


def test_named_python_is_the_only_candidate(bin_dir):
    fake(bin_dir / "python3.12", "ok")
    fake(bin_dir / "mine", "3.9")
    assert "mine (3.9)" in refusal(dry_run(bin_dir, PYTHON="mine"))
    assert "cannot run none" in refusal(dry_run(bin_dir, PYTHON="none"))


@pytest.mark.parametrize(
    ("driver", "target"),
    [
        ("580.65.06", ".[cuda13,dev]"),
        ("1000.1", ".[cuda13,dev]"),
        ("570.124.06", ".[cuda12,dev]"),
        ("580.65.06\n580.65.06", ".[cuda13,dev]"),  # one line per GPU
        ("No devices were found", ".[dev]"),
        (None, ".[dev]"),
    ],
)
def test_cuda_by_driver(bin_dir, driver, target):
    fake(bin_dir / "python3.12", "ok")
    if driver:
        fake(bin_dir / "nvidia-smi", driver)
    assert chosen(dry_run(bin_dir))[0] == target


def test_failing_nvidia_smi_means_cpu(bin_dir):
    fake(bin_dir / "python3.12", "ok")
    fake(bin_dir / "nvidia-smi", "580.65.06", code=9)
    assert chosen(dry_run(bin_dir))[0] == ".[dev]"


def test_broken_environment_is_named(bin_dir):
    fake(bin_dir.parent / "venv" / "bin" / "pip", "")
    fake(bin_dir.parent / "venv" / "bin" / "python", "3.11")
    line = refusal(dry_run(bin_dir))
    assert f"{bin_dir.parent}/venv" in line and "make clean" in line
