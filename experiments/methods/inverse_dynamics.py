"""(d) inverse-dynamics pseudo-actions for the residual: as ours, but targets are actions read from the imagined video by a
model that was trained for nothing else, without the shared latent space: no contrastive term, no bottleneck, no D_a.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.arena import Policy, Run
from experiments.methods.base import Parts
from experiments.methods.residual import post_train
from world2act import stage1
from world2act.data.clips import cut_clips
from world2act.models.adapters import Adapters
from world2act.models.worldmodel import WorldModel
from world2act.normalisation import Statistics
from world2act.presets import STAGE1
from world2act.stage2 import Targets
from world2act.types import M

STEPS, BATCH, RATE = 1200, 128, 2e-3


class InverseDynamics(nn.Module):
    """Two latents, before and after -> the normalised chunk between them. (N, 2, C, h, w) -> (N, M, A)."""

    def __init__(self, shape: tuple[int, int, int], actions: Statistics) -> None:
        super().__init__()
        channels, height, width = shape
        self.actions = actions
        self.net = nn.Sequential(
            nn.Conv2d(2 * channels, 64, 3, 1, 1),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, 2, 1),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, 1, 1),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * (height // 2) * (width // 2), 256),
            nn.GELU(),
            nn.Linear(256, M * len(actions.mean)),
        )

    def forward(self, pair: Tensor) -> Tensor:
        chunk: Tensor = self.net(pair.flatten(1, 2))
        return chunk.view(len(chunk), M, -1)


def fit(parts: Parts) -> InverseDynamics:
    """On the labelled demonstrations, true and predicted latents in equal parts, with the noise that Stage 1 uses."""
    settings, model, adapters = STAGE1["default"], parts.model, parts.adapters
    phases = range(0, M, max(1, M // settings.phases))
    clips = (clip for episode in parts.labels() for clip in cut_clips(episode, phases=phases))
    return fit_to(
        stage1.build_data(model, clips, settings.horizon, parts.seed), model, adapters, settings.latent_noise, parts.seed
    )


def fit_to(data: stage1.Stage1Data, model: WorldModel, adapters: Adapters, noise: float, seed: int) -> InverseDynamics:
    """Train on every pair of neighbouring latents of `data`; noise: on the latents, in their own spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = InverseDynamics(model.config.vae.latent_shape, adapters.actions)
    before = data.true[:, :-1][data.mask]
    after = {"true": data.true[:, 1:][data.mask], "predicted": data.predicted[:, 1:][data.mask]}
    chunks = adapters.actions.normalise(data.actions[data.mask])
    optimiser = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS)
    for step in range(STEPS):
        rows = torch.randint(len(chunks), (BATCH,), generator=generator)
        pair = torch.stack([before[rows], after["predicted" if step % 2 else "true"][rows]], dim=1).float()
        pair = pair + noise * torch.randn(pair.shape, generator=generator)
        loss = nn.functional.mse_loss(network(pair), chunks[rows])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return network.eval().requires_grad_(False)


def train(parts: Parts) -> Policy:
    """The same rounds, scenes and learner as ours."""
    network = fit(parts)

    @torch.no_grad()
    def target(run: Run) -> Targets:
        trajectory = run.trajectory
        n = len(trajectory.frames)
        latents = parts.model.imagine(torch.from_numpy(trajectory.frames), trajectory.prompts, 1, [parts.seed] * n)
        chunks = network(latents)
        # The embeddings only feed the reported cosine: the loss aims at the chunks.
        return Targets(parts.adapters.action(chunks[None])[0], torch.ones(n, dtype=torch.bool), latents[:, 0], chunks)

    return post_train(parts, target)
