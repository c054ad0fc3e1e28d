"""Texts are joined and cut as published perplexities are."""

import numpy as np
import pytest

from qserve_jax.evaluation.text import full_windows, read_text


def test_wikitext_is_joined_as_the_rows_of_the_data_set(tmp_path):
    lines = [
        " \n",
        " = Title = \n",
        " \n",
        " First paragraph .\n",
        "  Second\u2028and\x85no third .\n",
    ]
    rows = [line if line.strip() else "" for line in lines]  # as the data set has them
    (tmp_path / "wiki.test.raw").write_text("".join(lines), encoding="utf-8")
    text = read_text(tmp_path / "wiki.test.raw", "wikitext")
    assert text == "\n\n".join(rows)
    assert (
        text == "\n\n = Title = \n\n\n\n\n First paragraph .\n\n\n  Second\u2028and\x85no third .\n"
    )


def test_plain_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffOne\r\ntwo ü".encode())
    (tmp_path / "a.jsonl").write_text('{"text": "One"}\n\n{"text": "two", "id": 3}\n')
    assert read_text(tmp_path / "a.txt") == "One\r\ntwo ü"
    assert read_text(tmp_path / "a.jsonl") == "One\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, r"none.txt cannot be read \(No such file or directory\): name a text"),
        ("a.txt", b"", "a.txt holds no text: give a file with some"),
        ("a.txt", b" \n\n", "a.txt holds no text"),
        ("a.txt", b"ab\xff", r"a.txt is not UTF-8 text \(byte 2\): convert it to UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"x": 1}', r'a.jsonl:2 has no "text": give'),
        ("a.jsonl", b"[1", "a.jsonl:1 is not JSON .*: correct it"),
        ("a.jsonl", b'{"text": "a \\ud83e b"}', r"a.jsonl:1 holds '.ud83e', half a character: c"),
        ("a.jsonl", b"[" * 100000, "a.jsonl:1 is not JSON .*: correct it"),
    ],
)
def test_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_text(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("n", "kept"), [(3, 3), (8, 8), (15, 8), (16, 16), (23, 16)])
def test_full_windows(n, kept):
    np.testing.assert_array_equal(full_windows(np.arange(n), 8), np.arange(kept))
