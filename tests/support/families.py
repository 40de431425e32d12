"""A tiny config of every causal language model of the installed transformers.

The configs come from one table of small sizes, applied to the fields of each config class by their names, and from a
few lines per family if that is not enough.
"""

import re
from math import log, sqrt
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 160
# A size, and the fields that have it. Of an indexer's heads there are many: keys of which none has a positive score in
# any of them are as good as each other, and which of these are taken differs between rows.
_TABLE = """
160 vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input ngram_vocab_size_base
128 max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length
48 intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner ffn_hidden_size feed_forward_size
48 intermediate_size_mlp dense_intermediate_size
32 hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim input_embedding_size
32 output_embedding_size lru_width dim_model_base attention_hidden_size
28 image_size
16 moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size
16 moe_shared_expert_intermediate_size shared_experts_intermediate_size index_n_heads
14 patch_size
12 qk_head_dim
8 head_dim d_head dim_head attention_head_size swa_head_dim global_head_dim index_head_dim linear_key_head_dim
8 linear_value_head_dim kv_channels v_head_dim swa_v_head_dim kv_lora_rank q_lora_rank qk_nope_head_dim o_lora_rank
8 mamba_d_state state_size ssm_state_size hidden_size_per_layer_input mamba_n_heads mamba_d_head mamba_num_heads
8 mamba_head_dim n_mamba_heads mamba_chunk_size chunk_size attention_chunk_size block_size query_pre_attn_scalar
6 local_attention
5 sliding_window window_size attention_window_size sliding_window_size
4 num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads encoder_attention_heads
4 num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_value_heads
4 qk_rope_head_dim rotary_dim time_step_rank mamba_dt_rank adapter_rank laurel_rank d_rel index_topk floor_scale
4 log_scaling_n_floor num_experts n_routed_experts num_local_experts moe_num_experts n_experts
2 num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks num_encoder_layers
2 num_decoder_layers num_layers_per_stack num_key_value_heads num_kv_heads swa_num_key_value_heads
2 linear_num_key_heads num_global_key_value_heads mamba_n_groups n_groups mamba_ngroups num_experts_per_tok
2 num_experts_per_token moe_topk moe_k top_k_experts moe_top_k eos_token_id sep_token_id forced_eos_token_id
1 n_shared_experts num_shared_experts moe_num_shared_experts zero_expert_num n_group topk_group num_expert_group
1 max_window_layers first_k_dense_replace num_dense_layers moe_layer_start_index bos_token_id cls_token_id
1 decoder_start_token_id
0 num_nextn_predict_layers num_kv_shared_layers pad_token_id
"""
_SIZES = {name: int(size) for size, *names in map(str.split, _TABLE.strip().splitlines()) for name in names}
_RANDOM = re.compile(r"drop(out)?(_p|_prob|_rate)?$|pdrop$|^attention_dropout|jitter")


def small(config: PretrainedConfig, **overrides: Any) -> dict[str, Any]:
    """Return a config class's keywords for a tiny model: the fields of its default config that are sizes."""
    values: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name in _SIZES and value is not None and not isinstance(value, list | dict):
            values[name] = _SIZES[name]
        elif _RANDOM.search(name) and isinstance(value, float):
            values[name] = 0.0
        elif name == "is_decoder":
            values[name] = True
        elif isinstance(value, PretrainedConfig):
            values[name] = small(value, **_SPECIAL.get(value.model_type, {})) | {"model_type": value.model_type}
    if "qk_rope_head_dim" in values:  # multi-head latent attention has as many keys as queries
        values |= {"num_key_value_heads": values["num_attention_heads"]}
        values.pop("head_dim", None)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    field = config.attribute_map.get("layer_types", "layer_types")
    if kinds and not isinstance(getattr(type(config), field, None), property):
        layers = overrides.get("num_hidden_layers", max(2, len(kinds)))
        values[field] = [kinds[at % len(kinds)] for at in range(layers)]
        values["num_hidden_layers"] = layers
        mlps = list(dict.fromkeys(getattr(config, "mlp_layer_types", None) or ()))
        if mlps:
            values["mlp_layer_types"] = [mlps[-1 - at % len(mlps)] for at in range(layers)]
    return {**values, **overrides}


