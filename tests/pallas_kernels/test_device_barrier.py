"""JAX's barrier over devices before a kernel: left out where the kernel has flags of its own, and
nowhere else, so that all other kernels are launched as the measured ones were."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from qserve_jax.pallas_kernels import append_kv, quantize_activation
from qserve_jax.quantization.qtensor import KVCache
from tests.pallas_kernels import test_prefill_attention, test_sum_norm_quantize
from tests.pallas_kernels.test_decode_attention import lower_decode
from tests.pallas_kernels.w4a8_cases import lower, lower_matmul

HEADS = (8, 2, 64)
S = jax.ShapeDtypeStruct


def matmul(name):
    return lower_matmul(name, True, 16, 256, 256)


def decode(name):
    return lower_decode(name, 4, HEADS, 2, 2)


def prefill(name):
    return test_prefill_attention.lower(2, 64, *HEADS, 4, 2, name=name).as_text()


def append(name):
    def run(pages, k, slots):
        return append_kv(KVCache(pages, 4, 64), k, k, slots, backend=name).pages

    kv = S((4, 2, 64), jnp.bfloat16)
    return lower(run, S((3, 2, 1152), jnp.int32), kv, S((4,), jnp.int32))


def activation(name):
    return lower(lambda x: quantize_activation(x, backend=name), S((4, 256), jnp.bfloat16))


@pytest.mark.parametrize("name", ["mosaic_sm90", "mosaic_mma"])
@pytest.mark.parametrize("program", [matmul, decode, prefill, append, activation])
def test_it_is_there(program, name):
    text = program(name)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert text.count("skip_device_barrier = false") == 1


def test_it_is_left_out():
    mesh = AbstractMesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    text = test_sum_norm_quantize.lower(mesh, *test_sum_norm_quantize.shapes(2, 4, 128))
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert text.count("skip_device_barrier = true") == 1
