"""What every simulator must satisfy. A new one adds a `Probe` here and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from services.simulator.collect import record
from services.simulator.envs import base, libero_files
from tests.stand_ins import packages
from world2act.data.clips import skills_of
from world2act.data.robomimic import EpisodeWriter, read_episodes
from world2act.segmentation import OnlineSkill, RuleBasedPlanner, load_schemas
from world2act.splits import Split, scene_seed
from world2act.types import ImageArray, M

MILK = "libero_object-pick_up_the_milk_and_place_it_in_the_basket"


@dataclass(frozen=True)
class Probe:
    """What the tests must know of a simulator to move it on purpose."""

    task: str  # a task with free space above the gripper
    up: int  # action axis that moves the gripper up
    forward: int  # action axis that moves it towards what the wrist camera shows at the top
    gripper: int  # action axis of the gripper
    expert_tasks: tuple[str, ...] = ()  # tasks whose recorded expert is replayed
    looked_at: tuple[str, ...] = ()  # tasks that are reset and looked at; none: all
    missing: Callable[[], str] = str  # why it cannot run here; empty: it can
    starts_open: bool = True  # whether an episode starts with open fingers
    stand_in: Callable[[], AbstractContextManager[None]] = nullcontext  # what stands for packages that cannot be had here


PROBES = {
    "metaworld": Probe("drawer-open", up=2, forward=1, gripper=3, expert_tasks=("push", "drawer-open")),
    "metaworld-more": Probe(
        "window-open",
        up=2,
        forward=1,
        gripper=3,
        expert_tasks=("push-wall", "dial-turn"),
        looked_at=("window-open", "hammer", "push-wall"),
    ),
    "libero": Probe(
        MILK,
        up=2,
        forward=0,
        gripper=6,
        expert_tasks=(MILK,),
        looked_at=(  # each of 40 takes seconds to build; one of every kind of scene
            MILK,
            "libero_spatial-pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate",
            "libero_goal-open_the_middle_drawer_of_the_cabinet",
            "libero_10-KITCHEN_SCENE6_put_the_yellow_and_white_mug_in_the_microwave_and_close_it",
            "libero_10-LIVING_ROOM_SCENE2_put_both_the_cream_cheese_box_and_the_butter_in_the_basket",
            "libero_10-STUDY_SCENE1_pick_up_the_book_and_place_it_in_the_back_compartment_of_the_caddy",
        ),
        missing=libero_files.missing,
    ),
    # NOT RoboCasa: these show that the adapters read the documented layouts, on stand-ins of ours.
    "robocasa": Probe(
        "CoffeePressButton",
        up=2,
        forward=0,
        gripper=6,
        looked_at=("CoffeePressButton", "PnPCounterToCab", "OpenDoubleDoor"),
        starts_open=False,
        stand_in=lambda: packages.installed("robocasa"),
    ),
    "robocasa365": Probe(
        "StartCoffeeMachine",
        up=2,
        forward=0,
        gripper=6,
        looked_at=("StartCoffeeMachine", "PickPlaceCounterToCabinet", "OpenCabinet"),
        starts_open=False,
        stand_in=lambda: packages.installed("robocasa365"),
    ),
}


def test_every_simulator_has_a_probe() -> None:
    assert set(PROBES) == set(base.REGISTRY)


@pytest.fixture(scope="module", params=sorted(base.REGISTRY))
def env(request: pytest.FixtureRequest) -> Iterator[base.Environment]:
    if reason := PROBES[request.param].missing():
        pytest.skip(f"{request.param}: {reason}")
    with PROBES[request.param].stand_in():
        environment = base.make(request.param)
        yield environment
        environment.close()


@pytest.fixture
def probe(env: base.Environment) -> Probe:
    return PROBES[env.spec.simulator]


def looked_at(env: base.Environment, probe: Probe) -> list[str]:
    """The tasks to reset and look at."""
    return list(probe.looked_at or [task.name for task in env.spec.tasks])


def constant(env: base.Environment, axis: int, value: float) -> np.ndarray:
    """A whole chunk that moves along one axis."""
    actions = np.zeros((env.spec.chunk, len(env.spec.action)), np.float32)
    actions[:, axis] = value
    return actions


def random_chunk(env: base.Environment, seed: int) -> np.ndarray:
    shape = (env.spec.chunk, len(env.spec.action))
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def test_spec(env: base.Environment) -> None:
    spec = env.spec
    assert spec.chunk == M and spec.control_hz > 0
    assert len({c.cell for c in spec.cameras}) == len(spec.cameras) and all(0 <= c.cell < 4 for c in spec.cameras)
    assert len({(c.height, c.width) for c in spec.cameras}) == 1, "the grid needs one size"
    assert spec.cameras[0].cell == 0, "the first camera is the one that shows the scene"
    assert spec.state[spec.gripper_width_index].unit == "m"
    assert 0.02 < spec.gripper_open_width <= 0.12, "metres, not millimetres"
    assert all(axis.low < axis.high for axis in (*spec.state, *spec.action))
    assert len({t.name for t in spec.tasks}) == len(spec.tasks)
    for task in spec.tasks:
        assert task.instruction and task.max_chunks > 0


def test_every_task_resets_to_a_valid_observation(env: base.Environment, probe: Probe) -> None:
    spec = env.spec
    low, high = (np.array([getattr(a, side) for a in spec.state]) for side in ("low", "high"))
    for task in looked_at(env, probe):
        observation = env.reset(task, 1)
        assert list(observation.images) == [c.name for c in spec.cameras]
        for camera in spec.cameras:
            image = observation.images[camera.name]
            assert image.shape == (camera.height, camera.width, 3) and image.dtype == np.uint8
            assert image.std() > 5, f"{task}: {camera.name} is flat"
        assert observation.state.shape == (len(spec.state),) and observation.state.dtype == np.float32
        assert ((observation.state >= low) & (observation.state <= high)).all()
        width = observation.state[spec.gripper_width_index]
        assert abs(width - spec.gripper_open_width) < 0.002 if probe.starts_open else 0 < width <= spec.gripper_open_width, task
        assert observation.instruction


@pytest.mark.parametrize(("frames", "count"), [("last", 1), ("none", 0), ("all", 3)])
def test_step_shapes_and_frames(env: base.Environment, probe: Probe, frames: base.Frames, count: int) -> None:
    env.reset(probe.task, 1)
    result = env.step(random_chunk(env, 0)[:3], frames)
    for camera in env.spec.cameras:
        image = result.images[camera.name]
        assert image.shape == (count, camera.height, camera.width, 3) and image.dtype == np.uint8
    assert result.states.shape == (3, len(env.spec.state)) and result.states.dtype == np.float32
    assert result.success in (True, False) and not result.done


def test_last_frame_is_the_last_of_all_frames(env: base.Environment, probe: Probe) -> None:
    shown = {}
    for frames in ("last", "all"):
        env.reset(probe.task, 1)
        shown[frames] = env.step(random_chunk(env, 0), frames)
    for name in shown["last"].images:
        assert (shown["last"].images[name][0] == shown["all"].images[name][-1]).all()


def test_a_seed_determines_everything(env: base.Environment, probe: Probe) -> None:
    """Bit for bit, on an object with a past and on a new one; another seed is another scene."""
    other = base.make(env.spec.simulator)
    seen = []
    for number, environment in enumerate((env, other, env)):
        if number != 1:
            environment.reset(probe.task, 900 + number)
            environment.step(random_chunk(env, number))
        first = environment.reset(probe.task, 7)
        steps = [environment.step(random_chunk(env, k)) for k in range(3)]
        seen.append(
            [first.state, *first.images.values(), *(s.states for s in steps), *(i for s in steps for i in s.images.values())]
        )
    other.close()
    for run in seen[1:]:
        assert all((a == b).all() for a, b in zip(seen[0], run, strict=True))
    different = env.reset(probe.task, 8)
    assert any((different.images[name] != image).any() for name, image in zip(different.images, seen[0][1:], strict=False))


def test_paint_changes_what_is_seen_and_nothing_else(env: base.Environment, probe: Probe) -> None:
    plain = env.reset(probe.task, 5)
    try:
        env.paint(1)
    except base.InvalidInputError as error:
        assert "has one look" in str(error)
        return
    painted = env.reset(probe.task, 5)
    env.paint(None)
    again = env.reset(probe.task, 5)
    for name, image in plain.images.items():
        assert np.abs(image.astype(int) - painted.images[name]).mean() > 5 and (image == again.images[name]).all(), name
    assert (plain.state == painted.state).all()


def test_goals_are_visible(env: base.Environment, probe: Probe) -> None:
    """Two scenes of any task differ in the first camera's image: what a policy must know is in what it sees."""
    for task in looked_at(env, probe):
        a, b = (env.reset(task, seed).images[env.spec.cameras[0].name].astype(int) for seed in (21, 22))
        assert (np.abs(a - b).max(axis=-1) > 30).sum() >= 8, task


