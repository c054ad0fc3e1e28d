"""Hugging Face config.json -> ModelConfig: published configs, defaults, spellings, refusals."""

import json

import pytest

from qserve_jax.models.config import ModelConfig, RopeConfig
from qserve_jax.models.registry import config_from_hf

# Config files as published; those of a family differ by the keys after `|`.
LLAMA_2_7B = json.loads("""{
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
    "tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0",
    "use_cache": true, "vocab_size": 32000}""")
VICUNA_7B_16K = LLAMA_2_7B | json.loads("""{
    "_name_or_path": "vicuna-7b-v1.5-16k", "max_sequence_length": 16384, "pad_token_id": 0,
    "rope_scaling": {"factor": 4.0, "type": "linear"}}""")
YI_34B = LLAMA_2_7B | json.loads("""{
    "hidden_size": 7168, "intermediate_size": 20480, "num_attention_heads": 56,
    "num_hidden_layers": 60, "num_key_value_heads": 8, "pad_token_id": 0,
    "rope_theta": 5000000.0, "torch_dtype": "bfloat16", "vocab_size": 64000}""")
LLAMA_3_8B = json.loads("""{
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 8192,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
    "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0", "use_cache": true, "vocab_size": 128256}""")
LLAMA_3_1_8B_INSTRUCT = LLAMA_3_8B | json.loads("""{
    "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072,
    "mlp_bias": false, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}}""")
LLAMA_3_2_1B = LLAMA_3_1_8B_INSTRUCT | json.loads("""{
    "eos_token_id": 128001, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "tie_word_embeddings": true, "rope_scaling": {"factor": 32.0,
    "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3"}}""")
MISTRAL_7B = json.loads("""{
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}""")
MISTRAL_7B_V03 = MISTRAL_7B | json.loads("""{
    "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": null,
    "vocab_size": 32768}""")
QWEN15_7B = json.loads("""{
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 32768, "max_window_layers": 28,
    "model_type": "qwen2", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "transformers_version": "4.37.0", "use_cache": true, "use_sliding_window": false,
    "vocab_size": 151936}""")
QWEN2_7B = QWEN15_7B | json.loads("""{
    "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072,
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "sliding_window": 131072, "vocab_size": 152064}""")
QWEN25_72B_INSTRUCT = QWEN2_7B | json.loads("""{
    "eos_token_id": 151645, "hidden_size": 8192, "intermediate_size": 29568,
    "max_position_embeddings": 32768, "max_window_layers": 70, "num_attention_heads": 64,
    "num_hidden_layers": 80, "num_key_value_heads": 8}""")
QWEN3_8B = json.loads("""{
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288,
    "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""")
QWEN3_06B = QWEN3_8B | json.loads("""{
    "hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28,
    "num_attention_heads": 16, "num_hidden_layers": 28, "tie_word_embeddings": true}""")

LLAMA_2_IDS = {"bos_token_id": 1, "eos_token_ids": (2,)}
LLAMA_3_IDS = {"bos_token_id": 128000, "eos_token_ids": (128001,)}
QWEN_IDS = {"bos_token_id": 151643, "eos_token_ids": (151643,)}
QWEN_INSTRUCT_IDS = {"bos_token_id": 151643, "eos_token_ids": (151645,)}
ROPE_10K, ROPE_1M = RopeConfig(), RopeConfig(theta=1e6)
LLAMA_2_7B_CONFIG = ModelConfig(
    *("llama", 32000, 4096, 11008, 32, 32, 32, 128, 4096, 1e-5, ROPE_10K),
    **LLAMA_2_IDS,
    dtype="float16",
)

