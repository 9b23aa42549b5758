"""Who has seen which labels: the parts of a regime, built once and kept.

shipped: the weights in zoo/ (base: few demonstrations; Stage 1: every labelled demonstration of split worldmodel).
video-rich: n labelled demonstrations a task for everybody; the world model has seen plenty of video without actions. Stage 1
    names the actions of the video with an inverse-dynamics model that has seen the n demonstrations and the robot at play, whose
    actions are known without any label (experiments/naming.py), and learns the predicted latents on those pseudo-actions.
matched: n demonstrations a task for everybody, the world model too.
pretrained: matched, but the world model has seen plenty of video of *other* tasks too, whose actions Stage 1 names likewise.
practised: matched, and world model and Stage 1 see the robot's own play in new scenes too (experiments/practice.py): no label.
film-cloned: video-rich on a better base, cloned from the video too, its actions named as for the baselines (training seed 0); the
    robot's play is this base's, so Stage 1 names the video anew.
Variants of any of them: Base-WM instead of Skill-WM (METHOD section 2), and Stage 1 of preset `paper`.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch

from experiments import naming, practice
from experiments.arena import Arena
from experiments.naming import InverseDynamics, Windows
from world2act import behaviour_cloning, stage1, worldmodel_training
from world2act.console import Progress, no_progress
from world2act.data import robomimic
from world2act.data.clips import cut_clips
from world2act.models import store
from world2act.models.adapters import Adapters
from world2act.models.tiny_policy import TinyPolicy, TinyPolicyConfig
from world2act.models.worldmodel import WorldModel
from world2act.presets import STAGE1, Preset, Stage1Settings
from world2act.segmentation import Segmentation
from world2act.splits import Split
from world2act.stage1 import Stage1Data
from world2act.types import Clip, Episode, M, Skill
from world2act.worldmodel_training import TransformerSettings

T = TypeVar("T")
Kind = Literal["shipped", "video-rich", "matched", "pretrained", "practised", "film-cloned"]
OWN_WORLDMODEL = ("matched", "pretrained", "practised")
"""Kinds without video of their tasks beside the labelled demonstrations: their world models are their own."""
NAMED = ("video-rich", "pretrained", "film-cloned")
"""Kinds with video whose actions nobody labelled."""

INVERSE_STEPS = 3000
"""Of the baselines' inverse dynamics: explains 0.854 of held-out experts' actions from imagined latents, 1,200 steps 0.843;
D_a(E_v) 0.856 (decision 041)."""
READ = TransformerSettings(steps=2500, short_batch=48, short_horizon=1, long_share=0.1, rate=1e-3, reading_weight=4.0)
"""How a world model "read" is trained on: mostly one latent ahead, as closed-loop targets ask."""
TRAINED_ON = {"read": (READ, 0), "read-again": (READ, 1), "longer": (replace(READ, reading_weight=0.0), 0)}
"""World models that go on from a "skill" one: how, and the training seed."""
PLAY_SHARE = 0.75
"""Of the batches that the inverse-dynamics model learns from; the rest is of the labelled demonstrations."""


@dataclass(frozen=True)
class Regime:
    """demonstrations: labelled ones per task that the base has seen. worldmodel "base": trained on whole episodes with their
    instruction as the prompt, and asked that way; "read": "skill", trained on so that actions can be read in what it imagines,
    those that Stage 1 goes by; "read-again": likewise, with another seed; "longer": trained on as long without that, its
    control. stage1: preset of the adapters."""

    kind: Kind = "shipped"
    demonstrations: int = 4
    worldmodel: Literal["skill", "base", "read", "read-again", "longer"] = "skill"
    stage1: Preset = "default"

    @property
    def name(self) -> str:
        plain = "shipped" if self.kind == "shipped" else f"{self.kind}-{self.demonstrations}"
        asked = "" if self.worldmodel == "skill" else f"-{self.worldmodel}-wm"
        return plain + asked + ("" if self.stage1 == "default" else f"-{self.stage1}")


@dataclass(frozen=True)
class Places:
    """out: results that are kept (cells); cache: parts that can be built again; demos: demonstrations; zoo: shipped weights;
    more: video of other tasks."""

    out: Path = Path("docs/results")
    cache: Path = Path("data/experiments")
    demos: Path = Path("data/demos")
    zoo: Path = Path("zoo")
    more: Path = Path("data/more")

    def part(self, regime: Regime, name: str) -> Path:
        """The weights file of a regime's part: base, worldmodel or adapters. One in zoo/<regime>/ is taken from there."""
        kept = self.zoo / regime.name / f"{name}.safetensors"
        if kept.exists():
            return kept
        plain = Regime(regime.kind, regime.demonstrations)
        if name == "base":  # does not depend on the rest
            folder = self.zoo if regime.kind == "shipped" else self.cache / f"cloned-{regime.demonstrations}"
            folder = self.cache / plain.name if regime.kind == "film-cloned" else folder
        elif name == "worldmodel" and regime.worldmodel == "base":
            folder = self.cache / (f"{plain.name}-base-wm" if regime.kind in OWN_WORLDMODEL else "base-wm")
        elif name == "worldmodel" and regime.worldmodel in TRAINED_ON:
            folder = self.cache / f"{plain.name}-{regime.worldmodel}-wm"
        elif regime.kind == "shipped" and (name == "worldmodel" or regime == plain):
            folder = self.zoo
        elif name == "worldmodel":
            folder = self.cache / plain.name if regime.kind in OWN_WORLDMODEL else self.zoo
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


