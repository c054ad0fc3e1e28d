"""Quantise new K/V tokens and write them into the paged cache."""

from qserve_jax.pallas_kernels.append_kv.api import append_kv

__all__ = ["append_kv"]
