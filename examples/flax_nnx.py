"""Flax NNX: train, quantise the state under jit where it lies, merge it back, run, save."""

from __future__ import annotations

from _training import FEATURES, HIDDEN, batch, make_mesh, matmul, report, save_and_restore

import jax  # isort: skip
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qserve_jax import QuantConfig, quantize_params


class Linear(nnx.Module):
    def __init__(self, k: int, n: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (k, n)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return matmul(x, self.kernel.get_value())


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(FEATURES, rngs=rngs)
        self.up = Linear(FEATURES, HIDDEN, rngs)
        self.down = Linear(HIDDEN, FEATURES, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


SHARDING = {"up": P(None, "model"), "down": P("model", None)}


def loss(model: Block, x: jax.Array, y: jax.Array) -> jax.Array:
    return ((model(x) - y) ** 2).mean()


@nnx.jit
def step(model: Block, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
    optimizer.update(model, nnx.grad(loss)(model, x, y))


def main() -> None:
    mesh, model = make_mesh(), Block(nnx.Rngs(0))
    state = nnx.state(model)
    place = lambda path, w: NamedSharding(mesh, SHARDING.get(path[0].key, P()))  # noqa: E731
    nnx.update(model, jax.device_put(state, jax.tree_util.tree_map_with_path(place, state)))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    for i in range(40):
        x, y = jax.device_put(batch(jax.random.key(i)), NamedSharding(mesh, P("data")))
        step(model, optimizer, x, y)

    graph, state = nnx.split(model)
    quantized = jax.jit(quantize_params, static_argnums=1)(state, QuantConfig())
    restored = save_and_restore(quantized)
    test = batch(jax.random.key(1000))
    found = nnx.jit(loss)(nnx.merge(graph, restored), *test)
    report("NNX", loss(model, *test), found, quantized, restored)


if __name__ == "__main__":
    main()
