"""Settings and fixtures of all tests: JAX on CPU with several devices, seeds, data."""

import os
import re
import signal
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Compiling an example takes longer than the deadline; the same examples every time.
hypothesis.settings.register_profile("jax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jax")


# Through the environment, before any test module (or subprocess) imports JAX.
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")  # for the tests of sharding
# One folder per process, because JAX writes the entries without a lock.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax" / _worker))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_configure(config):
    """Run on the CPU unless `-m gpu` asks otherwise; let Ctrl-C interrupt."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as shells start what is to run behind
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        # Several processes share the GPU: none takes its memory beforehand.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # a conftest.py below this one has imported it
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def pytest_collection_modifyitems(items):
    """Skip the tests marked `gpu` where JAX has no GPU."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_gpu():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: run pytest -m gpu there"))


def _has_gpu() -> bool:
    import jax

    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:  # what JAX raises for a platform that it does not have
        return False


MANY_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_functions():
    """Of a process with many: each takes several memory maps, of which Linux gives a process 65 530
    (vm.max_map_count). XLA aborts where it gets none, which all tests in two processes came to."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers in every test and run."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small models and texts: $QSERVE_JAX_DATA, or shared/data beside the clone."""
    named = os.environ.get("QSERVE_JAX_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if named and not folder.is_dir():
        pytest.fail(f"QSERVE_JAX_DATA={named} is not a folder: correct it or unset it")
    if not folder.is_dir():
        pytest.skip("no folder of test data: name it in QSERVE_JAX_DATA")
    return folder
