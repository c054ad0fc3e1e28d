"""What an evaluation compares: a model with parameters and a cache precision, under a name."""

from __future__ import annotations

import dataclasses
from typing import Any

from qserve_jax.checkpoint import LoadedModel
from qserve_jax.evaluation.yardsticks import w4a4_params, w4a16_params
from qserve_jax.models.llama import CausalLM
from qserve_jax.quantization.config import QuantConfig
from qserve_jax.quantization.params import quantize_params

COMPARISONS = ("float", "rtn", "w4a16", "w4a4")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One row: `model.apply({"params": params}, tokens, kv_bits=kv_bits)`."""

    name: str
    model: CausalLM
    params: Any
    kv_bits: int


def measured(loaded: LoadedModel) -> Candidate:
    """The model as it was loaded."""
    name = precision_name(loaded.quant_config)
    return Candidate(name, loaded.model, loaded.params, loaded.quant_config.kv_bits)


def comparison(name: str, reference: LoadedModel, config: QuantConfig) -> Candidate:
    """One of COMPARISONS, made of the float model `reference`.

    float: as it is. rtn: `config` by round to nearest. w4a16: 4-bit weights in groups of 128, the
    rest in float. w4a4: 4-bit weights and activations in groups of 128 and a 4-bit KV cache.
    """
    model = reference.model.clone(act_bits=config.act_bits)
    if name == "float":
        return Candidate("float", model, reference.params, 16)
    if name == "rtn":
        label = f"{precision_name(config)} RTN"
        return Candidate(label, model, quantize_params(reference.params, config), config.kv_bits)
    if name == "w4a16":
        return Candidate("W4A16KV16 g128, fake", model, w4a16_params(reference.params), 16)
    if name == "w4a4":
        return Candidate("W4A4KV4 g128, fake", model, w4a4_params(reference.params), 4)
    raise ValueError(f"comparison {name!r} is unknown: use one of {', '.join(COMPARISONS)}")


def precision_name(config: QuantConfig) -> str:
    """`W4A8KV4 g128`, `W4A8KV4 per channel`, `W8A8KV8`, `float`."""
    if config.weight_bits == config.act_bits == config.kv_bits == 16:
        return "float"
    groups = {-1: " per channel", 128: " g128"}[config.group_size]
    return config.precision.upper() + (groups if config.weight_bits == 4 else "")
