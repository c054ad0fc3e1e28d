"""Memory of the devices: where several share a model, that of the fullest."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from typing import Any

import jax
from jax.sharding import Mesh


def held_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on the device that holds most of them, of this process's."""
    held: Counter[Any] = Counter()
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values(), default=0)


def limit_bytes() -> int | None:
    """Bytes that JAX may use of the device that lets it use least; None where they do not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if not all("bytes_limit" in found for found in stats):
        return None
    return min(found["bytes_limit"] for found in stats)


def free_bytes(mesh: Mesh | None) -> int | None:
    """Bytes that every device of the mesh (None: the first one) has free; None where they do not
    say."""
    devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in found for found in stats):
        return None
    return min(found["bytes_limit"] - found["bytes_in_use"] for found in stats)


def peak_bytes() -> int:
    """Most memory in use so far: on a device where they say, else of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("peak_bytes_in_use" in found for found in stats):
        return max(found["peak_bytes_in_use"] for found in stats)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
