"""The keys of a Hugging Face config.json and how to read their values.

A key is read, or is known not to change the model's output, or is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qserve_jax.models.config import LARGEST_SIZE, brief

READ = {
    *("model_type", "architectures", "dtype", "torch_dtype", "bos_token_id", "eos_token_id"),
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_types"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
}
# Training, bookkeeping, and generation defaults, which transformers 5 does not take from here
# either (they belong to generation_config.json). `pretraining_tp` and `chunk_size_feed_forward`
# only slice the same products; `max_sequence_length` and `model_max_length` speak of the tokenizer.
HARMLESS = re.compile(
    r"initializer_range|(\w+_)?dropout|\w+_pdrop|gradient_checkpointing|pretraining_tp"
    r"|chunk_size_feed_forward|use_cache|use_bfloat16|torchscript|return_dict(_in_generate)?"
    r"|output_(attentions|hidden_states|scores)|_?name_or_path|_commit_hash|transformers_version"
    r"|transformers\.js_config|unsloth_\w+|is_llama_config|_?attn_implementation\w*"
    r"|_flash_attn_2_enabled|(pad|unk|sep|cls|mask|decoder_start)_token_id|tokenizer_\w+"
    r"|max_sequence_length|model_max_length|id2label|label2id|num_labels|problem_type"
    r"|(max|min)_length|do_sample|early_stopping|num_beams|num_beam_groups|num_return_sequences"
    r"|temperature|top_[kp]|typical_p|(repetition|length|diversity|encoder_repetition)_penalty"
    r"|(encoder_)?no_repeat_ngram_size|remove_invalid_values|epsilon_cutoff|eta_cutoff"
)
# Optional features, which a config turns off by false, {} or []. Of other keys false may change the
# model (is_causal, scale_attn_weights). Whether there are biases and norms, the tensors tell too.
OFF = re.compile(
    r"is_(encoder_)?decoder|add_cross_attention|tie_encoder_decoder|tf_legacy_loss|pruned_heads"
    r"|task_specific_params|auto_map|(quantization|compression|dual_chunk_attention)_config"
    r"|(attention|attn|mlp|qkv|use|o)_bias|(use_)?qk_(layer)?norm|use_(sliding_window|mrope)"
    r"|use_(logn_attn|dynamic_ntk)|bad_words_ids|(begin_)?suppress_tokens"
)
# Keys with one value that changes nothing; any other value is refused.
NEUTRAL = {"hidden_act": "silu", "partial_rotary_factor": 1.0}
MOST = {"num_hidden_layers": 10_000}
"""The largest value of a size, where it is not LARGEST_SIZE."""


def refuse_unsupported(hf: Mapping[str, Any], reads: set[str]) -> None:
    """Raises ValueError naming every key that is neither read nor known as harmless.

    hf: the parsed config.json. reads: the keys that its family reads beyond READ. Null says that a
    key is not used; false and empty values say so for optional features only (OFF).
    """
    if method := hf.get("quantization_config") or hf.get("compression_config"):
        name = method.get("quant_method", "unknown") if isinstance(method, Mapping) else method
        raise ValueError(
            f"quantization_config (quant_method {brief(name)}) is not supported: use the float "
            "checkpoint, or one that load_model reads (qserve_jax, qoq, some of gptq and awq)"
        )
    known = READ | reads
    refused = {k: v for k, v in hf.items() if k not in known and not _is_harmless(k, v)}
    if refused:
        raise ValueError(
            f"config.json of model_type {hf.get('model_type')!r} asks for what is not supported: "
            f"{show(refused)}; use a checkpoint without, or delete keys that do not change the "
            "model"
        )
    _check_architectures(hf.get("architectures"))


def _is_harmless(key: str, value: Any) -> bool:
    if key in NEUTRAL:
        return value is None or NEUTRAL[key] == value
    if HARMLESS.fullmatch(key):
        return True
    return value is None or (_is_off(value) and OFF.fullmatch(key) is not None)


def _is_off(value: Any) -> bool:
    return value is False or value == {} or value == []


def _check_architectures(names: Any) -> None:
    if names is not None and not isinstance(names, list):
        raise ValueError(f"architectures={brief(names)} is not a list: write a list of names")
    for name in names or ():
        if not str(name).endswith("ForCausalLM"):
            raise ValueError(
                f"architecture {brief(name)} is not supported: use a ...ForCausalLM model"
            )


def show(keys: Mapping[str, Any]) -> str:
    """`key=value, ...` in one line, long values and odd keys shortened."""
    return ", ".join(f"{k if k.isidentifier() else brief(k)}={brief(v)}" for k, v in keys.items())


def read_size(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """hf[key] as a positive integer, the default if missing or null.

    Raises ValueError if there is neither, and for what is no integer from 1 to its limit.
    """
    value = hf.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"config.json has no {key}: add it, it has no meaningful default")
    if not is_int(value) or value <= 0:
        raise ValueError(f"{key}={brief(value)} is not a positive integer: correct it")
    most = MOST.get(key, LARGEST_SIZE)
    if value > most:
        raise ValueError(f"{key}={brief(value)} is beyond the limit of {most}: correct it")
    return value


def read_bool(hf: Mapping[str, Any], key: str) -> bool:
    """hf[key], by default False. Raises ValueError if it is not a boolean."""
    value = hf.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key}={brief(value)} is not a boolean: write true or false")
    return value


def read_token_ids(
    hf: Mapping[str, Any], key: str, vocab_size: int, default: int | None = None
) -> tuple[int, ...]:
    """hf[key], one id, a list of them or null, as a tuple; the default if missing.

    Raises ValueError for what is no integer, and for ids that the model can never produce.
    """
    value = hf.get(key, default)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(map(is_int, ids)):
        raise ValueError(f"{key}={brief(value)} is not an integer or a list of them: correct it")
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside:
        origin = "" if key in hf else " (the default of a config.json without it)"
        raise ValueError(
            f"{key}={brief(outside[0])}{origin} is not in the vocabulary: set an id from 0 to "
            f"{vocab_size - 1} (vocab_size={vocab_size}), or null for none"
        )
    return tuple(ids)


def is_int(value: object) -> bool:
    """Whether JSON's value is an integer (in Python a bool is one too)."""
    return isinstance(value, int) and not isinstance(value, bool)
