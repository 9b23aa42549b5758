"""World models in the diffusers layout with tiny random weights: the same classes and configuration fields as the released ones,
saved to disk, so that loading is tested too. `build(name, folder)` writes one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WORDS = ["the", "drawer", "open", "close", "pick", "puck", "push", "up", "robot", "arm", "goal", "reach", "button", "panel"]


def t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    letters = [(c, -10.0) for c in "abcdefghijklmnopqrstuvwxyz0123456789.,:;-"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -5.0), *((f"▁{w}", -3.0) for w in WORDS), *letters]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def t5(width: int, kind: str = "T5") -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=400, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def wan_vae(channels: int = 4) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1 * i for i in range(channels)],
        latents_std=[1.0 + 0.1 * i for i in range(channels)],
    )


def cosmos_predict2() -> dict[str, Any]:
    from diffusers import CosmosTransformer3DModel, FlowMatchEulerDiscreteScheduler

    transformer = CosmosTransformer3DModel(
        in_channels=5,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(32, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(1.0, 3.0, 3.0),
        concat_padding_mask=True,  # as the released ones: no torchvision here, see the backbone
        extra_pos_embed_type=None,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return {
        "transformer": transformer,
        "vae": wan_vae(),
        "text_encoder": t5(16),
        "tokenizer": t5_tokenizer(),
        "scheduler": scheduler,
    }


def wan22() -> dict[str, Any]:
    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
    )
    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0, num_train_timesteps=1000
    )
    return {
        "transformer": transformer,
        "vae": wan_vae(),
        "text_encoder": t5(16, "UMT5"),
        "tokenizer": t5_tokenizer(),
        "scheduler": scheduler,
    }


def ltx_video(time: int = 8) -> dict[str, Any]:
    from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel

    scaled = (True, True, True) if time == 8 else (True, True, False)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(*scaled, False),
        decoder_spatio_temporal_scaling=(*scaled, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=16,
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": t5(16),
        "tokenizer": t5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


def hunyuan_video15() -> dict[str, Any]:
    import transformers
    from diffusers import AutoencoderKLHunyuanVideo15, FlowMatchEulerDiscreteScheduler, HunyuanVideo15Transformer3DModel
    from tokenizers.pre_tokenizers import ByteLevel

    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        target_size=64,
    )
    letters = sorted(ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*letters, "<|endoftext|>", "<|im_start|>", "<|im_end|>"])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    qwen = transformers.Qwen2_5_VLTextModel(
        transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLTextConfig(
            vocab_size=len(vocab) + 8,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        )
    )
    siglip = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
        )
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": qwen,
        "tokenizer": tokenizer,
        "text_encoder_2": t5(16),
        "tokenizer_2": transformers.ByT5Tokenizer(),
        "image_encoder": siglip,
        "feature_extractor": transformers.SiglipImageProcessor(size={"height": 16, "width": 16}),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
    }


BUILDERS: dict[str, Callable[[], dict[str, Any]]] = {
    "cosmos_predict2": cosmos_predict2,
    "wan22": wan22,
    "ltx_video": ltx_video,
    "hunyuan_video15": hunyuan_video15,
}
SIZES = {"cosmos_predict2": "32x64", "wan22": "32x64", "ltx_video": "32x64", "hunyuan_video15": "32x64"}
"""Small and not square: heights and widths that were swapped would show."""


def build(name: str, folder: Path, seed: int = 0, **options: Any) -> Path:
    """Write the tiny model `name`; equal seeds give equal weights."""
    torch.manual_seed(seed)
    parts = BUILDERS[name](**options)
    index: dict[str, Any] = {"_class_name": name}
    for component, part in parts.items():
        if isinstance(part, torch.nn.Module):
            part.eval()
        part.save_pretrained(folder / component)
        library = type(part).__module__.split(".")[0]
        index[component] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
