"""Block-input rotation (QServe section 5.1, QuaRot): spread the residual stream's outliers.

The residual stream x becomes x @ Q with Q orthogonal. RMSNorm without a scale commutes with Q, so
the norms' scales are folded into the next linears first, and nothing is left to compute at runtime.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np

from qserve_jax.quantization.transforms.linear import (
    Array,
    Params,
    in_float32,
    matmul,
    rotate_inputs,
    rotate_outputs,
    scale_inputs,
)

READERS = {"attn_norm": ("q_proj", "k_proj", "v_proj"), "mlp_norm": ("gate_proj", "up_proj")}
WRITERS = ("o_proj", "down_proj")


def fold_norms(params: Params) -> Params:
    """Norm scales moved into the linears that read them; the norms keep scales of one.

    A tied head becomes a head of its own (`lm_head`): run the result with tie_embeddings=False
    (`untied`). Parts of the tree that are absent, for layers one at a time, are left out.
    """
    params = dict(params)
    if "layers" in params:
        layers = dict(params["layers"])
        for norm, readers in READERS.items():
            scale = layers[norm]["scale"]
            for name in readers:
                layers[name] = scale_inputs(layers[name], scale.astype(jnp.float32))
            layers[norm] = {"scale": jnp.ones_like(scale)}
        params["layers"] = layers
    if "final_norm" in params:
        scale = params["final_norm"]["scale"]
        head = params["lm_head" if "lm_head" in params else "embed"]["embedding"]
        params["lm_head"] = {"embedding": in_float32(lambda w: w * scale, head)}
        params["final_norm"] = {"scale": jnp.ones_like(scale)}
    return params


def rotate(params: Params, q: Array | None = None) -> Params:
    """The same function with the residual stream in the basis q f32[D, D] (x @ q).

    q: orthogonal; None takes `hadamard_rotation(D)`. Folds the norms first (`fold_norms`).
    """
    params = fold_norms(params)
    if "layers" in params:
        layers = params["layers"]
        size = layers["q_proj"]["kernel"].shape[-2]
        turn = _basis(q, size)
        names = [name for readers in READERS.values() for name in readers]
        turned = {name: rotate_inputs(layers[name], turn) for name in names}
        turned |= {name: rotate_outputs(layers[name], turn) for name in WRITERS}
        params["layers"] = {**layers, **turned}
    for name in ("embed", "lm_head"):
        if name in params:
            table = params[name]["embedding"]
            turn = _basis(q, table.shape[-1])
            params[name] = {"embedding": in_float32(lambda w, t=turn: matmul(w, t), table)}
    return params


def _basis(q: Array | None, size: int) -> Array:
    return jnp.asarray(hadamard_rotation(size) if q is None else q, jnp.float32)


def hadamard_rotation(n: int) -> np.ndarray:
    """Orthogonal f64[n, n] whose entries are all of one size, 1/sqrt(n), where a construction
    below gives a Hadamard matrix; else at most sqrt(2/n). Deterministic, no table of matrices.

    n = 2^a m: Sylvester's doubling of the smallest Hadamard matrix of order m 2^b found, or of the
    Hartley matrix (cos + sin)(2 pi i j / m) / sqrt(m) of the odd part m.
    """
    found = hadamard(n)
    if found is not None:
        return found / math.sqrt(n)
    odd = n // (n & -n)
    grid = 2 * np.pi / odd * (np.outer(np.arange(odd), np.arange(odd)) % odd)
    hartley = (np.cos(grid) + np.sin(grid)) / math.sqrt(odd)
    return np.kron(sylvester(n // odd) / math.sqrt(n // odd), hartley)


@functools.cache
def hadamard(n: int) -> np.ndarray | None:
    """A matrix of +1 and -1 with H H^T = n I, or None where no construction here gives one.

    Orders 2^a, q + 1 (Paley I: 12, 20, 60, 108, 140) and 2 (q + 1) (Paley II: 28, 36, 52, 148),
    with q a prime or its square, and doubles of all of these, which are tried first: 3584 is
    128 * 28, though 3583 is a prime too.
    """
    if n & (n - 1) == 0:
        return sylvester(n)
    half = hadamard(n // 2) if n % 8 == 0 else None
    if half is not None:
        return np.kron(sylvester(2), half)
    if n % 4 == 0:
        for order, construct in ((n - 1, paley_one), (n // 2 - 1, paley_two)):
            chi = quadratic_characters(order)
            if chi is not None and order % 4 == (3 if construct is paley_one else 1):
                return construct(chi)
    return None


def sylvester(n: int) -> np.ndarray:
    """The Hadamard matrix of order n = 2^a: (-1)^(number of common one bits of row and column)."""
    bits = np.arange(n)
    return 1.0 - 2.0 * (np.bitwise_count(bits[:, None] & bits) % 2)


def paley_one(chi: np.ndarray) -> np.ndarray:
    """Order q + 1 for q = 3 mod 4: I + S with S the skew matrix bordered by ones."""
    s = _bordered(chi)
    s[1:, 0] = -1
    return s + np.eye(len(s))


def paley_two(chi: np.ndarray) -> np.ndarray:
    """Order 2 (q + 1) for q = 1 mod 4: S (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]."""
    s = _bordered(chi)
    return np.kron(s, [[1, 1], [1, -1]]) + np.kron(np.eye(len(s)), [[1, -1], [-1, -1]])


def _bordered(chi: np.ndarray) -> np.ndarray:
    s = np.ones((len(chi) + 1, len(chi) + 1))
    s[0, 0] = 0
    s[1:, 1:] = chi
    return s


def quadratic_characters(q: int) -> np.ndarray | None:
    """chi(a - b) for all a, b of the field of q elements, q an odd prime or its square, or None.

    chi is 0 at 0, 1 at squares, -1 elsewhere. The field of p^2 is a + b w with w^2 = r, where r
    is the smallest number that is no square modulo p.
    """
    root = math.isqrt(q)
    if _odd_prime(q):
        elements = np.stack([np.arange(q), np.zeros(q, int)], axis=1)
        p, r = q, 0
    elif root * root == q and _odd_prime(root):
        elements = np.stack(np.divmod(np.arange(q), root), axis=1)
        p = root
        r = min(set(range(p)) - {i * i % p for i in range(p)})
    else:
        return None
    a, b = elements.T
    chi = np.full((p, p if r else 1), -1.0)
    chi[(a * a + r * b * b) % p, 2 * a * b % p] = 1
    chi[0, 0] = 0
    return chi[(a[:, None] - a) % p, (b[:, None] - b) % p]


def _odd_prime(n: int) -> bool:
    return n > 2 and all(n % d for d in range(2, math.isqrt(n) + 1))
