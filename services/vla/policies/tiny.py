"""The embedded base policy: world2act.models.tiny_policy, trained by behaviour cloning on few demonstrations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.vla.policies.base import BasePolicy, PolicySpec
from services.vla.settings import VlaSettings
from world2act.models.tiny_policy import TinyPolicy
from world2act.types import FloatArray, ImageArray, M

CAMERAS = {"primary": 0, "wrist": 1}


class Tiny(BasePolicy):
    """Two 64x64 views, four numbers of proprioception, one instruction -> M actions in [-1, 1]."""

    def __init__(self, policy: TinyPolicy, block: int) -> None:
        self._policy = policy
        config = policy.config
        limits = (1.0,) * config.actions
        self._spec = PolicySpec(
            name="tiny",
            hash=policy.hash,
            cameras=CAMERAS,
            height=config.height // 2,
            width=config.width // 2,
            state_size=config.states,
            low=tuple(-limit for limit in limits),
            high=limits,
            chunk=M,
            block=block,
        )

    @property
    def spec(self) -> PolicySpec:
        return self._spec

    def _act(self, grids: ImageArray, states: FloatArray, instructions: Sequence[str]) -> FloatArray:
        with torch.inference_mode():
            chunks = self._policy.act(torch.from_numpy(grids), torch.from_numpy(states), instructions)
        result: FloatArray = chunks.float().cpu().numpy()
        return result


def build(settings: VlaSettings) -> Tiny:
    """Load the weights that `settings` name. Raises FileNotFoundError or ValueError (damaged, or of another kind)."""
    return Tiny(TinyPolicy.load(settings.weights(settings.vla_base)), settings.vla_block)
