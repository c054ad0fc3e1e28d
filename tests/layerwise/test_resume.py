"""A run that is stopped anywhere and started again makes the same bytes, or says why not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qserve_jax.checkpoint import CheckpointError, load_model
from qserve_jax.layerwise import open_source, quantize_checkpoint, run
from qserve_jax.layerwise.work import REPORT, _differing, open_work
from qserve_jax.quantization.recipes import find_recipe

ROOT = Path(__file__).resolve().parents[2]


def test_goes_on_where_it_stopped(tiny, quantized, tmp_path, monkeypatch, contents):
    """Each part is made once, although the run stops after every one of them."""
    made, quantize_layer = [], run.quantize_layer

    def once(config, layer, calibrator, recipe):
        if made and made[-1] == "stop":
            raise KeyboardInterrupt
        made.extend([calibrator.layer, "stop"])
        return quantize_layer(config, layer, calibrator, recipe)

    monkeypatch.setattr(run, "quantize_layer", once)
    output = tmp_path / "out"
    while not output.exists():
        if made:
            made.pop()
        try:
            recipe, source = find_recipe("qoq-g128"), open_source(tiny.folder)
            quantize_checkpoint(output, source, recipe, tiny.tokens)
        except KeyboardInterrupt:
            with pytest.raises(CheckpointError, match="run the command that writes it again"):
                load_model(output)
            with pytest.raises(CheckpointError, match="was not written to its end"):
                load_model(f"{output}.partial")
    assert made == [0, 1, 2, "stop"]
    assert contents(output) == contents(quantized[0])


def test_differences_are_told_field_by_field():
    before = {"calibration": {"samples": 8, "sha256": "a", "dtype": "f"}, "seed": 1}
    other = before | {"calibration": {"samples": 16, "sha256": "b", "dtype": "f"}}
    assert _differing(other, before) == ["calibration.samples is 16, was 8"]
    other = before | {"calibration": before["calibration"] | {"sha256": "b"}, "seed": 2}
    assert _differing(other, before) == [
        "calibration.sha256 is 'b', was 'a'",
        "seed is 2, was 1",
    ]


def test_other_settings_are_refused_and_restart_forgets(tmp_path):
    output = tmp_path / "out"
    with open_work(output, 3, {"seed": 1, "recipe": {"gptq": True}}) as work:
        work.add({}, {"part": "tables"})
    with pytest.raises(CheckpointError, match="was begun otherwise .seed is 2, was 1.*--restart"):
        with open_work(output, 3, {"seed": 2, "recipe": {"gptq": True}}):
            pass
    with pytest.raises(
        CheckpointError, match=r"begun otherwise .recipe\.gptq is False, was True.:"
    ):
        with open_work(output, 3, {"seed": 1, "recipe": {"gptq": False}}):
            pass
    with open_work(output, 3, {"seed": 1, "recipe": {"gptq": True}}) as work:
        assert work.parts == [{"part": "tables"}]
        with pytest.raises(CheckpointError, match="another run is writing"):
            with open_work(output, 3, {"seed": 1}):
                pass
    with open_work(output, 3, {"seed": 2}, restart=True) as work:
        assert work.parts == [] and not any(work.folder.iterdir())
    (tmp_path / "out.partial" / REPORT).write_text("{")
    with pytest.raises(CheckpointError, match="is damaged: give --restart"):
        with open_work(output, 3, {}):
            pass


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "model-00002-of-00003.safetensors is no regular file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is truncated or corrupt"),
        (lambda file: file.write_bytes(b"x" * 100), "is truncated or corrupt"),
    ],
    ids=["missing", "truncated", "garbage"],
)
def test_damaged_parts_are_found_before_the_work_goes_on(tmp_path, damage, message):
    with open_work(tmp_path / "out", 3, {}) as work:
        for i in range(2):
            work.add({f"{i}": np.ones(8, np.float32)}, {"part": i})
    damage(work.file(1))
    with pytest.raises(CheckpointError, match=f"{message}.*: give --restart to begin anew"):
        with open_work(tmp_path / "out", 3, {}):
            pass
    assert work.file(0).exists()
    with open_work(tmp_path / "out", 3, {}, restart=True) as work:
        assert work.parts == []


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(CheckpointError, match="what no run has left there .thesis.txt."):
            with open_work(tmp_path / "out", 3, {}, restart=restart):
                pass
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "years of work"


def test_an_output_that_exists_is_left_alone(quantized, tiny):
    recipe, source = find_recipe("rtn"), open_source(tiny.folder)
    with pytest.raises(CheckpointError, match="exists already"):
        quantize_checkpoint(quantized[0], source, recipe, None)


def test_the_fingerprint_knows_the_weights(tiny):
    before = open_source(tiny.folder).fingerprint
    weights = tiny.folder / "model.safetensors"
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = open_source(tiny.folder).fingerprint
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert before != changed and before == open_source(tiny.folder).fingerprint


RUN = """
import sys
import numpy as np
from pathlib import Path
from qserve_jax.layerwise import open_source, quantize_checkpoint, run
from qserve_jax.quantization.recipes import find_recipe

def quantize_layer(*args, inner=run.quantize_layer):
    print("a layer begins", flush=True)
    return inner(*args)

run.quantize_layer = quantize_layer
tokens = np.random.default_rng(0).integers(0, 64, (8, 64)).astype(np.int32)
recipe, source = find_recipe("qoq-g128"), open_source(sys.argv[1])
quantize_checkpoint(Path(sys.argv[2]), source, recipe, tokens)
"""


def start(tiny, output) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, str(tiny.folder), str(output)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    error = process.communicate()[1].decode()
    assert process.returncode == 0, error


def test_killed_while_writing(tiny, quantized, tmp_path, contents):
    """SIGKILL as soon as a part's file is there, before or after it is entered."""
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    for parts in (1, 3):
        process = start(tiny, output)
        while process.poll() is None and len(list(partial.glob("*.safetensors"))) < parts:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (partial / "config.json").exists()
        with pytest.raises(CheckpointError, match="was not written to its end"):
            load_model(output)
    finish(start(tiny, output))
    assert contents(output) == contents(quantized[0]) and not partial.exists()


@pytest.mark.slow
def test_twenty_kills_at_random_times(tiny, quantized, tmp_path, contents):
    """A third of them at any time of a run; most of it is start-up and compilation, so the others
    come within a second of the moment when a random layer of that run begins."""
    begun = time.monotonic()
    finish(start(tiny, tmp_path / "whole"))
    seconds, rng = time.monotonic() - begun, random.Random(0)
    killed, finished, kept = 0, 0, []
    while killed < 20 or not finished:
        output = tmp_path / f"out{finished}"
        process = start(tiny, output)
        wait = rng.uniform(0, seconds)
        if rng.random() < 2 / 3:
            wait = rng.uniform(0, 1)
            assert process.stdout is not None
            for _ in range(rng.randint(1, 3)):
                process.stdout.readline()  # at once where there are no more
        try:
            process.wait(wait if killed < 20 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            killed += process.wait() == -signal.SIGKILL
            kept.append(len(list(tmp_path.glob("*.partial/*.safetensors"))))
        else:
            finish(process)
        if output.exists():  # a kill may come after the last rename
            assert contents(output) == contents(quantized[0])
            finished += 1
    print(f"a run takes {seconds:.1f} s; {finished} outputs; parts there after each kill: {kept}")
    assert len(set(kept)) > 2
