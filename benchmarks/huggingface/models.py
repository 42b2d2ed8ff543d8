"""The models, with the calls that they are prepared on and compared on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Calls = list[dict[str, Any]]

_TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BLOCKS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_TOKENS, **_BLOCKS, "max_position_embeddings": 64}
_SHARED = {**_TEXT, "num_key_value_heads": 2}
_EXPERTS = {**_SHARED, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_PAIR = {
    **_TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2,
}  # fmt: skip
_IMAGE = {**_BLOCKS, "image_size": 32, "patch_size": 8}
_SOUND = {
    **_TOKENS, **_BLOCKS, "conv_dim": (16, 24), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A model and its calls.

    Attributes:
        name: the model's class.
        config: fields of its configuration.
        calls: makes the calls; the model is prepared on the first `examples`, and compared on all.
        examples: how many.
        generates: whether tokens are generated.
    """

    name: str
    config: dict[str, Any]
    calls: Callable[[], Calls]
    examples: int = 2
    generates: bool = False


def _tokens(samples: int, length: int) -> Tensor:
    return torch.randint(3, 60, (samples, length), generator=torch.Generator().manual_seed(length))


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]))


def _mask(samples: int, length: int, left: bool) -> Tensor:
    """A mask where the last sample is padded by three."""
    mask = torch.ones(samples, length, dtype=torch.long)
    mask[-1, slice(3) if left else slice(-3, None)] = 0
    return mask


def text(left: bool = True) -> Calls:
    """Tokens without a mask and with one, which pads on the left for models that generate; then others of both."""
    first, *alone = ({"input_ids": _tokens(*size)} for size in ((2, 7), (1, 4), (4, 9)))
    masked = [{"input_ids": _tokens(*size), "attention_mask": _mask(*size, left)} for size in ((2, 7), (3, 12))]
    return [first, *masked, *alone]


def pairs() -> Calls:
    """Calls of encoder and decoder."""
    calls = text(left=False)
    return [{**call, "decoder_input_ids": _tokens(len(call["input_ids"]), 5 + i)} for i, call in enumerate(calls)]


def spectra() -> Calls:
    """Whisper's frames, whose number is fixed, with tokens of the decoder, masked and not."""
    sizes = [(2, 7), (3, 9), (1, 4)]
    calls = [{"input_features": _floats(n, 16, 40), "decoder_input_ids": _tokens(n, length)} for n, length in sizes]
    masks = [{"decoder_attention_mask": _mask(*size, left=False)} for size in sizes]
    return [calls[0], calls[0] | masks[0], *calls[1:], calls[1] | masks[1]]


def sound() -> Calls:
    """Waves without a mask and with one."""
    waves = [_floats(2, 400), _floats(3, 520), _floats(1, 310)]
    masked = [torch.ones(len(wave), wave.shape[1], dtype=torch.long) for wave in waves[:2]]
    for mask in masked:
        mask[-1, 250:] = 0
    both = [{"input_values": wave, "attention_mask": mask} for wave, mask in zip(waves, masked, strict=False)]
    return [{"input_values": waves[0]}, *both, *({"input_values": wave} for wave in waves[1:])]


def images(*sizes: tuple[int, int, int], **options: Any) -> Callable[[], Calls]:
    """Images of these numbers, heights and widths."""
    return lambda: [{"pixel_values": _floats(n, 3, height, width), **options} for n, height, width in sizes]


def masked_images() -> Calls:
    """DETR's images, with the pixels that are padding and without."""
    calls = images((2, 64, 64), (3, 64, 96), (1, 96, 64))()
    masked = []
    for call in calls[:2]:
        mask = torch.ones_like(call["pixel_values"][:, 0], dtype=torch.long)
        mask[-1, :, 40:] = 0
        masked.append({**call, "pixel_mask": mask})
    return [calls[0], masked[0], *calls[1:], masked[1]]


def prompts() -> Calls:
    """SAM's images with points, and with boxes."""
    two, one = ({"pixel_values": _floats(samples, 3, 64, 64)} for samples in (2, 1))
    points = {"input_points": _floats(2, 1, 2, 2) * 10 + 30}
    return [
        {**two, **points},
        {**two, "input_boxes": torch.tensor([[[5.0, 5, 40, 50]]] * 2)},
        {**one, "input_points": _floats(1, 2, 3, 2) * 10 + 30},
        {**two, **points, "multimask_output": False},
    ]


