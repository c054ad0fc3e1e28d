"""Calibration of one layer after another, for models whose float weights do not fit together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.models.calibration import keep_heads, reduce_taps, through_layers
from qserve_jax.models.config import ModelConfig
from qserve_jax.models.layers import Params
from qserve_jax.models.llama import CausalLM
from qserve_jax.quantization.config import QuantConfig
from qserve_jax.quantization.qtensor import Array
from qserve_jax.quantization.transforms.calibration import ActivationStats, collect_statistics


class LayerCalibrator:
    """The calibration set where it enters one layer; what `quantize_with_recipe` asks of it.

    All params here are trees of one layer, {"layers": [1, ...]}.

    hidden: what enters the layer, float[B, T, D] each, the residual stream; its dtype is that of
      the computation. layer: the layer's number, for errors.
    The first `search_tokens` of the first batch serve searches over the attention's output.

    Layers before this one are the float ones. Their quantised outputs differ by noise that later
    layers would be fitted to; with theirs every layer depends on the float model alone, so that a
    run can be taken up anywhere and gives what `quantize_with_recipe` gives on the whole tree.
    """

    def __init__(
        self,
        config: ModelConfig,
        hidden: Sequence[Array],
        *,
        layer: int = 0,
        search_tokens: int = 1024,
    ):
        self.config, self.hidden, self.layer = config, list(hidden), layer
        self._search_tokens = search_tokens

    def statistics(self, params: Params, *, hessians: bool = False) -> ActivationStats:
        """The statistics of one layer's inputs. Raises ValueError naming a layer with NaN."""
        inputs = _layer_inputs(self.config, hessians)
        return collect_statistics(
            inputs, params, self.hidden, hessians=hessians, first_layer=self.layer
        )

    def heads(self, params: Params) -> dict[str, Array]:
        """`layers/queries` and so on of some tokens, as `attention_heads` gives."""
        x = self.hidden[0]
        rows = max(1, self._search_tokens // x.shape[1])
        return _layer_heads(self.config, params, x[:rows, : self._search_tokens])

    def output_error(self, params: Params, quantized: Params, quant: QuantConfig) -> Array:
        """f32: squared error of the quantised layer's output, with its activations and cache, over
        the square of what the layer adds to the residual stream, 0 where that is nothing. Of the
        first batch."""
        return _output_error(self.config, params, quantized, self.hidden[0], quant)

    def advance(self, params: Params) -> None:
        """Go on to the next layer: `hidden` becomes what this one returns."""
        for i in range(len(self.hidden)):
            self.hidden[i] = _advance(self.config, params, self.hidden[i])
        self.layer += 1


@functools.cache
def _layer_inputs(config: ModelConfig, hessians: bool) -> Callable[[Params, Array], dict[str, Any]]:
    """One function object for all layers, so that it is compiled once."""
    summarize = reduce_taps(hessians)
    return lambda params, x: through_layers(CausalLM(config), params["layers"], x, summarize)[1]


@functools.partial(jax.jit, static_argnums=0)
def _layer_heads(config: ModelConfig, params: Params, x: Array) -> dict[str, Array]:
    return through_layers(CausalLM(config), params["layers"], x, keep_heads)[1]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(config: ModelConfig, params: Params, x: Array) -> Array:
    return through_layers(CausalLM(config), params["layers"], x)[0]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _output_error(
    config: ModelConfig, params: Params, quantized: Params, x: Array, quant: QuantConfig
) -> Array:
    x = x.astype(jnp.float32)  # the rounding of a 16-bit stream would be counted as error
    model = CausalLM(config, act_bits=quant.act_bits, backend="reference")
    exact, _ = through_layers(model, params["layers"], x)
    got, _ = through_layers(model, quantized["layers"], x, kv_bits=quant.kv_bits)
    error, size = (jnp.sum(jnp.square(change)) for change in (got - exact, exact - x))
    return jnp.where(size == 0, 0, error / size)
