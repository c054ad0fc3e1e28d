"""An output is put in its place whole, and nothing that is not ours is lost on the way."""

import errno
import fcntl
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from qserve_jax.checkpoint import CheckpointError
from qserve_jax.checkpoint.atomic import (
    REPORT,
    atomic_folder,
    check_free,
    open_partial,
    save_tensors,
)

LEFT_BY_A_KILL = (
    *("shard-0.safetensors", "model-00001-of-00003.safetensors", "model.safetensors.index.json"),
    *("model-00002-of-00003.safetensors.tmp", ".tmpQ1zX9b", "tokenizer.json", "config.json.tmp"),
)


@pytest.fixture
def partial(tmp_path) -> Path:
    folder = tmp_path / "out.partial"
    folder.mkdir()
    return folder


def test_what_a_killed_run_has_left_is_cleared_away(tmp_path, partial):
    for name in LEFT_BY_A_KILL:
        (partial / name).touch()
    (partial / "params.orbax-checkpoint-tmp").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        assert not any(folder.iterdir())
        (folder / "config.json").touch()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["config.json"]
    assert not partial.exists()


@pytest.mark.parametrize("name", ["thesis.txt", "model.safetensors.txt", "my config.json"])
def test_files_of_others_are_left_alone(tmp_path, partial, name):
    (partial / name).write_text("years of work")
    with pytest.raises(CheckpointError, match=f"no run has left there .{name}.: move it, or"):
        with atomic_folder(tmp_path / "out"):
            pass
    assert (partial / name).read_text() == "years of work"


def test_what_quantize_goes_on_with_is_left_alone(tmp_path, partial):
    (partial / REPORT).write_text("hours of work")
    with pytest.raises(CheckpointError, match="a stopped run of quantize goes on with: let it"):
        with atomic_folder(tmp_path / "out"):
            pass
    assert (partial / REPORT).read_text() == "hours of work"


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "config.json").touch()
    (tmp_path / "out.partial").symlink_to(tmp_path / "models")
    with pytest.raises(CheckpointError, match="out.partial is a link: remove it, or choose"):
        with open_partial(tmp_path / "out"):
            pass
    assert (tmp_path / "models" / "config.json").exists()


def test_two_runs_do_not_share_a_folder(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "config.json").touch()
        with pytest.raises(CheckpointError, match="another run is writing .*: wait for it, or"):
            with atomic_folder(tmp_path / "out"):
                pass
    assert (tmp_path / "out" / "config.json").exists()


def test_a_folder_that_was_renamed_before_it_was_locked_is_not_ours(tmp_path, monkeypatch):
    flock = fcntl.flock

    def late(descriptor, operation):
        (tmp_path / "out.partial").rename(tmp_path / "out")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(CheckpointError, match="another run is writing"):
        with atomic_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("name", [".", "", "..", "new/.."])
def test_the_current_folder_is_no_output(tmp_path, monkeypatch, name):
    """Found before the work: it cannot be replaced, or the shell would stand in a removed one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be replaced: name a new folder as output"):
        check_free(Path(name))


def test_names_too_long_are_one_line(tmp_path):
    reason = os.strerror(errno.ENAMETOOLONG)
    with pytest.raises(CheckpointError, match=f"cannot be made .{reason}.: choose another output"):
        check_free(tmp_path / ("n" * 300))


def test_a_full_disk_is_one_line_with_a_cure(tmp_path):
    """As safetensors tells of it; a limit on the size of files stands for the disk's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(CheckpointError, match="x.safetensors cannot be written .*: make room"):
            save_tensors(tmp_path / "x.safetensors", {"x": np.zeros(2**16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_relative_output_stays_where_it_was_asked_for(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with atomic_folder("out"):
        os.chdir(tmp_path / "elsewhere")
    assert (tmp_path / "out").is_dir() and not (tmp_path / "elsewhere" / "out").exists()
