"""Who has seen which labels: the parts of a regime, and actions named without labels."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experiments import naming, practice, regimes
from experiments.methods import dreamgen
from experiments.policies import Playing
from experiments.regimes import Places, Regime
from services.simulator.envs.metaworld import SPEC
from tests.unit.test_stage1 import known_world
from world2act import schedule, stage1
from world2act.data import robomimic
from world2act.data.clips import cut_clips
from world2act.data.robomimic import EpisodeWriter
from world2act.models.adapters import Adapters, AdapterSettings
from world2act.models.tiny_policy import TinyPolicy, TinyPolicyConfig
from world2act.normalisation import Statistics
from world2act.presets import STAGE2
from world2act.splits import LeakageError, Split
from world2act.types import Episode, M

PLACES = Places(cache=Path("cache"), zoo=Path("zoo"))


def episode(index: int, task: str = "reach", split: Split = Split.BASE, actions: int = 8) -> Episode:
    images = {name: np.full((actions + 1, 8, 8, 3), index, np.uint8) for name in ("primary", "wrist")}
    states = np.zeros((actions + 1, 4), np.float32)
    widths = np.full(actions + 1, 0.08, np.float32)
    moves = np.arange(actions * 4, dtype=np.float32).reshape(actions, 4) / 100
    return Episode(task, split.value, index, "reach the green goal", images, states, widths, moves, True)


def write(root: Path, split: Split, count: int, task: str = "reach") -> None:
    with EpisodeWriter(root / split.value / f"{task}.hdf5", split=split, env_args=SPEC.env_args("reach")) as writer:
        for index in range(count):
            writer.write(episode(index, task, split))


def test_each_regime_takes_its_own_parts() -> None:
    shipped, rich, matched = Regime(), Regime("video-rich", 10), Regime("matched", 10)
    assert {PLACES.part(shipped, name).parent for name in ("base", "worldmodel", "adapters")} == {Path("zoo")}
    assert PLACES.part(rich, "worldmodel") == PLACES.part(shipped, "worldmodel"), "video without actions is plentiful"
    assert PLACES.part(matched, "worldmodel") != PLACES.part(shipped, "worldmodel")
    assert PLACES.part(rich, "base") == PLACES.part(matched, "base"), "the same base, whatever is built on it"
    assert PLACES.part(rich, "adapters") != PLACES.part(matched, "adapters")
    assert PLACES.part(Regime("matched", 25), "base") != PLACES.part(matched, "base")


def test_other_tasks_do_not_drown_the_own_ones() -> None:
    data = known_world(clips=20)  # of tasks a and b in turn
    assert regimes.half_own(data, ["a", "b"]) is data
    few = data.rows(torch.tensor([0, *range(1, 20, 2)]))
    drawn = regimes.half_own(few, ["a"])
    assert drawn.tasks.tolist() == [0] * 10 + [1] * 10 and (drawn.true[:10] == few.true[0]).all()
    assert torch.equal(drawn.actions[10:], few.actions[1:])


def test_own_rollouts_use_scenes_that_no_method_meets() -> None:
    met = {spec.index for spec in schedule.plan(STAGE2["default"], ["reach"], seed=4)}
    for seed, count in ((naming.PLAY_SEED, naming.PLAY_EPISODES), (practice.SEED, practice.EPISODES)):
        own = set(range(seed * schedule.INDICES_PER_SEED, seed * schedule.INDICES_PER_SEED + count))
        assert not met & own
        met |= own


def test_practice_is_whole_episodes_that_know_what_was_meant(tmp_path: Path) -> None:
    base = TinyPolicy(TinyPolicyConfig(channels=(4, 4, 4), hidden=16, text_width=8)).eval()
    practice.write(tmp_path, base, ["drawer-close", "reach"], 1)
    first, second = robomimic.read_root(tmp_path, allowed=[Split.POSTTRAIN])
    for own in (first, second):
        assert len(own.actions) == M * SPEC.task(own.task).max_chunks and len(own.widths) == len(own.actions) + 1
        assert own.intended is not None and not own.success and own.index == practice.SEED * schedule.INDICES_PER_SEED
        chunks = own.intended.reshape(-1, M)
        assert (chunks.all(1) | ~chunks.any(1)).all() and 0 < chunks[:, 0].mean() < 1
        assert sum(len(clip.actions) for clip in cut_clips(own)) == len(chunks), "nothing of it is discarded"
        moved = np.ptp(own.actions.reshape(len(chunks), M, -1), axis=1)
        assert (moved[~chunks[:, 0]] == 0.0).all(), "random motion is held for a chunk"
    before = (tmp_path / "posttrain" / "reach.hdf5").stat().st_mtime_ns
    practice.write(tmp_path, base, ["reach"], 1)
    assert (tmp_path / "posttrain" / "reach.hdf5").stat().st_mtime_ns == before


def test_a_base_of_as_many_demonstrations_as_the_shipped_one_is_that_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regimes, "lacking", lambda regime, places: [n for n in ["base"] if not places.part(regime, n).exists()])
    monkeypatch.setattr(regimes, "PARTS", ("base",))
    hashes = []
    for kind in ("matched", "video-rich"):
        places = Places(cache=tmp_path / kind, zoo=Path(__file__).parents[2] / "zoo")
        hashes.append(regimes.prepare(Regime(kind, 4), places, ["reach"]))
        kept, shipped = (TinyPolicy.load(places.part(regime, "base")) for regime in (Regime(kind, 4), Regime()))
        assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), shipped.parameters(), strict=True))
    assert hashes[0] == hashes[1]


def test_more_demonstrations_are_cloned_for_longer_up_to_a_limit() -> None:
    steps = [regimes.cloning_steps(7 * n) for n in (4, 10, 25, 60, 160)]
    assert steps == sorted(steps) and steps[0] == 1000 and steps[-1] == 4000


def test_too_few_demonstrations_are_an_error_that_counts_them(tmp_path: Path) -> None:
    write(tmp_path, Split.BASE, 3)
    places = Places(demos=tmp_path)
    assert [e.index for e in regimes.few(places, ["reach"], 2)] == [0, 1]
    with pytest.raises(ValueError, match=r"need 4 a task of split base under .*, got reach 3"):
        regimes.few(places, ["reach"], 4)


def test_cloning_refuses_scenes_of_post_training() -> None:
    with pytest.raises(LeakageError):
        regimes.clone([episode(0, split=Split.POSTTRAIN)], seed=0)


def test_phases_cut_other_pairs_of_the_same_video() -> None:
    whole, shifted = cut_clips(episode(1), phases=(0, 2))
    assert len(whole.actions) == 2 and len(shifted.actions) == 1
    np.testing.assert_array_equal(shifted.actions.reshape(-1, 4), episode(1).actions[2:6])
    assert len(shifted.frames) == 1 + M


def test_actions_named_from_video_replace_the_labels() -> None:
    seen, hidden = known_world(clips=60), known_world(seed=1, clips=20)
    shown = naming.Windows(seen.true[:, 1:][seen.mask], seen.actions[seen.mask])
    inverse = naming.fit([(shown, 1.0)], noise=0.0, seed=0, steps=60)
    blind = stage1.name_actions(inverse.read, replace(hidden, actions=torch.zeros_like(hidden.actions)))
    error = (blind.actions - hidden.actions)[hidden.mask].square().mean()
    assert blind.actions.shape == hidden.actions.shape
    assert error < 0.2 * hidden.actions[hidden.mask].var(), "the video says what was done"
    partly = stage1.name_actions(inverse.read, hidden, keep=slice(5))
    assert torch.equal(partly.actions[:5], hidden.actions[:5]) and torch.equal(partly.actions[5:], blind.actions[5:])
    assert torch.equal(partly.rows(slice(5)).actions, hidden.actions[:5]) and len(partly.rows(slice(5))) == 5


def test_pretrained_names_the_actions_of_other_tasks_and_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(cache=tmp_path, demos=tmp_path / "demos", more=tmp_path / "more")
    write(places.demos, Split.BASE, 3)
    write(places.demos, Split.WORLDMODEL, 1)  # video of its own tasks: not for this regime
    write(places.more, Split.WORLDMODEL, 2, "hammer")
    seen: list[tuple[str, str]] = []

    def build(model: object, clips: Any, *rest: Any) -> stage1.Stage1Data:
        seen.extend((clip.task, clip.split) for clip in clips)
        return known_world(clips=len(seen))

    named = SimpleNamespace(read=lambda latents: torch.full((*latents.shape[:2], 4, 4), 7.0))
    monkeypatch.setattr(regimes.WorldModel, "load", lambda path: None)
    monkeypatch.setattr(stage1, "build_data", build)
    monkeypatch.setattr(regimes, "own_play", lambda *_: None)
    monkeypatch.setattr(naming, "windows", lambda *_: None)
    monkeypatch.setattr(naming, "fit", lambda *_: named)
    data = regimes.stage1_data(Regime("pretrained", 2), places, ["reach"])
    own = seen.count(("reach", "base"))
    assert seen == [("reach", "base")] * own + [("hammer", "worldmodel")] * own and own
    assert (data.actions[own:] == 7.0).all() and (data.actions[:own].abs() <= 1.0).all()


def test_what_stage_1_has_seen_is_kept_for_who_learns_from_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places, regime, data = Places(cache=tmp_path, zoo=tmp_path / "zoo"), Regime("video-rich", 4), known_world(clips=5)
    data = replace(data, intended=data.mask & (torch.rand(data.mask.shape) < 0.5))
    for name in ("base", "worldmodel"):
        places.part(regime, name).parent.mkdir(exist_ok=True)
        places.part(regime, name).write_bytes(name.encode())
    monkeypatch.setattr(regimes, "stage1_data", lambda *_: data)
    true, predicted = regimes.stage1_windows(regime, places, ["reach"])
    assert torch.equal(true.latents, data.true[:, 1:][data.mask]) and torch.equal(true.chunks, data.actions[data.mask])
    assert torch.equal(predicted.latents, data.predicted[:, 1:][data.intended]), "what nobody intended, no model predicts"
    monkeypatch.setattr(regimes, "stage1_data", None)
    assert torch.equal(regimes.stage1_windows(regime, places, ["reach"])[0].latents, true.latents), "computed once"


def test_the_baselines_inverse_dynamics_is_fitted_once_per_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places, regime, data = Places(cache=tmp_path, zoo=tmp_path / "zoo"), Regime("video-rich", 4), known_world(clips=5)
    actions = Statistics.fit(data.actions, data.mask)
    Adapters(AdapterSettings(), actions, "of a world model").save(places.part(regime, "adapters"))
    shown = naming.Windows(data.true[:, 1:][data.mask], data.actions[data.mask])
    pools: list[list[float]] = []

    def fit(given: list[tuple[naming.Windows, float]], *rest: Any) -> naming.InverseDynamics:
        pools.append([share for _, share in given])
        return fitted(given, *rest[:-1], 3)

    fitted = naming.fit
    monkeypatch.setattr(naming, "fit", fit)
    monkeypatch.setattr(regimes, "_hash", lambda path: path.name)
    monkeypatch.setattr(regimes, "stage1_windows", lambda *_: (shown, shown))
    monkeypatch.setattr(regimes, "own_play", lambda *_: shown)
    (first, seconds), (again, same) = (regimes.inverse_dynamics(regime, places, ["reach"], 0) for _ in range(2))
    assert pools == [[0.25, 0.25, 0.5]] and seconds == same > 0, "play, encoded video, the world model's"
    assert torch.equal(first.read(data.true), again.read(data.true)) and torch.equal(again.actions.mean, actions.mean)
    other, _ = regimes.inverse_dynamics(regime, places, ["reach"], 1)
    assert len(pools) == 2 and not torch.equal(other.read(data.true), first.read(data.true))


def test_play_is_the_base_and_random_motion_in_spans() -> None:
    base = TinyPolicy(TinyPolicyConfig(channels=(4, 4, 4), hidden=16, text_width=8)).eval()
    frames, states = torch.zeros((2, 128, 128, 3), dtype=torch.uint8), torch.zeros(2, 4)
    player = Playing(base, seed=0)
    moves = [player.act(frames, states, ["a", "b"], ["", ""]) for _ in range(200)]
    interrupted = np.array([[not torch.equal(moved[row], chunk[row]) for chunk, moved in moves] for row in (0, 1)])
    assert 0.4 < interrupted.mean() < 0.6 and not np.array_equal(interrupted[0], interrupted[1])
    for row in (0, 1):
        motions = [moves[i][1][row] for i in np.flatnonzero(interrupted[row])]
        assert all(bool((motion == motion[0]).all()) and abs(float(motion[0, 3])) == 1.0 for motion in motions), (
            "held for a chunk"
        )
        held = sum(torch.equal(a, b) for a, b in itertools.pairwise(motions)) / len(motions)
        assert 0.3 < held < 0.7, "and often for longer"


def test_windows_are_every_second_whole_chunk(tmp_path: Path) -> None:
    class Model:
        def encode(self, frames: torch.Tensor) -> torch.Tensor:
            return frames[:, [0, M], :1, :1, :1].float().expand(-1, -1, 16, 2, 2)

    frames = torch.arange(11, dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3)
    actions = torch.arange(10.0)[:, None].expand(-1, 4)
    found = naming.windows(Model(), [(frames, actions)])  # type: ignore[arg-type]
    assert found.latents[:, 0, 0, 0].tolist() == [4, 6, 8, 10] and found.chunks[:, 0, 0].tolist() == [0, 2, 4, 6]
    found.save(tmp_path / "play.safetensors")
    again = naming.Windows.load(tmp_path / "play.safetensors")
    assert torch.equal(again.latents, found.latents) and torch.equal(again.chunks, found.chunks)


def test_dreams_move_proprioception_as_the_labels_do_and_last_as_long() -> None:
    rng = np.random.default_rng(0)
    moved = []
    for index in range(4):
        actions = rng.uniform(-1, 1, (20, 4)).astype(np.float32)
        steps = 0.01 * np.cumsum(np.concatenate([np.zeros((1, 4), np.float32), actions]), axis=0)
        states = (steps + np.array([0.0, 0.6, 0.2, 0.05])).astype(np.float32)
        moved.append(replace(episode(index, actions=20), actions=actions, states=states))
    motion = dreamgen.fit_motion(moved)
    chunk, state = torch.full((4, 4), 0.5), torch.tensor([0.1, 0.6, 0.2, 0.05])
    change = torch.cat([chunk.flatten(), state, torch.ones(1)]) @ motion
    assert torch.allclose(change, torch.full((4,), 4 * 0.5 * 0.01), atol=1e-4)
    assert dreamgen.skill_lengths(moved, 16) == {"reach": [("reach the green goal", 5)]}
    assert dreamgen.skill_lengths(moved, 3) == {"reach": [("reach the green goal", 3)]}, "no longer than the world model can"
