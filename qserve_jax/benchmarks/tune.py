"""A search for the fastest configuration of a kernel: from the heuristic's, uphill.

It knows nothing of a design but its dataclass: neighbours differ in one field.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ENOUGH = 0.99  # of the time so far; less of a gain is noise
Measure = Callable[[Sequence[Any]], list[float | None]]
"""Microseconds of each config; None for one that does not run or gives another result."""


def neighbours(config: Any) -> Iterator[Any]:
    """Configs with one field one up, one down, halved, doubled or turned over."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            changed = {not value}
        else:
            changed = {value - 1, value + 1, value // 2, 2 * value} - {value}
        for new in sorted(changed):
            yield dataclasses.replace(config, **{field.name: new})


def climb(
    start: Any,
    check: Callable[[Any], None],
    measure: Measure,
    rounds: int,
    others: Sequence[Any] = (),
) -> tuple[Any, float, float]:
    """(best config, its time, the time of start), after at most `rounds` times all neighbours.

    others: configs that are tried first, for what no uphill path leads to.
    check raises ValueError on a config that is not to be tried. Raises RuntimeError where start
    has no time.
    """
    best, us, first = best_of(start, others, measure)
    seen = {start, *others}
    for _ in range(rounds):
        tried = [c for c in dict.fromkeys(neighbours(best)) if c not in seen and can_run(c, check)]
        seen.update(tried)
        fastest, least = _fastest(tried, measure)
        if least > ENOUGH * us:
            break
        best, us = fastest, least
    return best, us, first


def best_of(start: Any, tried: Sequence[Any], measure: Measure) -> tuple[Any, float, float]:
    """(best config, its time, the time of start) of start and those tried.

    Raises RuntimeError where start has no time.
    """
    (first,) = measure([start])
    if first is None:
        raise RuntimeError(f"{start}, the heuristic's choice, gives no time")
    fastest, least = _fastest(tried, measure)
    return (fastest, least, first) if least < first else (start, first, first)


def _fastest(tried: Sequence[Any], measure: Measure) -> tuple[Any, float]:
    """Of those that have a time; infinity where none has."""
    times = [(t, c) for t, c in zip(measure(tried), tried, strict=True) if t is not None]
    least, fastest = min(times, key=lambda pair: pair[0], default=(math.inf, None))
    return fastest, least


def can_run(config: Any, check: Callable[[Any], None]) -> bool:
    """Whether check, as in `climb`, raises nothing."""
    try:
        check(config)
    except (ValueError, ZeroDivisionError):  # the latter from fields of 0
        return False
    return True
