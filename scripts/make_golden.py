"""Write tests/golden: tiny random Hugging Face checkpoints and what transformers makes of them.

Needs torch, which the package and its tests do not: `pip install torch transformers` in an
environment of its own, then `python scripts/make_golden.py [NAME ...]`. It runs on a CPU and takes
under a minute. Each folder of tests/golden is an ordinary checkpoint (config.json spelt as
published checkpoints of that age spell it, safetensors) plus expected.npz (see `expected`).

Before it ends the script checks that each example can tell right from wrong: without what the
folder is there for (`without`) the logits differ, with the other spelling of the same config
(`respelled`) they do not, and the greedy tokens are varied and no near tie decides one of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

try:
    import torch  # pyright: ignore[reportMissingImports]
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.utils import logging
except ImportError as error:  # --help needs none of them
    missing = str(error)
else:
    missing = None

BATCH, PROMPT, GREEDY = 2, 9, 40
SEEDS, MIN_DISTINCT = 1000, 8
MIN_GAP, MIN_EFFECT = 1e-3, 1e-2  # relative to the largest |logit|


@dataclasses.dataclass(frozen=True)
class Case:
    """One folder. `respelled` and each of `without` override config.json; None removes a key."""

    config: dict
    length: int = 24  # T of the full forward
    shards: int = 1
    without: tuple[dict, ...] = ()
    respelled: dict | None = None
    extra: str | None = None  # a tensor that published checkpoints hold and nothing needs


def drop(config: dict, *keys: str) -> dict:
    """The config less `keys`."""
    return {key: value for key, value in config.items() if key not in keys}


# A first-generation config: no GQA, rope or head_dim keys at all.
LLAMA_OLD = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "silu",
    "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
    "max_position_embeddings": 128, "num_attention_heads": 4, "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float32",
    "transformers_version": "4.28.1", "use_cache": True, "vocab_size": 96,
}  # fmt: skip
LLAMA = LLAMA_OLD | {
    "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "num_key_value_heads": 2,
    "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0,
    "transformers_version": "4.43.0",
}  # fmt: skip
LLAMA_NEW = drop(LLAMA, "rope_scaling", "rope_theta", "torch_dtype") | {
    "dtype": "float32", "head_dim": 16, "transformers_version": "5.0.0",
}  # fmt: skip
MISTRAL = drop(LLAMA_OLD, "pad_token_id") | {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2,
    "rope_theta": 10000.0, "transformers_version": "4.34.0",
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 32,
    "initializer_range": 0.02, "intermediate_size": 48, "max_position_embeddings": 128,
    "max_window_layers": 1, "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 8,
    "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.40.1",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 96,
}  # fmt: skip
QWEN3 = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
    "head_dim": 16, "rope_scaling": None, "sliding_window": None, "max_window_layers": 2,
    "transformers_version": "4.51.0",
}  # fmt: skip
QWEN3_NEW = drop(QWEN3, "rope_scaling", "rope_theta", "torch_dtype") | {
    "dtype": "float32", "layer_types": ["full_attention"] * 2, "transformers_version": "5.0.0",
}  # fmt: skip

LLAMA3_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_type": "llama3",
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
BETAS, MSCALE = {"beta_fast": 2.0, "beta_slow": 0.1}, {"mscale": 1.0, "mscale_all_dim": 3.0}
DEFAULT_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def new_rope(rope_type: str, theta: float, **values) -> dict:
    """The overrides that spell `rope_scaling` + `rope_theta` as `rope_parameters`."""
    rope = {"rope_type": rope_type, "rope_theta": theta} | values
    return {"rope_scaling": None, "rope_theta": None, "rope_parameters": rope}


def old_rope(rope: dict) -> dict:
    """The overrides that spell `rope_parameters` as `rope_scaling` + `rope_theta`."""
    scaling = drop(rope, "rope_theta")
    return {"rope_parameters": None, "rope_scaling": scaling, "rope_theta": rope["rope_theta"]}


def yarn_case(*without: dict, **values) -> Case:
    """YaRN in the new spelling, run past the original context; `without` are ropes it is not."""
    config = LLAMA_NEW | {"rope_parameters": YARN | values}
    others = tuple({"rope_parameters": rope} for rope in without)
    return Case(config, length=40, without=others, respelled=old_rope(YARN | values))


CASES = {
    # Llama. Eps of 1e-2 in a few of them: at 1e-5 a wrong eps would hide below the tolerance.
    "llama_mha": Case(LLAMA_OLD, extra="model.layers.0.self_attn.rotary_emb.inv_freq"),
    "llama_sharded": Case(LLAMA, shards=3),
    "llama_tied_head_dim": Case(LLAMA_NEW | DEFAULT_ROPE | {"tie_word_embeddings": True}),
    "llama_biases": Case(
        LLAMA | {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2},
        without=({"rms_norm_eps": 1e-5},),
    ),
    "llama_llama3_rope": Case(
        LLAMA | {"head_dim": 16, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
        without=(
            {"rope_scaling": None},
            {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 0.5}},
            {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 8.0}},
        ),
        respelled=new_rope(theta=500000.0, **LLAMA3_ROPE),
    ),
    # Vicuna-16k's spelling; its context is max_position_embeddings * factor.
    "llama_linear_rope": Case(
        LLAMA | {"max_position_embeddings": 32, "rope_scaling": {"type": "linear", "factor": 4.0}},
        without=({"rope_scaling": None},),
        respelled=new_rope("linear", 10000.0, factor=4.0),
    ),
    "llama_dynamic_rope": Case(
        LLAMA | {"max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        without=({"rope_scaling": None},),
        respelled=new_rope("dynamic", 10000.0, factor=4.0),
    ),
    "llama_yarn": yarn_case(DEFAULT_ROPE["rope_parameters"]),
    "llama_yarn_mscale": yarn_case(YARN | BETAS, YARN | MSCALE, **BETAS, **MSCALE),
    "llama_yarn_untruncated": yarn_case(
        YARN | {"truncate": False},
        YARN | {"attention_factor": 1.5},
        truncate=False,
        attention_factor=1.5,
    ),
    "llama_bfloat16": Case(
        LLAMA | {"torch_dtype": "bfloat16", "num_key_value_heads": 1, "num_hidden_layers": 3}
    ),
    "vicuna_float16": Case(LLAMA_OLD | {"torch_dtype": "float16"}),
    "yi": Case(LLAMA | {"rope_theta": 5000000.0}, without=({"rope_theta": 10000.0},)),
    "mistral_sliding": Case(MISTRAL | {"sliding_window": 8}, without=({"sliding_window": None},)),
    "mistral_full": Case(
        MISTRAL | {"sliding_window": None, "head_dim": 16, "rope_theta": 1000000.0},
        without=({"sliding_window": 8},),
    ),
    # Qwen. Qwen2 names a window and switches it off.
    "qwen2_tied": Case(
        QWEN2 | {"tie_word_embeddings": True}, without=({"use_sliding_window": True},)
    ),
    "qwen2_sliding": Case(
        QWEN2 | {"use_sliding_window": True, "max_window_layers": 0},
        without=({"use_sliding_window": False},),
        respelled={"layer_types": ["sliding_attention"] * 2, "max_window_layers": None},
    ),
    "qwen2_gqa7": Case(
        QWEN2 | {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 8}
    ),
    "qwen2_yarn": Case(
        QWEN2
        | {"max_position_embeddings": 32}
        | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        length=40,
        without=({"rope_scaling": None},),
        respelled=new_rope("yarn", 1e6, factor=4.0, original_max_position_embeddings=32),
    ),
    "qwen3_tied": Case(
        QWEN3_NEW
        | {"tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
        extra="lm_head.weight",
    ),
    "qwen3_untied": Case(QWEN3 | {"rms_norm_eps": 1e-2}, without=({"rms_norm_eps": 1e-6},)),
    "qwen3_biases": Case(QWEN3 | {"attention_bias": True}, without=({"attention_bias": False},)),
}


def random_weights(config_dir: Path, seed: int, extra: str | None) -> dict[str, torch.Tensor]:
    """A state dict in the checkpoint's dtype: N(0, 0.2²), the norms 1 + N(0, 0.2²)."""
    config = AutoConfig.from_pretrained(config_dir)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, old in model.named_parameters():  # a tied head is not listed
        noise = 0.2 * torch.randn(old.shape, generator=generator)
        weights[name] = (noise + 1 if "norm" in name else noise).to(config.dtype)
    if extra == "lm_head.weight":
        weights[extra] = weights["model.embed_tokens.weight"].clone()
    elif extra:
        weights[extra] = model.model.rotary_emb.inv_freq.clone()
    return weights