def clone(
    episodes: Sequence[Episode], seed: int, start: TinyPolicy | None = None, progress: Progress = no_progress
) -> TinyPolicy:
    """A base policy cloned from `episodes` of splits base and worldmodel, from `start`'s weights if given."""
    torch.manual_seed(seed)
    config = TinyPolicyConfig(actions=episodes[0].actions.shape[1], states=episodes[0].states.shape[1])
    policy = TinyPolicy(config)
    if start is not None:
        policy.load_state_dict(start.state_dict())
    samples = behaviour_cloning.samples_of(episodes, config.active_rows, (Split.BASE, Split.WORLDMODEL))
    settings = behaviour_cloning.Settings(Path(), Path(), seed=seed, steps=cloning_steps(len(episodes)))
    behaviour_cloning.train(policy, samples, settings, progress)
    return policy.requires_grad_(False)


PARTS = ("base", "worldmodel", "adapters")


def lacking(regime: Regime, places: Places) -> list[str]:
    """Parts that have to be built. Adapters of another world model (the zoo's may have changed since) are none.

    Raises FileNotFoundError for a shipped part that is missing or stale: those are never built here.
    """
    missing = [name for name in PARTS if not places.part(regime, name).exists()]
    if not missing:
        adapters = Adapters.load(places.part(regime, "adapters"))
        missing = [] if adapters.worldmodel_hash == _hash(places.part(regime, "worldmodel")) else ["adapters"]
    for path in (places.part(regime, name) for name in missing):
        if path.parent == places.zoo:
            raise FileNotFoundError(f"{path}: not there, or of another world model; `make zoo` makes it")
        if path.is_relative_to(places.zoo):
            raise FileNotFoundError(f"{path}: of another world model; once removed, it is built anew in {places.cache}")
    return missing


def prepare(regime: Regime, places: Places, tasks: Sequence[str], progress: Progress = no_progress) -> dict[str, str]:
    """Build what the regime lacks; returns the hash of each part. Raises as `lacking`."""
    missing = lacking(regime, places)
    if "base" in missing and regime.kind == "film-cloned":
        rich = Regime("video-rich", regime.demonstrations)
        prepare(rich, places, tasks, progress)
        named_clone(rich, places, tasks, 0, progress)[0].save(places.part(regime, "base"), {"regime": regime.name})
    elif "base" in missing:
        rich = Regime("video-rich", regime.demonstrations)  # kinds share it: one card, whichever comes first
        if rich.demonstrations == Regime().demonstrations:
            base = TinyPolicy.load(places.part(Regime(), "base"))  # cloned again elsewhere, the last bits would be others
        else:
            base = clone(few(places, tasks, rich.demonstrations), 0, progress=progress)
        base.save(places.part(regime, "base"), {"regime": rich.name})
    if "worldmodel" in missing:
        _train_worldmodel(regime, places, tasks, places.part(regime, "worldmodel"), progress)
    if missing and lacking(regime, places):
        _train_adapters(regime, places, tasks, progress).save(places.part(regime, "adapters"), {"regime": regime.name})
    return weights(regime, places)


