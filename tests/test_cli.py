"""What all commands share: exit codes and one-line messages."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

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
            ModuleNotFoundError("No module named 'jax'", name="jax"),
            1,
            f"command: error: jax is not installed for {sys.executable}: use the Python that "
            "qserve_jax is installed for, as .venv/bin/python of `make demo`",
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
            "--num-pages, --max-num-seqs or --max-model-len; where enough is free, but in pieces, "
            "set XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async",
        ),
    ],
)
def test_errors_are_one_line(capsys, error, code, line):
    assert run_raising(error) == code
    assert capsys.readouterr() == ("", line + "\n")


@pytest.mark.parametrize("command", ["generate --prompt x", "chat", "info"])
def test_a_python_without_packages_is_one_line(command):
    """-S: none of them is found."""
    words = [sys.executable, "-S", "-m", *f"qserve_jax.{command}".split()]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(words, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert found.returncode == 1 and not found.stdout
    assert re.fullmatch(r"qserve_jax\.\w+: error: \w+ is not installed for .*\n", found.stderr)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (None, "0.9")),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, (None, ".5")),
        ({"XLA_CLIENT_MEM_FRACTION": ".5"}, (".5", None)),  # both together are an error to JAX
    ],
)
def test_a_command_takes_most_of_the_gpu(monkeypatch, given, expected):
    seen = []
    for name in _cli.MEMORY_VARIABLES:
        monkeypatch.setenv(name, "x")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    body = lambda _: seen.append(tuple(map(os.environ.get, _cli.MEMORY_VARIABLES)))  # noqa: E731
    assert _cli.run("command", body, []) == 0 and seen == [expected]


def test_a_library_leaves_the_gpu_to_others():
    code = (
        "import os, qserve_jax; from qserve_jax import LLM, _cli;"
        "print([os.environ.get(name) for name in _cli.MEMORY_VARIABLES])"
    )
    env = {k: v for k, v in os.environ.items() if k not in _cli.MEMORY_VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "[None, None]\n", done.stderr


def test_errors_name_flags():
    parser = _cli.Parser(prog="p")
    parser.add_argument("--top-p")
    parser.add_argument("--num-samples", dest="n")
    parser.add_argument("--stop")
    for message, expected in [
        ("top_p=2.0 must be in (0, 1]", "--top-p 2.0 must be in (0, 1]"),
        (
            "n=3 is many: lower n=3, or top_p",
            "--num-samples 3 is many: lower --num-samples 3, or --top-p",
        ),
        ("stop='n=1' needs n to stop", "--stop 'n=1' needs n to stop"),
        ("/data/top_p/a.n=1 is no --top-p", "/data/top_p/a.n=1 is no --top-p"),
    ]:
        with pytest.raises(KeyError if "KeyError" in message else ValueError) as caught:
            with parser.errors_name_flags():
                raise ValueError(message)
        assert str(caught.value) == expected


def test_long_values_are_cut(capsys):
    def body(argv):
        parser = _cli.Parser(prog="p")
        parser.add_argument("--n", type=int)
        parser.parse_args(argv)

    assert _cli.run("command", body, ["--n", "9" * 5000]) == 2
    line = capsys.readouterr().err
    assert line.startswith("command: error: argument --n: invalid int value: '999")
    assert line.endswith("999' (see --help)\n") and len(line) < 600


def test_debug_raises(capsys):
    with pytest.raises(KeyError):
        run_raising(KeyError("name"), ["--debug"])
    assert run_raising(_cli.UsageError("x"), ["--debug"]) == 2


def test_interrupt_is_quiet(capsys):
    assert run_raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(closed):
    code = "import sys; from qserve_jax import _cli\n"
    code += "def body(argv):\n"
    code += "    print('made', sys.stderr.isatty(), repr(sys.stdin.read()))\n"
    code += "    raise _cli.UsageError('wrong')\n"
    code += "sys.exit(_cli.run('command', body, []))"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {closed}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, input=""
    )
    assert result.returncode == 2
    assert result.stdout == ("" if ">&- " in closed or closed == ">&-" else "made False ''\n")
    assert result.stderr == ("" if "2>&-" in closed else "command: error: wrong\n")


def test_output_that_the_encoding_lacks(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    text = json.dumps("café 😀", ensure_ascii=False)
    assert _cli.run("command", lambda argv: print(text), []) == 0
    written = stdout.buffer.getvalue().decode("ascii")
    assert json.loads(written) == "café 😀" and "caf\\u00e9" in written


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


def test_home_of_nobody_only_warns(cache_config, monkeypatch, capsys):
    monkeypatch.setenv("QSERVE_JAX_CACHE", "~nobody-of-that-name/cache")
    _cli.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    out, err = capsys.readouterr()
    assert err.startswith("warning: compiled programs are not kept, ~nobody-of-that-name/cache is ")
    assert err.count("\n") == 1 and "QSERVE_JAX_CACHE" in err and out == ""


@pytest.mark.filterwarnings("default")
def test_broken_compiled_program_is_written_anew(cache_config, monkeypatch, tmp_path, capsys):
    def compile(argv):
        def program_of_this_test(x):
            return x * 3 + 1

        jax.jit(program_of_this_test)(2.0)

    monkeypatch.setenv("QSERVE_JAX_CACHE", str(tmp_path))
    compilation_cache.reset_cache()  # opened by an earlier test, elsewhere
    try:
        _cli.enable_compilation_cache()
        assert _cli.run("command", compile, []) == 0
        (entry,) = tmp_path.glob("jit_program_of_this_test-*-cache")
        whole = entry.stat().st_size
        entry.write_bytes(entry.read_bytes()[:50])
        (other := tmp_path / "jit_other-0-cache").touch()
        assert _cli.run("command", compile, []) == 0
        assert entry.stat().st_size > whole // 2 and other.exists()
    finally:
        compilation_cache.reset_cache()
    assert capsys.readouterr() == ("", "")


def test_other_warnings_about_the_cache_are_shown(capsys):
    message = "Error writing persistent compilation cache entry for 'jit_f': OSError: disk full"
    _cli.show_warning(message)
    assert capsys.readouterr().err == f"warning: {message}\n"


def test_make_golden_without_torch_says_so():
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv[0] = 'make_golden.py'\n"
    code += "runpy.run_path('scripts/make_golden.py', run_name='__main__')"
    ends = [
        subprocess.run(
            [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
        )
        for flags in (["--help"], ["--out", "/dev/null/x"])
    ]
    assert [end.returncode for end in ends] == [0, 1]
    assert "--out" in ends[0].stdout and ends[0].stderr == ""
    assert ends[1].stderr.startswith("make_golden.py: error: ") and ends[1].stderr.count("\n") == 1
    assert "pip install torch transformers" in ends[1].stderr


def test_matmuls_are_left_to_cublas_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    _cli.leave_matmuls_to_cublas()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_enable_triton_gemm=false"
    for given, expected in (
        ("--a=1", "--a=1 --xla_gpu_enable_triton_gemm=false"),
        ("--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm=true"),
    ):
        monkeypatch.setenv("XLA_FLAGS", given)
        _cli.leave_matmuls_to_cublas()
        assert os.environ["XLA_FLAGS"] == expected
