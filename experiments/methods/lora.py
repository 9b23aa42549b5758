"""(g) LoRA on the base instead of a residual (paper Table 3): low-rank adapters, the same targets, loss, rounds and optimiser.

Only the adapter differs: the change of the chunk is bounded as the residual's is, the bound being part of the recipe. What
follows from it: the trainer must keep the base and the pixels of every visited frame, where the residual needs latents and
recorded base chunks. The wrapper is our own, for `peft` would bring transformers and accelerate for these few lines.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from experiments.arena import Policy
from experiments.methods.base import Parts
from experiments.methods.residual import post_train
from experiments.methods.world2act import imagined
from world2act.behaviour_cloning import shifted
from world2act.models.adapters import Adapters
from world2act.models.residual import ResidualPolicy
from world2act.models.tiny_policy import TinyPolicy
from world2act.models.vae import to_float
from world2act.optimisation import autocast
from world2act.presets import Stage2Settings
from world2act.stage2 import Batch, Learner
from world2act.types import Device

SHIFT = 3
"""Random shift of training images in pixels, as in the base's own cloning; the residual has noise on its latents instead."""


class LowRank(nn.Module):
    """A frozen linear or convolution layer plus up(down(x)), rank r: W + B A, B = 0 at first, alpha = r (arXiv 2106.09685)."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank: must be >= 1, got {rank}")
        self.layer = layer.requires_grad_(False)
        self.down: nn.Module
        self.up: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            size, stride, padding = layer.kernel_size, layer.stride, layer.padding
            self.down = nn.Conv2d(layer.in_channels, rank, size, stride, padding, bias=False)  # type: ignore[arg-type]
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        whole: Tensor = self.layer(x) + self.up(self.down(x))
        return whole


def adapt(module: nn.Module, rank: int) -> None:
    """Freeze `module` in place and wrap every linear and convolution layer inside."""
    module.requires_grad_(False)
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear | nn.Conv2d):
            setattr(module, name, LowRank(child, rank))
        else:
            adapt(child, rank)


class LoraPolicy(nn.Module):
    """The base with low-rank adapters, seen as a residual on the frozen base's chunk: the interface of `ResidualPolicy`."""

    state_mean: Tensor
    state_std: Tensor

    def __init__(self, base: TinyPolicy, adapters: Adapters, rank: int, bound: float, seed: int) -> None:
        super().__init__()
        self.net = copy.deepcopy(base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapt(self.net, rank)
        self.action_adapter = copy.deepcopy(adapters.action).requires_grad_(False)
        self.actions, self.bound = adapters.actions, bound
        self.register_buffer("state_mean", torch.zeros(base.config.states))
        self.register_buffer("state_std", torch.ones(base.config.states))

    def set_state_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Of proprioception (S,), the unit of the noise that training adds; the base keeps its own."""
        self.state_mean.copy_(mean)
        self.state_std.copy_(std)

    def forward(self, visual: Tensor, states: Tensor, base: Tensor, instructions: Sequence[str]) -> Tensor:
        """Change of the chunk (N, M, A), normalised, within +-bound.

        visual: active rows, float (N, 3, rows, W) in [-1, 1]; states (N, S); base: the frozen base's chunk, normalised.
        """
        with autocast("auto" if self.training else "float32", visual.device):  # as in the base's own cloning
            out = self.net(visual.contiguous(memory_format=torch.channels_last), states, instructions)
        # As little clipped as the residual's sum: a clipped value whose gradient passes lets saturated components run away.
        raw = self.actions.normalise(out.float() * self.net.action_std + self.net.action_mean) - base
        return self.bound * torch.tanh(raw / self.bound)


class LoraLearner(Learner):
    """Stage 2's learner with LoRA in the residual's place: same losses, batches, optimiser, random state."""

    def __init__(
        self, base: TinyPolicy, adapters: Adapters, settings: Stage2Settings, seed: int, rank: int, device: Device = "cpu"
    ) -> None:
        super().__init__(adapters, replace(settings, vision="pixels"), seed, base.config.states, device=device)
        self.rows = base.config.active_rows
        # The learner calls what both have; a LoRA has no bundle.
        self.policy = cast(ResidualPolicy, LoraPolicy(base, adapters, rank, settings.bound, seed).to(self.device))
        self.optimiser = settings.optimiser.build(self.policy.parameters())

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """As the residual's, on frames uint8 (B, n, H, W, 3) moved by a few pixels."""
        batch = batch.to(self.device)
        active = to_float(batch.visual[:, :, : self.rows].flatten(0, 1)).permute(0, 3, 1, 2).contiguous()
        moved = shifted(active, SHIFT, self.generator).view(*batch.mask.shape, *active.shape[1:])
        return super().losses(replace(batch, visual=moved))


@dataclass
class WithLora:
    """A frozen base and the adapted one: base and combined = clip(base + bounded difference)."""

    base: TinyPolicy
    policy: LoraPolicy
    version: int

    @torch.no_grad()
    def act(self, frames: Tensor, states: Tensor, instructions: Sequence[str], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        chunk = self.base.act(frames, states, instructions)
        active = to_float(frames[:, : self.base.config.active_rows]).permute(0, 3, 1, 2)
        actions = self.policy.actions
        residual = self.policy(active, states, actions.normalise(chunk), instructions) * actions.std
        return chunk, (chunk + residual).clamp(-1.0, 1.0)


def train(parts: Parts, rank: int) -> Policy:
    """Ours with another adapter."""
    learner = LoraLearner(parts.base, parts.adapters, parts.settings, parts.seed, rank, device="auto")

    def policy_of(trained: Learner) -> Policy:
        policy = copy.deepcopy(trained.policy).cpu().eval().requires_grad_(False)
        return WithLora(parts.base, cast(LoraPolicy, policy), trained.version)

    parts.note("parameters", sum(p.numel() for p in learner.policy.parameters() if p.requires_grad))
    return post_train(parts, imagined(parts), learner=learner, policy_of=policy_of)


rank_16 = partial(train, rank=16)
rank_32 = partial(train, rank=32)