def weights(regime: Regime, places: Places) -> dict[str, str]:
    """The sha256 of each part's file. Raises OSError where one is not there."""
    return {name: _hash(places.part(regime, name)) for name in PARTS}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _cut(regime: Regime, episodes: Iterable[Episode], phases: Sequence[int]) -> Iterator[Clip]:
    """Clips as the regime's world model is asked for them: by skill, or whole with the instruction as the prompt."""
    for episode in episodes:
        whole = Skill(episode.instruction, 0, len(episode.actions), "not segmented")
        yield from cut_clips(episode, Segmentation((whole,), None, (), ()) if regime.worldmodel == "base" else None, phases)


def video_of(regime: Regime, places: Places, tasks: Sequence[str]) -> list[Path]:
    """Files of the regime's video beside its demonstrations. Raises ValueError where it has none at all."""
    if regime.kind in ("matched", "practised"):
        return []
    if regime.kind == "pretrained":
        root, make = places.more, f"--simulator metaworld-more --out {places.more}"
        found = sorted((root / Split.WORLDMODEL.value).glob("*.hdf5"))
    else:
        root, make = places.demos, ""
        found = [file for task in tasks if (file := root / Split.WORLDMODEL.value / f"{task}.hdf5").exists()]
    if not found:
        raise ValueError(f"video: none of split worldmodel under {root}; world2act demos --split worldmodel {make} makes it")
    return found


def stage1_data(regime: Regime, places: Places, tasks: Sequence[str], progress: Progress = no_progress) -> Stage1Data:
    """What Stage 1 of the regime learns from. video-rich: the demonstrations, and video named from them and the robot's own play;
    pretrained: likewise, the video is of other tasks; matched: the demonstrations; practised: and the robot's own play;
    shipped: every demonstration of split worldmodel."""
    settings, seed = STAGE1[regime.stage1], 0
    model = WorldModel.load(places.part(regime, "worldmodel"))
    video = video_of(regime, places, tasks)
    demonstrations = [] if regime.kind == "shipped" else few(places, tasks, regime.demonstrations)
    known = list(_cut(regime, demonstrations, _phases(settings)))
    if regime.kind == "practised":
        own = robomimic.read_root(practised(regime, places, tasks, progress), allowed=[Split.POSTTRAIN], tasks=tasks)
        known += _cut(regime, own, _phases(settings))
    more: Iterable[Clip] = ()
    if video:
        total = sum(map(robomimic.count_episodes, video))
        plenty = itertools.chain.from_iterable(robomimic.read_episodes(file, allowed=[Split.WORLDMODEL]) for file in video)
        more = _cut(regime, _counted("clips", plenty, total, progress), _phases(settings))
    data = stage1.build_data(model, itertools.chain(known, more), settings.horizon, seed)
    if regime.kind not in NAMED:
        return data
    return stage1.name_actions(_namer(regime, places, tasks, model, progress).read, data, keep=slice(len(known)))


def _namer(regime: Regime, places: Places, tasks: Sequence[str], model: WorldModel, progress: Progress) -> InverseDynamics:
    """What names the regime's video for Stage 1: it has seen play and labelled demonstrations, as `model`'s VAE shows them."""
    labelled = naming.windows(model, map(naming.film_of, few(places, tasks, regime.demonstrations)))
    pools = [(own_play(regime, places, tasks, progress), PLAY_SHARE), (labelled, 1.0 - PLAY_SHARE)]
    return naming.fit(pools, STAGE1["default"].latent_noise, 0)