def write_weights(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    """model.safetensors, or `shards` files and their index."""
    metadata = {"format": "pt"}
    if shards == 1:
        return save_file(weights, folder / "model.safetensors", metadata=metadata)
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {key: weights[key] for key in sorted(weights)[i::shards]}
        save_file(part, folder / name, metadata=metadata)
        weight_map |= dict.fromkeys(part, name)
    size = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def load(folder: Path) -> Any:
    """The folder as transformers reads it, in float32 with plain attention and no end token."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.eval()


def load_changed(folder: Path, changes: dict) -> Any:
    """The same weights under a config with `changes` (None takes the key out)."""
    removed = [key for key, value in changes.items() if value is None]
    config = json.loads((folder / "config.json").read_text()) | changes
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        write_config(Path(copy), drop(config, *removed))
        return load(Path(copy))


def write_config(folder: Path, config: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def fix_dynamic_base(model: Any, length: int) -> None:
    """Give a dynamic NTK model the one rope base of `length` for all positions.

    transformers recomputes the base whenever a sequence grows, so that cached keys were rotated by
    older bases. We use one base per sequence, that of the longest length asked for, prompt and
    new tokens together; the expected greedy tokens follow that rule. Others are left as they are.
    """
    rope = model.model.rotary_emb
    if rope.rope_type == "dynamic":
        rope.inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](model.config, seq_len=length)
        rope.rope_type = "default"  # switches the recomputation off


def expected(folder: Path, length: int, seed: int) -> dict[str, np.ndarray]:
    """What expected.npz holds: tokens i32[2, T] and their logits f32[2, T, V], by a plain forward;
    prompt i32[t] and greedy i32[40], its continuation by `generate` with a KV cache."""
    model = load(folder)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, model.config.vocab_size, (BATCH, length), generator=generator)
    logits = model(tokens).logits
    model = load(folder)  # a dynamic rope remembers the longest sequence seen
    fix_dynamic_base(model, PROMPT + GREEDY)
    prompt = tokens[:1, :PROMPT]
    out = model.generate(prompt, max_new_tokens=GREEDY, do_sample=False, use_cache=True)
    arrays = {"tokens": tokens, "prompt": prompt[0], "greedy": out[0, PROMPT:]}
    return {k: v.numpy().astype(np.int32) for k, v in arrays.items()} | {"logits": logits.numpy()}


def greedy_gap(folder: Path, arrays: dict[str, np.ndarray]) -> float:
    """Smallest lead of a greedy token over the runner-up, relative to the largest |logit|, by one
    forward without cache over prompt and answer; 0 when that forward disagrees with `generate`."""
    model = load(folder)
    fix_dynamic_base(model, PROMPT + GREEDY)
    ids = torch.tensor(np.concatenate([arrays["prompt"], arrays["greedy"]])[None, :-1]).long()
    top, best = model(ids).logits[0, PROMPT - 1 :].topk(2)
    if not np.array_equal(best[:, 0].numpy(), arrays["greedy"]):
        return 0.0
    return float(((top[:, 0] - top[:, 1]) / top.abs().max()).min())


def changed_by(folder: Path, arrays: dict[str, np.ndarray], changes: dict) -> float:
    """Largest change of the logits under config `changes`, relative to the largest |logit|."""
    logits = load_changed(folder, changes)(torch.tensor(arrays["tokens"]).long()).logits.numpy()
    return float(np.abs(logits - arrays["logits"]).max() / np.abs(arrays["logits"]).max())


def find_seed(folder: Path, case: Case) -> tuple[dict[str, np.ndarray], str]:
    """Write the weights of the first seed whose greedy tokens are varied and clear.

    Returns what is expected of them, and a description."""
    for seed in range(SEEDS):
        write_weights(folder, random_weights(folder, seed, case.extra), case.shards)
        arrays = expected(folder, case.length, seed)
        gap, distinct = greedy_gap(folder, arrays), len(set(arrays["greedy"].tolist()))
        if gap > MIN_GAP and distinct >= MIN_DISTINCT:
            return arrays, f"seed {seed:3}  gap {gap:.1e}  distinct {distinct:2}"
    raise ValueError(f"{folder.name}: none of {SEEDS} seeds gives {MIN_DISTINCT=}, {MIN_GAP=}")


def check(folder: Path, case: Case, arrays: dict[str, np.ndarray]) -> str:
    """Raise ValueError unless `without` changes the logits and `respelled` does not; describe."""
    effects = [changed_by(folder, arrays, changes) for changes in case.without]
    if any(effect < MIN_EFFECT for effect in effects):
        raise ValueError(f"{folder.name}: {case.without} change the logits by {effects} only")
    if case.respelled and (change := changed_by(folder, arrays, case.respelled)) > 0:
        raise ValueError(f"{folder.name}: {case.respelled} changes the logits by {change:.1e}")
    return f"effects {[round(effect, 3) for effect in effects]}"


def make(folder: Path, case: Case) -> str:
    """Write one folder afresh and describe it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_config(folder, case.config)
    arrays, found = find_seed(folder, case)
    checked = check(folder, case, arrays)
    np.savez(folder / "expected.npz", allow_pickle=False, **arrays)
    low, high = arrays["logits"].min(), arrays["logits"].max()
    size = sum(file.stat().st_size for file in folder.iterdir())
    return f"{folder.name:24} {found}  logits {low:.2f} .. {high:.2f}  {size} B  {checked}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the golden checkpoints of tests/golden.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default all: {', '.join(CASES)}")
    out = Path(__file__).resolve().parents[1] / "tests" / "golden"
    parser.add_argument("--out", type=Path, default=out, help="default: tests/golden")
    args = parser.parse_args()
    if missing:
        sys.exit(f"make_golden.py: error: {missing}: pip install torch transformers")
    torch.set_grad_enabled(False)
    logging.disable_progress_bar()
    if unknown := set(args.names) - set(CASES):
        parser.error(f"unknown {', '.join(sorted(unknown))}: use one of {', '.join(CASES)}")
    for name in args.names or CASES:
        print(make(args.out / name, CASES[name]), flush=True)


if __name__ == "__main__":
    main()
