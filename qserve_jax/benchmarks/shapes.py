"""The matrix sizes of published models: (N, K) of qkv, o, gate and up together, and down."""

from __future__ import annotations

import re

Shape = tuple[int, int]

MODEL_SHAPES: dict[str, tuple[Shape, ...]] = {
    "llama3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "qwen2.5-7b": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
    "llama2-7b": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "llama3-70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    "qwen2.5-72b": ((10240, 8192), (8192, 8192), (59136, 8192), (8192, 29568)),
}
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


def parse_shape(text: str) -> Shape:
    """ "28672x4096" -> (28672, 4096), as N x K. Raises ValueError."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise ValueError(f"{text!r} is no shape: give NxK, as 28672x4096")
    n, k = int(found[1]), int(found[2])
    if n == 0 or k == 0 or n % 64 or k % 128:
        raise ValueError(f"{text!r}: N must be a multiple of 64 and K of 128")
    return n, k