def _counted(part: str, items: Iterable[T], total: int, progress: Progress) -> Iterator[T]:
    for number, item in enumerate(items, 1):
        progress(part, number, total, {})
        yield item


def _train_adapters(regime: Regime, places: Places, tasks: Sequence[str], progress: Progress) -> Adapters:
    data = stage1_data(regime, places, tasks, progress)
    _keep(data, _kept(regime, places))
    data = half_own(data, tasks)
    settings = STAGE1[regime.stage1]
    return stage1.train(data, settings, 0, lambda step, of, terms: progress("Stage 1", step, of, {"loss": terms["loss"]}))[0]


def half_own(data: Stage1Data, tasks: Sequence[str]) -> Stage1Data:
    """Where clips of other tasks outnumber those of `tasks`, these are repeated: half of what is drawn is theirs, as in the world
    model's training (worldmodel_training.mixed)."""
    own = torch.tensor([name in tasks for name in data.task_names])[data.tasks]
    times = max(1, round(int((~own).sum()) / int(own.sum())))
    return data if times == 1 else data.rows(torch.arange(len(own)).repeat_interleave(torch.where(own, times, 1)))


def stage1_windows(regime: Regime, places: Places, tasks: Sequence[str]) -> tuple[Windows, Windows]:
    """`stage1_data` as pairs, for who learns from the same: encoded video, and the world model's. Computed once and kept."""
    path = _kept(regime, places)
    if not path.exists():
        _keep(stage1_data(regime, places, tasks), path)
    return Windows.load(path), Windows.load(path.with_stem(f"{path.stem}-predicted"))


def inverse_dynamics(regime: Regime, places: Places, tasks: Sequence[str], seed: int) -> tuple[InverseDynamics, float]:
    """The network that names actions for the baselines, fitted to what Stage 1 has seen, named video too, true and predicted
    latents in equal parts, and to play if there is any. Computed once per training seed and kept; with the seconds of the fit."""
    seen = _kept(regime, places)
    path = seen.with_stem(f"inverse-dynamics-{INVERSE_STEPS}-{seed}-{seen.stem}")
    if not path.exists():
        true, predicted = stage1_windows(regime, places, tasks)
        pools = [(true, 0.5), (predicted, 0.5)]
        if regime.kind in NAMED:
            pools = [(own_play(regime, places, tasks), 0.25), (true, 0.25), (predicted, 0.5)]
        actions = Adapters.load(places.part(regime, "adapters")).actions
        started = time.monotonic()
        network = naming.fit(pools, STAGE1["default"].latent_noise, seed, actions, INVERSE_STEPS)
        network.save(path, time.monotonic() - started)
    return InverseDynamics.load(path)


def named_video(regime: Regime, places: Places, tasks: Sequence[str], network: InverseDynamics) -> Iterator[Episode]:
    """The regime's video beside its demonstrations, with proprioception as recorded and the actions that `network` reads from it:
    what any other part has seen, for who learns from whole episodes. None where that video has labels or is not there."""
    if regime.kind in NAMED:
        model = WorldModel.load(places.part(regime, "worldmodel"))
        for file in video_of(regime, places, tasks):
            for episode in robomimic.read_episodes(file, allowed=[Split.WORLDMODEL]):
                yield naming.named(model, network, episode)


def named_clone(
    regime: Regime, places: Places, tasks: Sequence[str], seed: int, progress: Progress = no_progress
) -> tuple[TinyPolicy, float]:
    """The base cloned from the regime's demonstrations and its video, named by `inverse_dynamics` of that training seed. Computed
    once and kept; with the seconds that it took, those of the reader apart."""
    seen = _kept(regime, places)
    path = seen.with_stem(f"named-clone-{seed}-{seen.stem}")
    if not path.exists():
        network, _ = inverse_dynamics(regime, places, tasks, seed)
        started = time.monotonic()
        film = named_video(regime, places, tasks, network)
        policy = clone([*labels(regime, places, tasks), *film], seed, progress=progress)
        policy.save(path, {"regime": regime.name, "seconds": time.monotonic() - started})
    policy = TinyPolicy.load(path)
    return policy, float(policy.card["seconds"])


