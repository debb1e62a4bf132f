"""Architectures of transformers, from configurations: nothing is downloaded."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo import Architecture

VOCABULARY, BATCH, TOKENS, LABELS = 128, 2, 16, 16

# What most configurations call their sizes; some refuse a name or two.
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DECODER = {**TEXT, "head_dim": 16}
TWO_STACKS = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_decoder_layers": 1,
    "num_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
# In bf16, the only dtype for which transformers lets a grouped product be compiled.
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "dtype": torch.bfloat16,
}  # fmt: skip
IMAGE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "num_channels": 3, "num_labels": LABELS,
}  # fmt: skip
STAGES = {
    "image_size": 32, "num_channels": 3, "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [64, 128],
    "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "sr_ratios": [2, 1], "sequence_reduction_ratios": [2, 1],
    "num_labels": LABELS,
}  # fmt: skip
WINDOWS = {
    "image_size": 32, "patch_size": 4, "num_channels": 3, "embed_dim": 64, "depths": [2, 1], "num_heads": [2, 4],
    "window_size": 4, "num_labels": LABELS,
}  # fmt: skip
WAVE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32,
    "conv_dim": (64, 64), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "pad_token_id": 0, "mask_time_prob": 0.0,
    "apply_spec_augment": False,
}  # fmt: skip
PAIR = {"text_config": {**TEXT, "projection_dim": 64}, "vision_config": {**IMAGE, "projection_dim": 64}}

GATED = ("mlp.(gate_proj|up_proj)", "mlp.down_proj")
MERGED = ("mlp.gate_up_proj", "mlp.down_proj")
FC = ("fc1", "fc2")
GPT2 = ("mlp.c_fc", "mlp.c_proj")
NEOX = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
GPTJ = ("mlp.fc_in", "mlp.fc_out")
BERT = (r"layer\.\d+\.intermediate.dense", r"layer\.\d+\.output.dense")
SPEECH = ("feed_forward.intermediate_dense", "feed_forward.output_dense")
GROUPED = ("experts.gate_up_proj", "experts.down_proj")
NONE = ("", "")


def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, TOKENS))


def text() -> dict[str, Tensor]:
    given = ids()
    return {"input_ids": given, "labels": given}


def two_texts() -> dict[str, Tensor]:
    return {"input_ids": ids(), "labels": ids()}


def pixels(*shape: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, *(shape or (3, 32, 32))), "labels": torch.randint(LABELS, (BATCH,))}


def wave() -> dict[str, Tensor]:
    return {"input_values": torch.randn(BATCH, 400), "labels": torch.randint(1, 32, (BATCH, 4))}


def text_and_pixels() -> dict[str, Any]:
    return {"input_ids": ids(), "pixel_values": torch.randn(BATCH, 3, 32, 32), "return_loss": True}


def segments() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": torch.randint(LABELS, (BATCH, 32, 32))}


def spectrogram(*shape: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(BATCH, *shape), "labels": ids()}


def build(name: str, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    import transformers

    model = getattr(transformers, name)
    chosen = model.config_class(**config)
    _without_randomness(chosen)
    return model(chosen).to(dtype)


def _without_randomness(config: Any) -> None:
    """No dropout of any kind: gradients are compared."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
        elif hasattr(value, "model_type"):
            _without_randomness(value)


