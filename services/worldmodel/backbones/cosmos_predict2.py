"""Cosmos-Predict2 Video2World (2B, 14B): CosmosTransformer3DModel, Wan's VAE, T5 (the parts of diffusers'
Cosmos2VideoToWorldPipeline).

NVIDIA's weights come under a licence that requires their guardrail (package cosmos_guardrail, with weights of its own), so it is
on unless W2A_GUARDRAIL=false, which is for weights of one's own. Prompts are checked before anything is computed, frames as they
are decoded; latents alone are shown to nobody and are not checked.

Guidance: diffusers adds g times the difference to the conditional prediction, so its 7 is our 8 (1 = the conditional alone).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.cosmos.pipeline_cosmos2_video2world import DEFAULT_NEGATIVE_PROMPT

from services.worldmodel.backbones import Frames, diffusion
from services.worldmodel.backbones.diffusion import Condition, DiffusionBackbone
from services.worldmodel.backbones.folder import ModelError, ModelFolder
from services.worldmodel.settings import WorldModelSettings

SIGMA_OF_GIVEN = 1e-4
"""The noise level that the model is told of the start frame's latent, which has none."""


class CosmosPredict2(DiffusionBackbone):
    """See the module."""

    name = "cosmos_predict2"
    components: ClassVar[dict[str, tuple[str, ...]]] = {
        "transformer": ("CosmosTransformer3DModel",),
        "vae": ("AutoencoderKLWan",),
        "text_encoder": ("T5EncoderModel",),
        "tokenizer": ("T5TokenizerFast", "T5Tokenizer"),
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    }
    guidance = 8.0
    negative = DEFAULT_NEGATIVE_PROMPT

    def __init__(
        self, folder: ModelFolder, settings: WorldModelSettings, device: str, only: Collection[str] | None = None
    ) -> None:
        # Parts of the model alone show nothing to anybody: training looks at its own data.
        self.guardrail = make_guardrail() if settings.guardrail and only is None else None
        super().__init__(folder, settings, device, only)
        if "scheduler" in self.parts:  # the same sigmas as the pipeline's constructor sets
            sigmas = {"sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 1.0, "final_sigmas_type": "sigma_min"}
            self.parts["scheduler"].register_to_config(**sigmas)
        if importlib.util.find_spec("torchvision") is None:
            # The model resizes its (empty) padding mask by torchvision, which is not needed for anything else.
            transformer_cosmos.transforms = SimpleNamespace(  # type: ignore[attr-defined]
                functional=SimpleNamespace(resize=_resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
            )

    @classmethod
    def compression(cls, folder: ModelFolder) -> tuple[tuple[int, int], int]:
        return wan_compression(folder), int(folder.config("transformer")["patch_size"][1])

    def channels(self) -> int:
        return int(self.vae.config.z_dim)

    def embed(self, prompt: str) -> Condition:
        return {"text": t5_embed(self, prompt)}

    def velocity(self, x: torch.Tensor, start: torch.Tensor, t: torch.Tensor, given: Condition) -> torch.Tensor:
        x = torch.cat([start, x[:, :, 1:]], dim=2)
        mask = torch.zeros_like(x[:, :1])
        mask[:, :, 0] = 1.0
        at = t.view(-1, 1, 1, 1, 1).expand(-1, 1, x.shape[2], 1, 1).clone()
        at[:, :, 0] = SIGMA_OF_GIVEN / (1 + SIGMA_OF_GIVEN)
        v = self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=at.to(self.dtype),
            encoder_hidden_states=given["text"].to(self.dtype),
            fps=int(self.info.fps),
            condition_mask=mask.to(self.dtype),
            padding_mask=x.new_zeros(1, 1, self.height, self.width, dtype=self.dtype),
            return_dict=False,
        )[0]
        return torch.as_tensor(v).float()

    def times(self, steps: int) -> torch.Tensor:
        """t = sigma / (1 + sigma). diffusers ends at the smallest sigma and repeats it: its last step moves nothing and is left
        out here."""
        scheduler = self.parts["scheduler"]
        scheduler.set_timesteps(sigmas=torch.linspace(0, 1, steps, dtype=torch.float64))
        sigmas: torch.Tensor = scheduler.sigmas[:-1].double()
        return sigmas / (1 + sigmas)

    def first(self, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return times[0].float() * noise

    def advance(self, x: torch.Tensor, v: torch.Tensor, i: int, times: torch.Tensor) -> torch.Tensor:
        return x + (times[i + 1] - times[i]).float() * v

    def normalise(self, moments: torch.Tensor) -> torch.Tensor:
        return wan_normalise(self.vae, moments)

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        return wan_denormalise(self.vae, latents)

    def check_text(self, prompt: str) -> None:
        if self.guardrail is not None and not self.guardrail.check_text_safety(prompt):
            raise ValueError(f"prompt: the guardrail refuses {prompt[:80]!r}")

    def check_video(self, frames: Frames) -> Frames:
        if self.guardrail is None:
            return frames
        checked: Frames | None = self.guardrail.check_video_safety(frames)
        if checked is None:
            raise ValueError("frames: the guardrail refuses the imagined video")
        return checked


def make_guardrail() -> Any:
    """NVIDIA's safety checker. Raises ModelError where its package is not installed or its weights cannot be had."""
    try:
        from cosmos_guardrail import CosmosSafetyChecker
    except ImportError:
        raise ModelError(
            "guardrail: package cosmos_guardrail is not installed (pip install cosmos_guardrail; it fetches weights). "
            "NVIDIA's licence requires it for NVIDIA's weights; for weights of your own set W2A_GUARDRAIL=false"
        ) from None
    try:
        return CosmosSafetyChecker()
    except Exception as error:  # a foreign package that downloads: it may fail in any way
        raise ModelError(f"guardrail: cannot be loaded: {type(error).__name__}: {str(error)[:200]}") from None


def _resize(mask: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
    return torch.nn.functional.interpolate(mask, size, mode=interpolation)


def wan_compression(folder: ModelFolder) -> tuple[int, int]:
    """Of AutoencoderKLWan: (frames per latent, pixels per cell)."""
    config = folder.config("vae")
    down = config["temperal_downsample"]  # diffusers' spelling
    return 2 ** sum(down), 2 ** len(down) * int(config.get("patch_size") or 1)


def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = (torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std))
    return tuple(v.view(1, -1, 1, 1, 1).to(like) for v in values)  # type: ignore[return-value]


def wan_normalise(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """AutoencoderKLWan's latents -> zero mean, unit spread."""
    mean, std = _statistics(vae, latents)
    return (latents - mean) / std


def wan_denormalise(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The inverse."""
    mean, std = _statistics(vae, latents)
    return latents * std + mean


def t5_embed(backbone: DiffusionBackbone, prompt: str) -> torch.Tensor:
    """T5's last hidden states (1, tokens, width), zero where padded."""
    tokens = backbone.parts["tokenizer"](
        [prompt], padding="max_length", max_length=backbone.tokens, truncation=True, return_tensors="pt"
    )
    mask = tokens.attention_mask.to(backbone.device)
    hidden: torch.Tensor = backbone.parts["text_encoder"](
        tokens.input_ids.to(backbone.device), attention_mask=mask
    ).last_hidden_state
    return torch.as_tensor(hidden * mask[..., None].to(hidden))


def load(settings: WorldModelSettings, device: str) -> DiffusionBackbone:
    """See `services.worldmodel.backbones`."""
    return diffusion.load(CosmosPredict2, settings, device)


def weights_hash(settings: WorldModelSettings, device: str) -> str:
    """See `services.worldmodel.backbones`."""
    return diffusion.weights_hash(CosmosPredict2, settings, device)
