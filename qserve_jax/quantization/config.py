"""QuantConfig: which tensors get how many bits."""

from __future__ import annotations

import dataclasses
import re

PRECISIONS = ("w4a8kv4", "w4a8kv8", "w8a8kv4", "w8a8kv8", "w4a16kv4", "w16a16kv16")
GROUP_SIZES = (-1, 128)


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Bits of weights, activations and KV cache. Hashable: use it as a static jit argument.

    weight_bits: 4 (two-level per group, or per channel), 8 (per channel) or 16 (left in float).
    group_size: input features that share one second-level scale: 128, or -1 for one scale per
      output channel. Read for 4-bit weights only.
    act_bits: 8 (per token, dynamic) or 16 (left in float).
    kv_bits: 4, 8 (per token and KV head) or 16 (left in float).
    scale_dtype: float32, or float16 to round the channel scales of 4-bit weights to it before
      coding. They stay float32 arrays; published QServe checkpoints store them in float16.
    round_level_one: round weights to int8 before they are coded in groups, as the paper writes (its
      code does not). Off: unrounded weights are a little nearer, and perplexities cannot be told
      apart (docs/results/quantize_options.json).

    Raises ValueError on any other value.
    """

    weight_bits: int = 4
    group_size: int = 128
    act_bits: int = 8
    kv_bits: int = 4
    scale_dtype: str = "float32"
    round_level_one: bool = False

    def __post_init__(self):
        for field, allowed in (
            ("weight_bits", (4, 8, 16)),
            ("group_size", GROUP_SIZES),
            ("act_bits", (8, 16)),
            ("kv_bits", (4, 8, 16)),
            ("scale_dtype", ("float32", "float16")),
        ):
            value = getattr(self, field)
            if value not in allowed or isinstance(value, float):
                raise ValueError(f"{field}={value!r:.60} is not supported: use one of {allowed}")
        if not isinstance(self.round_level_one, bool):
            raise ValueError(
                f"round_level_one={self.round_level_one!r:.60} is not supported: use True or False"
            )
        if self.act_bits == 8 and self.weight_bits == 16:
            raise ValueError("act_bits=8 needs 4- or 8-bit weights, got weight_bits=16")

    @classmethod
    def preset(cls, precision: str, *, group_size: int = 128) -> QuantConfig:
        """`preset("w4a8kv4", group_size=-1)`; `precision` is one of PRECISIONS."""
        if precision not in PRECISIONS:
            names = ", ".join(PRECISIONS)
            raise ValueError(f"precision {precision!r} is unknown: use one of {names}")
        weight, act, kv = map(int, re.findall(r"\d+", precision))
        return cls(weight_bits=weight, group_size=group_size, act_bits=act, kv_bits=kv)

    @property
    def precision(self) -> str:
        """The preset's name, for example `w4a8kv4`."""
        return f"w{self.weight_bits}a{self.act_bits}kv{self.kv_bits}"
