"""Weights to and from qwix's QArray: over a stand-in where qwix is not installed."""

import dataclasses
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.quantization import (
    QuantConfig,
    W4PerChannel,
    W4PerGroup,
    W8PerChannel,
    dequantize_kernel,
    quantize_kernel,
)
from qserve_jax.quantization.qwix_arrays import from_qwix, to_qwix

HAS_QWIX = importlib.util.find_spec("qwix") is not None


@dataclasses.dataclass(frozen=True)
class StandIn:
    qvalue: Any
    scale: Any
    zero_point: Any = None


@pytest.fixture(autouse=True)
def qwix(monkeypatch):
    if HAS_QWIX:
        return importlib.import_module("qwix")
    module = ModuleType("qwix")
    module.QArray = StandIn  # type: ignore
    monkeypatch.setitem(sys.modules, "qwix", module)
    return module


def test_without_qwix(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    weight = quantize_kernel(jnp.ones((128, 8)), QuantConfig())
    with pytest.raises(ImportError, match="to_qwix needs qwix, .*: pip install qwix"):
        to_qwix(weight)


def value(array):
    """(qvalue - zero_point) * scale by qwix's definition, in numpy."""
    parts = [array.scale, array.zero_point]
    shape = array.qvalue.shape
    scale, zero = (
        0.0
        if x is None
        else np.kron(np.asarray(x, np.float32), np.ones(np.divide(shape, x.shape).astype(int)))
        for x in parts
    )
    return (np.asarray(array.qvalue, np.float32) - zero) * scale


LAYOUTS = {
    "[K, N]": ((256, 6), (-2,), (-1,), 128),
    "[L, K, N]": ((3, 256, 6), (-2,), (-1,), 128),
    "[N, K]": ((6, 256), (-1,), (-2,), 128),
    "[D, heads, head_dim]": ((256, 2, 3), (-3,), (-2, -1), 128),
    "[heads, head_dim, D]": ((8, 64, 6), (-3, -2), (-1,), 128),
    "[heads, L, head_dim, D]": ((2, 3, 256, 6), (0, -2), (-1,), 128),
}
CONFIGS = {
    "w4 g128": (QuantConfig(), W4PerGroup),
    "w4": (QuantConfig(group_size=-1), W4PerChannel),
    "w8": (QuantConfig.preset("w8a8kv8"), W8PerChannel),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(rng, layout, config):
    shape, contract, out, _ = LAYOUTS[layout]
    config, kind = CONFIGS[config]
    kernel = jnp.asarray(rng.normal(size=shape), jnp.float32)
    w = quantize_kernel(kernel, config, contract, out)
    array = to_qwix(w)
    assert array.qvalue.shape == shape
    assert array.qvalue.dtype == (jnp.int8 if kind is W8PerChannel else jnp.int4)
    expected = np.asarray(dequantize_kernel(w))
    np.testing.assert_allclose(value(array), expected, rtol=1e-6, atol=1e-6)
    back = from_qwix(array, contract, out)
    assert type(back) is kind and back.source == w.source
    np.testing.assert_array_equal(back.codes, w.codes)
    np.testing.assert_allclose(dequantize_kernel(back), expected, rtol=1e-6, atol=1e-6)
    if kind is W8PerChannel:
        np.testing.assert_array_equal(back.channel_scale, w.channel_scale)


def test_groups_in_place():
    """Groups of 128 over heads of 64: two heads share a scale."""
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(4, 64, 5)), jnp.float32)
    array = to_qwix(quantize_kernel(kernel, QuantConfig(), (-3, -2), (-1,)))
    assert array.scale.shape == array.zero_point.shape == (2, 1, 5)


def test_under_jit(rng):
    w = quantize_kernel(jnp.asarray(rng.normal(size=(128, 4)), jnp.float32))
    scale = jax.jit(lambda w: to_qwix(w).scale)(w)
    np.testing.assert_array_equal(scale, to_qwix(w).scale)


def test_refused(rng, qwix):
    kernel = jnp.asarray(rng.normal(size=(256, 4)), jnp.float32)
    w = quantize_kernel(kernel)
    assert isinstance(w, W4PerGroup)
    with pytest.raises(ValueError, match="layout 'mma_w4' is a kernel's: apply from_kernel_layout"):
        to_qwix(dataclasses.replace(w, layout="mma_w4"))
    with pytest.raises(ValueError, match="zero point .* is no integer in 0..15"):
        to_qwix(dataclasses.replace(w, group_offset=w.group_offset - 1))
    stack = quantize_kernel(jnp.stack([kernel, kernel]))
    with pytest.raises(ValueError, match="lack stack axes of .* convert the whole stack"):
        to_qwix(jax.tree.map(lambda x: x[0], stack))
    awkward = quantize_kernel(jnp.ones((4, 96, 5)), QuantConfig(), (-3, -2), (-1,))
    with pytest.raises(ValueError, match=r"groups of 128 inputs do not fit the axes \(4, 96\)"):
        to_qwix(awkward)

    array = to_qwix(w)
    with pytest.raises(ValueError, match="no multiples 1..16 of one per channel is no QoQ weight"):
        from_qwix(dataclasses.replace(array, scale=array.scale * jnp.array([[1.0], [1.003]])))
    small = qwix.QArray(
        array.qvalue, jnp.repeat(array.scale, 2, 0) * jnp.array([[1], [2], [1], [2]])
    )
    with pytest.raises(ValueError, match="groups that are not of 128 inputs is no QoQ weight"):
        from_qwix(small)
    wide = jnp.array([[1.0], [16.0]]) * jnp.ones((1, 4))
    far = qwix.QArray(jnp.full((256, 4), 7, jnp.int4), wide, jnp.full((2, 4), -8, jnp.int4))
    with pytest.raises(ValueError, match="leave int8"):
        from_qwix(far)
    with pytest.raises(
        ValueError, match="qvalue int8 with scale .* is no QoQ weight: quantize_par"
    ):
        from_qwix(qwix.QArray(jnp.ones((256, 4), jnp.int8), wide))
    with pytest.raises(ValueError, match="does not fit contract=.* name its axes"):
        from_qwix(array, contract=(-1,))


@pytest.mark.skipif(not HAS_QWIX, reason="qwix is not installed: pip install qwix")
@pytest.mark.parametrize("kind", ["int8", "int4", "int4 asymmetric", "int4 g128"])
def test_arrays_that_qwix_makes(rng, kind, qwix):
    kernel = jnp.asarray(rng.normal(size=(256, 6)), jnp.float32)
    bits, _, variant = kind.partition(" ")
    array = qwix.quantize(
        kernel,
        jnp.dtype(bits),
        channelwise_axes=[1],
        tiled_axes={0: 128} if variant == "g128" else None,
        calibration_method="minmax" if variant == "asymmetric" else "absmax",
    )
    if variant == "g128":  # any float per group: no second level
        with pytest.raises(ValueError, match="no multiples 1..16 of one per channel"):
            from_qwix(array)
        return
    found = dequantize_kernel(from_qwix(array))
    np.testing.assert_allclose(found, qwix.dequantize(array), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not HAS_QWIX, reason="qwix is not installed: pip install qwix")
def test_qwix_computes_with_ours(rng, qwix):
    w = quantize_kernel(jnp.asarray(rng.normal(size=(256, 6)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(3, 256)), jnp.float32)
    found = qwix.dot_general(x, to_qwix(w), (((1,), (0,)), ((), ())))
    np.testing.assert_allclose(found, x @ dequantize_kernel(w), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(
        qwix.dequantize(to_qwix(w)), dequantize_kernel(w), rtol=1e-6, atol=1e-6
    )