# What the table of sizes does not give: special fields of each family and of each of its variants.
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
        "layer_types": ["full_attention"] * 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0, "attn_pdrop": 0.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16},
    "dots3_note_text": {"num_key_value_heads": 4, "swa_num_key_value_heads": 4, "swa_num_attention_heads": 4,
        "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8, "swa_qk_nope_head_dim": 8, "swa_qk_rope_head_dim": 4,
        "swa_head_dim": 12, "swa_v_head_dim": 8},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "blt_local_encoder": {"hidden_size_global": 32},
    "blt_local_decoder": {"hidden_size_global": 32},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"intermediate_size": 48, "activation_sparsity_pattern": [0.95, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_offset": 1, "attn_layer_period": 2},
    "inkling_text": {"rel_extent": 8},
    "inkling2_text": {"rel_extent": 8, "n_layers_per_attn_res_block": 2},
    "inkling2_loop_text": {"rel_extent": 8, "num_hidden_layers": 4, "loop_layer_index_start": 1,
        "loop_layer_index_end": 3, "loop_gate_rank": 4, "n_layers_per_attn_res_block": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 4},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"], "index_block_size": 4,
        "index_topk_blocks": 2, "index_n_heads": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen4_exp_text": {"eos_token_id": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
        "indexer_budget": 4, "indexer_compress_ratio": 2, "ple_layer_ids": [1], "ple_embed_dim": 32, "hc_lowrank": 8,
        "heads_per_ngram": 2, "split_ngram_parts": 2, "make_ngram_vocab_size_divisible_by": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [8, 24],
        "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "pronunciation_vocab_size": 90,
        "shape_vocab_size": 90},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_head_dim": 16, "attention_hidden_size": 64, "n_mamba_heads": 2},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "hybrid_layer_ids": [1], "mamba_headdim": 8, "n_mamba_heads": 8, "attention_hidden_size": 64,
        "attention_head_dim": 16, "num_key_value_heads": 4, "num_query_groups": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


# Variants of a family, as changes of its tiny config.
_LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
         "long_factor": [2.0, 3.0, 4.0, 5.0]}  # fmt: skip
MAX_LENGTH = 2048  # the default of tokens.max_length
_VARIANTS: dict[str, dict[str, Any]] = {
    "llama+linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "llama+llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **_LLAMA3}},
    "llama+yarn": {"rope_parameters": _YARN},
    "llama+tied": {"tie_word_embeddings": True},
    "llama+biases": {"attention_bias": True, "mlp_bias": True},
    "llama+dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    "phi3+longrope": {"rope_parameters": _LONG, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 52},
    "deepseek_v3+yarn": {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    **{f"{kind}+long-topk": {"index_topk": 2048}
       for kind in ("axk2", "deepseek_v32", "deepseek_v4", "dots3_note_text", "glm_moe_dsa", "hy_v4")},
    "bert+encoder": {"is_decoder": False},
    "doge+moe": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
    "doge+short-window": {"keep_window_size": 6},
    "falcon+alibi": {"alibi": True},
    "falcon+new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "flint+moe": {"mlp_only_layers": [0]},
    "gemma3n_text+kvshared": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": 48,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text+kvshared": {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_oss+yarn": {"rope_parameters": {**_YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}},
    "granitemoehybrid+dense": {"num_local_experts": 0, "layer_types": ["attention"] * 2,
        "position_embedding_type": "rope", "shared_intermediate_size": 16},
    "hunyuan_v1_dense+alpha": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}},
    "jamba+attention": {"num_hidden_layers": 2, "attn_layer_offset": 0, "attn_layer_period": 1},
    "minimax_m3_vl_text+dense": {"layer_types": ["full_attention"] * 2},
    "mpt+no-alibi": {"attn_config": {"alibi": False}},
    "olmo3+yarn": {"rope_parameters": _YARN},
    "phimoe+longrope": {"rope_parameters": {**_LONG, "short_mscale": 1.1, "long_mscale": 1.3,
        "original_max_position_embeddings": 52}, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 52},
    "phi+qk-layernorm": {"qk_layernorm": True},
    "qwen2+window": {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen3_moe+mixed": {"decoder_sparse_step": 2},
    "smollm3+window": {"use_sliding_window": True, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"]},
    "stablelm+parallel": {"use_parallel_residual": True, "qk_layernorm": True},
}  # fmt: skip
_TRUTH: dict[str, dict[str, Any]] = {  # further changes, for the truth
    # Every row has the frequencies of MAX_LENGTH tokens, which are, by the formula, those of another base.
    "llama+dynamic": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0 * (4.0 * MAX_LENGTH / 128 - 3.0) ** (8 / 6)}
    },
    "phi3+longrope": {  # rows of any length have the long factors
        "rope_parameters": _LONG | {"attention_factor": sqrt(1 + log(4096 / 52) / log(52))},
        "original_max_position_embeddings": 1,
    },
}

CANNOT_BE_TINY = {
    "dots3_note": "its config keeps layers of the full size (its text model, `dots3_note_text`, is tried)",
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "it drafts from the hidden states of another model",
    "gemma4_unified_assistant": "it drafts from the hidden states of another model",
    "musicgen": "it makes sound; its config holds three models",
    "musicgen_melody": "it makes sound; its config holds three models",
}


def tiny_config(name: str, *, truth: bool = False) -> PretrainedConfig:
    """Return the config of a family or of a variant, "family+name"; `truth` sets RoPE's frequencies explicitly."""
    kind = name.partition("+")[0]
    config_class = CONFIG_MAPPING[kind]
    changes = _SPECIAL.get(kind, {}) | _VARIANTS.get(name, {}) | (_TRUTH.get(name, {}) if truth else {})
    return config_class(**small(config_class(), **changes))


FAMILIES = tuple(sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *_VARIANTS} - CANNOT_BE_TINY.keys()))
