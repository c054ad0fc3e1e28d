"""Rows are told to be of today's kernels only where the lowered kernels are equal."""

import json
import sys

import pytest

from qserve_jax.benchmarks.provenance import kernels
from scripts import same_kernels

CONFIG = {"row_warps": 1, "row_tiles": 1, "k_warps": 8, "tokens": 8, "stages": 3}
HEADS = {"heads": 32, "kv_heads": 8, "head_dim": 128, "kv_bits": 4}


def row(commit="a" * 40, **other):
    sizes = {"backend": "mosaic_sm90", "group_size": 128, "m": 1, "n": 64, "k": 1024}
    return sizes | {"config": CONFIG, "kernels": "old", "commit": commit} | other


def test_digests_tell_kernels_apart():
    decode = HEADS | {"backend": "mosaic_sm90", "b": 1, "ctx": 128, "attends": "quantized"}
    decode["config"] = {"stages": 3, "warpgroups": 1, "cluster": 1, "splits": 1}
    chunk = HEADS | {"backend": "mosaic_sm90", "chunk": 64, "ctx": 128}
    found = [
        same_kernels.matmul(row()),
        same_kernels.matmul(row(config=CONFIG | {"stages": 4})),
        same_kernels.matmul(row(group_size=-1)),
        same_kernels.decode(decode),
        same_kernels.decode(decode | {"attends": "full"}),
        same_kernels.append(HEADS | {"backend": "mosaic_sm90", "b": 2}),
        same_kernels.prefill(chunk),
        same_kernels.prefill(chunk | {"attends": "full"}),
    ]
    assert len(set(found)) == len(found) and {len(digest) for digest in found} == {64}
    assert same_kernels.matmul(row()) == found[0]


def test_what_launches_no_kernel_has_no_digest():
    with pytest.raises(ValueError, match="no kernel of ours"):
        same_kernels.digest(lambda x: x + 1, same_kernels.integers(4))


def test_bytes_of_a_string():
    assert same_kernels.unescape(r"ML\EFR\"\\0A\0A") == b'ML\xefR"\\0A\x0a'


def test_equal_rows_alone_are_stamped(tmp_path, monkeypatch, capsys):
    here, gone = "a" * 40, "b" * 40
    rows = [row(here), row(here, m=2), row(gone, m=3), row(gone, m=4, kernels="unknown")]
    report = {"rows": [*rows, row(here, m=5, config=None)]}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    digests = ["x" * 64, "y" * 64, "z" * 64, "w" * 64]
    monkeypatch.setattr(same_kernels, "is_here", lambda commit: commit == here)
    monkeypatch.setattr(same_kernels, "lower_all", lambda report: digests)
    monkeypatch.setattr(
        same_kernels, "lower_at", lambda commit, report: [digests[0], "other", *digests[2:]]
    )
    monkeypatch.setattr(sys, "argv", ["same_kernels.py", str(path), "--stamp"])
    assert same_kernels.main() == 1
    today = kernels("matmul")
    found = [row["kernels"] for row in json.loads(path.read_text())["rows"]]
    assert found == [today, "old", today, "unknown", "old"]
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "2 rows equal",
        "1 rows of bbbbbbbbbbbb, which is not here",
        "1 rows other than at aaaaaaaaaaaa",
    ]
