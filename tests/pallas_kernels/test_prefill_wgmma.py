"""The wgmma kernel of prefill attention: its own code on numpy twins, warpgroups in any order."""

import numpy as np
import pytest

from qserve_jax.pallas_kernels.paged_attention import (
    prefill_rows,
    prefill_tile,
    sm90_prefill,
    sm90_prefill_ring,
)
from tests.pallas_kernels import lanes, warpgroups
from tests.pallas_kernels.prefill_cases import expected_of, make_case, operands_of, worst_error

MODULES = (prefill_rows, prefill_tile, sm90_prefill, sm90_prefill_ring)


def emulate(case, attends="full", window=None, *, seed=0, blocks=2, late=True):
    """The kernel's code on twins, on so many blocks."""
    p, memories, out = operands_of(case, attends, window)
    shared_bytes = sm90_prefill_ring.shared_bytes(p) + 1024
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sm90_prefill, "SMS", blocks)
        for block in range(min(blocks, p.blocks)):
            machine = warpgroups.Machine(
                block, sm90_prefill.THREADS, shared_bytes, (seed, block), late=late
            )
            for module in MODULES:
                patch.setattr(module, "ptx", machine.namespace())
                for kind in ("I32", "F32"):
                    patch.setattr(module, kind, getattr(lanes, kind), raising=False)
            sm90_prefill._body(p, *memories, out, machine.shared, "barriers")
    assert out.filled.all()
    return out.array()


CASES = [  # context, new, heads, kv_heads, head_dim, bits
    ([200, 0, 64], [66, 0, 64], 2, 1, 64, 4),
    ([130, 65], [2, 1], 7, 1, 64, 8),
    ([100], [40], 2, 1, 128, 16),
    ([150], [20], 6, 2, 128, 4),
    ([400], [90], 2, 1, 128, 8),
]


@pytest.mark.parametrize("attends", ["full", "quantized"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_s_own_code(case, attends, rng):
    made = make_case(rng, *case, attends=attends)
    found, expected = emulate(made, attends), expected_of(made, attends=attends)
    assert np.isfinite(found).all()
    assert worst_error(found, expected, made.query_lens) < 8e-4
    assert not found[made.context_lens == 0].any()