def test_gripper_sign_and_unit(env: base.Environment, probe: Probe) -> None:
    index, width = env.spec.gripper_width_index, env.spec.gripper_open_width
    env.reset(probe.task, 3)
    closed = [env.step(constant(env, probe.gripper, 1.0), "none").states[-1, index] for _ in range(6)][-1]
    opened = [env.step(constant(env, probe.gripper, -1.0), "none").states[-1, index] for _ in range(6)][-1]
    assert closed < 0.6 * width, "+1 closes"
    assert opened > 0.9 * width, "-1 opens"
    assert 0 <= closed < opened <= 0.12


def test_primary_camera_is_upright(env: base.Environment, probe: Probe) -> None:
    """A gripper that rises moves towards row 0."""
    env.reset(probe.task, 3)
    images: list[ImageArray] = []
    for value in (-1.0, 1.0):
        for _ in range(4):
            env.step(constant(env, probe.up, value), "none")
        images.append(env.step(constant(env, probe.up, value), "last").images[env.spec.cameras[0].name][0].astype(np.int16))
    down, up = images
    changed = np.abs(up - down).max(axis=-1) > 30
    rows = np.nonzero(changed)[0]
    assert changed.sum() > 10
    # Where the gripper was and where it is both change; the arm above it hides what is far, so the lower end tells:
    # the lowest changed rows show the gripper in `down` and background, smooth, in `up`.
    lowest = slice(int(np.percentile(rows, 70)), int(rows.max()) + 1)
    roughness = [np.abs(np.diff(image[lowest], axis=1)).max(axis=-1)[changed[lowest][:, 1:]].mean() for image in (down, up)]
    assert roughness[0] > roughness[1]


