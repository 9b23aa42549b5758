"""Parts of the simulator service that need no simulator: the collector's rules, messages, the registry of environments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from services.simulator import collect, worker
from services.simulator.envs import base
from services.simulator.pool import Pool
from world2act.data.robomimic import read_episodes
from world2act.splits import Split, scene_seed
from world2act.types import FloatArray, ImageArray

SPEC = base.EnvironmentSpec(
    simulator="fake",
    cameras=(base.Camera("primary", 8, 8, 0),),
    state=(base.Axis("x", "m", -1, 1), base.Axis("gripper_width", "m", 0, 0.1)),
    action=tuple(base.Axis(name, "normalised", -1, 1) for name in ("x", "y", "z", "gripper")),
    chunk=4,
    control_hz=10,
    gripper_open_width=0.1,
    gripper_width_index=1,
    tasks=(base.TaskSpec("go", "go there", 6),),
)


class FakeEnvironment(base.Environment):
    """Succeeds after nine actions of the expert's sign, in scenes that `solvable` accepts."""

    def __init__(self) -> None:
        self.count = 0
        self.seeds: list[int] = []
        self.executed: list[FloatArray] = []

    def describe(self) -> base.EnvironmentSpec:
        return SPEC

    def _reset(self, task: str, seed: int) -> base.Observation:
        self.count = 0
        self.seeds.append(seed)
        self.executed.clear()
        return base.Observation({"primary": np.zeros((8, 8, 3), np.uint8)}, np.array([0, 0.1], np.float32))

    def _step(self, actions: FloatArray, frames: base.Frames) -> tuple[dict[str, ImageArray], FloatArray, bool]:
        states = []
        for action in actions:
            self.executed.append(action)
            self.count += 1
            states.append(np.array([self.count / 100, 0.1], np.float32))
        image = np.full((8, 8, 3), self.count, np.uint8)
        success = self.count >= 9 and self.seeds[-1] % 3 != 0
        return base.stack_frames([{"primary": image}] * (frames != "none"), SPEC.cameras), np.stack(states), success

    def close(self) -> None:
        pass

    def expert_action(self) -> FloatArray:
        return np.full(4, 0.5, np.float32)


def test_an_episode_ends_some_chunks_after_success_in_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "AFTER_SUCCESS", 1)
    env = FakeEnvironment()
    episode = collect.record(env, "go", Split.BASE, 1, 0.0)
    # success at action 9, in chunk 2; chunk 3 is the one after it
    assert len(episode.actions) == 16 and episode.success
    assert episode.images["primary"].shape == (17, 8, 8, 3) and episode.states.shape == (17, 2)
    assert [int(image[0, 0, 0]) for image in episode.images["primary"]] == list(range(17))
    assert (episode.widths == np.float32(0.1)).all() and episode.instruction == "go there"
    assert env.seeds == [scene_seed(Split.BASE, 1)]
    failed = collect.record(env, "go", Split.BASE, 0, 0.0)
    assert len(failed.actions) == 24 and not failed.success


def test_a_perturbed_episode_records_what_was_executed() -> None:
    env = FakeEnvironment()
    plain = collect.record(env, "go", Split.BASE, 1, 0.0)
    perturbed = collect.record(env, "go", Split.BASE, 1, 0.5)
    assert (np.stack(env.executed) == perturbed.actions).all()
    offsets = (perturbed.actions - 0.5).reshape(-1, 4, 4)
    assert (offsets == offsets[:, :1]).all(), "one offset a chunk"
    forced = perturbed.actions.reshape(-1, 4, 4)[..., 3][offsets[..., 3] != 0]
    assert len(forced) and set(np.abs(forced)) == {1.0}, "the gripper is left alone, or forced to a limit"
    assert np.abs(perturbed.actions).max() <= 1 and (plain.actions == 0.5).all()
    disturbed = (offsets[:, 0] != 0).any(axis=1)
    assert 0 < disturbed.sum() < len(offsets), "some chunks, not all"
    assert perturbed.intended is not None and plain.intended is not None and plain.intended.all()
    assert (perturbed.intended.reshape(-1, 4) == ~disturbed[:, None]).all(), "what was not the expert's wish is marked"
    again = collect.record(env, "go", Split.BASE, 1, 0.5)
    assert (again.actions == perturbed.actions).all()