# After model_type: V, D, F, L, N, K, H, positions, eps, rope.
PUBLISHED = {
    "Llama-2-7B": (LLAMA_2_7B, LLAMA_2_7B_CONFIG),
    "Vicuna-7B": (
        LLAMA_2_7B | {"_name_or_path": "vicuna-7b-v1.5", "pad_token_id": 0},
        LLAMA_2_7B_CONFIG,
    ),
    "Vicuna-7B-16k": (
        VICUNA_7B_16K,
        ModelConfig(
            *("llama", 32000, 4096, 11008, 32, 32, 32, 128, 4096, 1e-5),
            RopeConfig("linear", factor=4.0),
            **LLAMA_2_IDS,
            dtype="float16",
        ),
    ),
    "Yi-34B": (
        YI_34B,
        ModelConfig(
            *("llama", 64000, 7168, 20480, 60, 56, 8, 128, 4096, 1e-5),
            RopeConfig(theta=5e6),
            **LLAMA_2_IDS,
        ),
    ),
    "Llama-3-8B": (
        LLAMA_3_8B,
        ModelConfig(
            *("llama", 128256, 4096, 14336, 32, 32, 8, 128, 8192, 1e-5),
            RopeConfig(theta=5e5),
            **LLAMA_3_IDS,
        ),
    ),
    "Llama-3.1-8B-Instruct": (
        LLAMA_3_1_8B_INSTRUCT,
        ModelConfig(
            *("llama", 128256, 4096, 14336, 32, 32, 8, 128, 131072, 1e-5),
            RopeConfig("llama3", 5e5, 8.0, 8192, 1.0, 4.0),
            bos_token_id=128000,
            eos_token_ids=(128001, 128008, 128009),
        ),
    ),
    "Llama-3.2-1B": (
        LLAMA_3_2_1B,
        ModelConfig(
            *("llama", 128256, 2048, 8192, 16, 32, 8, 64, 131072, 1e-5),
            RopeConfig("llama3", 5e5, 32.0, 8192, 1.0, 4.0),
            tie_embeddings=True,
            **LLAMA_3_IDS,
        ),
    ),
    "Mistral-7B-v0.1": (
        MISTRAL_7B,
        ModelConfig(
            *("mistral", 32000, 4096, 14336, 32, 32, 8, 128, 32768, 1e-5, ROPE_10K),
            sliding_window=4096,
            **LLAMA_2_IDS,
        ),
    ),
    "Mistral-7B-v0.3": (
        MISTRAL_7B_V03,
        ModelConfig(
            *("mistral", 32768, 4096, 14336, 32, 32, 8, 128, 32768, 1e-5, ROPE_1M),
            **LLAMA_2_IDS,
        ),
    ),
    "Qwen1.5-7B": (
        QWEN15_7B,
        ModelConfig(
            *("qwen2", 151936, 4096, 11008, 32, 32, 32, 128, 32768, 1e-6, ROPE_1M),
            qkv_bias=True,
            **QWEN_IDS,
        ),
    ),
    "Qwen2-7B and Qwen2.5-7B": (
        QWEN2_7B | {"use_mrope": False},
        ModelConfig(
            *("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 131072, 1e-6, ROPE_1M),
            qkv_bias=True,
            **QWEN_IDS,
        ),
    ),
    "Qwen2.5-72B-Instruct": (
        QWEN25_72B_INSTRUCT,
        ModelConfig(
            *("qwen2", 152064, 8192, 29568, 80, 64, 8, 128, 32768, 1e-6, ROPE_1M),
            qkv_bias=True,
            **QWEN_INSTRUCT_IDS,
        ),
    ),
    "Qwen3-8B": (
        QWEN3_8B,
        ModelConfig(
            *("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, 40960, 1e-6, ROPE_1M),
            qk_norm=True,
            **QWEN_INSTRUCT_IDS,
        ),
    ),
    "Qwen3-0.6B": (
        QWEN3_06B,
        ModelConfig(
            *("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, 40960, 1e-6, ROPE_1M),
            qk_norm=True,
            tie_embeddings=True,
            **QWEN_INSTRUCT_IDS,
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    hf, config = PUBLISHED[name]
    assert config_from_hf(hf) == config
    assert hash(config_from_hf(hf)) == hash(config)


def minimal(model_type="llama", **keys):
    """A config.json with only the required keys."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96}
    return {
        "model_type": model_type,
        **sizes,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        **keys,
    }


@pytest.mark.parametrize(
    ("model_type", "kv_heads", "head_dim", "positions", "fields"),
    [
        ("llama", 32, 2, 2048, LLAMA_2_IDS),
        ("mistral", 8, 2, 131072, LLAMA_2_IDS | {"sliding_window": 4096}),
        ("qwen2", 32, 2, 32768, {"qkv_bias": True}),
        ("qwen3", 32, 128, 32768, {"qk_norm": True}),
    ],
)
def test_missing_keys_take_the_defaults_of_transformers(
    model_type, kv_heads, head_dim, positions, fields
):
    sizes = (96, 64, 96, 2, 32, kv_heads, head_dim, positions)
    assert config_from_hf(minimal(model_type)) == ModelConfig(model_type, *sizes, **fields)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_null_kv_heads_means_one_per_head(model_type):
    assert config_from_hf(minimal(model_type, num_key_value_heads=None)).num_kv_heads == 32


def test_explicit_head_dim_need_not_be_hidden_size_over_heads():
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        assert config_from_hf(minimal(model_type, head_dim=6)).head_dim == 6


def test_biases():
    llama = config_from_hf(minimal(attention_bias=True, mlp_bias=True))
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    qwen3 = config_from_hf(minimal("qwen3", attention_bias=True))
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.mlp_bias) == (True, True, False)


def test_null_token_ids_and_dtype_spellings():
    config = config_from_hf(minimal(bos_token_id=None, eos_token_id=None))
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())
    assert config.dtype == "bfloat16"
    assert config_from_hf(minimal(torch_dtype="float16")).dtype == "float16"
    assert config_from_hf(minimal(torch_dtype="float16", dtype="float32")).dtype == "float32"


FULL, SLIDING = ["full_attention"] * 2, ["sliding_attention"] * 2
ON = {"use_sliding_window": True, "sliding_window": 16}


@pytest.mark.parametrize(
    ("model_type", "keys", "window"),
    [
        ("llama", {"layer_types": FULL}, None),
        ("mistral", {"layer_types": SLIDING, "sliding_window": 16}, 16),
        ("mistral", {"layer_types": FULL, "sliding_window": None}, None),
        ("qwen2", {"sliding_window": 16, "max_window_layers": 0}, None),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, 4096),
        ("qwen2", {**ON, "max_window_layers": 0}, 16),
        ("qwen2", ON, None),  # max_window_layers is 28: windows would start after the last layer
        ("qwen2", {**ON, "max_window_layers": 1, "layer_types": SLIDING}, 16),
        ("qwen3", {**ON, "max_window_layers": 0, "layer_types": FULL}, None),
        ("qwen3", {**ON, "sliding_window": None, "max_window_layers": 0}, None),
    ],
)
def test_sliding_window(model_type, keys, window):
    assert config_from_hf(minimal(model_type, **keys)).sliding_window == window


YARN_KEYS = {
    **{"factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16, "beta_slow": 2},
    **{"attention_factor": 1.5, "mscale": 0.5, "mscale_all_dim": 0.25, "truncate": False},
}
YARN = RopeConfig("yarn", 1e4, 4.0, 512, 1.0, 4.0, 16, 2, 1.5, 0.5, 0.25, False)


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeConfig(theta=5e5)),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig("linear", factor=2)),
        (
            {"rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0}},
            RopeConfig("dynamic", factor=2.0),
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}},
            RopeConfig("dynamic", 1e6, 2.0),
        ),
        ({"rope_scaling": {"type": "yarn", **YARN_KEYS}}, YARN),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN_KEYS}}, YARN),
        # as in transformers, the factor counts as written and not the ratio of the lengths (4.0)
        (
            {"rope_scaling": {"type": "yarn", **YARN_KEYS, "factor": 3.0}},
            RopeConfig("yarn", 1e4, 3.0, 512, 1.0, 4.0, 16, 2, 1.5, 0.5, 0.25, False),
        ),
        (
            {
                "rope_scaling": {
                    **{"type": "yarn", "factor": None, "beta_fast": None},
                    "original_max_position_embeddings": 512,
                }
            },
            RopeConfig("yarn", factor=4.0, original_max_position_embeddings=512),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            RopeConfig("yarn", factor=4.0, original_max_position_embeddings=2048),
        ),
        (
            {
                "rope_scaling": {
                    **{"rope_type": "llama3", "factor": 8.0},
                    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
                }
            },
            RopeConfig("llama3", factor=8.0, original_max_position_embeddings=2048),
        ),
        ({"rope_scaling": {}, "rope_parameters": None}, RopeConfig()),
        (
            {"rope_parameters": {}, "rope_scaling": {"type": "linear", "factor": 2}},
            RopeConfig("linear", factor=2),
        ),
    ],
)
def test_rope_in_both_spellings(keys, rope):
    assert config_from_hf(minimal(head_dim=16, **keys)).rope == rope


def test_harmless_keys_are_accepted():
    keys = {"pad_token_id": 0, "attention_dropout": 0.1, "pretraining_tp": 2, "use_cache": False}
    keys |= {"temperature": 0.6, "max_length": 4096, "unsloth_version": "1", "torchscript": True}
    keys |= {"partial_rotary_factor": 1.0, "transformers.js_config": {"dtype": "q4"}}
    keys |= {"pad_token_id": -1, "do_sample": False, "id2label": {}}
    unused = {"attn_logit_softcapping": None, "use_mrope": False, "pruned_heads": {}}
    unused |= {"is_decoder": False, "qkv_bias": False, "anything": None, "auto_map": {}}
    assert config_from_hf(minimal(**keys, **unused)) == config_from_hf(minimal())


def rope_scaling(**keys):
    return {"rope_scaling": keys}


REFUSED = [
    (
        {"model_type": "gemma3"},
        "'gemma3' is not supported: use one of llama, mistral, qwen2, qwen3",
    ),
    ({"model_type": None}, "model_type None is not supported"),
    # features, by name
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"quantization_config": {"quant_method": "awq"}}, r"\(quant_method 'awq'\).* use the float"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
    # false is no way to say "not used" where it changes the model
    ({"is_causal": False}, "is_causal=False"),
    ({"scale_attn_weights": False}, "scale_attn_weights=False"),
    ({"use_rope": False, "anything": {}, "other": []}, "use_rope=False, anything={}, other="),
    ({"hidden_act": False}, "hidden_act=False"),
    ({"use_mrope": 0}, "use_mrope=0"),
    ({"architectures": 5}, "architectures=5 is not a list"),
    ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM' is not a list"),
    ({"architectures": [None]}, "architecture None is not supported"),
    ({"a\nb": 1}, r"'a\\nb'=1"),
    ({"num_experts": 8, "num_experts_per_tok": 2}, "num_experts=8, num_experts_per_tok=2;"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    ({"logits_scaling": 8.0}, "logits_scaling=8.0"),
    ({"residual_multiplier": 0.2}, "residual_multiplier=0.2"),
    ({"output_multiplier": 2.0}, "output_multiplier=2.0"),
    ({"clip_qkv": 8.0}, "clip_qkv=8.0"),
    ({"attention_chunk_size": 0}, "attention_chunk_size=0"),
    ({"sliding_window": 4096}, "sliding_window=4096"),
    ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config="),
    ({"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map="),
    ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification'"),
    ({"model_type": "mistral", "attention_bias": True}, "attention_bias=True"),
    ({"model_type": "qwen2", "attention_bias": True}, "attention_bias=True"),
    ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias=True"),
    ({"layer_types": SLIDING}, "layer_types=.*all 2 layers 'full_attention'"),
    ({"model_type": "mistral", "layer_types": FULL}, "layer_types=.*window 4096 in effect"),
    (
        {"model_type": "qwen2", **ON, "max_window_layers": 1},
        "max_window_layers=1 with .* all attend alike",
    ),
    (
        {"model_type": "qwen3", **ON, "layer_types": [FULL[0], SLIDING[0]]},
        "layer_types=.*'sliding_attention'",
    ),
    ({"model_type": "qwen3", "layer_types": SLIDING}, "layer_types=.*window None"),
    ({"model_type": "qwen3", "layer_types": FULL[:1]}, "layer_types=.*all 2 layers"),
    # values
    ({"vocab_size": None}, "config.json has no vocab_size: add it"),
    ({"hidden_size": -1}, "hidden_size=-1 is not a positive integer"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not a positive integer"),
    ({"intermediate_size": "96"}, "intermediate_size='96' is not a positive integer"),
    ({"num_key_value_heads": 5}, "num_attention_heads=32 .* num_key_value_heads=5"),
    ({"hidden_size": 65}, "hidden_size=65 is not a multiple of .*=32: set head_dim"),
    ({"head_dim": 3}, "head_dim=3 is odd"),
    ({"rms_norm_eps": 0}, "rms_norm_eps=0 is not between 0 and 1"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 is not a boolean"),
    ({"torch_dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn' is not supported"),
    ({"num_hidden_layers": 10_001}, "num_hidden_layers=10001 is beyond the limit of 10000"),
    ({"num_hidden_layers": 10**13}, "num_hidden_layers=10000000000000 is beyond"),
    ({"num_hidden_layers": 10**400}, "num_hidden_layers=10+[.]{3}0+ is beyond the limit"),
    ({"hidden_size": 2**31}, "hidden_size=2147483648 is beyond the limit of 2147483647"),
    ({"head_dim": 10**400}, "head_dim=10.* is beyond the limit"),
    ({"vocab_size": -(10**400)}, "vocab_size=-10.* is not a positive integer"),
    ({"max_position_embeddings": 10**400}, "max_position_embeddings=10.* is beyond"),
    (
        {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 2},
        "has no num_key_value_heads, and its default of 32 does not .*num_attention_heads=2: add",
    ),
    ({"eos_token_id": 96}, r"eos_token_id=96 is not in .* from 0 to 95 \(vocab_size=96\)"),
    ({"eos_token_id": [1, 2**31]}, "eos_token_id=2147483648 is not in the vocabulary"),
    ({"eos_token_id": -5}, "eos_token_id=-5 is not in the vocabulary"),
    ({"bos_token_id": 500}, "bos_token_id=500 is not in the vocabulary"),
    ({"bos_token_id": -1}, "bos_token_id=-1 is not in the vocabulary"),
    ({"vocab_size": 2}, r"eos_token_id=2 \(the default of a config.json without it\) is not in"),
    ({"eos_token_id": "</s>"}, "eos_token_id='</s>' is not an integer"),
    ({"bos_token_id": [1]}, r"bos_token_id=\[1\] is not an integer"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0 is not a positive integer"),
    ({"model_type": "qwen2", **ON, "sliding_window": -5, "max_window_layers": 0}, "window=-5 is"),
    # rope
    (rope_scaling(type="longrope", factor=2.0), "rope_type 'longrope' is not supported: .*yarn"),
    (rope_scaling(type="su"), "rope_type 'su' is not supported"),
    (rope_scaling(type="mrope", mrope_section=[1, 1]), "rope_type 'mrope' is not supported"),
    (rope_scaling(type="linear", factor=2.0, alpha=3), "'linear' does not read alpha=3"),
    (rope_scaling(factor=2.0), "rope_type 'default' does not read factor=2.0"),
    (rope_scaling(type="linear"), "rope_type 'linear' needs 'factor', which is missing"),
    (rope_scaling(type="dynamic", factor=None), "rope_type 'dynamic' needs 'factor'"),
    (rope_scaling(type="yarn"), "rope_type 'yarn' needs 'factor'"),
    (rope_scaling(type="llama3", factor=2.0, low_freq_factor=1.0), "needs 'high_freq_factor'"),
    (rope_scaling(type="linear", rope_type="dynamic", factor=2.0), "'dynamic' contradicts type="),
    (rope_scaling(type="linear", factor=-2.0), "rope factor=-2.0 is out of range"),
    (rope_scaling(type="linear", factor="2"), "rope factor='2' is out of range"),
    (
        rope_scaling(type="yarn", factor=None, original_max_position_embeddings=0),
        "original_max_position_embeddings=0 is not a positive integer",
    ),
    ({"rope_theta": 2.0, "rope_parameters": {"rope_theta": 3.0}}, "rope_theta=3.0 contradicts"),
    (
        rope_scaling(type="linear", factor=2.0) | {"rope_parameters": {"rope_theta": 3.0}},
        "rope_parameters=.* contradicts rope_scaling=",
    ),
    (rope_scaling(type="linear", factor=1e308), "rope factor=1e[+]308 is out of .*, up to 1e[+]15"),
    (rope_scaling(type="linear", factor=1e9), "factor=1000000000.0 makes a context of 2048000"),
    (rope_scaling(type="yarn", factor=1e9), "factor=1000000000.0 makes a context of 2048000"),
    (rope_scaling(type="yarn", factor=2.0, beta_fast=1e-320), "rope beta_fast=1e-320 is out of"),
    (
        rope_scaling(type="yarn", factor=2.0, original_max_position_embeddings=10**400),
        "original_max_position_embeddings=10.* is beyond the limit",
    ),
    ({"rope_theta": 10**400}, "rope theta=10+[.]{3}0+ is out of range"),
    ({"rope_theta": float("inf")}, "rope theta=inf is out of range"),
    ({"rope_theta": float("nan")}, "rope theta=nan is out of range"),
    ({"rope_theta": "1e4"}, "theta='1e4' is out of range"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear' is not an object"),
    (rope_scaling(type="default", partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(keys, message):
    with pytest.raises(ValueError, match=message) as error:
        config_from_hf(minimal() | keys)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_the_largest_of_everything():
    config = config_from_hf(minimal(num_hidden_layers=10_000, rope_theta=4.5e10, eos_token_id=95))
    assert (config.num_layers, config.rope.theta, config.eos_token_ids) == (10_000, 4.5e10, (95,))


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_required_keys(key):
    hf = minimal()
    del hf[key]
    with pytest.raises(ValueError, match=f"config.json has no {key}"):
        config_from_hf(hf)