def test_wrist_camera_is_upright(env: base.Environment, probe: Probe) -> None:
    """Moving forward, what lies on the table moves towards the bottom row."""
    if "wrist" not in {c.name for c in env.spec.cameras}:
        pytest.skip("no wrist camera")
    env.reset(probe.task, 3)
    for _ in range(2):
        env.step(constant(env, probe.forward, -1.0), "none")
    frames = env.step(constant(env, probe.forward, 1.0), "all").images["wrist"].astype(np.float64).mean(axis=-1)
    first, last = frames[0] - frames[0].mean(axis=0), frames[-1] - frames[-1].mean(axis=0)
    rows = len(first)
    scores = {}
    for shift in range(-12, 13):
        a, b = first[max(0, -shift) : rows - max(0, shift)], last[max(0, shift) : rows - max(0, -shift)]
        scores[shift] = float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert max(scores, key=scores.__getitem__) > 0, scores


def test_replaying_an_expert_reproduces_its_states(env: base.Environment, probe: Probe) -> None:
    """Recorded actions are executed actions: open loop, in whole chunks, they give the recorded states to the bit."""
    for task in probe.expert_tasks:
        for noise in (0.0, 0.5):
            episode = record(env, task, Split.TUNING, 5, noise)
            assert noise > 0 or episode.success
            observation = env.reset(task, scene_seed(Split.TUNING, 5))
            states = [observation.state[None]]
            success = False
            for chunk in episode.actions.reshape(-1, env.spec.chunk, len(env.spec.action)):
                result = env.step(chunk, "none")
                states.append(result.states)
                success = result.success
            assert (np.concatenate(states) == episode.states).all()
            assert success == episode.success


def test_training_cuts_a_recorded_episode_where_a_running_policy_changes_skills(
    env: base.Environment, probe: Probe, tmp_path: Path
) -> None:
    """Both see the grasp with this robot's hand: the world model is asked for the skills that it was trained on."""
    if not probe.expert_tasks:
        pytest.skip(f"{env.spec.simulator}: has no scripted expert")
    for task in probe.expert_tasks:
        path = tmp_path / f"{task}.hdf5"
        with EpisodeWriter(path, split=Split.TUNING, env_args=env.spec.env_args(task)) as writer:
            writer.write(record(env, task, Split.TUNING, 5))
        (episode,) = read_episodes(path, allowed=[Split.TUNING])
        hand = load_schemas().calibration_of(env.spec.simulator, env.spec.gripper_open_width)
        running = OnlineSkill(RuleBasedPlanner().plan(episode.instruction, task), hand)
        starts = range(0, len(episode.actions), env.spec.chunk)
        asked = [running.update(episode.widths[max(0, t - env.spec.chunk + 1) : t + 1]) for t in starts]
        trained = [skill.prompt for skill in skills_of(episode)[0] for _ in range(skill.start, skill.end, env.spec.chunk)]
        changes = [next((i for i, prompt in enumerate(said) if prompt != said[0]), None) for said in (asked, trained)]
        assert asked[0] == trained[0] and changes[0] == changes[1], task
        assert changes[0] is not None or "pick" not in asked[0], task


