"""CheckpointError, and how long lists are put into its one line."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it is. One line: what, which limit, what to do."""


def listing(names: Sequence[str], limit: int = 8) -> str:
    """The first `limit` names joined by commas, and how many more there are."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to quote in ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
