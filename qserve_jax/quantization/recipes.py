"""The pipelines of QoQ: which transforms, in which order (rotate, reorder, smooth, weights)."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from qserve_jax.quantization.config import QuantConfig
from qserve_jax.quantization.params import quantize_params
from qserve_jax.quantization.transforms import (
    ActivationStats,
    center_keys,
    quantize_with_statistics,
    reorder_ffn,
    reorder_values,
    rotate,
    rotate_values,
    search_smooth_attention,
    smooth_attention,
    smooth_down,
    smooth_values,
)
from qserve_jax.quantization.transforms.heads import AttentionConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done, in the order of the fields, and with what.

    rotate: block-input rotation, norms folded. rotate_values: also the value heads,
      which the demo model does not gain from (docs/results/quantize_options.json).
    reorder: channels sorted by salience.
    center_keys: the keys' mean taken off them (not in the paper, nor in its checkpoint format).
    smooth_keys: alpha of SmoothAttention, "search" for the grid, None for none.
    smooth_outputs: alpha of block-output smoothing, None for none.
    clip: search of weight ranges (per channel). gptq: else round to nearest.
    quant: bits and group size; the model is to run with its act_bits and kv_bits.
    """

    rotate: bool = False
    rotate_values: bool = False
    reorder: bool = False
    center_keys: bool = False
    smooth_keys: float | str | None = None
    smooth_outputs: float | None = None
    clip: bool = False
    gptq: bool = False
    quant: QuantConfig = QuantConfig()

    @property
    def needs_calibration(self) -> bool:
        """Whether any step reads activations."""
        smooths = self.smooth_keys is not None or self.smooth_outputs is not None
        return self.reorder or self.center_keys or smooths or self.needs_hessians

    @property
    def needs_hessians(self) -> bool:
        """Whether the weights are quantised by statistics."""
        return self.clip or self.gptq

    def without(self, **changes: Any) -> Recipe:
        """The recipe with some fields changed: an ablation."""
        return dataclasses.replace(self, **changes)


PER_CHANNEL = QuantConfig(group_size=-1)
QOQ_G128 = Recipe(rotate=True, reorder=True, smooth_keys="search", smooth_outputs=0.05, gptq=True)
QOQ_PER_CHANNEL = Recipe(
    rotate=True, smooth_keys="search", smooth_outputs=0.05, clip=True, gptq=True, quant=PER_CHANNEL
)
WHOLE = {"qoq-g128": QOQ_G128, "qoq-per-channel": QOQ_PER_CHANNEL}
WITHOUT = {
    "rotation": {"rotate": False},
    "smooth-attention": {"smooth_keys": None},
    "output-smoothing": {"smooth_outputs": None},
    "gptq": {"gptq": False},
}

RECIPES = (
    WHOLE
    | {"rtn": Recipe(), "rtn-per-channel": Recipe(quant=PER_CHANNEL)}
    | {
        f"{name}-no-{part}": recipe.without(**change)
        for name, recipe in WHOLE.items()
        for part, change in WITHOUT.items()
    }
    | {f"{name}-centered": recipe.without(center_keys=True) for name, recipe in WHOLE.items()}
    | {"qoq-g128-no-reordering": QOQ_G128.without(reorder=False)}
    | {"qoq-per-channel-no-clipping": QOQ_PER_CHANNEL.without(clip=False)}
)
"""Recipes by name; `rtn` and `qoq-g128` have groups of 128."""


class Calibration(Protocol):
    """A calibration set; `qserve_jax.models.calibration.Calibrator` is one."""

    def statistics(self, params: Any, *, hessians: bool = False) -> ActivationStats: ...
    def heads(self, params: Any) -> dict[str, jax.Array]: ...


def find_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of that name, or itself. ValueError for an unknown name."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} is unknown: use one of {', '.join(RECIPES)}")
    return RECIPES[recipe]


def quantize_with_recipe(
    config: AttentionConfig, params: Any, calibration: Calibration, recipe: str | Recipe
) -> Any:
    """The canonical float tree, or part of it (one layer), -> the quantised one.

    calibration: asked anew after each step that changes what flows between the layers.
    Rotation gives a tied model a head of its own, centring its keys a centre: run the result with
    the config that `config_of` of qserve_jax.models.llama gives. Raises ValueError for an unknown
    recipe, and where an activation is not finite.
    """
    recipe = find_recipe(recipe)
    params = transform_with_recipe(config, params, calibration, recipe)
    stats = calibration.statistics(params, hessians=True) if recipe.needs_hessians else None
    return quantize_transformed(params, stats, recipe)


def quantize_transformed(params: Any, stats: ActivationStats | None, recipe: Recipe) -> Any:
    """The last step: a tree of `transform_with_recipe` and its statistics, with Hessians, or None
    where recipe.needs_hessians is false."""
    if stats is None:
        return _quantize_rounded(params, recipe.quant)
    return quantize_with_statistics(params, recipe.quant, stats, gptq=recipe.gptq, clip=recipe.clip)


_quantize_rounded = jax.jit(quantize_params, static_argnums=1)


def transform_with_recipe(
    config: AttentionConfig, params: Any, calibration: Calibration, recipe: str | Recipe
) -> Any:
    """Only the steps that leave the float model's function as it is; float32 kernels."""
    recipe = find_recipe(recipe)
    params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    if recipe.rotate:
        params = jax.jit(rotate)(params)
    if recipe.rotate_values:
        params = rotate_values(params, config)
    if recipe.reorder:
        stats = calibration.statistics(params)
        params = reorder_values(reorder_ffn(params, stats), config, stats)
    if recipe.center_keys:
        params = center_keys(params, calibration.heads(params))
    if recipe.smooth_keys is not None:
        params = _smooth_keys(config, params, calibration, recipe)
    if recipe.smooth_outputs is not None:
        stats = calibration.statistics(params)
        params = smooth_down(params, stats, recipe.smooth_outputs)
        params = smooth_values(params, config, stats, recipe.smooth_outputs)
    return params


def _smooth_keys(config, params, calibration, recipe):
    stats = calibration.statistics(params)
    if recipe.smooth_keys != "search":
        return smooth_attention(params, config, stats, recipe.smooth_keys)
    if recipe.quant.kv_bits == 16:
        return params  # nothing to gain
    heads, kv_bits = calibration.heads(params), recipe.quant.kv_bits
    return search_smooth_attention(params, config, stats, heads, kv_bits=kv_bits)