def test_truth_and_preview(env: base.Environment, probe: Probe) -> None:
    """The expert's grasps and what it moves show in `truth`; `expert_preview` tells what it does next and changes nothing."""
    if not probe.expert_tasks:
        pytest.skip(f"{env.spec.simulator}: has no scripted expert")
    moved: list[str] = []
    for task in probe.expert_tasks:
        runs = []
        for preview in (False, True):
            env.reset(task, scene_seed(Split.TUNING, 5))
            before = env.truth()
            assert {key.split("/")[0] for key in before} <= {"touch", "height", "joint"} and before
            assert all(all(key.split("/")) for key in before), "every one has a name, or it cannot be written"
            assert all(value == 0 for key, value in before.items() if key.startswith("touch/"))
            states, truths = [], []
            for _ in range(env.spec.task(task).max_chunks):
                told = env.expert_preview()[0] if preview else None
                done = [env.expert_action()]
                states += list(env.step(done[-1][None], "none").states)
                for _ in range(env.spec.chunk - 1):
                    done.append(env.expert_action())
                    result = env.step(done[-1][None], "none")
                    states += list(result.states)
                truths.append(env.truth())
                assert told is None or (told == np.stack(done)).all()
                if result.success:
                    break
            runs.append(np.stack(states))
            assert any(truth[key] > 0 for truth in truths for key in truth if key.startswith("touch/"))
            moved += [key for key in before if not key.startswith("touch/") and abs(truths[-1][key] - before[key]) > 0.01]
        assert (runs[0] == runs[1]).all(), task
    assert moved, "no object rose, no drawer slid"


def test_episode_limit(env: base.Environment, probe: Probe) -> None:
    env.reset(probe.task, 1)
    limit = env.spec.task(probe.task).max_chunks
    dones = [env.step(random_chunk(env, k), "none").done for k in range(limit)]
    assert dones == [False] * (limit - 1) + [True]
    with pytest.raises(base.InvalidInputError, match="episode limit"):
        env.step(random_chunk(env, 0), "none")


def test_errors_name_field_and_limit(env: base.Environment, probe: Probe) -> None:
    size = len(env.spec.action)
    for bad, words in (
        (("no-such-task", 1), "task: 'no-such-task' is unknown; choose one of"),
        ((probe.task, -1), "seed: -1 is outside"),
        ((probe.task, 2**31), "seed: .* is outside"),
    ):
        with pytest.raises(base.InvalidInputError, match=words):
            env.reset(*bad)
    env.reset(probe.task, 1)
    good = random_chunk(env, 0)
    for actions, words in (
        (good.astype(np.float64), "actions: dtype must be float32"),
        (good[0], "actions: shape must be"),
        (good[:, : size - 1], f"actions: shape must be \\(m, {size}\\)"),
        (good[:0], "limit is 1 to"),
        (np.concatenate([good, good]), f"actions: {2 * env.spec.chunk} actions, the limit is 1 to {env.spec.chunk}"),
        (np.where(good > 0, np.nan, good), "actions: values must be finite"),
        (constant(env, probe.gripper, 1.5), "actions: gripper is outside"),
    ):
        with pytest.raises(base.InvalidInputError, match=words):
            env.step(actions.astype(actions.dtype))
    with pytest.raises(base.InvalidInputError, match="frames: 'some' is unknown"):
        env.step(good, "some")  # type: ignore[arg-type]
    fresh = base.make(env.spec.simulator)
    with pytest.raises(base.InvalidInputError, match="no episode is running"):
        fresh.step(good)
    fresh.close()
    fresh.close()


def test_unknown_simulator() -> None:
    with pytest.raises(base.InvalidInputError, match=r"simulator: 'no-such' is unknown; choose one of .*metaworld"):
        base.make("no-such")
