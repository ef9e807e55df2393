"""Configurations of every family that transformers builds, small enough for a processor, with their variants."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

_LLAMA: Fields = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXTURE: Fields = {**_LLAMA, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT: Fields = {
    **_MIXTURE,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
}
_BERT: Fields = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}

SMALL: dict[str, Fields] = {
    "bert": _BERT,
    "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "falcon": {**_BERT, "num_kv_heads": 2},
    "gemma": {**_LLAMA, "head_dim": 16},
    "gemma2": {**_LLAMA, "head_dim": 16, "sliding_window": 8},
    "gemma3_text": {**_LLAMA, "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 3},
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": _BERT,
    "gpt_oss": {**_MIXTURE, "head_dim": 16, "num_local_experts": 8, "sliding_window": 8},
    "llama": _LLAMA,
    "llama4_text": {
        **_MIXTURE,
        "head_dim": 16,
        "num_local_experts": 8,
        "intermediate_size_mlp": 40,
        "attention_chunk_size": 16,
    },
    "mistral": _LLAMA,
    "mixtral": {**_MIXTURE, "num_local_experts": 8},
    "olmo2": _LLAMA,
    "opt": {**_BERT, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": {**_MIXTURE, "num_experts": 8, "shared_expert_intermediate_size": 40},
    "qwen3": {**_LLAMA, "head_dim": 16},
    "qwen3_moe": {**_MIXTURE, "head_dim": 16, "num_experts": 8},
    "roberta": _BERT,
    "smollm3": _LLAMA,
    "starcoder2": _LLAMA,
    "t5": {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4},
}
"""The smallest useful fields of each family."""

VARIANTS: tuple[tuple[str, Fields], ...] = (
    ("bert", {"tie_word_embeddings": False, "type_vocab_size": 3}),
    ("bloom", {"tie_word_embeddings": False}),
    ("deepseek_v2", {"attention_bias": True, "mlp_bias": True, "q_lora_rank": None}),
    ("deepseek_v3", {"attention_bias": True, "n_shared_experts": 2, "tie_word_embeddings": True}),
    ("falcon", {"new_decoder_architecture": True}),
    ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 40}),
    ("falcon", {"alibi": True, "bias": True, "parallel_attn": False, "multi_query": False}),
    ("falcon", {"tie_word_embeddings": False, "multi_query": False, "num_kv_heads": None}),
    ("gemma", {"attention_bias": True, "hidden_act": "gelu"}),
    ("gemma2", {"tie_word_embeddings": False, "final_logit_softcapping": None}),
    ("gemma3_text", {"attention_bias": True, "final_logit_softcapping": 30.0}),
    ("gpt2", {"n_inner": 40, "tie_word_embeddings": False, "activation_function": "relu"}),
    ("gpt_neox", {"attention_bias": False, "use_parallel_residual": False, "rotary_pct": 0.5}),
    ("gpt_neox", {"tie_word_embeddings": True, "hidden_dropout": 0.1}),
    ("gpt_oss", {"attention_bias": False, "layer_types": ["full_attention"] * 4}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 16, "num_key_value_heads": None, "tie_word_embeddings": True}),
    ("llama4_text", {"interleave_moe_layer_step": 2, "use_qk_norm": False, "attention_bias": True}),
    ("llama4_text", {"moe_layers": [1, 2], "no_rope_layers": [0, 1, 1, 0]}),
    ("mistral", {"head_dim": 16, "sliding_window": None, "tie_word_embeddings": True}),
    ("mixtral", {"head_dim": 16, "sliding_window": 8}),
    ("olmo2", {"attention_bias": True, "num_key_value_heads": None}),
    ("opt", {"do_layer_norm_before": False, "enable_bias": False, "word_embed_proj_dim": 16}),
    ("opt", {"layer_norm_elementwise_affine": False, "tie_word_embeddings": False}),
    ("phi3", {"sliding_window": 8, "tie_word_embeddings": True, "partial_rotary_factor": 0.5}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "qkv_bias": False}),
    ("qwen2_moe", {"mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
    ("qwen3", {"attention_bias": True, "use_sliding_window": True, "max_window_layers": 0}),
    ("qwen3_moe", {"attention_bias": True, "mlp_only_layers": [3], "use_sliding_window": True}),
    ("roberta", {"tie_word_embeddings": False}),
    ("smollm3", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "no_rope_layer_interval": 2}),
    ("starcoder2", {"use_bias": False, "sliding_window": 8, "tie_word_embeddings": False}),
    ("t5", {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 2, "tie_word_embeddings": False}),
    ("t5", {"num_layers": 1}),
)
"""Fields that change what is built: biases, ties, norms, windows, experts."""


def every_configuration() -> list[tuple[str, Fields]]:
    """Each family's defaults, its small configuration, and the variants of that, with their families."""
    # DeepSeek-V2's config class has no default number of experts per token.
    defaults = [(family, {"num_experts_per_tok": 2} if family == "deepseek_v2" else {}) for family in SMALL]
    small = list(SMALL.items())
    return defaults + small + [(family, {**SMALL[family], **fields}) for family, fields in VARIANTS]
