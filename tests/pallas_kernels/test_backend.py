"""Which backend runs: the argument, then the environment, then the first that can."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.pallas_kernels import (
    BACKENDS,
    append_kv,
    paged_attention,
    resolve,
    rope_append_kv,
    w4a8_matmul,
)
from qserve_jax.pallas_kernels.backend import ENVIRONMENT_VARIABLE, as_int32, dispatch
from qserve_jax.quantization.numerics import quantize_activation
from qserve_jax.quantization.params import quantize_kernel
from qserve_jax.quantization.qtensor import KVCache


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.mark.parametrize("name", [None, "auto"])
def test_default_is_all_fastest_first(name):
    assert resolve(name) == BACKENDS
    assert BACKENDS[-1] == "reference"


def test_environment_and_argument(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert resolve(None) == ("reference",)
    assert resolve("mosaic_mma") == ("mosaic_mma",)  # the argument wins
    assert resolve("auto") == BACKENDS
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert resolve(None) == BACKENDS


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match="^backend='sm90' is unknown: use auto or one of mosaic"):
        resolve("sm90")
    nothing: Any
    for nothing in (0, False, (), ""):
        with pytest.raises(ValueError, match=f"^backend={re.escape(repr(nothing))} is unknown"):
            resolve(nothing)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "sm90")
    with pytest.raises(ValueError, match="^QSERVE_JAX_BACKEND='sm90' is unknown"):
        resolve(None)


def refuse(*args, **kwargs):
    raise NotImplementedError("too wide")


def wrong(*args, **kwargs):
    raise ValueError("the caller is wrong")


def answer(x, *, y):
    return x + y


def test_dispatch_takes_the_first_that_can():
    table = {"reference": answer, "mosaic_sm90": refuse}
    assert dispatch("op", table, None, 1, y=2) == 3
    assert dispatch("op", {"reference": refuse, "mosaic_mma": answer}, None, 1, y=2) == 3


def test_dispatch_propagates():
    with pytest.raises(NotImplementedError, match="too wide"):
        dispatch("op", {"mosaic_sm90": refuse, "reference": answer}, "mosaic_sm90", 1, y=2)
    with pytest.raises(NotImplementedError, match="op has no 'mosaic_mma' backend"):
        dispatch("op", {"reference": answer}, "mosaic_mma", 1, y=2)
    with pytest.raises(NotImplementedError, match="too wide"):
        dispatch("op", {"mosaic_sm90": refuse}, None, 1, y=2)
    with pytest.raises(ValueError, match="the caller is wrong"):  # not a reason to try another
        dispatch("op", {"mosaic_sm90": wrong, "reference": answer}, None, 1, y=2)


def calls():
    """Each operation on its smallest case, with the backend left open."""
    x = quantize_activation(jnp.ones((1, 128)))
    w: Any = quantize_kernel(jnp.ones((128, 8)))
    cache = KVCache(jnp.zeros((1, 1, 2, 8, 8)), 16, 8)
    kv = jnp.ones((1, 1, 8))
    zero, one = jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32)
    return {
        "quantized_matmul": lambda **kw: w4a8_matmul(x, w, **kw),
        "append_kv": lambda **kw: append_kv(cache, kv, kv, zero, **kw).pages,
        "paged_attention": lambda **kw: paged_attention(
            kv, cache, zero[None], one, new_k=kv, new_v=kv, **kw
        ),
    }


REFUSES = {
    "quantized_matmul": "mosaic_mma: a weight of N=8, K=128 cannot be packed",
    "append_kv": "head_dim=8, but the append kernel takes",
    "paged_attention": "mosaic_mma: pages of 8 tokens, but the kernel takes 64",
}


@pytest.mark.parametrize("op", ["quantized_matmul", "append_kv", "paged_attention"])
def test_operations_follow_the_choice(op, monkeypatch):
    call = calls()[op]
    expected = call(backend="reference")
    np.testing.assert_array_equal(call(), expected)
    with pytest.raises(NotImplementedError, match=REFUSES[op]):
        call(backend="mosaic_mma")
    with pytest.raises(ValueError, match="backend='triton' is unknown"):
        call(backend="triton")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "mosaic_mma")
    with pytest.raises(NotImplementedError, match=REFUSES[op]):
        call()


@pytest.mark.parametrize(
    "shape, dtype, bits, message",
    [
        ((3, 2, 64 * 72 // 4), "int32", 5, "a cache of bits=5 is none: use 4, 8 or 16"),
        (
            (3, 2, 64 * 72 // 4),
            "float32",
            4,
            r"pages float32\[3, 2, 1152\] hold no 4-bit cache of he",
        ),
        (
            (3, 2, 64 * 136 // 4),
            "int32",
            4,
            r"pages int32\[3, 2, 2176\] hold no 4-bit cache of head",
        ),
        (
            (3, 2, 1, 1, 64 * 72 // 4),
            "int32",
            4,
            "hold no 4-bit cache of head_dim 64: make them as",
        ),
        (
            (3, 2, 64 * 264 // 4),
            "bfloat16",
            16,
            r"pages bfloat16\[3, 2, 4224\] hold no 16-bit cache",
        ),
        ((3, 2, 2, 64, 128), "bfloat16", 16, "hold no 16-bit cache of head_dim 64"),
        ((3, 2, 2, 64, 64), "int32", 16, r"pages int32\[3, 2, 2, 64, 64\] hold no 16-bit cache"),
        ((3, 2, 2, 64, 64), "float8_e4m3fn", 16, "pages float8_e4m3fn.* hold no 16-bit cache"),
        ((0, 2, 2, 64, 64), "bfloat16", 16, "hold no 16-bit cache"),
        ((3, 0, 64 * 72 // 4), "int32", 4, r"pages int32\[3, 0, 1152\] hold no 4-bit cache"),
        ((3, 2, 0), "int32", 8, r"pages int32\[3, 2, 0\] hold no 8-bit cache"),
    ],
)
def test_pages_that_are_none(shape, dtype, bits, message):
    """Which kernels would read as whatever the cache says that they are."""
    cache = KVCache(jnp.zeros(shape, dtype), bits, 64)
    k, none = jnp.zeros((2, 2, 64)), jnp.zeros((2, 1), jnp.int32)
    options: Any = {"attends": "quantized", "backend": "mosaic_sm90"}
    with pytest.raises(ValueError, match=message):
        paged_attention(jnp.zeros((2, 4, 64)), cache, none, none[:, 0], **options)
    with pytest.raises(ValueError, match=message):
        append_kv(cache, k, k, none[:, 0])
    with pytest.raises(ValueError, match=message):
        rope_append_kv([k, k, k], k[:, 0, :32], k[:, 0, :32], cache, none[:, 0])


@pytest.mark.parametrize(
    "cache, layer, message",
    [
        (KVCache(jnp.zeros((3, 2, 2, 8, 12)), 16, 12), None, "head_dim=12 is none: use a multi"),
        (KVCache(jnp.zeros((3, 2, 2, 8, 0)), 16, 0), None, "head_dim=0 is none"),
        (KVCache(jnp.zeros((3, 2, 8 * 24 // 4), jnp.int32), 4.0, 16), None, "bits=4.0 is none"),  # pyright: ignore
        (KVCache(np.zeros((3, 2, 2, 8, 8)), 16, 8), None, "the cache is a ndarray: make a KVCach"),  # pyright: ignore
        (None, None, "the cache is a NoneType: make a KVCache"),
        (
            KVCache(jnp.zeros((2, 3, 2, 2, 8, 8)), 16, 8),
            True,
            r"layer=True is no integer: use 0\.\.1",
        ),
    ],
)
def test_what_is_no_cache_and_no_layer(cache, layer, message):
    k, none = jnp.zeros((2, 2, 8)), jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(ValueError, match=message):
        paged_attention(k, cache, none, none[:, 0], attends="quantized", layer=layer)
    with pytest.raises(ValueError, match=message):
        append_kv(cache, k, k, none[:, 0], layer=layer)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    "dtype, given, expected",
    [
        ("int8", [-1, 127], [-1, 127]),
        ("uint32", [7, 2**32 - 1], [7, 2**31 - 1]),
        ("int64", [-(2**40), 7, 2**32 + 5], [-(2**31), 7, 2**31 - 1]),
        ("uint64", [7, 2**63], [7, 2**31 - 1]),
    ],
)
def test_integers_as_int32(dtype, given, expected, x64):
    """Of numpy, and traced where JAX has 64 bits; what is out of range stays out of range."""
    x = np.array(given, dtype)
    with jax.enable_x64(x64):
        convert = jax.jit(lambda x: as_int32(x=x)) if x64 else lambda x: as_int32(x=x)
        (found,) = convert(x)
    assert found.dtype == jnp.int32 and found.tolist() == expected
