"""Where tokens go: slots of the pages that the block table gives, and none elsewhere."""

import jax.numpy as jnp
import numpy as np

from qserve_jax.models.llama import slot_mapping


def test_slots_and_what_has_none():
    """Also of page ids whose slots are no int32: they would wrap around into the cache."""
    table = jnp.asarray([[3, -1, 2**26, 2**25 - 1], [2**31 - 1, 0, -(2**31), 2**25]], jnp.int32)
    positions = jnp.asarray([[0, 63, 64, 128, 192, 255, 256, -1]] * 2, jnp.int32)
    valid = jnp.ones((2, 8), bool).at[0, 1].set(False)
    slots = np.asarray(slot_mapping(table, positions, valid, 64)).reshape(2, 8)
    assert slots[0].tolist() == [192, -1, -1, -1, 2**31 - 64, 2**31 - 1, -1, -1]
    assert slots[1].tolist() == [-1, -1, 0, -1, -1, -1, -1, -1]


def test_pages_of_one_token():
    table, position = jnp.asarray([[2**31 - 1, 7]], jnp.int32), jnp.asarray([[0, 1]], jnp.int32)
    slots = slot_mapping(table, position, jnp.ones((1, 2), bool), 1)
    assert slots.tolist() == [2**31 - 1, 7]
