"""HunyuanVideo-1.5 480p I2V: HunyuanVideo15Transformer3DModel, its own VAE (4x time, 16x space), Qwen2.5-VL's text model, ByT5
for quoted words, SigLIP for the start frame (the parts of diffusers' HunyuanVideo15ImageToVideoPipeline).

All latents are denoised, the start frame's too: it is given beside the noise and not in its place.
"""

from __future__ import annotations

import inspect
from typing import ClassVar

import numpy as np
import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline as Pipeline

from services.worldmodel.backbones import Frames, diffusion
from services.worldmodel.backbones.diffusion import Condition, DiffusionBackbone
from services.worldmodel.backbones.folder import ModelFolder
from services.worldmodel.settings import WorldModelSettings

SYSTEM = inspect.signature(Pipeline._get_mllm_prompt_embeds).parameters["system_message"].default
"""What the language model is told before each prompt; its tokens are cut off the embeddings."""
SYSTEM_TOKENS = 108


class HunyuanVideo15(DiffusionBackbone):
    """See the module."""

    name = "hunyuan_video15"
    components: ClassVar[dict[str, tuple[str, ...]]] = {
        "transformer": ("HunyuanVideo15Transformer3DModel",),
        "vae": ("AutoencoderKLHunyuanVideo15",),
        "text_encoder": ("Qwen2_5_VLTextModel",),
        "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
        "text_encoder_2": ("T5EncoderModel",),
        "tokenizer_2": ("ByT5Tokenizer",),
        "image_encoder": ("SiglipVisionModel",),
        "feature_extractor": ("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil"),
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    }
    steps = 50
    guidance = 6.0
    tokens = 1000
    tokens_2 = 256
    given_first = False
    lora_rank = 8

    @classmethod
    def compression(cls, folder: ModelFolder) -> tuple[tuple[int, int], int]:
        config = folder.config("vae")
        patch = int(folder.config("transformer")["patch_size"])
        return (int(config["temporal_compression_ratio"]), int(config["spatial_compression_ratio"])), patch

    def channels(self) -> int:
        return int(self.vae.config.latent_channels)

    def embed(self, prompt: str) -> Condition:
        text, mask = Pipeline._get_mllm_prompt_embeds(
            self.parts["text_encoder"],
            self.parts["tokenizer"],
            [prompt],
            self.device,
            tokenizer_max_length=self.tokens,
            crop_start=SYSTEM_TOKENS,
        )
        words, words_mask = Pipeline._get_byt5_prompt_embeds(
            self.parts["tokenizer_2"], self.parts["text_encoder_2"], [prompt], self.device, self.tokens_2
        )
        return {"text": text, "mask": mask, "words": words, "words_mask": words_mask}

    def look(self, start: Frames) -> Condition:
        """SigLIP's embedding of the start frame."""
        # As (3, H, W) array: PIL would do as well, and needs one package more.
        pixels = self.parts["feature_extractor"].preprocess(images=np.moveaxis(start, -1, 0), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            seen = self.parts["image_encoder"](pixels.to(self.device, self.dtype)).last_hidden_state
        return {"image": seen}

    def velocity(self, x: torch.Tensor, start: torch.Tensor, t: torch.Tensor, given: Condition) -> torch.Tensor:
        beside = torch.zeros_like(x)
        beside[:, :, :1] = start
        mask = torch.zeros_like(x[:, :1])
        mask[:, :, 0] = 1.0
        velocity: torch.Tensor = self.transformer(
            hidden_states=torch.cat([x, beside, mask], dim=1).to(self.dtype),
            timestep=(1000.0 * t).to(self.dtype),
            timestep_r=None,
            encoder_hidden_states=given["text"].to(self.dtype),
            encoder_attention_mask=given["mask"].to(self.dtype),
            encoder_hidden_states_2=given["words"].to(self.dtype),
            encoder_attention_mask_2=given["words_mask"].to(self.dtype),
            image_embeds=given["image"].to(self.dtype),
            return_dict=False,
        )[0].float()
        return velocity

    def times(self, steps: int) -> torch.Tensor:
        scheduler = self.parts["scheduler"]
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
        return torch.as_tensor(scheduler.sigmas)

    def normalise(self, moments: torch.Tensor) -> torch.Tensor:
        return moments * float(self.vae.config.scaling_factor)

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / float(self.vae.config.scaling_factor)


def load(settings: WorldModelSettings, device: str) -> DiffusionBackbone:
    """See `services.worldmodel.backbones`."""
    return diffusion.load(HunyuanVideo15, settings, device)


def weights_hash(settings: WorldModelSettings, device: str) -> str:
    """See `services.worldmodel.backbones`."""
    return diffusion.weights_hash(HunyuanVideo15, settings, device)