def _kept(regime: Regime, places: Places) -> Path:
    of = " ".join(_hash(places.part(regime, name)) for name in ("base", "worldmodel"))
    return places.cache / regime.name / f"seen-{hashlib.sha256(of.encode()).hexdigest()[:16]}.safetensors"


def _keep(data: Stage1Data, path: Path) -> None:
    true, predicted, chunks, mask, intended = data.pairs()
    path.parent.mkdir(parents=True, exist_ok=True)
    Windows(predicted[intended], chunks[intended]).save(path.with_stem(f"{path.stem}-predicted"))
    Windows(true[mask], chunks[mask]).save(path)  # last: its presence says that both are whole


def own_play(regime: Regime, places: Places, tasks: Sequence[str], progress: Progress = no_progress) -> Windows:
    """The regime's base at play, as its world model's VAE sees it; recorded once and kept."""
    base, model = places.part(regime, "base"), WorldModel.load(places.part(regime, "worldmodel"))
    seen_by = store.content_hash(store.to_bytes(model.vae.state_dict(), {}))
    name = hashlib.sha256(f"{_hash(base)} {seen_by} {sorted(tasks)}".encode()).hexdigest()
    path = base.parent / f"play-{name[:16]}.safetensors"

    if not path.exists():
        policy = TinyPolicy.load(base)
        arena = Arena(policy.action_std.numpy())
        films = map(naming.film_of_run, naming.play(arena, policy, tasks))
        found = naming.windows(model, _counted("play", films, naming.PLAY_EPISODES * len(tasks), progress))
        arena.close()
        found.save(path)
    return Windows.load(path)


def practised(regime: Regime, places: Places, tasks: Sequence[str], progress: Progress = no_progress) -> Path:
    """The folder of the regime's base's own episodes; recorded once and kept."""
    base = places.part(regime, "base")
    out = places.cache / f"practice-{_hash(base)[:16]}"
    practice.write(out, TinyPolicy.load(base), tasks, progress=progress)
    return out


def _phases(settings: Stage1Settings) -> range:
    return range(0, M, max(1, M // settings.phases))


def _train_worldmodel(regime: Regime, places: Places, tasks: Sequence[str], out: Path, progress: Progress = no_progress) -> None:
    """The whole recipe. Own world models: on the regime's own episodes, VAE too; pretrained: and on other tasks' video.
    Base-WM: with the VAE of its Skill-WM."""
    partial = out.parent / "partial" / out.name  # training saves what it has: a stopped one must not pass for a whole one
    partial.parent.mkdir(parents=True, exist_ok=True)
    settings = worldmodel_training.Settings(places.demos, partial, tasks=tuple(tasks))
    if regime.kind in OWN_WORLDMODEL:
        settings = replace(settings, split=Split.BASE, limit=regime.demonstrations)
    if regime.kind == "practised":
        settings = replace(settings, own=practised(regime, places, tasks, progress))
    if regime.kind == "pretrained":
        video_of(regime, places, tasks)
        settings = replace(settings, more=places.more)
    name, before = None, replace(regime, worldmodel="skill")
    skill = places.part(before, "worldmodel")
    if regime.worldmodel != "skill" and not skill.exists():
        _train_worldmodel(before, places, tasks, skill, progress)
    if regime.worldmodel == "base":
        settings = replace(settings, segmented=False, vae_from=skill)
    if regime.worldmodel in TRAINED_ON:
        transformer, seed = TRAINED_ON[regime.worldmodel]
        settings = replace(settings, tune=skill, transformer=transformer, seed=seed)
        if transformer.reading_weight and regime.kind in NAMED:
            name = _namer(before, places, tasks, WorldModel.load(skill), progress).read
    worldmodel_training.train_worldmodel(settings, progress, name)
    for file in partial.parent.glob(f"{out.stem}.*"):  # the weights and their card
        file.replace(out.parent / file.name)
    partial.parent.rmdir()
