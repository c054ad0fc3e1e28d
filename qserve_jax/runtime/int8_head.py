"""The output head in 8 bits: half the bytes of what is, in a small model, most of a decode step."""

from __future__ import annotations

import dataclasses

import jax

from qserve_jax.checkpoint import LoadedModel
from qserve_jax.quantization.numerics import quantize_int8
from qserve_jax.quantization.qtensor import Source, W8PerChannel


def with_int8_head(loaded: LoadedModel) -> LoadedModel:
    """The model with its head, or its embedding where they are tied, as 8-bit weights per token of
    the vocabulary (symmetric, rounded to nearest); its input is then quantised per token as well.

    A tied embedding stays as it is, and the model has a head of its own from then on. QoQ keeps the
    head in 16 bits; `scripts/lm_head_bits.py` measures what this loses.
    """
    config = loaded.config
    table = loaded.params["embed" if config.tie_embeddings else "lm_head"]["embedding"]
    codes, scale = jax.jit(quantize_int8)(table)
    vocab, width = table.shape
    source = Source(("out", "in"), (width,), (vocab,), table.dtype.name)
    config = dataclasses.replace(config, tie_embeddings=False)
    return dataclasses.replace(
        loaded,
        model=loaded.model.clone(config=config),
        config=config,
        params={**loaded.params, "lm_head": {"embedding": W8PerChannel(codes, scale, source)}},
    )
