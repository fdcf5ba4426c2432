"""Tiny random models of many architectures, built by transformers from configs; a few dozen kilobytes each.

`tiny(name)` gives a model's class and config, `build(name)` the model. No norm is all ones and no bias all zeros, so
that a tensor that gets lost, or is drawn again, shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

VOCABULARY = 48
_COMMON = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, **_COMMON}
_DECODER = {**_SIZES, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
_HEAD = {**_DECODER, "head_dim": 8}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **_COMMON}
_BERT = {**_SIZES, "num_attention_heads": 2, "max_position_embeddings": 64}
_EXPERTS = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "max_position_embeddings": 64,
    "forced_eos_token_id": 2,
    **_COMMON,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 2,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
    **_COMMON,
}
_MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
}
_CLIP_TEXT = {**_BERT, "projection_dim": 16}
_CLIP_IMAGE = {"model_type": "clip_vision_model", **_IMAGE, "projection_dim": 16}
_QWEN_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_QWEN_IMAGE = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_GEMMA3N = {
    **_HEAD,
    "num_hidden_layers": 5,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "num_kv_shared_layers": 0,
    "sliding_window": 8,
    "activation_sparsity_pattern": [0.0] * 5,
    "intermediate_size": [24] * 5,
}
_MAMBA2 = {"mamba_d_conv": 4, "mamba_d_state": 4, "mamba_expand": 2}

# name -> (class of the model, class of its config, values of the config). The name is transformers' model type, with
# what is special about this one behind a dash.
_TABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Decoders.
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "tie_word_embeddings": True}),
    "llama-untied": ("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "tie_word_embeddings": False}),
    "llama-biases": ("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "attention_bias": True, "mlp_bias": True}),
    "llama-classifier": ("LlamaForSequenceClassification", "LlamaConfig", {**_DECODER, "num_labels": 3}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER),
    "ministral": ("MinistralForCausalLM", "MinistralConfig", _HEAD),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_DECODER, "num_local_experts": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_DECODER, "tie_word_embeddings": True}),
    "qwen2_moe": (
        *("Qwen2MoeForCausalLM", "Qwen2MoeConfig"),
        {**_DECODER, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_HEAD, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_HEAD, **_EXPERTS, "num_experts": 4}),
    "qwen3_next": (
        *("Qwen3NextForCausalLM", "Qwen3NextConfig"),
        {
            **_HEAD,
            **_EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "num_hidden_layers": 4,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _HEAD),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _HEAD),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", _HEAD),
    "gemma3n_text": ("Gemma3nForCausalLM", "Gemma3nTextConfig", _GEMMA3N),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", _DECODER),
    "phi": ("PhiForCausalLM", "PhiConfig", _DECODER),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _DECODER),
    "olmo3": ("Olmo3ForCausalLM", "Olmo3Config", _DECODER),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**_DECODER, "tie_word_embeddings": True}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**_DECODER, "num_local_experts": 4}),
    "cohere": ("CohereForCausalLM", "CohereConfig", _DECODER),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", _DECODER),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _DECODER),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", _DECODER),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", _DECODER),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", _HEAD),
    "glm4_moe": (
        *("Glm4MoeForCausalLM", "Glm4MoeConfig"),
        {**_HEAD, **_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", {**_DECODER, **_EXPERTS, **_MLA}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**_DECODER, **_EXPERTS, **_MLA}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "ernie4_5": ("Ernie4_5ForCausalLM", "Ernie4_5Config", _HEAD),
    "exaone4": ("Exaone4ForCausalLM", "Exaone4Config", _HEAD),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", {**_DECODER, "full_attn_idxs": [1], "block_ff_dim": 24}),
    "falcon": (
        *("FalconForCausalLM", "FalconConfig"),
        {**_COMMON, "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "falcon_h1": (
        *("FalconH1ForCausalLM", "FalconH1Config"),
        {**_DECODER, **_MAMBA2, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    ),
    "jamba": (
        *("JambaForCausalLM", "JambaConfig"),
        {
            **_DECODER,
            "num_hidden_layers": 4,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            "tie_word_embeddings": True,
        },
    ),
    "mamba": (
        *("MambaForCausalLM", "MambaConfig"),
        {**_SIZES, "state_size": 4, "time_step_rank": 4, "tie_word_embeddings": True},
    ),
    "mamba2": (
        *("Mamba2ForCausalLM", "Mamba2Config"),
        {**_SIZES, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "tie_word_embeddings": True},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "gpt_neo": (
        *("GPTNeoForCausalLM", "GPTNeoConfig"),
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "intermediate_size": 24,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            **_COMMON,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _BERT),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_BERT, "ffn_dim": 24, "word_embed_proj_dim": 8}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**_GPT, "hidden_size": 16}),
    "xlnet": (
        *("XLNetLMHeadModel", "XLNetConfig"),
        {**_COMMON, "vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
    ),
    # Encoders.
    "bert-base": ("BertModel", "BertConfig", _BERT),
    "bert-pretraining": ("BertForPreTraining", "BertConfig", _BERT),
    "bert-decoder": ("BertLMHeadModel", "BertConfig", {**_BERT, "is_decoder": True}),
    "bert-masked": ("BertForMaskedLM", "BertConfig", _BERT),
    "bert-next": ("BertForNextSentencePrediction", "BertConfig", _BERT),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", {**_BERT, "num_labels": 3}),
    "bert-choice": ("BertForMultipleChoice", "BertConfig", _BERT),
    "bert-tokens": ("BertForTokenClassification", "BertConfig", {**_BERT, "num_labels": 5}),
    "bert-answers": ("BertForQuestionAnswering", "BertConfig", _BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _BERT),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**_BERT, "embedding_size": 8}),
    "distilbert": (
        *("DistilBertForMaskedLM", "DistilBertConfig"),
        {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, **_COMMON},
    ),
    "deberta-v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config", _BERT),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", {**_BERT, "num_hidden_layers": 4}),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**_BERT, "embedding_size": 8}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_IMAGE, "num_labels": 4}),
    "clip": (
        *("CLIPModel", "CLIPConfig"),
        {"text_config": _CLIP_TEXT, "vision_config": _CLIP_IMAGE, "projection_dim": 16},
    ),
    "siglip": ("SiglipModel", "SiglipConfig", {"text_config": _CLIP_TEXT, "vision_config": _IMAGE}),
    # Encoder-decoders.
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "t5-gated": ("T5ForConditionalGeneration", "T5Config", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", _T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", _BART),
    "marian": ("MarianMTModel", "MarianConfig", {**_BART, "decoder_vocab_size": VOCABULARY}),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", _BART),
    "whisper": (
        *("WhisperForConditionalGeneration", "WhisperConfig"),
        {**_BART, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16},
    ),
    # Vision and language.
    "llava": (
        *("LlavaForConditionalGeneration", "LlavaConfig"),
        {
            "text_config": {"model_type": "llama", **_DECODER},
            "vision_config": _CLIP_IMAGE,
            "image_token_index": 9,
        },
    ),
    "paligemma": (
        *("PaliGemmaForConditionalGeneration", "PaliGemmaConfig"),
        {
            "text_config": {"model_type": "gemma", **_HEAD},
            "vision_config": {"model_type": "siglip_vision_model", **_IMAGE, "projection_dim": 16},
            "projection_dim": 16,
            "image_token_index": 9,
        },
    ),
    "qwen2_vl": (
        *("Qwen2VLForConditionalGeneration", "Qwen2VLConfig"),
        {
            "text_config": {**_DECODER, "rope_parameters": _QWEN_ROPE},
            "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
        },
    ),
    "qwen2_5_vl": (
        *("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig"),
        {
            "text_config": {**_DECODER, "rope_parameters": _QWEN_ROPE},
            "vision_config": {**_QWEN_IMAGE, "out_hidden_size": 16, "fullatt_block_indexes": [1]},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_vl": (
        *("Qwen3VLForConditionalGeneration", "Qwen3VLConfig"),
        {
            "text_config": {**_HEAD, "rope_parameters": _QWEN_ROPE},
            "vision_config": {
                **_QWEN_IMAGE,
                "out_hidden_size": 16,
                "deepstack_visual_indexes": [1],
                "num_position_embeddings": 16,
            },
        },
    ),
    "gemma3": (
        *("Gemma3ForConditionalGeneration", "Gemma3Config"),
        {
            "text_config": _HEAD,
            "vision_config": {"model_type": "siglip_vision_model", **_IMAGE},
            "mm_tokens_per_image": 4,
            "image_token_index": 9,
            "boi_token_index": 10,
            "eoi_token_index": 11,
        },
    ),
    "mistral3": (
        *("Mistral3ForConditionalGeneration", "Mistral3Config"),
        {
            "text_config": {"model_type": "mistral", **_HEAD},
            "vision_config": {"model_type": "pixtral", **_IMAGE, "head_dim": 8},
            "image_token_index": 9,
        },
    ),
    "internvl": (
        *("InternVLForConditionalGeneration", "InternVLConfig"),
        {
            "text_config": {"model_type": "qwen2", **_DECODER},
            "vision_config": {"model_type": "internvl_vision", **_IMAGE, "image_size": [8, 8], "patch_size": [4, 4]},
            "image_token_id": 9,
        },
    ),
    "idefics3": (
        *("Idefics3ForConditionalGeneration", "Idefics3Config"),
        {
            "text_config": {"model_type": "llama", **_DECODER},
            "vision_config": _IMAGE,
            "image_token_id": 9,
            "scale_factor": 2,
        },
    ),
    "llama4": (
        *("Llama4ForConditionalGeneration", "Llama4Config"),
        {
            "text_config": {
                **_HEAD,
                "intermediate_size_mlp": 24,
                "num_local_experts": 2,
                "interleave_moe_layer_step": 2,
                "attention_chunk_size": 16,
            },
            "vision_config": {
                **_IMAGE,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
                "pixel_shuffle_ratio": 0.5,
                "intermediate_size": 64,
            },
        },
    ),
}


def names() -> tuple[str, ...]:
    """All architectures here, in the order of the table."""
    return tuple(_TABLE)


def tiny(name: str) -> tuple[Any, Any]:
    """(model class, config) of an architecture."""
    import transformers

    model, config, values = _TABLE[name]
    return getattr(transformers, model), getattr(transformers, config)(**values)


def build(name: str, seed: int = 0, step: float = 0.0) -> Any:
    """A model in float32.

    Args:
        seed: of the numbers.
        step: standard deviation of what a fine-tune changes; 0 gives the model that fine-tunes of all seeds begin at.
    """
    import torch

    cls, config = tiny(name)
    torch.manual_seed(0)
    model = cls(config).float().eval()
    _shake(model, 0, 0.1)
    if step:
        _shake(model, seed, step)
    return model


def _shake(model: Any, seed: int, size: float) -> None:
    """Adds noise to all that is stored; a tied tensor gets it once."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    seen: dict[int, None] = {}
    computed = model._keys_to_ignore_on_save or ()  # sine positions, which every load computes again
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.data_ptr() not in seen and name not in computed:
            seen[value.data_ptr()] = None
            value += size * torch.randn(value.shape, generator=generator)


def saved(path: Path, name: str, seed: int = 1) -> Any:
    """A fine-tune, and its directory's path as `path`."""
    model = build(name, seed, 0.02)
    model.save_pretrained(path)
    return model


def loaded(model: Any, path: Path) -> dict[str, torch.Tensor]:
    again, info = type(model).from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    state: dict[str, torch.Tensor] = again.state_dict()
    return state
