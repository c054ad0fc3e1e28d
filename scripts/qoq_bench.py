"""A float model to quantise again and again, and what is measured each time: rows of a table."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from qserve_jax import QuantConfig
from qserve_jax.checkpoint import LoadedModel
from qserve_jax.evaluation.candidates import Candidate, comparison
from qserve_jax.evaluation.compare import Work, make_row, measure
from qserve_jax.models import CausalLM
from qserve_jax.models.calibration import Calibrator
from qserve_jax.models.llama import config_of
from qserve_jax.quantization.recipes import Recipe, quantize_with_recipe
from qserve_jax.runtime.perplexity import loss_difference

Row = dict[str, Any]
FLOAT = Recipe(quant=QuantConfig.preset("w16a16kv16"))
GROUPS = Recipe()
CHANNELS = Recipe(quant=QuantConfig(group_size=-1))
YARDSTICKS = {"W4A16KV16 g128, fake": "w4a16", "W4A4KV4 g128, fake": "w4a4"}


@dataclasses.dataclass
class Bench:
    """A float model, its calibration batches i32[B, T], and what its variants are measured on."""

    loaded: LoadedModel
    batches: list[jax.Array]
    work: Work

    @functools.cached_property
    def calibrator(self) -> Calibrator:
        """One for all, so that its programs are compiled once."""
        return Calibrator(CausalLM(self.loaded.config), self.batches)

    def candidate(self, name: str, params: Any, recipe: Recipe | str) -> Candidate:
        """`params`, which have the model's function, after a recipe or as a yardstick."""
        if isinstance(recipe, str):
            reference = dataclasses.replace(self.loaded, params=params)
            return dataclasses.replace(comparison(recipe, reference, QuantConfig()), name=name)
        config, quant = self.loaded.config, recipe.quant
        quantized = quantize_with_recipe(config, params, self.calibrator, recipe)
        model = CausalLM(config_of(config, quantized), quant.act_bits)
        return Candidate(name, model, quantized, quant.kv_bits)

    def rows(self, params: Any, recipes: Mapping[str, Recipe | str]) -> list[Row]:
        """float and then a row for each recipe: scores, what differs from float, and, for the QoQ
        recipes, what differs from round to nearest at the same group size where it is there."""
        results, rows = {}, []
        for name, recipe in ({"float": FLOAT} | dict(recipes)).items():
            candidate = self.candidate(name, params, recipe)
            results[name] = measure(candidate, self.loaded.tokenizer, self.work)
            rows.append(make_row(results[name], results["float"]))
            rounded = results.get(f"RTN {name.removeprefix('qoq-').replace('-', ' ')}")
            if name.startswith("qoq-") and rounded is not None:
                difference = loss_difference(results[name].perplexity, rounded.perplexity)
                keys = "loss_change_from_rtn", "loss_change_from_rtn_standard_error"
                rows[-1] |= zip(keys, difference, strict=True)
            print(f"  {name}: {results[name].perplexity}", flush=True)
        return rows
