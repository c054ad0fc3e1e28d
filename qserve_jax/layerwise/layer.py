"""One layer: transformed, quantised, and how far it is from what it was."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qserve_jax.models.config import ModelConfig
from qserve_jax.models.layer_calibration import LayerCalibrator
from qserve_jax.quantization.params import dequantize_kernel
from qserve_jax.quantization.qtensor import Array, is_quantized
from qserve_jax.quantization.recipes import Recipe, quantize_transformed, transform_with_recipe
from qserve_jax.quantization.transforms import rotate
from qserve_jax.quantization.transforms.calibration import input_name
from qserve_jax.quantization.transforms.linear import matmul

Tree = dict[str, Any]


def quantize_layer(
    config: ModelConfig, layer: Tree, calibrator: LayerCalibrator | None, recipe: Recipe
) -> tuple[Tree, dict[str, Any]]:
    """{"layers": [1, ...]}, float32 and rotated already where the recipe rotates -> (the same tree
    quantised, its errors).

    calibrator: where it enters this layer; None for recipes that need none.
    The errors are relative and squared: of each projection's weights, and, with Hessians, of its
    output; with a calibrator that of the layer, quantised activations and cache included.
    """
    moved, stats = layer, None
    if calibrator is None:
        assert not recipe.needs_calibration
    else:
        moved = transform_with_recipe(config, layer, calibrator, recipe.without(rotate=False))
        if recipe.needs_hessians:
            stats = calibrator.statistics(moved, hessians=True)
    quantized = quantize_transformed(moved, stats, recipe)
    hessians = {} if stats is None else stats.hessian
    report: dict[str, Any] = {}
    if calibrator is not None:
        error = calibrator.output_error(layer, quantized, recipe.quant)
        report["output_error"] = float(error)
    report["projections"] = _projection_errors(moved, quantized, hessians)
    return quantized, report


def _projection_errors(moved: Tree, quantized: Tree, hessians: dict[str, Array]) -> Tree:
    errors = {}
    for name, part in quantized["layers"].items():
        if not is_quantized(part.get("kernel")):
            continue
        hessian = hessians.get(input_name(f"layers/{name}/kernel"))
        found = _kernel_errors(moved["layers"][name]["kernel"], part["kernel"], hessian)
        errors[name] = {key: float(value) for key, value in found.items()}
    return errors


@jax.jit
def _kernel_errors(w: Array, quantized: Any, hessian: Array | None) -> dict[str, Array]:
    """Of w f32[1, K, N]: |dW|^2 / |W|^2, and |X dW|^2 / |X W|^2 = tr(dW^T H dW) / tr(W^T H W)."""
    w, delta = w[0], (dequantize_kernel(quantized) - w)[0]
    errors = {"weight_error": _ratio(jnp.sum(delta * delta), jnp.sum(w * w))}
    if hessian is not None:
        output, exact = (jnp.sum(matmul(hessian[0], x) * x) for x in (delta, w))
        errors["output_error"] = _ratio(output, exact)
    return errors


def _ratio(error: Array, size: Array) -> Array:
    return jnp.where(size == 0, 0, error / size)  # NaN is to be seen


@jax.jit
def rotate_tree(tree: Tree, basis: Array) -> Tree:
    """`rotate` of a layer or a table, in float32; the basis f32[D, D] is no constant of the
    program."""
    return rotate(jax.tree.map(lambda w: w.astype(jnp.float32), tree), basis)


@jax.jit
def embedded(table: Array, tokens: Array, basis: Array | None) -> Array:
    """Rows of the embedding [V, D] of tokens i32[B, T], in the basis: f32[B, T, D]."""
    x = table[tokens].astype(jnp.float32)
    return x if basis is None else matmul(x, basis)


def as_stored(tree: Tree, dtype: str) -> Tree:
    """Float leaves on the host in `dtype`, containers as they are."""
    return jax.tree.map(
        lambda leaf: leaf if is_quantized(leaf) else np.asarray(leaf.astype(dtype)),
        tree,
        is_leaf=is_quantized,
    )
