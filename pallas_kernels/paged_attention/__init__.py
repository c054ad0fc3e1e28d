"""Causal attention over the paged K/V cache, for prefill, chunked prefill and decode."""

from qserve_jax.pallas_kernels.paged_attention.api import (
    ATTENDS,
    longest_first,
    paged_attention,
    validate_paged_inputs,
)

__all__ = ["ATTENDS", "longest_first", "paged_attention", "validate_paged_inputs"]
