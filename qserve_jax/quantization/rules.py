"""Rules: which leaves of a parameter tree to quantise, and what their axes mean."""

from __future__ import annotations

import dataclasses
import re

from qserve_jax.quantization.config import GROUP_SIZES


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which leaves to quantise, and what their axes mean.

    The first rule decides that matches the path and names no more axes than the leaf has.

    pattern: regular expression, searched (re.search) in the leaf's path, names joined by "/".
    contract: axes that the matmul sums over. out: axes of its output features. Every other axis is
      a stack of independent kernels, wherever it stands.
        [..., K, N]                 the default
        [N, K] (Hugging Face)       contract=(-1,), out=(-2,)
        [..., D, heads, head_dim]   contract=(-3,), out=(-2, -1)   in FLAX_RULES
        [..., heads, head_dim, D]   contract=(-3, -2)              in FLAX_RULES
        [K, L, N]                   contract=(0,)                  in MAXTEXT_RULES
        [D, L, heads, head_dim]     contract=(0,), out=(-2, -1)    in MAXTEXT_RULES
        [heads, L, head_dim, D]     contract=(0, -2)               in MAXTEXT_RULES
    skip: leave the leaf in float.
    weight_bits, group_size: used instead of the QuantConfig's own.

    Raises ValueError on an invalid pattern, weight_bits or group_size.
    """

    pattern: str
    contract: tuple[int, ...] = (-2,)
    out: tuple[int, ...] = (-1,)
    skip: bool = False
    weight_bits: int | None = None
    group_size: int | None = None

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is no regex: {error}") from None
        for field, allowed in (("weight_bits", (4, 8, 16)), ("group_size", GROUP_SIZES)):
            value = getattr(self, field)
            if value is not None and value not in allowed:
                raise ValueError(f"{field}={value} is not supported: use None or one of {allowed}")


DEFAULT_RULES = (Rule(r"(^|/)kernel$"),)
"""Every leaf named `kernel` with at least two axes, [..., K, N]."""

FLAX_RULES = (
    Rule(r"(^|/)(query|key|value)/kernel$", contract=(-3,), out=(-2, -1)),
    Rule(r"(^|/)out/kernel$", contract=(-3, -2)),
    *DEFAULT_RULES,
)
"""Trees with the attention of Flax, Linen `MultiHeadDotProductAttention` or NNX
`MultiHeadAttention`; layers, where stacked, on the first axes. Not for stacks of plain [K, N]
kernels that are named query, key, value or out."""

MAXTEXT_RULES = (
    Rule(r"(^|/)(query|key|value)/kernel$", contract=(0,), out=(-2, -1)),
    Rule(r"(^|/)out/kernel$", contract=(0, -2)),
    Rule(r"(^|/)kernel$", contract=(0,)),
)
"""MaxText's decoder: layers scanned on axis 1 (its default `param_scan_axis`), or not scanned."""

AMBIGUOUS = re.compile(r"(^|/)(query|key|value|out)/kernel$")
"""Kernels that have heads on axes of their own in Flax and MaxText."""
