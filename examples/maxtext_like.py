"""A MaxText-like tree: the layers scanned on axis 1 of every kernel, attention heads on axes of
their own. MAXTEXT_RULES say so; a quantised stack has its layers in front and is scanned there."""

from __future__ import annotations

from typing import Any

from _training import FEATURES, HIDDEN, batch, make_mesh, matmul, report, save_and_restore

import jax  # isort: skip
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qserve_jax import QuantConfig, quantization_report, quantize_params
from qserve_jax.quantization import MAXTEXT_RULES
from qserve_jax.quantization.qtensor import is_quantized

LAYERS, HEADS, HEAD_DIM = 2, 4, 32
SHAPES = {  # name: (shape, what is sharded over `model`)
    "query": ((FEATURES, LAYERS, HEADS, HEAD_DIM), P(None, None, "model")),
    "key": ((FEATURES, LAYERS, HEADS, HEAD_DIM), P(None, None, "model")),
    "value": ((FEATURES, LAYERS, HEADS, HEAD_DIM), P(None, None, "model")),
    "out": ((HEADS, LAYERS, HEAD_DIM, FEATURES), P("model")),
    "wi": ((FEATURES, LAYERS, HIDDEN), P(None, None, "model")),
    "wo": ((HIDDEN, LAYERS, FEATURES), P("model")),
}


def init(key: jax.Array) -> dict[str, Any]:
    keys = jax.random.split(key, len(SHAPES))
    return {
        name: {"kernel": jax.random.normal(own, shape) / (4 * FEATURES**0.5)}
        for own, (name, (shape, _)) in zip(keys, SHAPES.items(), strict=True)
    }


def project(x: jax.Array, kernel: Any, axes: int = 1) -> jax.Array:
    """x times one layer's kernel, its last `axes` axes contracted; [B, T, N] out."""
    x = x.reshape(*x.shape[: x.ndim - axes], -1)
    return matmul(x, kernel if is_quantized(kernel) else kernel.reshape(x.shape[-1], -1))


def layer(x: jax.Array, p: dict[str, Any]) -> tuple[jax.Array, None]:
    """x [B, T, D] through attention and MLP, with one layer's parameters."""
    heads = (*x.shape[:2], HEADS, HEAD_DIM)
    q, k, v = (project(x, p[name]["kernel"]).reshape(heads) for name in ("query", "key", "value"))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + project(y, p["out"]["kernel"], axes=2)
    return x + project(jax.nn.gelu(project(x, p["wi"]["kernel"])), p["wo"]["kernel"]), None


def layers_first(params: dict[str, Any]) -> dict[str, Any]:
    """As `lax.scan` wants it: float kernels have layers on axis 1, containers already in front."""
    return jax.tree.map(
        lambda w: w if is_quantized(w) else jnp.moveaxis(w, 1, 0), params, is_leaf=is_quantized
    )


def loss(params: dict[str, Any], x: jax.Array, y: jax.Array) -> jax.Array:
    x, y = x.reshape(4, -1, FEATURES), y.reshape(4, -1, FEATURES)
    return ((jax.lax.scan(layer, x, layers_first(params))[0] - y) ** 2).mean()


def main() -> None:
    mesh, optimizer = make_mesh(), optax.adam(3e-3)
    shardings = {n: {"kernel": NamedSharding(mesh, spec)} for n, (_, spec) in SHAPES.items()}
    params = jax.jit(init, out_shardings=shardings)(jax.random.key(0))

    @jax.jit
    def step(params, state, x, y):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for i in range(40):
        x, y = jax.device_put(batch(jax.random.key(i)), NamedSharding(mesh, P("data")))
        params, state = step(params, state, x, y)

    print(quantization_report(params, QuantConfig(), rules=MAXTEXT_RULES))
    quantize = jax.jit(lambda p: quantize_params(p, QuantConfig(), rules=MAXTEXT_RULES))
    quantized = quantize(params)
    restored = save_and_restore(quantized)
    test = batch(jax.random.key(1000))
    exact = jax.jit(loss)(params, *test)
    report("MaxText-like", exact, jax.jit(loss)(restored, *test), quantized, restored)


if __name__ == "__main__":
    main()
