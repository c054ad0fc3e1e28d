"""Causal attention of fresh prompts over themselves, by cuDNN: nothing of size T x T is stored."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels.paged_attention.prefill_problem import HALVES
from qserve_jax.quantization.qtensor import Array


def takes(
    q: Array, block_table: Array, new_k: Array | None, attends: str, softcap: float | None
) -> bool:
    """Whether all that is attended are new tokens, in a dtype and of a size that cuDNN takes."""
    fresh = attends == "full" and block_table.shape[1] == 0 and softcap is None
    halves = q.dtype.name in HALVES and new_k is not None and new_k.dtype == q.dtype
    return fresh and halves and q.size > 0 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def attention(
    q: Array, k: Array | None, v: Array | None, query_lens: Array, options: dict[str, Any]
) -> Array:
    """q [B, T, N, H], k and v [B, T, K, H], query_lens i32[B] -> like q.

    cuDNN gives zeros for padding rows, and a NaN of padding in k or v to the real rows of its
    sequence: no mask is added, which would read and write the output once more.

    Raises NotImplementedError where JAX finds no cuDNN, or one that it knows not to do this: it
    looks while it traces. What cuDNN itself refuses is known when the program is compiled, when no
    other kernel can be chosen, and is an error then: use attends="quantized".
    """
    assert k is not None and v is not None
    lens, window = query_lens.astype(jnp.int32), options["window"]
    try:
        return jax.nn.dot_product_attention(
            q,
            k,
            v.astype(q.dtype),
            scale=options["sm_scale"],
            is_causal=True,
            query_seq_lengths=lens,
            key_value_seq_lengths=lens,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    except RuntimeError as error:
        line = str(error).strip().splitlines()[0]
        raise NotImplementedError(f"fresh prompts are cuDNN's, but {line}") from error
