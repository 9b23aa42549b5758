"""Who has seen which labels: the parts of a regime, built once and kept.

shipped: the weights in zoo/ (base: few demonstrations; Stage 1: every labelled demonstration of split worldmodel).
video-rich: n labelled demonstrations a task for everybody; the world model has seen plenty of video without actions. Stage 1
    learns actions from the n demonstrations and from the robot's own rollouts, whose actions are known without any label,
    names the actions of the video with that, and learns the predicted latents on those pseudo-actions.
matched: n demonstrations a task for everybody, the world model too.
Variants of any of them: Base-WM instead of Skill-WM (METHOD section 2), and Stage 1 of preset `paper`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from experiments.arena import Arena
from experiments.policies import Playing
from world2act import behaviour_cloning, stage1, worldmodel_training
from world2act.data import robomimic
from world2act.data.clips import cut_clips
from world2act.models.adapters import Adapters
from world2act.models.tiny_policy import TinyPolicy, TinyPolicyConfig
from world2act.models.worldmodel import WorldModel
from world2act.presets import STAGE1, Preset, Stage1Settings
from world2act.schedule import INDICES_PER_SEED, EpisodeSpec
from world2act.segmentation import Segmentation
from world2act.splits import Split
from world2act.types import Clip, Episode, M, Skill

Kind = Literal["shipped", "video-rich", "matched"]

PLAY_EPISODES = 40
"""Own rollouts a task that Stage 1 of the video-rich regime learns from."""
PLAY_NOISE = 0.6
PLAY_SEED = 99
"""The seed of `schedule.plan` whose scenes of split posttrain they use; no method uses it."""


@dataclass(frozen=True)
class Regime:
    """demonstrations: labelled ones per task that the base has seen. worldmodel "base": trained on whole episodes with their
    instruction as the prompt, and asked that way. stage1: preset of the adapters."""

    kind: Kind = "shipped"
    demonstrations: int = 4
    worldmodel: Literal["skill", "base"] = "skill"
    stage1: Preset = "default"

    @property
    def name(self) -> str:
        plain = "shipped" if self.kind == "shipped" else f"{self.kind}-{self.demonstrations}"
        return (
            plain + ("" if self.worldmodel == "skill" else "-base-wm") + ("" if self.stage1 == "default" else f"-{self.stage1}")
        )


@dataclass(frozen=True)
class Places:
    """out: results that are kept (cells); cache: parts that can be built again; demos: demonstrations; zoo: shipped weights."""

    out: Path = Path("docs/results")
    cache: Path = Path("data/experiments")
    demos: Path = Path("data/demos")
    zoo: Path = Path("zoo")

    def part(self, regime: Regime, name: str) -> Path:
        """The weights file of a regime's part: base, worldmodel or adapters."""
        plain = Regime(regime.kind, regime.demonstrations)
        if name == "base":  # does not depend on the rest
            folder = self.zoo if regime.kind == "shipped" else self.cache / f"cloned-{regime.demonstrations}"
        elif name == "worldmodel" and regime.worldmodel == "base":
            folder = self.cache / (f"{plain.name}-base-wm" if regime.kind == "matched" else "base-wm")
        elif regime.kind == "shipped" and (name == "worldmodel" or regime == plain):
            folder = self.zoo
        elif name == "worldmodel":
            folder = self.zoo if regime.kind == "video-rich" else self.cache / plain.name
        else:
            folder = self.cache / regime.name
        return folder / f"{name}.safetensors"


def labels(regime: Regime, places: Places, tasks: Sequence[str]) -> list[Episode]:
    """Every labelled demonstration that any part of the regime has seen."""
    episodes = few(places, tasks, regime.demonstrations)
    if regime.kind == "shipped":
        episodes += robomimic.read_root(places.demos, allowed=[Split.WORLDMODEL], tasks=tasks)
    return episodes


