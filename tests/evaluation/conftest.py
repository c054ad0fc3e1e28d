"""The demo model in float, loaded once."""

from pathlib import Path

import pytest

import qserve_jax
from qserve_jax.checkpoint import LoadedModel, load_model

DEMO = Path(qserve_jax.__file__).parent / "assets" / "demo"


@pytest.fixture(scope="session")
def demo() -> LoadedModel:
    return load_model(DEMO, precision="w16a16kv16", dtype="float32")
