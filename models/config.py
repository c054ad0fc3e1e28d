"""ModelConfig: everything that fixes a model's computation graph."""

from __future__ import annotations

import dataclasses
import reprlib

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")

LARGEST_SIZE = 2**31 - 1
"""Sizes and positions are counted in int32."""
LARGEST_ROPE = 1e15
"""Far above any published base or factor, and small enough for all formulas to stay finite."""

brief = reprlib.Repr(maxstring=60, maxother=60).repr
"""repr for error messages: one line, and short whatever a config.json holds."""

# (name, lower bound, whether the bound itself is excluded)
_ROPE_BOUNDS = (
    ("theta", 1, True),
    ("factor", 1, False),
    ("original_max_position_embeddings", 1, False),
    ("low_freq_factor", 0, True),
    ("high_freq_factor", 0, True),
    ("beta_fast", 1e-6, False),
    ("beta_slow", 1e-6, False),
    ("attention_factor", 0, True),
    ("mscale", 0, False),
    ("mscale_all_dim", 0, False),
)
_ROPE_ORDERS = (("low_freq_factor", "high_freq_factor", True), ("beta_slow", "beta_fast", False))


def _in_range(value: object, low: float, strict: bool) -> bool:
    """Whether `value` is a number (JSON may hold strings, booleans and NaN) in range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return (value > low if strict else value >= low) and value <= LARGEST_ROPE


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; names and meanings as in Hugging Face `rope_parameters`.

    `original_max_position_embeddings` None means the model's `max_position_embeddings`, and
    `attention_factor` None the one that follows from `factor` (`rope.yarn_attention_factor`).
    Raises ValueError on an unknown type or on a value outside the range its formula needs.
    """

    rope_type: str = "default"  # one of ROPE_TYPES
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type {brief(self.rope_type)} is not supported: use a checkpoint with one of "
                f"{', '.join(ROPE_TYPES)}"
            )
        for name, low, strict in _ROPE_BOUNDS:
            value = getattr(self, name)
            if value is not None and not _in_range(value, low, strict):
                bound = f"{'above' if strict else 'of at least'} {low:g}, up to {LARGEST_ROPE:g}"
                value = brief(value)
                raise ValueError(f"rope {name}={value} is out of range: set a number {bound}")
        for low_name, high_name, strict in _ROPE_ORDERS:
            low, high = getattr(self, low_name), getattr(self, high_name)
            if not _in_range(high, low, strict):
                raise ValueError(
                    f"rope {high_name}={high!r} is not above {low_name}={low!r}: correct them"
                )
        if not isinstance(self.truncate, bool):
            raise ValueError(
                f"rope truncate={brief(self.truncate)} is not a boolean: set true or false"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama kind. Hashable: use it as a static jit argument.

    Raises ValueError where sizes cannot go together (query and KV heads, head_dim and rope), and
    for a rope factor that makes the context longer than LARGEST_SIZE.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    centered_keys: bool = False  # transforms/center_keys.py; no Hugging Face checkpoint has it
    sliding_window: int | None = None  # each token sees this many tokens, itself included
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"  # the checkpoint's own

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}: correct one of them"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: rotary embeddings need it even")
        if self.context_length > LARGEST_SIZE:
            raise ValueError(
                f"rope factor={self.rope.factor!r} makes a context of {self.context_length} "
                f"tokens, beyond the limit of {LARGEST_SIZE}: correct it"
            )
        if self.rope.rope_type == "dynamic" and self.head_dim < 4:
            raise ValueError(f"head_dim={self.head_dim} is too small: dynamic rope needs 4 or more")

    @property
    def group_heads(self) -> int:
        """Query heads per KV head (G)."""
        return self.num_heads // self.num_kv_heads

    @property
    def context_length(self) -> int:
        """Tokens that the position embedding is made for, scaling included.

        By convention `max_position_embeddings` counts the positions before a linear or dynamic
        scaling; for yarn `original_max_position_embeddings` does; for llama3 it counts them all.
        """
        rope, length = self.rope, self.max_position_embeddings
        if rope.rope_type in ("linear", "dynamic"):
            return int(length * rope.factor)
        if rope.rope_type == "yarn":
            return max(length, int((rope.original_max_position_embeddings or length) * rope.factor))
        return length