def few(places: Places, tasks: Sequence[str], count: int) -> list[Episode]:
    """The first `count` demonstrations a task of split base. Raises ValueError where there are fewer."""
    chosen: dict[str, list[Episode]] = {task: [] for task in tasks}
    for episode in robomimic.read_root(places.demos, allowed=[Split.BASE], tasks=tasks):
        if len(chosen[episode.task]) < count:
            chosen[episode.task].append(episode)
    short = [f"{task} {len(found)}" for task, found in chosen.items() if len(found) < count]
    if short:
        more = f"world2act demos --split base --episodes {count} --resume makes them"
        raise ValueError(
            f"demonstrations: need {count} a task of split base under {places.demos}, got {', '.join(short)}; {more}"
        )
    return [episode for found in chosen.values() for episode in found]


def cloning_steps(episodes: int) -> int:
    """Training steps of behaviour cloning on that many episodes: 1,000 at 28, more for more, 4,000 at most."""
    return int(min(4000, 1000 * max(1.0, (episodes / 28) ** 0.5)))


def clone(episodes: Sequence[Episode], seed: int, start: TinyPolicy | None = None) -> TinyPolicy:
    """A base policy cloned from `episodes` of splits base and worldmodel, from `start`'s weights if given."""
    torch.manual_seed(seed)
    config = TinyPolicyConfig(actions=episodes[0].actions.shape[1], states=episodes[0].states.shape[1])
    policy = TinyPolicy(config)
    if start is not None:
        policy.load_state_dict(start.state_dict())
    samples = behaviour_cloning.samples_of(episodes, config.active_rows, (Split.BASE, Split.WORLDMODEL))
    settings = behaviour_cloning.Settings(Path(), Path(), seed=seed, steps=cloning_steps(len(episodes)))
    behaviour_cloning.train(policy, samples, settings)
    return policy.requires_grad_(False)


PARTS = ("base", "worldmodel", "adapters")


def lacking(regime: Regime, places: Places) -> list[str]:
    """Parts that have to be built. Adapters of another world model (the zoo's may have changed since) are none.

    Raises FileNotFoundError for a shipped part that is missing: those are never built here.
    """
    missing = [name for name in PARTS if not places.part(regime, name).exists()]
    if not missing:
        adapters = Adapters.load(places.part(regime, "adapters"))
        missing = [] if adapters.worldmodel_hash == _hash(places.part(regime, "worldmodel")) else ["adapters"]
    for path in (places.part(regime, name) for name in missing):
        if path.parent == places.zoo:
            raise FileNotFoundError(f"{path}: not there, or of another world model; `make zoo` makes it")
    return missing


def prepare(regime: Regime, places: Places, tasks: Sequence[str]) -> dict[str, str]:
    """Build what the regime lacks; returns the hash of each part. Raises as `lacking`."""
    missing = lacking(regime, places)
    if "base" in missing:
        clone(few(places, tasks, regime.demonstrations), seed=0).save(places.part(regime, "base"), {"regime": regime.name})
    if "worldmodel" in missing:
        _train_worldmodel(regime, places, tasks, places.part(regime, "worldmodel"))
    if missing and lacking(regime, places):
        build = _video_rich_adapters if regime.kind == "video-rich" else _labelled_adapters
        build(regime, places, tasks).save(places.part(regime, "adapters"), {"regime": regime.name})
    return {name: _hash(places.part(regime, name)) for name in PARTS}


