"""Flax Linen: train, quantise the parameters under jit where they lie, run, save.

A module that reads its kernel with `self.variable` takes it float or quantised; `self.param` would
compare it with what the initialiser makes and refuse.
"""

from __future__ import annotations

from _training import FEATURES, HIDDEN, batch, make_mesh, matmul, report, save_and_restore

import flax.linen as nn  # isort: skip
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qserve_jax import QuantConfig, quantize_params


class Dense(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def initial():
            shape = (x.shape[-1], self.features)
            return nn.initializers.lecun_normal()(self.make_rng("params"), shape)

        return matmul(x, self.variable("params", "kernel", initial).value)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.gelu(Dense(HIDDEN, name="up")(nn.RMSNorm(name="norm")(x)))
        return x + Dense(FEATURES, name="down")(hidden)


SHARDING = {"up": P(None, "model"), "down": P("model", None)}


def main() -> None:
    mesh, model, optimizer = make_mesh(), Block(), optax.adam(3e-3)
    params = model.init(jax.random.key(0), jnp.zeros((1, FEATURES)))["params"]
    place = lambda path, w: NamedSharding(mesh, SHARDING.get(path[0].key, P()))  # noqa: E731
    params = jax.device_put(params, jax.tree_util.tree_map_with_path(place, params))

    def loss(p, x, y):
        return ((model.apply({"params": p}, x) - y) ** 2).mean()

    @jax.jit
    def step(params, state, x, y):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for i in range(40):
        x, y = jax.device_put(batch(jax.random.key(i)), NamedSharding(mesh, P("data")))
        params, state = step(params, state, x, y)

    quantized = jax.jit(quantize_params, static_argnums=1)(params, QuantConfig())
    restored = save_and_restore(quantized)
    test = batch(jax.random.key(1000))
    report("Linen", loss(params, *test), jax.jit(loss)(restored, *test), quantized, restored)


if __name__ == "__main__":
    main()
