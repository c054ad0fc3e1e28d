"""Measurements of the kernels: what `python -m qserve_jax.bench` and the tuner stand on."""
