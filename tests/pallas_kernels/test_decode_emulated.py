"""The decode attention kernels themselves, run by an emulated GPU, against float64."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.pallas_kernels import intrinsics, paged_attention
from qserve_jax.pallas_kernels.paged_attention import mosaic_decode
from qserve_jax.pallas_kernels.paged_attention.decode_config import DecodeConfig
from tests.pallas_kernels import emulator
from tests.pallas_kernels.attention_cases import make_case, worst_error

LENS = [130, 0, 65, 1, 64, 3, 63, 323]
TOLERANCE = 2.5e-3  # the error that is allowed; rounding the output to bf16 alone takes 1.7e-3
BACKENDS = ("mosaic_sm90", "mosaic_mma")


@pytest.fixture
def emulated(monkeypatch):
    """Run paged_attention's kernel on the emulated GPU, with this config."""

    def run(case, name, config=None, eager=True):
        launch = functools.partial(emulator.launch, monkeypatch, eager=eager)
        with monkeypatch.context() as patch:
            patch.setattr(intrinsics, "launch", launch)
            if config is not None:
                patch.setattr(mosaic_decode, "choose_config", lambda p, clusters: config)
            return paged_attention(**case.arguments, backend=name)

    return run


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("attends", ["full", "quantized"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("h", [64, 128])
def test_lengths_around_the_page(emulated, name, attends, bits, h, rng):
    case = make_case(rng, LENS, bits=bits, h=h, attends=attends)
    eager = h == 64
    out = emulated(case, name, DecodeConfig(3), eager)
    assert out.dtype == jnp.bfloat16 and out.shape == (len(LENS), 8, h)
    error = worst_error(out, case.expected)
    print(error)
    assert error <= TOLERANCE
