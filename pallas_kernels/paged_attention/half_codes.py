"""Codes become float16 without a conversion: numbers for the instructions that do it.

An OR, or a permutation of bytes, puts a code into the low bits of 1024 (0x6400), whose last place
is 1, which makes it 1024 + code. A code four bits higher makes it 1024 + 16 code. Half the range of
the codes, 8 or 128, is taken off with the 1024.
"""

from __future__ import annotations

import numpy as np


def two_halves(low: float, high: float | None = None) -> int:
    """A word of these numbers in float16; of twice the first without a second."""
    pair = np.array([low, low if high is None else high], np.float16)
    return int(pair.view(np.uint32)[0])


MAGIC = two_halves(1024)
PAIRS = (0x5150, 0x5352)
"""Of a word of codes and MAGIC, as bytes: the lower two codes, the upper two, each in 1024."""
OFFSET_4 = 1024 + 8
"""What 1024 + code has too much."""
OFFSET_4_HIGH = (1024 + 16 * 8) / 16
"""What (1024 + 16 code) / 16 has too much."""
OFFSET_8 = 1024 + 128
