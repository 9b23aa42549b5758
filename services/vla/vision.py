"""What a residual sees: the current frame's latent, from the VAE inside the world model's weights file.

Only the VAE is built. The transformer beside it needs diffusers, whose import takes longer than everything else at start.
"""

from __future__ import annotations

from pathlib import Path

import torch

from services.vla.policies.base import in_blocks
from world2act.models import store
from world2act.models.vae import VAEConfig, VideoVAE
from world2act.types import FloatArray, ImageArray


class Vision:
    """hash: sha256 of the world model's weights file, which is `WorldModel.hash`; shape: (C, h, w) of a latent."""

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError, or WeightsError when the file holds no world model or its VAE does not fit."""
        tensors, metadata, self.hash = store.read(path, "worldmodel")
        try:
            values = metadata["config"]["vae"]
            self._vae = VideoVAE(VAEConfig(**{**values, "widths": tuple(values["widths"])}))
            self._vae.load_state_dict({k.removeprefix("vae."): v for k, v in tensors.items() if k.startswith("vae.")})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise store.WeightsError(f"{path}: weights and configuration of the VAE do not fit ({reason})") from None
        self._vae.eval().requires_grad_(False)
        for parameter in self._vae.encoder.parameters():  # 15 % faster, the same bits
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.shape = self._vae.config.latent_shape

    def encode(self, grids: ImageArray) -> FloatArray:
        """Camera grids uint8 (B, H, W, 3) -> latents float32 (B, C, h, w), as `WorldModel.encode` of one frame each.

        One row at a time, so that a latent does not depend on the batch (see `in_blocks`): larger blocks gain a fifth on a
        full batch and cost a lone client three times as much.
        """
        return in_blocks(self._encode, 1, grids)

    def _encode(self, grids: ImageArray) -> FloatArray:
        with torch.inference_mode():
            latents: FloatArray = self._vae.encode(torch.from_numpy(grids)[:, None])[:, 0].numpy()
        return latents