def _hash(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def play(arena: Arena, base: TinyPolicy, tasks: Sequence[str], count: int) -> Iterator[Clip]:
    """Clips of the base at play with the actions that were executed: no expert, no success, no reward.

    Nothing in them is intended: they show what actions do, not what a task needs.
    """
    first, policy = PLAY_SEED * INDICES_PER_SEED, Playing(base, PLAY_SEED)
    for index in range(first, first + count):
        specs = [EpisodeSpec(0, task, index, PLAY_NOISE, f"{index:x}{number:x}") for number, task in enumerate(tasks)]
        for run in arena.run(specs, policy, film=True):
            assert run.frames is not None
            episode = run.trajectory
            nothing = np.zeros(len(episode.executed), np.bool_)
            prompt = episode.prompts[0]  # E_v never reads it
            yield Clip(episode.task, prompt, run.frames, episode.executed, nothing, episode.split, episode.index)


def _cut(regime: Regime, episodes: Iterable[Episode], phases: Sequence[int]) -> Iterator[Clip]:
    """Clips as the regime's world model is asked for them: by skill, or whole with the instruction as the prompt."""
    for episode in episodes:
        whole = Skill(episode.instruction, 0, len(episode.actions), "not segmented")
        yield from cut_clips(episode, None if regime.worldmodel == "skill" else Segmentation((whole,), None, (), ()), phases)


def _video_rich_adapters(regime: Regime, places: Places, tasks: Sequence[str]) -> Adapters:
    """Name the actions of the video from few labels and own rollouts, then Stage 1 on all of it."""
    naming, settings, seed = STAGE1["default"], STAGE1[regime.stage1], 0
    model = WorldModel.load(places.part(regime, "worldmodel"))
    base = TinyPolicy.load(places.part(regime, "base"))
    known = list(_cut(regime, few(places, tasks, regime.demonstrations), _phases(settings)))
    arena = Arena(base.action_std.numpy(), segmented=regime.worldmodel == "skill")
    own = list(play(arena, base, tasks, PLAY_EPISODES))
    arena.close()
    episodes = robomimic.read_root(places.demos, allowed=[Split.WORLDMODEL], tasks=tasks)
    video = _cut(regime, episodes, _phases(settings))
    data = stage1.build_data(model, itertools.chain(own, known, video), settings.horizon, seed)
    labelled = slice(len(own) + len(known))
    inverse, _ = stage1.train(data.rows(labelled), inverse_settings(naming), seed)
    named = stage1.name_actions(inverse, data, keep=labelled)
    if settings.predicted_share == 1.0:  # preset paper sees predictions only, and there are none of own rollouts
        named = named.rows(slice(len(own), None))
    adapters, _ = stage1.train(named, settings, seed)
    return adapters


def _phases(settings: Stage1Settings) -> range:
    return range(0, M, max(1, M // settings.phases))


def inverse_settings(settings: Stage1Settings) -> Stage1Settings:
    """Stage 1 on true latents alone: an inverse-dynamics model that names the actions of a video."""
    return replace(settings, predicted_share=0.0, adapters=replace(settings.adapters, frame_width=0))


def _labelled_adapters(regime: Regime, places: Places, tasks: Sequence[str]) -> Adapters:
    """Stage 1 on the demonstrations with their labels: matched, and shipped with other parts than those of the zoo."""
    settings = STAGE1[regime.stage1]
    model = WorldModel.load(places.part(regime, "worldmodel"))
    if regime.kind == "shipped":
        episodes: Iterable[Episode] = robomimic.read_root(places.demos, allowed=[Split.WORLDMODEL], tasks=tasks)
    else:
        episodes = few(places, tasks, regime.demonstrations)
    clips = _cut(regime, episodes, _phases(settings))
    return stage1.train(stage1.build_data(model, clips, settings.horizon, 0), settings, 0)[0]


def _train_worldmodel(regime: Regime, places: Places, tasks: Sequence[str], out: Path) -> None:
    """The whole recipe. matched: on the regime's own demonstrations, VAE too. Base-WM: with the VAE of its Skill-WM."""
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = worldmodel_training.Settings(places.demos, out, tasks=tuple(tasks))
    if regime.kind == "matched":
        settings = replace(settings, split=Split.BASE, limit=regime.demonstrations)
    if regime.worldmodel == "base":
        skill = places.part(replace(regime, worldmodel="skill"), "worldmodel")
        if not skill.exists():
            _train_worldmodel(replace(regime, worldmodel="skill"), places, tasks, skill)
        settings = replace(settings, segmented=False, vae_from=skill)
    worldmodel_training.train_worldmodel(settings)
