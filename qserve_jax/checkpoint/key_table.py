"""Names: the canonical parameter tree <-> Hugging Face tensors.

Llama, Mistral, Qwen2 and Qwen3 name their modules alike, so one table serves them all: which of its
rows a model has follows from its ModelConfig. It is read from canonical to Hugging Face, so that a
missing tensor can be named too; every name in a file that it does not give is unexpected.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from flax.traverse_util import flatten_dict

from qserve_jax.models.config import ModelConfig
from qserve_jax.models.llama import param_shapes

_LAYER = "model.layers.{layer}"
MODULES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "layers/attn_norm": f"{_LAYER}.input_layernorm",
    "layers/mlp_norm": f"{_LAYER}.post_attention_layernorm",
    **{f"layers/{x}_proj": f"{_LAYER}.self_attn.{x}_proj" for x in "qkvo"},
    **{f"layers/{x}_norm": f"{_LAYER}.self_attn.{x}_norm" for x in "qk"},
    "layers/key_center": f"{_LAYER}.self_attn.key_center",
    **{f"layers/{x}_proj": f"{_LAYER}.mlp.{x}_proj" for x in ("gate", "up", "down")},
}
PARAMETERS = {"embedding": "weight", "kernel": "weight", "scale": "weight"} | {
    name: name for name in ("bias", "center")
}

FLOATS = ("F32", "BF16", "F16")

# Tables of rotary frequencies, which old checkpoints carry and which follow from the config.
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")
IGNORED_IF_TIED = re.compile(rf"{IGNORED.pattern}|lm_head\.weight")


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a Hugging Face tensor goes. path: of a canonical leaf, names joined by "/".

    layer: index into the leaf's leading axis, None where the leaf is not stacked.
    shape: the tensor's own; a kernel is [N, K] in Hugging Face and [K, N] in the canonical tree.
    dtypes: that the tensor may have in a file.
    """

    path: str
    layer: int | None
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS

    @property
    def is_kernel(self) -> bool:
        return self.path.endswith("/kernel")


def targets(config: ModelConfig) -> dict[str, Target]:
    """Every tensor that a checkpoint of `config` must hold: Hugging Face name -> Target."""
    found = {}
    shapes: Any = flatten_dict(param_shapes(config), sep="/")
    for path, shape in shapes.items():
        module, _, parameter = path.rpartition("/")
        name = f"{MODULES[module]}.{PARAMETERS[parameter]}"
        if not path.startswith("layers/"):
            found[name] = Target(path, None, shape)
            continue
        shape = shape[:0:-1] if parameter == "kernel" else shape[1:]
        for layer in range(config.num_layers):
            found[name.format(layer=layer)] = Target(path, layer, shape)
    return found


def ignored(config: ModelConfig) -> re.Pattern[str]:
    """Tensors (by full match) that a checkpoint may hold and that say nothing new.

    Of the head of a tied model stream.check_tied_head makes sure of that.
    """
    return IGNORED_IF_TIED if config.tie_embeddings else IGNORED
