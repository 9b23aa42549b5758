"""Skill clips and the latent bank, on episodes whose right answer is known: frame t is everywhere t, action t is t."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from world2act.behaviour_cloning import samples_of
from world2act.data import clips
from world2act.data.clips import CutEpisode, LatentBank, cut_clips, lived_skills, median_first_frames, read_cut, skills_of
from world2act.segmentation import Segmentation, segment_episode
from world2act.splits import LeakageError, Split
from world2act.types import Episode, Skill
from world2act.worldmodel_training import VAESettings, _Windows


class LastFrameVAE:
    """A stand-in whose latent is the grey level of the last and of the first frame that it sees."""

    config = SimpleNamespace(latent_shape=(2, 1, 1))

    def moments(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        level = ((windows + 1.0) * 127.5).mean(dim=(2, 3, 4))
        return torch.stack([level[:, -1], level[:, 0]], dim=1)[..., None, None], torch.zeros(len(windows), 2, 1, 1)

    def normalise(self, z: torch.Tensor) -> torch.Tensor:
        return z


def cut_episode(length: int, skills: tuple[Skill, ...], first: int = 0) -> CutEpisode:
    frames = np.broadcast_to(np.arange(first, first + length + 1, dtype=np.uint8)[:, None, None, None], (length + 1, 8, 16, 3))
    actions = np.broadcast_to(np.arange(first, first + length, dtype=np.float32)[:, None], (length, 4))
    return CutEpisode("push", "worldmodel", 0, False, frames.copy(), actions.copy(), np.ones(len(actions), np.bool_), skills)


TWO_SKILLS = (Skill("grasp the puck", 0, 8), Skill("push the puck", 8, 20))


@pytest.mark.parametrize("start", [21, 22, 25, 30, 37])
def test_latent_k_pairs_with_chunk_k_minus_1(start: int) -> None:
    """Second episode (flat frames 21 ..): target k-1 must end at frame s+4k, begin at s+4k-4, and carry the actions between."""
    bank = LatentBank(LastFrameVAE(), [cut_episode(20, (Skill("one", 0, 20),), 100), cut_episode(20, TWO_SKILLS, 50)])
    local = start - 21
    end = 8 if local < 8 else 20
    batch = bank.batch(torch.tensor([start]), 3)
    assert batch.start[0].flatten().tolist() == [50 + local, 50 + local]
    assert batch.mask[0].tolist() == [local + 4 * k <= end for k in (1, 2, 3)]
    assert batch.prompts == [("grasp the puck" if local < 8 else "push the puck")]
    for k in (1, 2, 3):
        if batch.mask[0, k - 1]:
            assert batch.target[0, k - 1].flatten().tolist() == [50 + local + 4 * k, 50 + local + 4 * k - 4]
            assert batch.chunks[0, k - 1, :, 0].tolist() == [50 + local + 4 * (k - 1) + i for i in range(4)]
        else:
            assert not batch.target[0, k - 1].any() and not batch.chunks[0, k - 1].any()


def test_clips_start_only_where_a_whole_chunk_of_the_skill_follows() -> None:
    bank = LatentBank(LastFrameVAE(), [cut_episode(20, TWO_SKILLS)])
    assert bank.starts.tolist() == [0, 1, 2, 3, 4, *range(8, 17)]
    assert bank.batch(bank.starts, 1).mask.all()
    heavy = LatentBank(
        LastFrameVAE(), [cut_episode(4, (Skill("a", 0, 4),)), replace(cut_episode(8, (Skill("b", 0, 8),)), weight=2)]
    )
    assert heavy.starts.tolist() == [0, *(5 + start for start in range(5) for _ in range(2))]
    strided = LatentBank(LastFrameVAE(), [cut_episode(20, TWO_SKILLS)], stride=2)
    assert strided.starts.tolist() == [0, 2, 4, 8, 10, 12, 14, 16]
    whole, part = bank.batch(strided.starts, 3), strided.batch(strided.starts, 3)
    assert torch.equal(whole.target, part.target) and torch.equal(whole.start, part.start)


def test_what_a_disturbance_did_is_a_start_and_never_a_target() -> None:
    disturbed = replace(cut_episode(20, (Skill("one", 0, 20),)), intended=~((np.arange(20) >= 8) & (np.arange(20) < 12)))
    bank = LatentBank(LastFrameVAE(), [disturbed], stride=4)
    assert bank.starts.tolist() == [0, 4, 12, 16]
    batch = bank.batch(torch.tensor([0, 4, 12]), 3)
    assert batch.mask.tolist() == [[True, True, False], [True, False, False], [True, True, False]]
    marked = replace(episode(), intended=np.arange(12) >= 4)
    (clip,) = cut_clips(marked, Segmentation((Skill("a", 0, 12),), None, (), ()))
    assert clip.intended.tolist() == [False, True, True]


def test_an_empty_bank_is_refused() -> None:
    with pytest.raises(ValueError, match="episodes: none"):
        LatentBank(LastFrameVAE(), [])


def episode(split: str = "worldmodel") -> Episode:
    images = {name: np.full((13, 64, 64, 3), value, np.uint8) for name, value in (("primary", 10), ("wrist", 20))}
    actions = np.arange(48, dtype=np.float32).reshape(12, 4)
    states, widths = np.zeros((13, 4), np.float32), np.full(13, 0.08, np.float32)
    return Episode("reach", split, 3, "reach the green goal", images, states, widths, actions, True)


def test_cut_clips_takes_frames_and_actions_by_the_same_indices() -> None:
    e = episode()
    e.images["primary"][:] = np.arange(13, dtype=np.uint8)[:, None, None, None]
    first, second = cut_clips(e, Segmentation((Skill("a", 0, 4), Skill("b", 4, 12)), None, (), ()))
    assert first.frames.shape == (5, 128, 128, 3) and second.frames.shape == (9, 128, 128, 3)
    assert second.frames[:, 0, 0, 0].tolist() == list(range(4, 13)) and second.frames[0, 0, 64, 0] == 20
    assert second.actions.reshape(8, 4).tolist() == e.actions[4:12].tolist()
    assert (second.prompt, second.split, second.index, second.intended.tolist()) == ("b", "worldmodel", 3, [True, True])
    assert cut_clips(replace(e, actions=e.actions[:3]), Segmentation((), "too short", (), ())) == []


@pytest.mark.parametrize(
    ("robot", "opened", "held", "two"),
    [
        ("libero", 0.0795, 0.062, True),  # a can in a Panda's hand
        ("metaworld", 0.0795, 0.062, False),  # a hand that opens wider holds nothing there
        (None, 0.0795, 0.062, False),
        ("my_arm:Arm", 0.04, 0.02, True),  # unknown: by how wide it opens
        ("metaworld", 0.04, 0.02, False),
    ],
)
def test_clips_are_cut_with_the_hand_of_the_robot_that_made_them(
    robot: str | None, opened: float, held: float, two: bool
) -> None:
    task = "pick up the alphabet soup and place it in the basket"
    widths = np.repeat([opened, held, opened], [10, 15, 4]).astype(np.float32)
    states, actions = np.zeros((29, 4), np.float32), np.zeros((28, 4), np.float32)
    e = Episode(task, "worldmodel", 0, task, {}, states, widths, actions, True, meta={"robot": robot} if robot else {})
    found = [(s.prompt.split()[0], s.start, s.end) for s in skills_of(e)[0]]
    assert found == ([("pick", 0, 12), ("place", 12, 28)] if two else [("pick", 0, 28)])


def test_nothing_is_learned_from_frames_that_a_slow_camera_repeats() -> None:
    """The image of a repeated frame is older than the state and the action beside it."""
    e = replace(episode(), meta={"env_args": '{"camera_every": 4}'})
    whole = Segmentation((Skill("a", 0, 12),), None, (), ())
    assert [len(clip.actions) for clip in cut_clips(e, whole, phases=(0, 2))] == [3]
    assert [len(clip.actions) for clip in cut_clips(episode(), whole, phases=(0, 2))] == [3, 2]
    slow = replace(cut_episode(20, TWO_SKILLS), every=4)
    for stride in (1, 2):
        bank = LatentBank(LastFrameVAE(), [slow], stride=stride)
        assert bank.starts.tolist() == [0, 4, 8, 12, 16]
        assert bank.batch(bank.starts, 2).target[1, 0].flatten().tolist() == [8, 4]
    windows = _Windows([slow], VAESettings(still_share=0.0, batch=64), np.random.default_rng(0), torch.device("cpu"))
    assert set(windows.draw(64)[0][:, 0, 0, 0, 0].tolist()) == {0, 4, 8, 12, 16}
    assert samples_of([replace(e, split="base")], 64).chunks[:, 0, 0].tolist() == [0, 16, 32]
    assert samples_of([replace(episode(), split="base")], 64).chunks[:, 0, 0].tolist() == [4.0 * t for t in range(9)]


def test_a_missed_grasp_is_cut_as_the_policy_would_have_lived_it() -> None:
    widths = np.array(
        [0.088] * 9 + [0.05] + [0.035] * 4 + [0.015] * 8 + [0.06] + [0.088] * 6, np.float32
    )  # slips off, opens again
    e = replace(episode(), task="pick-place", instruction="pick up the puck and place it at the green goal", widths=widths)
    e = replace(e, actions=np.zeros((28, 4), np.float32), images={k: np.zeros((29, 64, 64, 3), np.uint8) for k in e.images})
    assert segment_episode(e).discarded is not None
    found = [(s.prompt.split()[0], s.start, s.end) for s in lived_skills(e)]
    assert found == [("pick", 0, 12), ("place", 12, 16), ("pick", 16, 28)]
    assert [len(clip.intended) for clip in cut_clips(e)] == [3, 1, 3]


def test_read_cut_refuses_other_splits_and_counts_discards(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [episode(), replace(episode(), actions=np.zeros((3, 4), np.float32), widths=np.full(4, 0.08, np.float32))]
    monkeypatch.setattr(clips.robomimic, "read_root", lambda *_args, **_kwargs: iter(found))
    cut = read_cut(Path("demos"), [Split.WORLDMODEL], 64)
    assert len(cut.episodes) == 1 and cut.discarded == 1
    assert cut.episodes[0].frames.shape == (13, 64, 128, 3)
    assert len(read_cut(Path("demos"), [Split.WORLDMODEL], 64, limit=0).episodes) == 0
    with pytest.raises(LeakageError, match="clips"):
        read_cut(Path("demos"), [Split.VALIDATION], 64)


def test_median_first_frames() -> None:
    levels = [cut_episode(4, (), first) for first in (3, 5, 90)]
    assert (median_first_frames(levels)["push"] == 5).all()
