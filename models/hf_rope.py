"""Reads the rotary embedding out of a Hugging Face config.json, in its old and its new spelling.

Old (transformers 4): top-level `rope_theta`, and `rope_scaling: {"type" or "rope_type": ..., ...}`
or null. New (transformers 5): one `rope_parameters: {"rope_type": ..., "rope_theta": ..., ...}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qserve_jax.models.config import ROPE_TYPES, RopeConfig, brief
from qserve_jax.models.hf_keys import read_size, show

# Keys that each type needs, and those it may have (transformers `_validate_*_rope_parameters`).
_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "llama3": ("original_max_position_embeddings",),
    "yarn": (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
_HEADER = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def rope_from_hf(hf: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    """The rotary embedding of a config.json.

    Defaults are those of transformers `modeling_rope_utils` (standardize_rope_params and the
    _compute_*_parameters functions): theta 10000; `original_max_position_embeddings` falls back to
    `max_position_embeddings` for llama3 and yarn. A yarn `factor` is used as written, even where
    max_position_embeddings / original_max_position_embeddings differs; only when it is null is it
    that ratio.

    Raises ValueError for an unknown type, a missing or unread key, a value out of range, and two
    spellings that contradict each other.
    """
    scaling = _scaling_dict(hf)
    rope_type = _same(scaling, "rope_type", scaling, "type", "default")
    if rope_type not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise ValueError(f"rope_type {brief(rope_type)} is not supported: use one of {known}")
    _check_keys(scaling, rope_type)
    values = {k: v for k, v in scaling.items() if k not in _HEADER and v is not None}
    if rope_type in ("llama3", "yarn"):
        original = read_size(values, "original_max_position_embeddings", max_position_embeddings)
        values["original_max_position_embeddings"] = original
        values.setdefault("factor", max_position_embeddings / original)
    theta = _same(scaling, "rope_theta", hf, "rope_theta", 10000.0)
    return RopeConfig(rope_type=rope_type, theta=theta, **values)


def _scaling_dict(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """Whichever of the two spellings is there, {} if none."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(hf.get(key) or {}, Mapping):
            raise ValueError(
                f"{key}={brief(hf[key])} is not an object: write one, or null for none"
            )
    return _same(hf, "rope_parameters", hf, "rope_scaling", None) or {}


def _same(a: Mapping[str, Any], a_key: str, b: Mapping[str, Any], b_key: str, default: Any) -> Any:
    """a[a_key], else b[b_key], else default; both may be given if they are equal."""
    first, second = a.get(a_key), b.get(b_key)
    if first and second and first != second:
        raise ValueError(
            f"{a_key}={brief(first)} contradicts {b_key}={brief(second)}: keep only one"
        )
    return next((v for v in (first, second) if v not in (None, {})), default)


def _check_keys(scaling: Mapping[str, Any], rope_type: str) -> None:
    required = _REQUIRED[rope_type]
    for key in required:
        # a null yarn factor has a meaning, a missing one has not
        if key not in scaling or (scaling[key] is None and rope_type != "yarn"):
            raise ValueError(f"rope_type {rope_type!r} needs {key!r}, which is missing: add it")
    known = _HEADER | {*required, *_OPTIONAL.get(rope_type, ())}
    unread = {k: v for k, v in scaling.items() if k not in known and v is not None}
    if unread:
        raise ValueError(
            f"rope_type {rope_type!r} does not read {show(unread)}: remove it, or correct it"
        )
    if scaling.get("partial_rotary_factor", 1) not in (1, None):
        value = scaling["partial_rotary_factor"]
        raise ValueError(f"partial_rotary_factor={brief(value)} is not supported: it must be 1.0")
