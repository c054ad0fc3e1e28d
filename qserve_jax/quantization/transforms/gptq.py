"""GPTQ (Frantar et al. 2022): round column by column, each time correcting the columns to come.

The grid (scales and zero points) is that of the weights as they are, group by group of their own
order; columns are visited by falling Hessian diagonal ("act-order"). For two-level weights all of
it happens in the level-2 domain u = w / channel_scale, and what correction has moved beyond the
protective range is brought back before it is coded, so that no stored code leaves int8.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from qserve_jax.quantization.transforms.linear import Array, matmul

DAMP = 0.01
BLOCK = 128


@functools.partial(jax.jit, static_argnames=("bound", "block"))
def gptq_codes(
    u: Array,
    hessian: Array,
    scale: Array,
    zero: Array,
    *,
    bound: float | None = None,
    damp: float = DAMP,
    block: int = BLOCK,
) -> Array:
    """Codes u8[N, K] of u f32[N, K] that keep u @ X, with hessian f32[K, K] = 2 X^T X / n.

    scale, zero: f32[N, K/g] per group of consecutive columns; u ~= (code - zero) * scale.
    bound: values are clamped to +-bound before they are coded (119 for two-level weights).
    damp: of the mean diagonal, added to the diagonal. block: columns corrected at once.

    A column whose input is always zero is coded as zero. A Hessian that has no factor in float32,
    damping and all, or is not finite, corrects nothing: codes are then those of round to nearest.
    Equal to a plain column-by-column evaluation up to rounding
    (tests/quantization/transforms/test_gptq.py).
    """
    n, k = u.shape
    group = k // scale.shape[-1]
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    u = jnp.where(dead, 0.0, u.astype(jnp.float32))
    order = jnp.argsort(diagonal, descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order], dead[order], damp)
    padding = -k % block

    def sorted_columns(x):  # [K, N], padded with ones that no other column hears of
        return jnp.pad(x.T[order], [(0, padding), (0, 0)], constant_values=1)

    scale, zero = (jnp.repeat(x, group, axis=1) for x in (scale, zero))
    factor = jnp.pad(factor, (0, padding)) + jnp.diag(jnp.arange(k + padding) >= k)
    u, scale, zero = sorted_columns(u), sorted_columns(scale), sorted_columns(zero)
    codes = _rounded_columns(u, scale, zero, factor, bound, block)[:k]
    return codes[jnp.argsort(order)].T.astype(jnp.uint8)


def _inverse_factor(hessian: Array, dead: Array, damp: float) -> Array:
    """Upper U with U^T U = (H + damping)^-1, or the identity where Cholesky's square roots fail.

    H = R R^T with R upper is Cholesky's factorisation from the last row up, and U = R^-1: no
    inverse of H itself is formed, which would square the rounding errors.
    """
    k = len(hessian)
    diagonal = jnp.diagonal(hessian)
    mean = jnp.where(jnp.any(~dead), jnp.mean(diagonal), 1.0)
    hessian = hessian + jnp.diag(jnp.where(dead, mean, 0.0) + damp * mean)
    upper = jnp.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    identity = jnp.eye(k, dtype=hessian.dtype)
    factor = solve_triangular(upper, identity, lower=False)
    return jnp.where(jnp.all(jnp.isfinite(factor)), factor, identity)


def _rounded_columns(u, scale, zero, factor, bound, block):
    """Codes f32[K, N] of columns u [K, N] in the order in which they come."""

    def column(carry, xs):
        u, j = carry  # u [block, N]
        scale, zero, row = xs  # row [block] of the factor
        w = u[j] if bound is None else jnp.clip(u[j], -bound, bound)
        code = jnp.clip(jnp.round(w / scale + zero), 0, 15)
        error = (u[j] - (code - zero) * scale) / row[j]
        return (u - row[:, None] * error, j + 1), (code, error)

    def one_block(u, xs):
        start, scale, zero = xs
        rows = jax.lax.dynamic_slice_in_dim(factor, start, block)
        square = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)
        mine = jax.lax.dynamic_slice_in_dim(u, start, block)
        _, (codes, errors) = jax.lax.scan(column, (mine, 0), (scale, zero, square))
        return u - matmul(rows.T, errors), codes

    k, n = u.shape
    starts = jnp.arange(0, k, block)
    blocks = (starts, scale.reshape(-1, block, n), zero.reshape(-1, block, n))
    return jax.lax.scan(one_block, u, blocks)[1].reshape(k, n)