def _language(name: str, **config: Any) -> Tiny:
    return Tiny(name, config, text, generates=True)


MODELS: dict[str, Tiny] = {
    "GPT-2": _language("GPT2LMHeadModel", **_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "Llama": _language("LlamaForCausalLM", **_SHARED),
    "Qwen2": _language("Qwen2ForCausalLM", **_SHARED),
    "Qwen3": _language("Qwen3ForCausalLM", **_SHARED, head_dim=8),
    "Mistral": _language("MistralForCausalLM", **_SHARED),
    "Gemma 2": _language("Gemma2ForCausalLM", **_SHARED, head_dim=8),
    "Gemma 3": _language("Gemma3ForCausalLM", **_SHARED, head_dim=8),
    "Phi-3": _language("Phi3ForCausalLM", **_SHARED),
    "OPT": _language("OPTForCausalLM", **_TEXT, ffn_dim=48, word_embed_proj_dim=32),
    "GPT-NeoX": _language("GPTNeoXForCausalLM", **_TEXT),
    "Falcon": _language("FalconForCausalLM", **_TEXT),
    "Mixtral": _language("MixtralForCausalLM", **_EXPERTS, num_local_experts=4),
    "Qwen3-MoE": _language("Qwen3MoeForCausalLM", **_EXPERTS, num_experts=4, head_dim=8),
    "DeepSeek-V3": _language(
        "DeepseekV3ForCausalLM", **{**_EXPERTS, "num_key_value_heads": 4}, n_routed_experts=4, n_group=2, topk_group=1,
        kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
    ),
    "BERT": Tiny("BertForMaskedLM", _TEXT, lambda: text(left=False)),
    "ModernBERT": Tiny("ModernBertForMaskedLM", _TEXT, lambda: text(left=False)),
    "T5": Tiny(
        "T5ForConditionalGeneration",
        {**_TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 2,
         "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16},
        pairs, generates=True,
    ),
    "BART": Tiny("BartForConditionalGeneration", {**_PAIR, "max_position_embeddings": 64}, pairs, generates=True),
    "Whisper": Tiny(
        "WhisperForConditionalGeneration",
        {**_PAIR, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 64,
         "suppress_tokens": None, "begin_suppress_tokens": None},
        spectra, generates=True,
    ),
    "wav2vec 2.0": Tiny("Wav2Vec2ForCTC", _SOUND, sound),
    "WavLM": Tiny("WavLMForCTC", {**_SOUND, "num_buckets": 16, "max_bucket_distance": 40}, sound),
    "ViT": Tiny(
        "ViTForImageClassification", _IMAGE,
        images((2, 32, 32), (3, 32, 32), (1, 48, 32), interpolate_pos_encoding=True), examples=1,
    ),
    "DINOv2": Tiny("Dinov2ForImageClassification", _IMAGE, images((2, 32, 32), (3, 32, 48), (1, 64, 64)), examples=1),
    "SAM": Tiny("SamModel", {}, prompts),
    "DETR": Tiny("DetrForObjectDetection", {}, masked_images),
    "SegFormer": Tiny(
        "SegformerForSemanticSegmentation",
        {"depths": [1, 1], "num_encoder_blocks": 2, "hidden_sizes": [16, 24], "num_attention_heads": [1, 2],
         "decoder_hidden_size": 16, "sr_ratios": [2, 1], "mlp_ratios": [2, 2], "strides": [4, 2],
         "patch_sizes": [7, 3]},
        images((2, 32, 32), (3, 64, 32), (1, 64, 96)), examples=1,
    ),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """A tiny model with random weights, in eval mode."""
    tiny = MODELS[name]
    kind: Any = getattr(transformers, tiny.name)
    torch.manual_seed(0)
    model = kind(_CONFIGS.get(name, lambda: kind.config_class(**tiny.config))()).eval()
    with torch.no_grad():  # weights that start as zeros, ones or near zero would hide differences
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _sam() -> Any:
    return transformers.SamConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 8,
            "mlp_ratio": 1.5, "output_channels": 16, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 8,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 24, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
            "num_hidden_layers": 2,
        },
    )  # fmt: skip


def _detr() -> Any:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    return transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=32,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, num_queries=3, num_labels=3,
    )  # fmt: skip


_CONFIGS: dict[str, Callable[[], Any]] = {"SAM": _sam, "DETR": _detr}
"""Configurations that are made of several."""
