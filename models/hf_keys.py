"""The keys of a Hugging Face config.json: nothing is ignored.

A key is read, or is known not to change the model's output, or is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

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
# Keys with one value that changes nothing; any other value is refused.
NEUTRAL = {"hidden_act": "silu", "partial_rotary_factor": 1.0}


def refuse_unsupported(hf: Mapping[str, Any], reads: set[str]) -> None:
    """Raises ValueError naming every key that is neither read nor known as harmless.

    hf: the parsed config.json. reads: the keys that its family reads beyond READ. A null, false or
    empty value is how a config says that it does not use a feature.
    """
    if method := hf.get("quantization_config") or hf.get("compression_config"):
        name = method.get("quant_method", "unknown") if isinstance(method, Mapping) else method
        raise ValueError(
            f"quantization_config (quant_method {name!r}) is not supported: use the float "
            "checkpoint; published QServe checkpoints cannot be read yet"
        )
    keys = (k for k in hf if k not in READ | reads and not _is_harmless(k, hf[k]))
    refused = ", ".join(f"{k}={hf[k]!r:.60}" for k in keys)
    if refused:
        raise ValueError(
            f"config.json of model_type {hf.get('model_type')!r} asks for what is not supported: "
            f"{refused}; use a checkpoint without, or delete keys that do not change the model"
        )
    for name in hf.get("architectures") or ():
        if not str(name).endswith("ForCausalLM"):
            raise ValueError(f"architecture {name!r} is not supported: use a ...ForCausalLM model")


def _is_harmless(key: str, value: Any) -> bool:
    if value is None or value is False or value == {} or value == []:
        return True
    return NEUTRAL[key] == value if key in NEUTRAL else HARMLESS.fullmatch(key) is not None
