"""Every family's tiny config with random weights, calibrated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.models import CausalLM, ModelConfig, param_shapes
from qserve_jax.models.calibration import calibrate

FAMILIES = {
    "mistral": {"sliding_window": 8},
    "qwen2_gqa7": {"qkv_bias": True, "tie_embeddings": True, "num_heads": 7, "num_kv_heads": 1},
    "qwen3": {"qk_norm": True, "tie_embeddings": True, "head_dim": 32},
    "llama_biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "hidden_size": 48},
}
apply = jax.jit(
    lambda model, params, tokens: model.apply({"params": params}, tokens), static_argnums=0
)


@dataclasses.dataclass
class Case:
    """A tiny model, its parameters, and the logits it gives for `tokens`."""

    config: ModelConfig
    params: dict
    tokens: jax.Array

    @property
    def model(self):
        return CausalLM(self.config)

    def logits(self, params):
        config = dataclasses.replace(self.config, tie_embeddings="lm_head" not in params)
        return np.asarray(apply(CausalLM(config), params, self.tokens))

    def stats(self, params=None, **options):
        params = self.params if params is None else params
        return calibrate(self.model, params, [self.tokens], **options)

    def same_function(self, params):
        """The largest difference of logits over the largest logit."""
        exact = self.logits(self.params)
        return np.abs(self.logits(params) - exact).max() / np.abs(exact).max()


def make_case(**changes) -> Case:
    sizes = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    config = ModelConfig(**{**sizes, **changes})
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        normal = rng.standard_normal(shape)
        kind = path[-1].key
        if kind == "scale":
            return 1 + 0.2 * normal
        if kind == "bias":
            return 0.2 * normal
        return normal * (1 if path[0].key == "embed" else shape[-2] ** -0.5)

    shapes = param_shapes(config)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    tree = jax.tree_util.tree_map_with_path(leaf, shapes, is_leaf=is_shape)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    return Case(config, params, jnp.asarray(rng.integers(0, 64, (2, 24))))


@pytest.fixture(scope="session")
def make():
    """make(**changes of the ModelConfig) -> Case."""
    return make_case


@pytest.fixture(params=FAMILIES)
def case(request) -> Case:
    """A case of every family and shape of attention."""
    return make_case(**FAMILIES[request.param])
