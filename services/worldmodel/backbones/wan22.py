"""Wan 2.2 TI2V 5B: WanTransformer3DModel whose timesteps are per token, Wan's VAE (16x space), UMT5 (the parts of diffusers'
WanImageToVideoPipeline with expand_timesteps). The start frame's latent is given clean, at time 0."""

from __future__ import annotations

from typing import ClassVar

import torch

from services.worldmodel.backbones import diffusion
from services.worldmodel.backbones.cosmos_predict2 import t5_embed, wan_compression, wan_denormalise, wan_normalise
from services.worldmodel.backbones.diffusion import Condition, DiffusionBackbone
from services.worldmodel.backbones.folder import ModelError, ModelFolder
from services.worldmodel.settings import WorldModelSettings


class Wan22(DiffusionBackbone):
    """See the module."""

    name = "wan22"
    components: ClassVar[dict[str, tuple[str, ...]]] = {
        "transformer": ("WanTransformer3DModel",),
        "vae": ("AutoencoderKLWan",),
        "text_encoder": ("UMT5EncoderModel",),
        "tokenizer": ("T5TokenizerFast", "T5Tokenizer"),
        "scheduler": ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"),
    }
    steps = 50
    lora_rank = 32
    exact = ("vae",)

    @classmethod
    def compression(cls, folder: ModelFolder) -> tuple[tuple[int, int], int]:
        return wan_compression(folder), int(folder.config("transformer")["patch_size"][1])

    def channels(self) -> int:
        taken, own = self.folder.config("transformer")["in_channels"], int(self.vae.config.z_dim)
        if taken != own:
            raise ModelError(
                f"model folder {self.folder.path}: its transformer takes {taken} channels and latents have {own}; wan22 is "
                "Wan 2.2 TI2V (5B), whose start frame stands in its own place"
            )
        return own

    def embed(self, prompt: str) -> Condition:
        return {"text": t5_embed(self, prompt)}

    def velocity(self, x: torch.Tensor, start: torch.Tensor, t: torch.Tensor, given: Condition) -> torch.Tensor:
        x = torch.cat([start, x[:, :, 1:]], dim=2)
        patch = self.parts["transformer"].config.patch_size
        tokens = (x.shape[3] // patch[1]) * (x.shape[4] // patch[2])
        at = (1000.0 * t)[:, None].repeat(1, x.shape[2] * tokens)
        at[:, :tokens] = 0.0
        velocity: torch.Tensor = self.transformer(
            hidden_states=x.to(self.dtype), timestep=at, encoder_hidden_states=given["text"].to(self.dtype), return_dict=False
        )[0].float()
        return velocity

    def times(self, steps: int) -> torch.Tensor:
        """The times that the network is told; the scheduler knows how far its steps go."""
        scheduler = self.parts["scheduler"]
        scheduler.set_timesteps(steps)
        return torch.cat([scheduler.timesteps.float() / 1000.0, torch.zeros(1)])

    def advance(self, x: torch.Tensor, v: torch.Tensor, i: int, times: torch.Tensor) -> torch.Tensor:
        """One step of the folder's own scheduler (UniPC, second order)."""
        scheduler = self.parts["scheduler"]
        stepped: torch.Tensor = scheduler.step(v, scheduler.timesteps[i], x, return_dict=False)[0]
        return stepped

    def normalise(self, moments: torch.Tensor) -> torch.Tensor:
        return wan_normalise(self.vae, moments)

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        return wan_denormalise(self.vae, latents)


def load(settings: WorldModelSettings, device: str) -> DiffusionBackbone:
    """See `services.worldmodel.backbones`."""
    return diffusion.load(Wan22, settings, device)


def weights_hash(settings: WorldModelSettings, device: str) -> str:
    """See `services.worldmodel.backbones`."""
    return diffusion.weights_hash(Wan22, settings, device)
