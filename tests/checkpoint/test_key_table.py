"""The names of every family's tensors: those of the golden checkpoints, by transformers."""

import json
from pathlib import Path

import pytest
from flax.traverse_util import flatten_dict

from qserve_jax.checkpoint.hf import tensor_specs, weight_files
from qserve_jax.checkpoint.key_table import ignored, targets
from qserve_jax.models import config_from_hf, param_shapes

FOLDERS = sorted(p.parent for p in (Path(__file__).parents[1] / "golden").glob("*/config.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_names_and_shapes_are_those_of_transformers(folder):
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    wanted = {name: target.shape for name, target in targets(config).items()}
    specs = tensor_specs(weight_files(folder))
    found = {n: s.shape for n, s in specs.items() if not ignored(config).fullmatch(n)}
    assert wanted == found


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_part_of_the_tree_is_filled_once(folder):
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    shapes = flatten_dict(param_shapes(config), sep="/")
    slots = [(t.path, t.layer) for t in targets(config).values()]
    layers = range(config.num_layers)
    expected = {(p, i) for p in shapes for i in (layers if p.startswith("layers/") else [None])}
    assert len(slots) == len(set(slots)) and set(slots) == expected


def test_ignored_names():
    def config(tied):
        hf = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        hf |= {"num_attention_heads": 1, "model_type": "llama", "tie_word_embeddings": tied}
        return config_from_hf(hf)

    for tied in (False, True):
        pattern = ignored(config(tied))
        assert pattern.fullmatch("model.layers.3.self_attn.rotary_emb.inv_freq")
        assert pattern.fullmatch("model.rotary_emb.inv_freq")
        assert bool(pattern.fullmatch("lm_head.weight")) == tied
        assert not pattern.fullmatch("lm_head.weight.scale")
        assert not pattern.fullmatch("model.layers.3.self_attn.rotary_emb.inv_freq.x")