def hf(
    model: str,
    ffn: tuple[str, str],
    base: Mapping[str, Any] = DECODER,
    inputs: Callable[[], Mapping[str, Any]] = text,
    *,
    loss: Callable[[Any], Tensor] = lambda output: output.loss,
    exceptions: Mapping[str, str] | None = None,
    eager: str = "",
    without: str = "",
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Architecture:
    """An entry of the table.

    Args:
        ffn: patterns of the up and down projections.
        base, config: the configuration, the second over the first.
        without: names that this configuration refuses.
    """
    merged = {name: value for name, value in {**base, **config}.items() if name not in without.split()}
    return Architecture(
        name=model,
        build=partial(build, model, merged, dtype),
        inputs=inputs,
        loss=loss,
        up=ffn[0],
        down=ffn[1],
        exceptions=exceptions or {},
        eager=eager,
        library="transformers",
    )


ARCHITECTURES = [
    # Decoders with gated FFNs, in two matrices or one.
    hf("LlamaForCausalLM", GATED, num_hidden_layers=2),
    hf("MistralForCausalLM", GATED, head_dim=32, num_key_value_heads=2),
    hf("Qwen2ForCausalLM", GATED),
    hf("Qwen3ForCausalLM", GATED, head_dim=32, num_key_value_heads=2),
    hf("GemmaForCausalLM", GATED),
    hf("Gemma2ForCausalLM", GATED),
    hf("Gemma3ForCausalLM", GATED),
    hf("Phi3ForCausalLM", MERGED),
    hf("Glm4ForCausalLM", MERGED),
    hf("CohereForCausalLM", GATED),
    hf("OlmoForCausalLM", GATED),
    hf("Olmo2ForCausalLM", GATED),
    hf("GraniteForCausalLM", GATED),
    hf("StableLmForCausalLM", GATED),
    hf("SmolLM3ForCausalLM", GATED),
    hf("Exaone4ForCausalLM", GATED),
    hf("DiffLlamaForCausalLM", GATED),
    hf("BitNetForCausalLM", NONE),
    hf("Lfm2ForCausalLM", ("feed_forward.(w1|w3)", "feed_forward.w2")),
    # Decoders with plain FFNs.
    hf("PhiForCausalLM", FC),
    hf("GPT2LMHeadModel", GPT2),
    hf("GPTBigCodeForCausalLM", GPT2),
    hf("Starcoder2ForCausalLM", GPT2),
    hf("GPTNeoForCausalLM", GPT2, TEXT, attention_types=[[["global", "local"], 1]], num_hidden_layers=2),
    hf("GPTNeoXForCausalLM", NEOX),
    hf("PersimmonForCausalLM", NEOX),
    hf("BloomForCausalLM", NEOX),
    hf("FalconForCausalLM", NEOX, TEXT, ffn_hidden_size=128),
    hf("MptForCausalLM", ("ffn.up_proj", "ffn.down_proj")),
    hf("NemotronForCausalLM", ("mlp.up_proj", "mlp.down_proj")),
    hf("GPTJForCausalLM", GPTJ, TEXT, rotary_dim=8),
    hf("CodeGenForCausalLM", GPTJ, TEXT, rotary_dim=8),
    hf("OPTForCausalLM", FC, TEXT, ffn_dim=128, word_embed_proj_dim=64),
    hf("BioGptForCausalLM", FC, TEXT),
    hf("XGLMForCausalLM", FC, TEXT, ffn_dim=128, num_layers=1, attention_heads=4),
    hf("CTRLLMHeadModel", ("ffn.0", "ffn.2"), TEXT, dff=128),
    # Experts, whose matrices are one parameter; some beside dense FFNs.
    hf("MixtralForCausalLM", GROUPED, **EXPERTS),
    hf("Qwen3MoeForCausalLM", GROUPED, **EXPERTS),
    hf("OlmoeForCausalLM", GROUPED, **EXPERTS),
    hf("GraniteMoeForCausalLM", GROUPED, **EXPERTS),
    hf("GptOssForCausalLM", GROUPED, **EXPERTS),
    # It loops over its experts.
    hf("JetMoeForCausalLM", NONE, TEXT, kv_channels=16, num_local_experts=4),
    hf(
        "Llama4ForCausalLM",
        ("shared_expert.(gate_proj|up_proj)|experts.gate_up_proj", "shared_expert.down_proj|experts.down_proj"),
        intermediate_size_mlp=128,
        **EXPERTS,
    ),
    hf(
        "DeepseekV3ForCausalLM",
        (
            "(mlp|shared_experts).(gate_proj|up_proj)|experts.gate_up_proj",
            "(mlp|shared_experts).down_proj|experts.down_proj",
        ),
        TEXT,
        dtype=torch.bfloat16, num_hidden_layers=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        n_group=1, topk_group=1, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16,
        v_head_dim=16, first_k_dense_replace=1,
    ),
    # Recurrent ones.
    hf("MambaForCausalLM", NONE, TEXT),
    hf("Mamba2ForCausalLM", NONE, TEXT, num_heads=8, head_dim=16, state_size=16, chunk_size=8, n_groups=1),
    hf(
        "RwkvForCausalLM",
        ("feed_forward.key", "feed_forward.value"),
        TEXT,
        num_hidden_layers=2, attention_hidden_size=64, context_length=32,
        rescale_every=0,  # what rescales its weights in an evaluation can't be evaluated (docs/limits.md)
        exceptions={
            "attention.(key|value|receptance|output)": "its recurrence, which dynamo unrolls, is elementwise",
        },
    ),
    hf(
        "RecurrentGemmaForCausalLM",
        ("mlp_block.(gate_proj|up_proj)", "mlp_block.down_proj"),
        num_hidden_layers=3, lru_width=64, attention_window_size=8,
    ),
    hf(
        "JambaForCausalLM",
        (
            "feed_forward.(gate_proj|up_proj)|experts.gate_up_proj", "feed_forward.down_proj|experts.down_proj",
        ),
        TEXT,
        num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        dtype=torch.bfloat16, num_experts=4, use_mamba_kernels=False, mamba_d_state=16, mamba_dt_rank=16,
    ),
    # Encoders.
    hf("BertForMaskedLM", BERT, TEXT),
    hf("RobertaForMaskedLM", BERT, TEXT, max_position_embeddings=66),
    hf("AlbertForMaskedLM", ("ffn", "ffn_output"), TEXT, num_hidden_layers=2, embedding_size=64),
    hf("ElectraForMaskedLM", BERT, TEXT, embedding_size=64),
    hf("DebertaV2ForMaskedLM", BERT, TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    hf("DistilBertForMaskedLM", ("ffn.lin1", "ffn.lin2"), TEXT, hidden_dim=128),
    hf("MPNetForMaskedLM", BERT, TEXT),
    hf("ModernBertForMaskedLM", ("mlp.Wi", "mlp.Wo"), TEXT),
    hf("EsmForMaskedLM", BERT, TEXT),
    hf("LayoutLMForMaskedLM", BERT, TEXT, max_2d_position_embeddings=64),
    hf("LongformerForMaskedLM", BERT, TEXT, attention_window=8, max_position_embeddings=66),
    hf("BigBirdForMaskedLM", BERT, TEXT, attention_type="original_full"),
    hf("FNetForMaskedLM", BERT, TEXT),
    hf("NystromformerForMaskedLM", BERT, TEXT),
    hf("ConvBertForMaskedLM", BERT, TEXT),
    hf(
        "FunnelForMaskedLM",
        ("ffn.linear_1", "ffn.linear_2"),
        TEXT,
        without="num_hidden_layers max_position_embeddings",
        block_sizes=[1, 1], d_model=64, n_head=4, d_head=16, d_inner=128, num_decoder_layers=1,
    ),
    hf(
        "MobileBertForMaskedLM",
        (r"(layer|ffn)\.\d+\.intermediate.dense", r"(layer|ffn)\.\d+\.output.dense"),
        TEXT,
        embedding_size=64, true_hidden_size=64, intra_bottleneck_size=64,
    ),
    # An encoder and a decoder.
    hf("T5ForConditionalGeneration", ("DenseReluDense.wi", "DenseReluDense.wo"), T5, two_texts),
    hf("MT5ForConditionalGeneration", ("DenseReluDense.wi_[01]", "DenseReluDense.wo"), T5, two_texts),
    hf("BartForConditionalGeneration", FC, TWO_STACKS, two_texts),
    hf("MBartForConditionalGeneration", FC, TWO_STACKS, two_texts),
    hf("PegasusForConditionalGeneration", FC, TWO_STACKS, two_texts),
    hf("M2M100ForConditionalGeneration", FC, TWO_STACKS, two_texts),
    hf("MarianMTModel", FC, TWO_STACKS, two_texts, decoder_vocab_size=VOCABULARY),
    hf(
        "ProphetNetForConditionalGeneration",
        ("feed_forward.intermediate", "feed_forward.output"),
        TWO_STACKS,
        two_texts,
        without="d_model encoder_layers decoder_layers encoder_attention_heads decoder_attention_heads",
        hidden_size=64, num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
    ),
    # Speech.
    hf(
        "WhisperForConditionalGeneration",
        FC,
        TWO_STACKS,
        partial(spectrogram, 16, 32),
        eager="dynamo leaves the encoder's own forward, and the convolutions in it, to Python",
        num_mel_bins=16, max_source_positions=16, max_target_positions=32,
    ),
    hf(
        "Speech2TextForConditionalGeneration",
        FC,
        TWO_STACKS,
        partial(spectrogram, 64, 16),
        input_feat_per_channel=16, num_conv_layers=2, conv_channels=64, max_source_positions=64,
        max_target_positions=32,
    ),
    hf("Wav2Vec2ForCTC", SPEECH, WAVE, wave),
    hf("HubertForCTC", SPEECH, WAVE, wave),
    hf("WavLMForCTC", SPEECH, WAVE, wave),
    # Vision.
    hf("ViTForImageClassification", FC, IMAGE, pixels),
    hf("DeiTForImageClassification", FC, IMAGE, pixels, num_hidden_layers=2),
    hf("BeitForImageClassification", FC, IMAGE, pixels),
    hf("Dinov2ForImageClassification", FC, IMAGE, pixels),
    hf("SwinForImageClassification", FC, WINDOWS, pixels),
    hf(
        "Swinv2ForImageClassification",
        (r"blocks\.\d+\.intermediate.dense", r"blocks\.\d+\.output.dense"),
        WINDOWS,
        pixels,
    ),
    # A convolution stands within its FFNs.
    hf(
        "SegformerForSemanticSegmentation",
        NONE,
        STAGES,
        segments,
        patch_sizes=[7, 3], strides=[4, 2], decoder_hidden_size=64,
    ),
    hf("PvtForImageClassification", ("mlp.dense1", "mlp.dense2"), STAGES, pixels, patch_sizes=[4, 2], strides=[4, 2]),
    hf("ConvNextForImageClassification", ("pwconv1", "pwconv2"), STAGES, pixels, num_stages=2),
    hf("VideoMAEForVideoClassification", BERT, IMAGE, partial(pixels, 4, 3, 32, 32), num_frames=4, tubelet_size=2),
    hf(
        "DetrForObjectDetection",
        FC,
        TWO_STACKS,
        lambda: {"pixel_values": torch.randn(BATCH, 3, 64, 64)},
        loss=lambda output: output.logits.square().mean() + output.pred_boxes.square().mean(),
        exceptions={r"bbox_predictor.layers.\d": "three linears with ReLU between"},
        without="vocab_size",
        num_queries=16, num_labels=LABELS, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config={
            "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 32, 64], "depths": [1, 1, 1, 1],
            "layer_type": "basic", "out_features": ["stage4"],
        },
    ),
    # Pairs, and other inputs.
    hf("CLIPModel", FC, PAIR, text_and_pixels, projection_dim=64),
    hf("SiglipModel", FC, PAIR, text_and_pixels),
    hf(
        "BlipModel",
        ("mlp.fc1|" + BERT[0], "mlp.fc2|" + BERT[1]),
        PAIR,
        text_and_pixels,
        projection_dim=64, image_text_hidden_size=64,
        exceptions={"text_model.pooler.dense|text_projection": "the pooler's tanh stands between them"},
    ),
    hf(
        "PerceiverForSequenceClassification",
        ("mlp.dense1", "mlp.dense2"),
        {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_labels": LABELS},
        lambda: {"inputs": ids(), "labels": torch.randint(LABELS, (BATCH,))},
        d_model=64, d_latents=64, num_latents=16, num_blocks=1, num_self_attends_per_block=2,
        num_self_attention_heads=4, num_cross_attention_heads=4, qk_channels=64, v_channels=64,
    ),
    hf(
        "PatchTSTForPrediction",
        (r"ff\.0", r"ff\.3"),
        {"num_input_channels": 2, "context_length": 64, "patch_length": 8, "patch_stride": 8, "prediction_length": 16},
        lambda: {"past_values": torch.randn(BATCH, 64, 2), "future_values": torch.randn(BATCH, 16, 2)},
        d_model=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
    ),
    hf(
        "DecisionTransformerModel",
        GPT2,
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "state_dim": 64, "act_dim": 16, "max_ep_len": 64},
        lambda: {
            "states": torch.randn(BATCH, 5, 64), "actions": torch.randn(BATCH, 5, 16),
            "rewards": torch.randn(BATCH, 5, 1), "returns_to_go": torch.randn(BATCH, 5, 1),
            "timesteps": torch.arange(5).repeat(BATCH, 1),
            "attention_mask": torch.ones(BATCH, 5),
        },
        loss=lambda output: sum(
            (predicted.square().mean() for predicted in (output.action_preds, output.state_preds, output.return_preds)),
            torch.zeros(()),
        ),
    ),
]  # fmt: skip
