"""What all commands share: exit codes and one-line messages."""

import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

from qserve_jax import _cli

ROOT = Path(__file__).resolve().parent.parent


def run_raising(error, argv=()):
    def body(argv):
        raise error

    return _cli.run("command", body, argv)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (_cli.UsageError("--x 3 is\n too large"), 2, "command: error: --x 3 is too large"),
        (ValueError("n=3 must be 1: use 1"), 1, "command: error: n=3 must be 1: use 1"),
        (NotImplementedError("no kernel"), 1, "command: error: no kernel"),
        (
            KeyError("name"),
            1,
            "command: error: KeyError: 'name' (--debug shows the traceback)",
        ),
        (
            RuntimeError("first line\nsecond line"),
            1,
            "command: error: RuntimeError: first line (--debug shows the traceback)",
        ),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nx"),
            1,
            "command: error: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.: lower "
            "--num-pages, --max-num-seqs or --max-model-len",
        ),
    ],
)
def test_errors_are_one_line(capsys, error, code, line):
    assert run_raising(error) == code
    assert capsys.readouterr() == ("", line + "\n")


def test_debug_raises(capsys):
    with pytest.raises(KeyError):
        run_raising(KeyError("name"), ["--debug"])
    assert run_raising(_cli.UsageError("x"), ["--debug"]) == 2


def test_interrupt_is_quiet(capsys):
    assert run_raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(capsys):
    before = warnings.showwarning

    def body(argv):
        warnings.warn("two\n  lines", UserWarning, stacklevel=1)

    assert _cli.run("command", body, []) == 0
    assert capsys.readouterr() == ("", "warning: two lines\n")
    assert warnings.showwarning is before


def test_closed_output_is_quiet():
    """`| head -1` closes the pipe long before a million lines are through."""
    code = "import sys; from qserve_jax import _cli\n"
    code += "def body(argv):\n    for line in range(10**6): print(line)\n"
    code += "sys.exit(_cli.run('command', body, []))"
    pipe = (
        f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1; echo ${{PIPESTATUS[0]}}"
    )
    result = subprocess.run(["bash", "-c", pipe], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("0\n141\n", "")


@pytest.fixture
def cache_config(monkeypatch):
    """Restores JAX's settings of the cache; without the variables that say where it is."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("QSERVE_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_cache_folder(cache_config, monkeypatch, tmp_path, capsys):
    def folder():
        _cli.enable_compilation_cache()
        return jax.config.jax_compilation_cache_dir

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    jax.config.update("jax_compilation_cache_dir", None)
    assert folder() == str(tmp_path / "home" / ".cache" / "qserve_jax")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == str(tmp_path / "xdg" / "qserve_jax")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    assert folder() == str(tmp_path / "jax")
    monkeypatch.setenv("QSERVE_JAX_CACHE", str(tmp_path / "own"))
    assert folder() == str(tmp_path / "own") and (tmp_path / "own").is_dir()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    assert capsys.readouterr() == ("", "")


def test_unwritable_cache_folder_only_warns(cache_config, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "cache")  # not writable for root either
    monkeypatch.setenv("QSERVE_JAX_CACHE", folder)
    _cli.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    out, err = capsys.readouterr()
    assert err.startswith(f"warning: compiled programs are not kept, {folder} is not writable (")
    assert err.count("\n") == 1 and "QSERVE_JAX_CACHE" in err and out == ""
