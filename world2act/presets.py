"""The two recipes as typed settings: `paper` is METHOD.md to the letter, `default` is what measurements chose.

Every number that a training reads stands here, with its source; a run records its whole settings in its card.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from world2act.models.adapters import AdapterSettings
from world2act.objectives import Contrastive
from world2act.optimiser import Optimiser

Preset = Literal["default", "paper"]


def _at_least(limit: float, **values: float) -> None:
    for name, value in values.items():
        if not value >= limit:
            raise ValueError(f"{name}: must be >= {limit:g}, got {value}")


def _share(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}: must be in [0, 1], got {value}")


@dataclass(frozen=True)
class Stage1Weights:
    """Weight of each term of Stage 1's loss; 0 leaves it out.

    action: D_a(E_a(a)) against a; video: D_a(E_v(v)) against a; noisy: as action, on chunks with noise (the neighbourhood in
    which Stage 2 moves); contrastive: Eq. 1; cosine: 1 - cos of true pairs. The paper has action and contrastive, 1.0 each;
    its authors' code weighs them 1.0 and 0.1.
    """

    action: float = 1.0
    video: float = 1.0
    noisy: float = 1.0
    contrastive: float = 0.1
    cosine: float = 0.1


@dataclass(frozen=True)
class Stage1Settings:
    """Stage 1 (METHOD section 3).

    predicted_share: probability that a clip of a batch shows the world model's own latents, not the encoded video's.
    horizon: latents imagined per start frame; 0: the whole clip from its first frame (the paper's full denoising).
    phases: how many times each clip is cut, at phases M / phases frames apart: more distinct pairs of the same video.
    latent_noise: standard deviation of the noise that training adds to latents, in their own spread.
    hard_ratio: share of the batch drawn from one and the same skill (hard negatives). window: pairs per clip at most.
    random_start: probability that a clip's window starts at random instead of at its first pair.
    """

    adapters: AdapterSettings = field(default_factory=AdapterSettings)
    optimiser: Optimiser = field(default_factory=Optimiser)
    contrastive: Contrastive = field(default_factory=Contrastive)
    weights: Stage1Weights = field(default_factory=Stage1Weights)
    steps: int = 1200
    batch: int = 24
    hard_ratio: float = 0.25
    window: int = 14
    random_start: float = 0.5
    predicted_share: float = 0.75
    horizon: int = 1
    phases: int = 2
    latent_noise: float = 0.3
    action_noise: float = 0.5

    def __post_init__(self) -> None:
        _at_least(1, steps=self.steps, window=self.window, phases=self.phases)
        _at_least(2, batch=self.batch)
        _at_least(0, horizon=self.horizon, action_noise=self.action_noise, latent_noise=self.latent_noise)
        _share(hard_ratio=self.hard_ratio, random_start=self.random_start, predicted_share=self.predicted_share)


@dataclass(frozen=True)
class Rounds:
    """What Stage 2 executes per task: round 0 with base and perturbed episodes, then on-policy rounds, all aggregated.

    Noise is the spread of one offset per chunk on the first three action components, in standard deviations of the actions.
    """

    base: int = 24
    perturbed: int = 16
    perturbed_noise: float = 0.6
    rounds: int = 6
    on_policy: int = 12
    on_policy_noise: float = 0.3
    first_steps: int = 300
    steps: int = 200

    def __post_init__(self) -> None:
        _at_least(0, base=self.base, perturbed=self.perturbed, rounds=self.rounds, on_policy=self.on_policy)
        _at_least(1, first_steps=self.first_steps, steps=self.steps, round_0=self.base + self.perturbed)
        _at_least(0, perturbed_noise=self.perturbed_noise, on_policy_noise=self.on_policy_noise)


@dataclass(frozen=True)
class Stage2Settings:
    """Stage 2 (METHOD section 4).

    target "closed-loop": imagine one chunk again from each visited frame; "open-loop": one clip from the first frame (paper).
    decode_weight: masked MSE between base + residual and D_a(e_v); contrastive_weight: Eq. 1 over scenes of the same task.
    bound: largest residual, in standard deviations of the actions; at 1.0 errors of the imagined targets harm tasks that the base
    has mastered (button-press 1.00 -> .65, against .90 at 0.5 with half the episodes; 20 tuning scenes, one training seed each).
    vision: what the residual sees: "latent" (the
    frame's VAE latent) or "pixels" (METHOD's 256x256 convolutions). instruction: a token of the instruction's words, absent in
    the paper.
    """

    optimiser: Optimiser = field(default_factory=lambda: Optimiser(rate=2e-3))
    contrastive: Contrastive = field(default_factory=Contrastive)
    plan: Rounds = field(default_factory=Rounds)
    target: Literal["closed-loop", "open-loop"] = "closed-loop"
    decode_weight: float = 1.0
    contrastive_weight: float = 0.0
    vision: Literal["latent", "pixels"] = "latent"
    instruction: bool = True
    bound: float = 0.5
    tasks_per_step: int = 2
    episodes_per_step: int = 12
    latent_noise: float = 0.15
    state_noise: float = 0.05

    def __post_init__(self) -> None:
        _at_least(0, decode_weight=self.decode_weight, contrastive_weight=self.contrastive_weight)
        _at_least(0, latent_noise=self.latent_noise, state_noise=self.state_noise)
        _at_least(1, tasks_per_step=self.tasks_per_step, episodes_per_step=self.episodes_per_step)
        if self.decode_weight == self.contrastive_weight == 0:
            raise ValueError("decode_weight, contrastive_weight: one of them must be > 0")
        if not self.bound > 0:
            raise ValueError(f"bound: must be > 0, got {self.bound}")


PAPER_OPTIMISER = Optimiser(rate=1e-4, schedule="constant")

STAGE1: dict[Preset, Stage1Settings] = {
    "default": Stage1Settings(),
    "paper": Stage1Settings(
        adapters=AdapterSettings(pool="average", unit=False),
        optimiser=PAPER_OPTIMISER,
        weights=Stage1Weights(action=1.0, video=0.0, noisy=0.0, contrastive=1.0, cosine=0.0),
        steps=30_000,
        batch=16,
        window=1_000_000,
        random_start=0.0,
        predicted_share=1.0,
        horizon=0,
        phases=1,
        latent_noise=0.0,
        action_noise=0.0,
    ),
}

STAGE2: dict[Preset, Stage2Settings] = {
    "default": Stage2Settings(),
    "paper": Stage2Settings(
        optimiser=PAPER_OPTIMISER,
        plan=Rounds(base=50, perturbed=0, rounds=1, on_policy=50, on_policy_noise=0.0, first_steps=2500, steps=2500),
        target="open-loop",
        decode_weight=0.0,
        contrastive_weight=1.0,
        vision="pixels",
        bound=1.0,
        instruction=False,
        tasks_per_step=1,
        episodes_per_step=16,
        latent_noise=0.0,
        state_noise=0.0,
    ),
}
