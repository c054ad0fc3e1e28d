"""Sizes that a CPU can do."""

import pytest

from qserve_jax.benchmarks import operands


@pytest.fixture
def small_cache(monkeypatch):
    """A cache of nothing, so that two copies of a weight are enough."""
    monkeypatch.setattr(operands, "COLD_BYTES", 4096)