def test_truth_is_recorded_where_the_simulator_tells_and_a_slow_camera_repeats_its_frame() -> None:
    class Telling(FakeEnvironment):
        def truth(self) -> dict[str, float]:
            return {"touch/cube": float(len(self.executed))}

    assert collect.record(FakeEnvironment(), "go", Split.BASE, 1).truth is None
    episode = collect.record(Telling(), "go", Split.BASE, 1, camera_every=4)
    assert episode.truth is not None and episode.truth["touch/cube"].dtype == np.float32
    assert episode.truth["touch/cube"].tolist() == list(range(len(episode.actions) + 1)), "one value a frame, as it was then"
    shown = [int(image[0, 0, 0]) for image in episode.images["primary"]]
    assert shown == [t // 4 * 4 for t in range(len(episode.actions) + 1)]


def test_which_scenes_are_perturbed_does_not_depend_on_how_many() -> None:
    for share in (0.0, 0.25, 0.5, 0.7, 1.0):
        marks = [collect.is_perturbed(i, share) for i in range(200)]
        for n in (10, 33, 200):
            assert abs(sum(marks[:n]) - share * n) < 1


def test_failed_plain_episodes_are_dropped_and_counted_and_a_collection_grows(tmp_path: Path) -> None:
    env = FakeEnvironment()
    path = tmp_path / "base" / "go.hdf5"

    def run(episodes: int) -> collect.Tally:
        settings = collect.CollectSettings(out=tmp_path, split=Split.BASE, episodes=episodes, perturbed_share=0.5, resume=True)
        return list(collect.collect_task(env, "go", settings))[-1]

    first = run(4)
    # scenes 0 and 2 are plain, 1 and 3 perturbed; scene 0 (seed divisible by 3) fails and is dropped, 3 fails and is kept
    assert (first.plain, first.plain_failed, first.written) == (3, 1, 4)
    assert [e.index for e in read_episodes(path, allowed=[Split.BASE])] == [1, 2, 3, 4]
    second = run(6)
    assert second.existing == 4 and second.written == 6
    episodes = list(read_episodes(path, allowed=[Split.BASE]))
    assert [e.index for e in episodes] == [1, 2, 3, 4, 5, 7]
    assert [e.index for e in episodes if not e.success] == [3]
    assert [e.index for e in episodes if e.meta["perturbed"] == "true"] == [1, 3, 5, 7]


def test_an_expert_that_always_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = FakeEnvironment()
    monkeypatch.setattr(collect, "scene_seed", lambda split, index: 0)
    settings = collect.CollectSettings(out=tmp_path, split=Split.BASE, episodes=2)
    with pytest.raises(RuntimeError, match="go: only 0 of 2 episodes after 8 scenes"):
        list(collect.collect_task(env, "go", settings))
    assert not (tmp_path / "base" / "go.hdf5").exists()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("tasks", ("no-such",), "task: 'no-such' is unknown"),
        ("episodes", 0, r"episodes: 0 is outside \[1, "),
        ("perturbed_share", 1.5, r"perturbed_share: 1.5 is outside \[0, 1\]"),
        ("workers", 0, "workers: 0 is outside"),
        ("camera_every", 8, r"camera_every: 8 is outside \[1, 4\]"),
        ("camera_every", 3, "camera_every: 3 must divide the 4 actions of a chunk"),
        ("simulator", "no-such", "simulator: 'no-such' is unknown"),
    ],
)
def test_bad_collection_settings(tmp_path: Path, field: str, value: object, words: str) -> None:
    settings = collect.CollectSettings(out=tmp_path)
    setattr(settings, field, value)
    with pytest.raises(ValueError, match=words):
        collect.collect(settings, Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_worker_messages() -> None:
    env = FakeEnvironment()
    head, _ = worker.decode(worker.answer(env, worker.encode({"op": "describe"})))
    assert worker.spec_from_json(head["spec"]) == SPEC
    head, arrays = worker.decode(worker.answer(env, worker.encode({"op": "reset", "task": "go", "seed": "1"})))
    assert head["status"] == "ok" and arrays["state"].shape == (2,) and list(worker.images_of(arrays)) == ["primary"]
    step = worker.encode({"op": "step", "frames": "none"}, {"actions": np.zeros((3, 4), np.float32)})
    head, arrays = worker.decode(worker.answer(env, step))
    assert (head["success"], head["done"]) == ("0", "0") and arrays["states"].shape == (3, 2)
    assert worker.images_of(arrays)["primary"].shape == (0, 8, 8, 3)
    bad = worker.encode({"op": "step", "frames": "none"}, {"actions": np.zeros((9, 4), np.float32)})
    head, _ = worker.decode(worker.answer(env, bad))
    assert head["status"] == "invalid" and "actions: 9 actions" in head["message"]


def test_a_pool_of_an_unknown_simulator_is_refused() -> None:
    with pytest.raises(base.InvalidInputError, match="simulator_name: 'no-such' is unknown; choose one of libero, metaworld"):
        Pool("no-such", 1, 10, 10)
