"""CheckpointError, and how long lists are put into its one line."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it is. One line: what, which limit, what to do.

    Names of tensors and files are free text, so line ends and the like in them are escaped.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def shorten(text: object, limit: int = 200) -> str:
    """str(text), with its middle left out beyond `limit` characters."""
    text, half = str(text), limit // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


def listing(names: Sequence[str], limit: int = 8) -> str:
    """The first `limit` names joined by commas, and how many more there are."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(shorten, names[:limit])) + more


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to quote in ours."""
    return shorten((str(error).strip() or type(error).__name__).splitlines()[0])
