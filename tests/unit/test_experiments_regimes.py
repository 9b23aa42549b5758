"""Base-WM and other Stage 1 presets as regimes: which files, which training, which prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import regimes
from experiments.arena import Arena
from experiments.regimes import Places, Regime
from tests.unit.test_arena import SPREAD, Forward
from tests.unit.test_regimes import episode
from world2act import worldmodel_training
from world2act.console import Progress
from world2act.models.adapters import Adapters, AdapterSettings
from world2act.models.tiny_policy import TinyPolicy
from world2act.models.worldmodel import WorldModel
from world2act.normalisation import Statistics
from world2act.schedule import EpisodeSpec
from world2act.splits import Split

PLACES = Places(cache=Path("cache"), zoo=Path("zoo"))


def test_variants_of_a_regime_share_what_they_can() -> None:
    rich, whole, paper = Regime("video-rich", 4), Regime("video-rich", 4, "base"), Regime("video-rich", 4, stage1="paper")
    assert (whole.name, paper.name) == ("video-rich-4-base-wm", "video-rich-4-paper")
    assert {PLACES.part(regime, "base") for regime in (rich, whole, paper)} == {Path("cache/cloned-4/base.safetensors")}
    assert (
        PLACES.part(whole, "worldmodel")
        == PLACES.part(Regime(worldmodel="base"), "worldmodel")
        != PLACES.part(rich, "worldmodel")
    )
    assert PLACES.part(paper, "worldmodel") == PLACES.part(rich, "worldmodel")
    assert len({PLACES.part(regime, "adapters") for regime in (rich, whole, paper)}) == 3
    assert PLACES.part(Regime(stage1="paper"), "adapters").parent != Path("zoo")
    assert PLACES.part(Regime("matched", 4, "base"), "worldmodel") != PLACES.part(whole, "worldmodel")


def test_base_wm_is_trained_on_whole_episodes_with_the_vae_of_its_skill_wm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[worldmodel_training.Settings] = []

    names: list[object] = []

    def train(settings: worldmodel_training.Settings, progress: Progress, name: object) -> None:
        trained.append(settings)
        names.append(name)
        settings.out.touch()

    monkeypatch.setattr(worldmodel_training, "train_worldmodel", train)
    places = Places(cache=tmp_path, zoo=tmp_path / "zoo")
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "worldmodel.safetensors").touch()
    monkeypatch.setattr(regimes, "practised", lambda *_: tmp_path / "own")
    elsewhere = Regime("pretrained", 25)
    with pytest.raises(ValueError, match=r"video: none .*metaworld-more"):
        regimes._train_worldmodel(elsewhere, replace(places, more=tmp_path), ["reach"], tmp_path / "worldmodel.safetensors")
    video = tmp_path / "more" / "worldmodel" / "hammer.hdf5"
    video.parent.mkdir(parents=True)
    video.touch()
    places = replace(places, more=tmp_path / "more")
    assert regimes.video_of(elsewhere, places, ["reach"]) == [video] and not regimes.video_of(
        Regime("matched"), places, ["reach"]
    )
    for regime in (Regime("video-rich", 4, "base"), Regime("matched", 10, "base"), Regime("practised", 4), elsewhere):
        regimes._train_worldmodel(regime, places, ["reach"], places.part(regime, "worldmodel"))
        assert places.part(regime, "worldmodel").exists()
    rich, skill, matched, practised, pretrained = trained
    assert (pretrained.split, pretrained.limit, pretrained.more) == (Split.BASE, 25, places.more) and matched.more is None
    assert (practised.split, practised.limit, practised.own) == (Split.BASE, 4, tmp_path / "own") and matched.own is None
    assert not {settings.out for settings in trained} & set(tmp_path.rglob("*.safetensors")), (
        "half-trained weights have a name of their own"
    )
    assert not rich.segmented and rich.vae_from == tmp_path / "zoo" / "worldmodel.safetensors" and rich.split == Split.WORLDMODEL
    assert skill.segmented and skill.vae_from is None and (skill.split, skill.limit) == (Split.BASE, 10)
    assert (
        not matched.segmented
        and matched.vae_from == places.part(Regime("matched", 10), "worldmodel")
        and (matched.split, matched.limit) == (Split.BASE, 10)
    )
    assert names == [None] * 5
    monkeypatch.setattr(WorldModel, "load", lambda path: path)
    monkeypatch.setattr(regimes, "_namer", lambda regime, *_: SimpleNamespace(read=regime.name))
    for regime in (Regime("video-rich", 4, "read"), Regime("shipped", 4, "read")):
        regimes._train_worldmodel(regime, places, ["reach"], places.part(regime, "worldmodel"))
        assert trained[-1].tune == tmp_path / "zoo" / "worldmodel.safetensors" and trained[-1].segmented
        assert trained[-1].transformer.reading_weight > 0 and regime.name in str(places.part(regime, "worldmodel"))
    longer = Regime("video-rich", 4, "longer")
    regimes._train_worldmodel(longer, places, ["reach"], places.part(longer, "worldmodel"))
    again = Regime("shipped", 4, "read-again")
    regimes._train_worldmodel(again, places, ["reach"], places.part(again, "worldmodel"))
    read = trained[5].transformer
    assert trained[7].tune == trained[5].tune and trained[7].transformer == replace(read, reading_weight=0.0)
    assert trained[8].transformer == read and [found.seed for found in trained[5:]] == [0, 0, 0, 1], "again: another seed alone"
    assert names[5:] == ["video-rich-4", None, None, None], "what has no labels is named; what has, or is not read, is not"


def test_base_wm_is_asked_with_the_instruction() -> None:
    pick = replace(episode(0, "pick-place"), instruction="pick up the puck and place it at the goal")
    whole, skills = (list(regimes._cut(Regime(worldmodel=kind), [pick], [0])) for kind in ("base", "skill"))
    assert [clip.prompt for clip in whole] == [pick.instruction] and len(whole[0].actions) == 2
    assert skills and all(clip.prompt != pick.instruction for clip in skills)
    arena = Arena(SPREAD, segmented=False)
    run = arena.run([EpisodeSpec(0, "drawer-close", 0, 0.0, "a")], Forward())[0]
    arena.close()
    assert set(run.trajectory.prompts) == {run.trajectory.instruction}


def test_a_shipped_part_that_is_missing_is_named(tmp_path: Path) -> None:
    places = Places(cache=tmp_path / "cache", zoo=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"base.safetensors: not there.*make zoo"):
        regimes.lacking(Regime(), places)


def test_a_film_cloned_regime_has_a_base_and_adapters_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places, regime, rich = Places(cache=tmp_path, zoo=tmp_path / "zoo"), Regime("film-cloned", 4), Regime("video-rich", 4)
    assert [places.part(regime, name) == places.part(rich, name) for name in regimes.PARTS] == [False, True, False]
    prepared: list[Regime] = []
    cloned: list[str] = []
    clone = TinyPolicy()
    missing = iter([["base"], [], []])  # of film-cloned, of video-rich, of film-cloned once its base is there
    monkeypatch.setattr(regimes, "lacking", lambda regime, places: next(missing))
    monkeypatch.setattr(regimes, "weights", lambda regime, places: prepared.append(regime) or {})
    monkeypatch.setattr(regimes, "_kept", lambda regime, places: tmp_path / f"seen-{regime.name}.safetensors")
    monkeypatch.setattr(regimes, "labels", lambda regime, *_: [f"labels of {regime.name}"])
    monkeypatch.setattr(regimes, "inverse_dynamics", lambda regime, places, tasks, seed: (f"reader {seed} of {regime.name}", 1.0))
    monkeypatch.setattr(regimes, "named_video", lambda regime, places, tasks, reader: [f"film of {regime.name} by {reader}"])
    monkeypatch.setattr(regimes, "clone", lambda episodes, seed, progress: cloned.extend(episodes) or clone)
    regimes.prepare(regime, places, ["push"])
    assert prepared == [rich, regime], "its reader's regime is built first"
    assert cloned == ["labels of video-rich-4", "film of video-rich-4 by reader 0 of video-rich-4"]
    again, seconds = regimes.named_clone(rich, places, ["push"], 0)
    assert len(cloned) == 2 and seconds >= 0, "cloned once and kept"
    base = TinyPolicy.load(tmp_path / "film-cloned-4" / "base.safetensors")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in base.state_dict().items())
    assert base.card == {"regime": "film-cloned-4"}, "equal weights make an equal base, however long they took"


def test_a_part_that_is_kept_with_the_zoo_is_taken_and_never_written_over(tmp_path: Path) -> None:
    places, rich = Places(cache=tmp_path / "cache", zoo=tmp_path / "zoo"), Regime("video-rich", 4)
    assert places.part(rich, "adapters") == tmp_path / "cache" / "video-rich-4" / "adapters.safetensors"
    kept = tmp_path / "zoo" / "video-rich-4" / "adapters.safetensors"
    kept.parent.mkdir(parents=True)
    Adapters(AdapterSettings(), Statistics(torch.zeros(4), torch.ones(4)), "of another").save(kept)
    assert places.part(rich, "adapters") == kept and places.part(Regime("video-rich", 4, "base"), "adapters") != kept
    for name in ("base", "worldmodel"):
        places.part(rich, name).parent.mkdir(parents=True, exist_ok=True)
        places.part(rich, name).touch()
    with pytest.raises(FileNotFoundError, match="once removed, it is built anew"):
        regimes.lacking(rich, places)
