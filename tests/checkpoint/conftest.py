"""A made-up checkpoint that tests write, damage and load."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 32,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}
"""head_dim 64, biases on q, k, v; every K is a multiple of 128."""

LAYER = {
    "input_layernorm.weight": (128,),
    "self_attn.q_proj.weight": (128, 128),
    "self_attn.q_proj.bias": (128,),
    "self_attn.k_proj.weight": (64, 128),
    "self_attn.k_proj.bias": (64,),
    "self_attn.v_proj.weight": (64, 128),
    "self_attn.v_proj.bias": (64,),
    "self_attn.o_proj.weight": (128, 128),
    "post_attention_layernorm.weight": (128,),
    "mlp.gate_proj.weight": (256, 128),
    "mlp.up_proj.weight": (256, 128),
    "mlp.down_proj.weight": (128, 256),
}
SHAPES = {
    "model.embed_tokens.weight": (32, 128),
    **{f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()},
    "model.norm.weight": (128,),
    "lm_head.weight": (32, 128),
}


class Checkpoint:
    """`config` and `tensors` to change at will; `write()` puts them into `folder`."""

    def __init__(self, folder: Path, rng: np.random.Generator):
        self.folder = folder
        self.config = dict(CONFIG)
        self.tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}

    def write(self) -> Path:
        (self.folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, self.folder / "model.safetensors")
        return self.folder


@pytest.fixture
def checkpoint(tmp_path, rng) -> Checkpoint:
    return Checkpoint(tmp_path, rng)
