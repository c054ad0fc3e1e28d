"""Key centring: take off what all keys of a head have in common before they are cached in 4 bits.

q . (k - c) = q . k - q . c: a vector c taken off all keys moves all scores of a query alike, and
softmax does not see it, so nothing is added back on reading. Without it a channel that lies far
off zero stretches the range that all channels of the head share in the cache. c is of the keys
after the rotary embedding, so weights and biases cannot hold it: it is a leaf of its own,
subtracted where keys are rotated. (SageAttention, arXiv:2410.02367 section 4.2, takes off the mean
of the keys of one call; here it is that of a calibration set, so that pages can be shared.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qserve_jax.quantization.transforms.linear import Params, update_layers

CENTER = "key_center"


def center_keys(params: Params, heads: dict[str, jax.Array]) -> Params:
    """The same function with keys that average to zero over some tokens.

    heads: `layers/keys` [L, B, T, K, H] after the rotary embedding (`attention_heads` of
    qserve_jax.models). Adds the leaf `layers/key_center/center` f32[L, K, H]; run the result with
    the config that `config_of` of qserve_jax.models.llama gives. Raises ValueError for the heads of
    another model.
    """
    layers, *_, kv_heads, size = heads["layers/keys"].shape
    kernel = params["layers"]["k_proj"]["kernel"].shape
    if (layers, kv_heads * size) != (kernel[0], kernel[-1]):
        raise ValueError(
            f"keys have {layers} layers of {kv_heads} x {size} but k_proj has {kernel[0]} of "
            f"{kernel[-1]} outputs: collect the heads of this model"
        )
    mean = heads["layers/keys"].astype(jnp.float32).mean(axis=(1, 2))
    before = params["layers"].get(CENTER)  # the keys lack it already
    return update_layers(
        params, **{CENTER: {"center": mean if before is None else mean + before["center"]}}
    )
