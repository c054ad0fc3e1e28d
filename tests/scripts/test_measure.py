"""Parts of the measurements: their commands are ones that exist, and end in time."""

import os
import shlex
import sys
import time
from pathlib import Path

import pytest

from qserve_jax import bench
from scripts import measure


@pytest.mark.parametrize("name", measure.PARTS)
def test_commands_are_understood(name):
    seconds, command = measure.PARTS[name]
    words = shlex.split(command.format(into="FOLDER"))
    before, words = words[: words.index("python")], words[words.index("python") + 1 :]
    assert before[:1] in ([], ["env"]) and 0 < seconds <= 600
    if words[0] == "-m":
        assert words[1] == "qserve_jax.bench"
        bench.build_parser().parse_args(words[2:])
    else:
        source = (measure.ROOT / words[0]).read_text()
        for flag in (word for word in words if word.startswith("--")):
            assert f'"{flag}"' in source, flag
    for path in (word for word in words if word.endswith(".py")):
        assert (measure.ROOT / path).exists(), path


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["measure.py", *map(str, argv)])
    return measure.main()


def test_parts_go_on_in_a_copy_and_are_stopped(tmp_path, monkeypatch, capfd):
    code = "import sys; open(sys.argv[1], 'w').write('measured')"
    writes = f'env A=b python -c "{code}" {{into}}/goals.json'
    parts = {
        "writes": (60, writes),
        "fails": (60, "python -c 'raise SystemExit(3)'"),
        "sleeps": (1, "python -c 'import time; time.sleep(60)'"),
    }
    monkeypatch.setattr(measure, "PARTS", parts)
    results = tmp_path / "results"
    results.mkdir()
    (results / "goals.json").write_text("old")
    (results / "kept.json").write_text("kept")
    monkeypatch.setattr(measure, "RESULTS", results)
    into = tmp_path / "into"
    assert run(monkeypatch, "writes", "--into", into) == 0
    assert run(monkeypatch, "fails", "sleeps", "--into", into) == 1
    out = capfd.readouterr().out
    assert "== writes: done" in out and "== fails: failed with exit code 3" in out
    assert "== sleeps: stopped after 1 s" in out
    found = {path.name: path.read_text() for path in Path(into).iterdir()}
    assert found == {"goals.json": "measured", "kept.json": "kept"}
    assert (results / "goals.json").read_text() == "old"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nothing", "--into", "x"], "'nothing' is no part: choose from"),
        (["72b"], "name PARTs and"),
        (["72b", "--into", "x", "--seconds", "nan"], "--seconds nan must be more than 0"),
        (["72b", "--into", __file__], "is no folder to write to (File exists): name another"),
    ],
)
def test_wrong_flags(argv, words, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *argv)
    assert words in capsys.readouterr().err


def test_what_stops_it_stops_the_part(tmp_path, monkeypatch):
    """Its command is in a process group of its own, which no Ctrl-C reaches."""
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    class Interrupted(measure.subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            while not pid.exists() or not pid.read_text():
                time.sleep(0.01)
            raise KeyboardInterrupt

    monkeypatch.setattr(measure.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure.run_part(f'python -c "{code}"', 60, tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
