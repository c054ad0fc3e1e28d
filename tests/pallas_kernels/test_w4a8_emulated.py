"""The matmul kernels themselves, whole, run by an emulated GPU: exactly numpy's outputs.

What it cannot see is the memory model, a race within a warp, and whether the four warps of a wgmma
come together; of orders it draws one for each case, test_w4a8_ring.py many, of the ring alone.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.pallas_kernels.w4a8_matmul import (
    mosaic_mma,
    mosaic_sm90,
    sm90_exchange,
    sm90_tiles,
    to_kernel_layout,
)
from qserve_jax.pallas_kernels.w4a8_matmul.layout import take_layer
from qserve_jax.pallas_kernels.w4a8_matmul.mma_config import MmaConfig
from qserve_jax.pallas_kernels.w4a8_matmul.problem import INT32_SUMS
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_tiles import Sm90Config
from tests.pallas_kernels.matmul_machines import Agent, multiply
from tests.pallas_kernels.w4a8_cases import (
    every_kind,
    exact_sums,
    expected_output,
    make_activation,
    make_packed,
    make_weight,
)

MMA = [  # m, n, k, config
    (1, 64, 640, MmaConfig(1, 2, 4, 8, 3)),  # teams with a chunk, and one with two
    (3, 64, 1152, MmaConfig(1, 1, 8, 8, 2)),
    (17, 192, 384, MmaConfig(2, 2, 2, 32, 4)),  # more stages than chunks
    (60, 64, 512, MmaConfig(3, 1, 4, 24, 2)),  # three by two blocks, of 48 channels
    (33, 192, 384, MmaConfig(2, 4, 2, 32, 3)),  # the last block half beyond N
    (9, 64, 512, MmaConfig(4, 2, 1, 24, 4)),  # the only block too; more threads copy x than it has
    (64, 128, 128, MmaConfig(4, 2, 1, 64, 2)),  # sums that take more room than the rings
    (130, 64, 256, MmaConfig(4, 1, 1, 128, 3)),
]
WGMMA = [  # m, n, k, blocks there are, config
    (1, 64, 128, 132, Sm90Config(8, 1, 1, 4, 1)),
    (40, 192, 640, 2, Sm90Config(24, 1, 1, 4, 1)),  # six tiles of two blocks
    (130, 192, 256, 2, Sm90Config(256, 2, 1, 4, 1)),
    (130, 192, 384, 4, Sm90Config(64, 2, 1, 5, 2)),  # a cluster half beyond N
    (40, 320, 384, 2, Sm90Config(64, 3, 1, 5, 1, lead=2)),
    (17, 128, 384, 132, Sm90Config(32, 2, 2, 4, 1)),  # chunks that they do not divide
    (40, 192, 384, 2, Sm90Config(32, 1, 4, 2, 1)),  # sums beside the slots
    (64, 64, 640, 132, Sm90Config(64, 1, 4, 2, 1)),
    (64, 64, 512, 132, Sm90Config(64, 1, 1, 4, 1, k_blocks=2)),
    (40, 64, 384, 132, Sm90Config(64, 1, 1, 4, 1, k_blocks=3)),  # parts that overlap
    (60, 64, 640, 132, Sm90Config(64, 1, 2, 2, 1, k_blocks=4)),  # blocks without a chunk
]
PAIR = (40, 64, 1280, Sm90Config(64, 1, 2, 2, 1, k_blocks=2))
FINE = [  # the last round cut finer
    (40, 832, 256, 5, Sm90Config(64, 2, 1, 4, 1, 3)),  # 7 tiles: 5 and 2
    (128, 384, 256, 8, Sm90Config(64, 2, 1, 4, 1, 3)),  # none and 2 x 3
    (100, 576, 256, 4, Sm90Config(64, 2, 1, 5, 1, 2, 1)),
    (64, 320, 384, 4, Sm90Config(64, 1, 4, 2, 1, 1)),
    (120, 640, 256, 8, Sm90Config(128, 1, 1, 5, 2, 1)),  # clusters: 4 and 1
]


def operands(per_group, m, n, k, rng):
    """x, two layers of weights, a bias and a residual."""
    bias = jnp.asarray(rng.normal(size=n), jnp.float32)
    residual = jnp.asarray(rng.normal(size=(m, n)), jnp.float32)
    return make_activation(rng, m, k), make_weight(per_group, rng, (2, n, k)), bias, residual


def check(per_group, m, n, k, config, rng, dtype="bfloat16", residual_dtype=None):
    """With everything. Copies land as late as they may, or per group as soon."""
    x, w, bias, residual = operands(per_group, m, n, k, rng)
    residual = residual.astype(residual_dtype or dtype)
    expected = expected_output(x, take_layer(w, 1), jnp.dtype(dtype), bias, residual)
    options = {"bias": bias, "residual": residual, "layer": 1, "out_dtype": dtype}
    found = multiply(x, to_kernel_layout(w), config, seed=int(per_group), **options)
    np.testing.assert_array_equal(found, expected)


@every_kind
@pytest.mark.parametrize("m, n, k, config", MMA)
def test_mma(per_group, m, n, k, config, rng):
    check(per_group, m, n, k, config, rng)


@every_kind
@pytest.mark.parametrize("m, n, k, sms, config", WGMMA + FINE)
def test_wgmma(per_group, m, n, k, sms, config, rng, monkeypatch):
    monkeypatch.setattr(sm90_tiles, "SMS", sms)
    assert bool(sm90_tiles.cut(config, m, n).parts) == (config.last < 4)
    check(per_group, m, n, k, config, rng)


SMALL = {"mma": MmaConfig(2, 2, 2, 16, 2), "wgmma": Sm90Config(16, 1, 2, 2, 1)}
every_design = pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())


@every_kind
@every_design
@pytest.mark.parametrize(
    "dtype, residual", [("float16", "float16"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_dtypes(config, dtype, residual, per_group, rng):
    check(per_group, 19, 64, 256, config, rng, dtype, residual)


@every_design
@pytest.mark.parametrize("adds", [(), ("bias",), ("residual",)])
def test_what_is_added(config, adds, rng):
    """And weights that are not stacked."""
    x, w, bias, residual = operands(False, 19, 64, 256, rng)
    w = take_layer(w, 0)
    added: dict[str, Any] = {"bias": bias, "residual": residual.astype(jnp.float16)}
    added = {name: added[name] for name in adds}
    expected = expected_output(x, w, jnp.float16, **added)
    found = multiply(x, to_kernel_layout(w), config, out_dtype="float16", **added)
    np.testing.assert_array_equal(found, expected)


@every_design
@every_kind
@pytest.mark.parametrize("layer, is_read", [(0, 0), (-1, 2), (-3, 0), (3, 2), (-(2**31), 0)])
def test_a_layer_counts_from_the_end_or_is_clamped(config, per_group, layer, is_read, rng):
    x, w = make_activation(rng, 5, 256), make_weight(per_group, rng, (3, 64, 256))
    expected = expected_output(x, take_layer(w, is_read), jnp.bfloat16)
    found = multiply(x, to_kernel_layout(w), config, layer=jnp.int32(layer))
    np.testing.assert_array_equal(found, expected)


@every_design
@every_kind
def test_extreme_sums(config, per_group, rng):
    x, w = make_activation(rng, 19, 384, extreme=True), make_packed(per_group, rng, 128, 384)
    found = multiply(x, w, config, layer=0, out_dtype=INT32_SUMS)
    np.testing.assert_array_equal(found, exact_sums(x, w, 0))


# That these tests can fail

MEET = "without meeting|before it was written"


@pytest.mark.parametrize(
    "m, n, k, config, where, name, wrong, says",
    [
        (*MMA[2], mosaic_mma, "_sync_team", lambda *_: None, MEET),
        (*MMA[2], Agent, "wait_copies", lambda *_: None, "a copy that no one waited for"),
        (*MMA[0], mosaic_mma, "x_offset", lambda token, piece: token * 128, "not equal"),
        (*PAIR, Agent, "wait", lambda *_: None, MEET),
        (*PAIR, Agent, "wait_for_cluster", lambda *_: None, MEET),
        (*PAIR, Agent, "wgmma_fence", lambda self, registers: registers, "not fenced"),
        (*PAIR, mosaic_sm90, "_release", lambda *_: None, "deadlock"),
        (*PAIR, sm90_exchange, "_add", lambda *_: None, "not equal"),
        (*PAIR, Agent, "sync_block", lambda *_: None, "an mbarrier that nobody has made"),
    ],
)
def test_the_emulation_notices(m, n, k, config, where, name, wrong, says, rng, monkeypatch):
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError, match=says):
        check(False, m, n, k, config, rng)
