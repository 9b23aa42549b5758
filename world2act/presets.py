"""The two recipes as typed settings: `paper` is METHOD.md to the letter, `default` is what measurements chose.

Every number that a training reads stands here, with its source; a run records its whole settings in its card. docs/method.md
explains them and holds them as tables, which `python -m world2act.presets docs/method.md` brings up to date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from world2act.models.adapters import AdapterSettings
from world2act.objectives import Contrastive, one_of
from world2act.optimiser import Optimiser

Preset = Literal["default", "paper"]
Target = Literal["closed-loop", "open-loop"]
Alignment = Literal["same-index", "monotone"]
Vision = Literal["latent", "pixels"]

LONGEST_CLIP = 16
"""Chunks of one closed-loop clip at most: what a RolloutRequest carries."""


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

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("action", "video", "noisy", "contrastive", "cosine")}
        _at_least(0, **weights)
        if not any(weights.values()):
            raise ValueError(f"{', '.join(weights)}: one of them must be > 0")


@dataclass(frozen=True)
class Stage1Settings:
    """Stage 1 (METHOD section 3).

    predicted_share: probability that a clip of a batch shows the world model's own latents, not the encoded video's.
    horizon: latents imagined per start frame; 0: the whole clip from its first frame (the paper's full denoising).
    phases: how many times each clip is cut, at phases M / phases frames apart: more distinct pairs of the same video.
    latent_noise: standard deviation of the noise that training adds to latents, in their own spread.
    hard_ratio: share of the batch drawn from one and the same skill (hard negatives). window: pairs per clip at most.
    random_start: probability that a clip's window starts at random instead of at its first pair.
    action_noise: standard deviation of the noise of the term "noisy", in standard deviations of the actions.
    Pooling and unit norm of embeddings are the adapters' (`AdapterSettings.pool`, `unit`).
    """

    adapters: AdapterSettings = field(default_factory=AdapterSettings)
    optimiser: Optimiser = field(default_factory=Optimiser)
    contrastive: Contrastive = field(default_factory=Contrastive)
    weights: Stage1Weights = field(default_factory=Stage1Weights)
    steps: int = 3000
    batch: int = 24
    hard_ratio: float = 0.25
    window: int = 14
    random_start: float = 0.5
    predicted_share: float = 0.9
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

    Targets. target "closed-loop": imagine again from visited frames, one clip of `closed_loop_every` chunks from every
    `closed_loop_every`-th of them, under the skill active there; "open-loop": one clip a skill from the first frame (paper).
    alignment, of open-loop targets: "same-index" (paper): chunk k with imagined chunk k; "monotone": with the imagined chunk that
    `objectives.monotone_path` finds, skill by skill.
    Objective, a weighted sum; weight 0 leaves a term out. decode_weight: masked MSE between base + residual and D_a(e_v);
    contrastive_weight: Eq. 1 (or the form in `contrastive`) over scenes of the same task; cosine_weight: 1 - cos of the true
    pairs; residual_penalty: mean squared residual, in variances of the actions.
    bound: largest residual, in standard deviations of the actions; 4 lets it turn any action around: what a base does where it
    fails lies two and more from the right action (docs/decisions/012).
    vision: what the residual sees: "latent" (the frame's VAE latent) or "pixels" (METHOD's 256x256 convolutions).
    instruction: a token of the instruction's words, absent in the paper. width: of the residual's tokens (the paper's: D).
    """

    optimiser: Optimiser = field(default_factory=lambda: Optimiser(rate=2e-3))
    contrastive: Contrastive = field(default_factory=Contrastive)
    plan: Rounds = field(default_factory=Rounds)
    target: Target = "closed-loop"
    closed_loop_every: int = 1
    alignment: Alignment = "same-index"
    decode_weight: float = 0.0
    contrastive_weight: float = 0.0
    cosine_weight: float = 1.0
    residual_penalty: float = 0.0
    vision: Vision = "latent"
    instruction: bool = True
    bound: float = 4.0
    width: int = 128
    tasks_per_step: int = 2
    episodes_per_step: int = 12
    latent_noise: float = 0.15
    state_noise: float = 0.05

    def __post_init__(self) -> None:
        one_of(Target, target=self.target)
        one_of(Alignment, alignment=self.alignment)
        one_of(Vision, vision=self.vision)
        _at_least(0, decode_weight=self.decode_weight, contrastive_weight=self.contrastive_weight)
        _at_least(0, cosine_weight=self.cosine_weight, residual_penalty=self.residual_penalty)
        _at_least(0, latent_noise=self.latent_noise, state_noise=self.state_noise)
        _at_least(1, tasks_per_step=self.tasks_per_step, episodes_per_step=self.episodes_per_step)
        if self.decode_weight == self.contrastive_weight == self.cosine_weight == 0:
            raise ValueError("decode_weight, contrastive_weight, cosine_weight: one of them must be > 0")
        if not self.bound > 0:
            raise ValueError(f"bound: must be > 0, got {self.bound}")
        if not 1 <= self.closed_loop_every <= LONGEST_CLIP:
            raise ValueError(f"closed_loop_every: must be in [1, {LONGEST_CLIP}], got {self.closed_loop_every}")
        if self.target == "open-loop" and self.closed_loop_every != 1:
            raise ValueError("closed_loop_every: target open-loop imagines from the first frame only; leave it at 1")
        if self.target == "closed-loop" and self.alignment != "same-index":
            raise ValueError("alignment: closed-loop targets start at the chunk they are for; monotone is for target open-loop")


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
        contrastive_weight=1.0,
        cosine_weight=0.0,
        vision="pixels",
        bound=1.0,
        width=32,
        instruction=False,
        tasks_per_step=1,
        episodes_per_step=16,
        latent_noise=0.0,
        state_noise=0.0,
    ),
}


