"""What the examples share: data to learn, a mesh of CPU devices where there is no other, checks."""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")  # before JAX starts

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from qserve_jax.pallas_kernels import quantized_matmul
from qserve_jax.pallas_kernels.quantize_activation import quantize_activation
from qserve_jax.quantization.qtensor import (
    QUANTIZED_WEIGHTS,
    QuantizedWeight,
    is_quantized,
)

FEATURES, HIDDEN = 128, 256


def make_mesh() -> jax.sharding.Mesh:
    """All devices as (data, model), two along `model` where there are that many."""
    model = 2 if jax.device_count() % 2 == 0 else 1
    return jax.make_mesh(
        (jax.device_count() // model, model),
        ("data", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )


def batch(key: jax.Array, size: int = 64) -> tuple[jax.Array, jax.Array]:
    """(x f32[size, FEATURES], y alike): y is a fixed function of x."""
    x = jax.random.normal(key, (size, FEATURES))
    return x, jnp.sin(x) + jnp.roll(x, 1, axis=-1)


def matmul(x: jax.Array, kernel: jax.Array | QuantizedWeight) -> jax.Array:
    """x [..., K] @ kernel [K, N], by integers where the kernel is quantised (W4A8)."""
    if isinstance(kernel, QUANTIZED_WEIGHTS):
        return quantized_matmul(quantize_activation(x), kernel, out_dtype=x.dtype)
    return x @ kernel


def save_and_restore(tree: Any) -> Any:
    """Save a quantised tree with Orbax and restore it, each device reading its own shards."""
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        path = Path(folder) / "quantized"
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
        )
        return checkpointer.restore(path, like)


def report(
    name: str, float_loss: jax.Array, quantized_loss: jax.Array, quantized: Any, restored: Any
) -> None:
    """Print the result; raises AssertionError where the restored tree differs."""
    for a, b in zip(jax.tree.leaves(quantized), jax.tree.leaves(restored), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim) and (a == b).all()
    leaves = jax.tree.leaves(quantized, is_leaf=is_quantized)
    codes = [leaf.codes for leaf in leaves if is_quantized(leaf)]
    shard = codes[0].sharding.shard_shape(codes[0].shape)
    print(
        f"{name}: loss {float_loss:.4f} in float, {quantized_loss:.4f} in W4A8; "
        f"{len(codes)} kernels, codes {codes[0].shape} in shards of {shard}; restored from Orbax"
    )
