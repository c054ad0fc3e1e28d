"""Rotate new queries and keys, quantise K/V, and write them into the paged cache."""

from qserve_jax.pallas_kernels.append_kv.api import append_kv, rope_append_kv
from qserve_jax.pallas_kernels.append_kv.reference import rotate, split_heads

__all__ = ["append_kv", "rope_append_kv", "rotate", "split_heads"]
