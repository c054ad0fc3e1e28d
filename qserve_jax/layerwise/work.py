"""The folder of an unfinished output: finished layers, and what they were made from.

`OUTPUT.partial` holds one file of safetensors per layer, under its final name, and the report,
which doubles as the manifest: settings first, then an entry for each finished part. Each file is
renamed into place when it is whole, a part's before its entry, so that a killed run leaves a valid
folder. It becomes OUTPUT by one rename, after config.json, without which nothing loads, was added.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qserve_jax.checkpoint.atomic import (
    REPORT,
    check_free,
    copy_companions,
    empty_folder,
    open_partial,
    save_tensors,
)
from qserve_jax.checkpoint.errors import CheckpointError, listing
from qserve_jax.checkpoint.hf import INDEX, read_json, tensor_specs
from qserve_jax.models.config import brief


@dataclasses.dataclass
class Work:
    """An output that is being made, a file for each part: the first holds what is no layer, then
    one layer each. settings: what it depends on. parts: what is told of each finished one."""

    final: Path
    folder: Path
    num_parts: int
    settings: dict[str, Any]
    parts: list[dict[str, Any]]

    def add(self, tensors: Mapping[str, np.ndarray], entry: dict[str, Any]) -> None:
        """Keep the next part."""
        file = self.file(len(self.parts))
        _write_tensors(file, tensors)
        self.parts.append(entry)
        content = {"settings": self.settings, "parts": self.parts}
        _write_whole(self.folder / REPORT, json.dumps(content, indent=1) + "\n")

    def finish(self, config: dict[str, Any], companions: Path | None) -> None:
        """All parts are there: make them a checkpoint."""
        specs = tensor_specs([self.file(i) for i in range(self.num_parts)])
        total = sum(spec.nbytes for spec in specs.values())
        weight_map = {name: spec.file.name for name, spec in specs.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        copy_companions(companions, self.folder)
        _write_whole(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        _write_whole(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        os.replace(self.folder, self.final)

    def file(self, index: int) -> Path:
        """Of that part."""
        name = f"model-{index + 1:05d}-of-{self.num_parts:05d}.safetensors"
        return self.folder / name


@contextlib.contextmanager
def open_work(
    output: Path, num_parts: int, settings: dict[str, Any], *, restart: bool = False
) -> Iterator[Work]:
    """The work towards the directory `output`, taken up where a run with the same settings stopped.

    settings: JSON values. restart: forget what there is.
    Raises CheckpointError where `output` exists, where an unfinished one has other settings or
    is damaged, and as `open_partial`.
    """
    check_free(output)
    with open_partial(output) as folder:
        work = Work(output.absolute(), folder, num_parts, settings, [])
        if not restart:
            work.parts = _finished(work)
        if not work.parts:
            empty_folder(folder)
        yield work


def _differing(wanted: dict[str, Any], found: dict[str, Any], place: str = "") -> list[str]:
    """What is other than before, field by field; a hash only where nothing else says why."""
    told = []
    for key in sorted({*wanted, *found}, key=lambda key: (key == "sha256", key)):
        now, before = wanted.get(key), found.get(key)
        if now == before or (key == "sha256" and told):
            continue
        if isinstance(now, dict) and isinstance(before, dict):
            told += _differing(now, before, f"{place}{key}.")
        else:
            told.append(f"{place}{key} is {brief(now)}, was {brief(before)}")
    return told


def _finished(work: Work) -> list[dict[str, Any]]:
    """The entries of an unfinished output. Raises CheckpointError unless it has these settings, and
    the files that it tells of."""
    report = work.folder / REPORT
    if not report.is_file():
        return []
    try:
        content = read_json(report)
        found, parts = dict(content["settings"]), list(content["parts"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{report} is damaged: give --restart to begin anew") from None
    wanted = json.loads(json.dumps(work.settings))
    if differing := _differing(wanted, found):
        raise CheckpointError(
            f"{work.folder} was begun otherwise ({listing(differing)}): give the same flags to go "
            "on with it, or --restart to begin anew"
        )
    try:
        tensor_specs([work.file(i) for i in range(len(parts))])
    except CheckpointError as error:
        reason = str(error).partition(": ")[0]
        raise CheckpointError(f"{reason}: give --restart to begin anew") from None
    return parts


def _write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    save_tensors(temporary, tensors)
    _put_in_place(temporary, file)


def _write_whole(file: Path, text: str) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _put_in_place(temporary, file)


def _put_in_place(temporary: Path, file: Path) -> None:
    """Rename, once the content is on the disk: after a power cut, too, the file is whole."""
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, file)
