"""The sweep over cuts of decode attention, on an emulated GPU."""

import json
import sys

import jax
import numpy as np
import pytest

from qserve_jax.pallas_kernels import intrinsics
from scripts import tune_attention
from tests.pallas_kernels import emulator


@pytest.fixture
def on_emulated_gpu(monkeypatch):
    emulated = pytest.MonkeyPatch()

    def launch(body, inputs, out, **sizes):
        def run(*arrays):
            return np.asarray(emulator.launch(emulated, body, arrays, out, eager=True, **sizes))

        return jax.pure_callback(run, out, *inputs)

    monkeypatch.setattr(intrinsics, "launch", launch)
    monkeypatch.setattr(tune_attention, "check_available", lambda: None)
    monkeypatch.setattr(tune_attention, "copies_of", lambda size: 2)
    monkeypatch.setattr(tune_attention, "call_times", lambda call: [float(id(call) % 7 + 1)])


@pytest.mark.parametrize("bits, ragged", [(4, False), (16, True)])
def test_every_config_runs_and_agrees(on_emulated_gpu, bits, ragged, monkeypatch, tmp_path, capsys):
    path = tmp_path / "sweep.json"
    command = f"tune_attention --batch 3 --context 128 --heads 2 1 64 --bits {bits}".split()
    command += ["--output", str(path), *(["--ragged"] if ragged else [])]
    monkeypatch.setattr(sys, "argv", command)
    tune_attention.main()
    printed = capsys.readouterr().out
    assert "Error" not in printed and printed.count("<- the rules") == 2
    cases = json.loads(path.read_text())["cases"]
    assert [case["backend"] for case in cases] == ["mosaic_sm90", "mosaic_mma"]
    for case in cases:
        cuts = {tuple(row["config"].values()) for row in case["rows"]}
        assert {(3, 1, 1, 1), (2, 2, 1, 1), (3, 1, 1, 2)} <= cuts
        assert (3, 1, 2, 1) in cuts or case["backend"] == "mosaic_mma"
        assert all(row["gbps"] > 0 for row in case["rows"])


def test_a_config_that_fails_is_left_out(on_emulated_gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "t --batch 1 --context 64 --heads 2 1 64".split())
    answers = iter([0, 1] + [0] * 50)  # the second config gives another output

    def off(run, *arguments):
        return run(*arguments) + next(answers)

    monkeypatch.setattr(tune_attention, "call", off)
    tune_attention.main()
    assert capsys.readouterr().out.count("ArithmeticError: ['WRONG']") == 1
