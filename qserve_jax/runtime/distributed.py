"""Several processes that run one model: each runs the same program on its own devices.

They make the same calls in the same order, so what the host decides must not depend on a clock or
on what one of them alone knows.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def agreed(value: int) -> int:
    """The least of the processes' values, in all of them."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    halves = np.asarray([value >> 32, value & 0xFFFFFFFF], np.uint32)
    values = multihost_utils.process_allgather(halves).tolist()
    return min(high << 32 | low for high, low in values)


def to_devices(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays of the host, the same in every process, on the default device or all of the mesh."""
    if mesh is None:
        return jax.device_put(tree)
    everywhere = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, everywhere)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(np.shape(x), everywhere, np.asarray(x).__getitem__),
        tree,
    )
