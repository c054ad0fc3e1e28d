import pytest

from qserve_jax.runtime import device_calls


@pytest.fixture(scope="module")
def in_thread():
    """Calls are launched by a thread of their own, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_calls, "launching_waits", lambda mesh: mesh is None)
        yield
