"""LTX-Video 0.9.5 and later (13B): LTXVideoTransformer3DModel on packed tokens, its own VAE (8x time, 32x space), T5 (the parts
of diffusers' LTXConditionPipeline, the start frame at index 0).

The released VAE makes one latent of eight frames, two action chunks: such a model can be trained and measured, but not served for
post-training, which needs one chunk a latent (services/worldmodel/serving.py says so).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import LTXConditionPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

from services.worldmodel.backbones import diffusion
from services.worldmodel.backbones.diffusion import Condition, DiffusionBackbone
from services.worldmodel.backbones.folder import ModelFolder
from services.worldmodel.settings import WorldModelSettings


class LTXVideo(DiffusionBackbone):
    """See the module."""

    name = "ltx_video"
    components: ClassVar[dict[str, tuple[str, ...]]] = {
        "transformer": ("LTXVideoTransformer3DModel",),
        "vae": ("AutoencoderKLLTXVideo",),
        "text_encoder": ("T5EncoderModel",),
        "tokenizer": ("T5TokenizerFast", "T5Tokenizer"),
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    }
    frames = 97
    steps = 50
    guidance = 3.0
    tokens = 256
    lora_rank = 128

    @classmethod
    def compression(cls, folder: ModelFolder) -> tuple[tuple[int, int], int]:
        config = folder.config("vae")
        scaled = sum(config["spatio_temporal_scaling"])
        time = config.get("temporal_compression_ratio") or config["patch_size_t"] * 2**scaled
        space = config.get("spatial_compression_ratio") or config["patch_size"] * 2**scaled
        return (int(time), int(space)), int(folder.config("transformer")["patch_size"])

    def channels(self) -> int:
        return int(self.vae.config.latent_channels)

    def embed(self, prompt: str) -> Condition:
        tokens = self.parts["tokenizer"](
            [prompt], padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
        )
        mask = tokens.attention_mask.to(self.device)
        hidden = self.parts["text_encoder"](tokens.input_ids.to(self.device), attention_mask=mask.bool())[0]
        return {"text": hidden, "mask": mask}

    def velocity(self, x: torch.Tensor, start: torch.Tensor, t: torch.Tensor, given: Condition) -> torch.Tensor:
        x = torch.cat([start, x[:, :, 1:]], dim=2)
        b, _, n, h, w = x.shape
        config = self.parts["transformer"].config
        patch = (config.patch_size, config.patch_size_t)
        first = torch.zeros((b, 1, n, h, w), device=x.device)
        first[:, :, 0] = 1.0
        given_tokens = LTXConditionPipeline._pack_latents(first, *patch)[..., 0]
        places = LTXConditionPipeline._prepare_video_ids(b, n, h, w, *patch, device=x.device)
        time, space = self.info.temporal_compression, self.height // h
        places = LTXConditionPipeline._scale_video_ids(places, space, time, 0, device=x.device).float()
        places[:, 0] /= self.info.fps
        packed = self.transformer(
            hidden_states=LTXConditionPipeline._pack_latents(x.to(self.dtype), *patch),
            encoder_hidden_states=given["text"].to(self.dtype),
            timestep=torch.minimum(1000.0 * t[:, None], (1 - given_tokens) * 1000.0),
            encoder_attention_mask=given["mask"],
            video_coords=places,
            return_dict=False,
        )[0]
        velocity: torch.Tensor = LTXConditionPipeline._unpack_latents(packed.float(), n, h, w, *patch)
        return velocity

    def times(self, steps: int) -> torch.Tensor:
        scheduler = self.parts["scheduler"]
        scheduler.set_timesteps(sigmas=linear_quadratic_schedule(steps).numpy())  # type: ignore[no-untyped-call]
        return torch.as_tensor(scheduler.sigmas)

    def normalise(self, moments: torch.Tensor) -> torch.Tensor:
        normalised: torch.Tensor = LTXConditionPipeline._normalize_latents(
            moments, self.vae.latents_mean, self.vae.latents_std, self.vae.config.scaling_factor
        )
        return normalised

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        raw: torch.Tensor = LTXConditionPipeline._denormalize_latents(
            latents, self.vae.latents_mean, self.vae.latents_std, self.vae.config.scaling_factor
        )
        return raw

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """At decode time 0: nothing is added, so that decoding is a function of the latents."""
        time = torch.zeros(1, device=self.device) if self.vae.config.timestep_conditioning else None
        frames: torch.Tensor = self.vae.decode(latents.to(self.vae.dtype), time, return_dict=False)[0]
        return frames


def load(settings: WorldModelSettings, device: str) -> DiffusionBackbone:
    """See `services.worldmodel.backbones`."""
    return diffusion.load(LTXVideo, settings, device)


def weights_hash(settings: WorldModelSettings, device: str) -> str:
    """See `services.worldmodel.backbones`."""
    return diffusion.weights_hash(LTXVideo, settings, device)
