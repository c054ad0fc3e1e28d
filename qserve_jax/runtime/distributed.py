"""Several processes that run one model: each runs the same program on its own devices.

They make the same calls in the same order, so what the host decides must not depend on a clock or
on what one of them alone knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
"""Where what no flag says is read from."""


def join_processes(given: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    """`jax.distributed.initialize` with what is given or in the environment; False for nothing.

    Before JAX's first use of a device. The address "auto" leaves all to JAX, which knows Slurm,
    Open MPI and others. Raises ValueError where a part is missing or no such process can be.
    """
    found = {
        name: given[name] if given.get(name) is not None else environment.get(variable)
        for name, variable in VARIABLES.items()
    }
    missing = [name for name, value in found.items() if value is None]
    if len(missing) == len(found):
        return False
    if found["coordinator_address"] == "auto":
        jax.distributed.initialize()
        return True
    if missing:
        raise ValueError(f"{missing[0]} is missing for several processes: give all of {[*found]}")
    try:
        count, process = int(found["num_processes"]), int(found["process_id"])
    except ValueError:
        count, process = 0, 0
    if not 0 <= process < count:
        raise ValueError(
            f"process_id={found['process_id']!s:.20} is not in 0..num_processes - 1 with "
            f"num_processes={found['num_processes']!s:.20}: correct one"
        )
    jax.distributed.initialize(found["coordinator_address"], count, process)
    return True


def agreed(value: int) -> int:
    """The first process's value, in all of them."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    halves = np.asarray([value >> 32, value & 0xFFFFFFFF], np.uint32)
    high, low = multihost_utils.broadcast_one_to_all(halves)
    return int(high) << 32 | int(low)


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
