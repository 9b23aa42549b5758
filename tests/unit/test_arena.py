"""Experiments' arena on the real simulator: the same scenes for everybody, oracles that leave no trace, splits that hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments import distortions, study, wording
from experiments.arena import Arena, Run
from services.simulator.envs.base import make
from services.simulator.envs.metaworld import SPEC
from world2act.models.text import words
from world2act.schedule import EpisodeSpec
from world2act.splits import Split, scene_seed
from world2act.types import M

TASKS = ("drawer-close", "reach")
SPREAD = np.array([0.5, 0.5, 0.5, 0.5], np.float32)


@dataclass
class Forward:
    """Moves forward, a little to the side by what it sees."""

    version: int = 3

    def act(self, frames: Tensor, states: Tensor, instructions: Sequence[str], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        assert frames.dtype == torch.uint8 and len(frames) == len(states) == len(instructions) == len(prompts)
        base = torch.zeros(len(frames), 4, 4)
        base[..., 1] = 0.8
        base[..., 0] = (frames.float().mean((1, 2, 3)) / 255.0 - 0.2)[:, None]
        return base, base * 0.9


def specs(noise: float = 0.0) -> list[EpisodeSpec]:
    return [EpisodeSpec(0, task, index, noise, f"{index:x}{number:x}") for index in range(2) for number, task in enumerate(TASKS)]


@pytest.fixture(scope="module")
def arena() -> Arena:
    return Arena(SPREAD)


@pytest.fixture(scope="module")
def plain(arena: Arena) -> list[Run]:
    return arena.run(specs(), Forward())


def test_runs_come_back_in_the_order_of_the_specs(plain: list[Run]) -> None:
    for spec, run in zip(specs(), plain, strict=True):
        trajectory = run.trajectory
        assert (trajectory.task, trajectory.index, trajectory.version, trajectory.split) == (
            spec.task,
            spec.index,
            3,
            "posttrain",
        )
        n = len(trajectory.frames)
        assert n == SPEC.task(spec.task).max_chunks, "nothing that is learned from stops at success"
        assert trajectory.executed.shape == trajectory.base.shape == (n, 4, 4) and len(trajectory.prompts) == n
        np.testing.assert_allclose(trajectory.executed, np.clip(trajectory.base * np.float32(0.9), -1, 1), rtol=1e-6)


def test_asking_the_expert_leaves_the_episode_as_it_was(arena: Arena, plain: list[Run]) -> None:
    for asked, run in zip(arena.run(specs(), Forward(), expert="video", film=True), plain, strict=True):
        np.testing.assert_array_equal(asked.trajectory.frames, run.trajectory.frames)
        np.testing.assert_array_equal(asked.trajectory.states, run.trajectory.states)
        assert asked.expert is not None and asked.expert.shape == run.trajectory.base.shape
        assert asked.expert_frames is not None and asked.expert_frames.shape[:2] == asked.expert.shape[:2]
        assert asked.frames is not None and len(asked.frames) == 1 + 4 * len(run.trajectory.frames)
        np.testing.assert_array_equal(asked.frames[:-1:4], run.trajectory.frames)


def test_noise_is_the_plans(arena: Arena, plain: list[Run]) -> None:
    noisy = arena.run(specs(0.5), Forward())
    offset = noisy[0].trajectory.executed[0] - plain[0].trajectory.executed[0]
    assert np.ptp(offset[:, :3], axis=0).max() < 1e-6 and np.abs(offset[:, :3]).max() > 0.01 and not offset[:, 3].any()


def test_success_is_measured_on_evaluation_and_tuning_scenes_only(arena: Arena) -> None:
    with pytest.raises(ValueError, match="split: success is measured on evaluation or tuning scenes, got posttrain"):
        arena.evaluate(Forward(), Split.POSTTRAIN, TASKS, [0])
    outcomes = arena.evaluate(Forward(), Split.TUNING, TASKS, range(2))
    assert [(o.task, o.index) for o in outcomes] == [(task, index) for index in range(2) for task in TASKS]


def test_other_words_are_told_by_the_scene_and_change_nothing_else(arena: Arena, plain: list[Run]) -> None:
    runs = arena.run(specs(), Forward(), wording=wording.other)
    for before, run in zip(plain, runs, strict=True):
        assert run.trajectory.instruction == wording.OTHER[before.trajectory.instruction][run.trajectory.index]
        assert run.trajectory.prompts == before.trajectory.prompts
        np.testing.assert_array_equal(run.trajectory.frames, before.trajectory.frames)


def test_no_task_is_told_in_the_words_of_another() -> None:
    assert {task.instruction for task in SPEC.tasks if task.name in study.TASKS} == set(wording.OTHER)
    every = [" ".join(words(told)) for own, others in wording.OTHER.items() for told in (own, *others)]
    assert len(set(every)) == 4 * len(wording.OTHER)


def test_distortions_change_what_is_seen_and_leave_empty_cells_black(plain: list[Run]) -> None:
    grid = plain[0].trajectory.frames[0]
    for name, distortion in distortions.DISTORTIONS.items():
        if distortion is None:
            continue
        seen = distortion(grid, (3, 1), 7)
        assert seen.shape == grid.shape and seen.dtype == np.uint8 and not seen[64:].any(), name
        assert 1.0 < np.abs(seen[:64].astype(int) - grid[:64]).mean() < 60, name
        np.testing.assert_array_equal(seen, distortion(grid, (3, 1), 7))
        assert (distortion(grid, (3, 0), 7) != seen).any() and (distortion(grid, (4, 1), 7) != seen).any(), name
    assert (distortions.light(grid, (3, 1), 1) == distortions.light(grid, (3, 1), 2)).all(), "one light per episode"


def test_what_is_met_in_post_training_is_not_what_is_evaluated() -> None:
    arena = Arena(
        SPREAD, distortion=lambda grid, episode, chunk: np.full_like(grid, np.random.default_rng(episode).integers(256))
    )
    seen = {split: arena.run(specs(), Forward(), split) for split in (Split.POSTTRAIN, Split.EVALUATION)}
    arena.close()
    drawn = {split: [int(run.trajectory.frames[0, 0, 0, 0]) for run in runs] for split, runs in seen.items()}
    assert all(a != b for a, b in zip(*drawn.values(), strict=True)), drawn


def test_new_textures_are_those_of_the_scene(plain: list[Run]) -> None:
    arena = Arena(SPREAD, textures=True)
    runs = arena.run(specs(), Forward())
    again = arena.run(specs(), Forward())
    arena.close()
    for run, other, same in zip(runs, plain, again, strict=True):
        np.testing.assert_array_equal(run.trajectory.states[0], other.trajectory.states[0])
        np.testing.assert_array_equal(run.trajectory.frames, same.trajectory.frames)
        assert 10 < np.abs(run.trajectory.frames[0, :64].astype(int) - other.trajectory.frames[0, :64]).mean() < 100
        assert not run.trajectory.frames[:, 64:].any()


@pytest.mark.parametrize("task", ["push", "pick-place"])
def test_the_expert_opens_a_hand_that_somebody_closed(task: str) -> None:
    env = make("metaworld")
    env.reset(task, scene_seed(Split.TUNING, 3))
    closed = np.tile(np.array([0, 0, 0, 1], np.float32), (M, 1))
    for _ in range(3):
        result = env.step(closed, "none")
    assert result.states[-1][3] < 0.0205, "the hand is closed on nothing"
    for _ in range(M * 15):
        result = env.step(env.expert_action()[None], "none")
    env.close()
    assert result.success