Settings = TypeVar("Settings")


def changed(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """`settings` with dotted fields replaced, such as {"plan.rounds": 2, "bound": 1.0}: all at once, so their order is free.

    Raises ValueError naming a field that does not exist, is of another type, or is out of range.
    """
    flat: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        head, _, rest = name.partition(".")
        old = getattr(settings, head, None) if head in {f.name for f in fields(settings)} else None  # type: ignore[arg-type]
        if old is None or is_dataclass(old) != bool(rest):
            raise ValueError(f"{name}: no such setting")
        if rest:
            nested.setdefault(head, {})[rest] = value
        elif type(value) is type(old) or (type(old) is float and type(value) is int):
            flat[head] = type(old)(value)
        else:
            raise ValueError(f"{name}: must be {type(old).__name__}, got {value!r}")
    inner = {head: changed(getattr(settings, head), found) for head, found in nested.items()}
    return replace(settings, **flat, **inner)  # type: ignore[type-var]


# --- tables ---------------------------------------------------------------------------------------------------------------


def flattened(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every setting, in order."""
    for one in fields(settings):
        value = getattr(settings, one.name)
        if is_dataclass(value):
            yield from flattened(value, f"{prefix}{one.name}.")
        else:
            yield f"{prefix}{one.name}", value


def table(presets: Mapping[Preset, Any]) -> str:
    """Every setting under both presets, as Markdown; where they differ, the default's is bold."""
    lines = ["| setting | `paper` | `default` |", "|---|---|---|"]
    for (name, paper), (_, default) in zip(flattened(presets["paper"]), flattened(presets["default"]), strict=True):
        mark = "" if paper == default else "**"
        lines.append(f"| `{name}` | {paper} | {mark}{default}{mark} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """`text` with what stands between <!-- stage1 --> or <!-- stage2 --> and <!-- end --> replaced by the present tables."""
    for name, presets in (("stage1", STAGE1), ("stage2", STAGE2)):
        made = f"<!-- {name} -->\n\n{table(presets)}\n\n<!-- end -->"
        text, found = re.subn(f"<!-- {name} -->.*?<!-- end -->", lambda _, made=made: made, text, flags=re.DOTALL)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"<!-- {name} --> ... <!-- end -->: must stand in the text once, found {found}")
    return text


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_tables(page.read_text()))
