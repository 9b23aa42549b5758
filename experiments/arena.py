"""Running episodes in this process: one environment per task, all tasks in lockstep, one batch through the policy per chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from services.simulator.envs.base import Environment, Observation, StepResult, make
from world2act import schedule
from world2act.data.grid import stitch
from world2act.evaluation import Outcome
from world2act.schedule import EpisodeSpec
from world2act.segmentation import OnlineSkill, RuleBasedPlanner, load_schemas
from world2act.splits import Split, scene_seed
from world2act.types import FloatArray, ImageArray, Trajectory

Distortion = Callable[[ImageArray, Sequence[int], int], ImageArray]
"""Camera grid uint8 (H, W, 3), numbers that name the episode, the chunk -> what policy and world model see instead."""

Wording = Callable[[str, int], str]
"""The task's instruction, the scene's index -> what the policy is told instead."""

Expert = Literal["action", "video"]
"""What the expert is asked at every visited state: its next chunk, or what that looks like too (slower)."""


class Policy(Protocol):
    """What acts. prompts: the active skill of each row, for policies that imagine."""

    @property
    def version(self) -> int: ...

    def act(self, frames: Tensor, states: Tensor, instructions: Sequence[str], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Grids uint8 (N, H, W, 3), states (N, S) -> base and combined chunks (N, M, A) in the simulator's units."""
        ...


@dataclass(frozen=True)
class Run:
    """One executed episode. If asked: frames uint8 (1 + M n, H, W, 3), every frame, undistorted; expert (n, M, A), the expert's
    chunk at each visited state; expert_frames uint8 (n, M, H, W, 3), what it would have looked like (oracles only)."""

    trajectory: Trajectory
    success: bool
    frames: ImageArray | None = None
    expert: FloatArray | None = None
    expert_frames: ImageArray | None = None


@dataclass
class _Lane:
    """An episode that is running."""

    place: int
    spec: EpisodeSpec
    episode: tuple[int, int]
    instruction: str
    skill: OnlineSkill
    prompt: str
    image: ImageArray
    state: FloatArray
    offsets: FloatArray
    success: bool = False
    frames: list[ImageArray] = field(default_factory=list)
    states: list[FloatArray] = field(default_factory=list)
    base: list[FloatArray] = field(default_factory=list)
    executed: list[FloatArray] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    film: list[ImageArray] = field(default_factory=list)
    expert: list[FloatArray] = field(default_factory=list)
    expert_film: list[ImageArray] = field(default_factory=list)


class Arena:
    """Simulators of one process. spread: (A,) standard deviation of actions, the unit of an episode's noise.

    segmented: prompts are the active skill; False: the whole instruction (Base-WM). textures: every scene draws its own
    (Meta-World: 27 looks). What a scene draws, textures or a distortion, is by its split and index.
    """

    def __init__(
        self,
        spread: FloatArray,
        simulator: str = "metaworld",
        distortion: Distortion | None = None,
        segmented: bool = True,
        textures: bool = False,
    ) -> None:
        self.simulator, self.spread, self.distortion, self.segmented = simulator, spread, distortion, segmented
        self.textures = textures
        self._planner = RuleBasedPlanner()
        self._environments: dict[str, Environment] = {}
        probe = make(simulator)
        self.spec = probe.spec
        self.cells = {camera.name: camera.cell for camera in self.spec.cameras}
        probe.close()

    def environment(self, task: str) -> Environment:
        """The environment that runs `task`; built on first use."""
        if task not in self._environments:
            self._environments[task] = make(self.simulator)
        return self._environments[task]

    def close(self) -> None:
        """Release the simulators."""
        for environment in self._environments.values():
            environment.close()
        self._environments.clear()

    def evaluate(
        self, policy: Policy, split: Split, tasks: Sequence[str], indices: Sequence[int], wording: Wording | None = None
    ) -> list[Outcome]:
        """Success of `policy` in scenes `indices` of `split`; an episode ends at success."""
        if split not in (Split.EVALUATION, Split.TUNING):
            raise ValueError(f"split: success is measured on evaluation or tuning scenes, got {split.value}")
        specs = [EpisodeSpec(0, task, index, 0.0, f"{index:x}") for index in indices for task in tasks]
        runs = self.run(specs, policy, split, stop_at_success=True, wording=wording)
        return [Outcome(spec.task, split.value, spec.index, run.success) for spec, run in zip(specs, runs, strict=True)]

    def run(
        self,
        specs: Sequence[EpisodeSpec],
        policy: Policy,
        split: Split = Split.POSTTRAIN,
        *,
        stop_at_success: bool = False,
        film: bool = False,
        expert: Expert | None = None,
        wording: Wording | None = None,
    ) -> list[Run]:
        """Run every episode of `specs`, in the order given.

        film: keep every frame; expert: ask the expert at every chunk; wording: of instructions, not of skills' prompts.
        """
        waiting: dict[str, list[int]] = {}
        for place, spec in enumerate(specs):
            waiting.setdefault(spec.task, []).append(place)
        done: dict[int, Run] = {}
        lanes = {task: self._start(places.pop(0), specs, split, film, wording) for task, places in waiting.items()}
        while lanes:
            running = list(lanes.values())
            base, combined = self._act(policy, running)
            for lane, base_chunk, chunk in zip(running, base, combined, strict=True):
                if expert:
                    self._ask_expert(lane, expert)
                result = self._step(lane, base_chunk, chunk, film)
                if result.done or (stop_at_success and lane.success):
                    task = lane.spec.task
                    done[lane.place] = self._finish(lane, policy.version, split)
                    if waiting[task]:
                        lanes[task] = self._start(waiting[task].pop(0), specs, split, film, wording)
                    else:
                        del lanes[task]
        return [done[place] for place in range(len(specs))]

    def _start(self, place: int, specs: Sequence[EpisodeSpec], split: Split, film: bool, wording: Wording | None) -> _Lane:
        spec = specs[place]
        task = self.spec.task(spec.task)
        if self.textures:
            self.environment(spec.task).paint(scene_seed(split, spec.index))
        first: Observation = self.environment(spec.task).reset(spec.task, scene_seed(split, spec.index))
        hand = load_schemas().calibration_of(self.simulator, self.spec.gripper_open_width)
        skill = OnlineSkill(self._planner.plan(first.instruction, task.name), hand)
        prompt = skill.update(float(first.state[self.spec.gripper_width_index])) if self.segmented else first.instruction
        grid = stitch(first.images, self.cells)
        offsets = schedule.perturbation(spec, task.max_chunks, self.spread)
        episode = (scene_seed(split, spec.index), self.spec.tasks.index(task))
        seen = self._seen(grid, episode, 0)
        told = wording(first.instruction, spec.index) if wording else first.instruction
        lane = _Lane(place, spec, episode, told, skill, prompt, seen, first.state, offsets)
        if film:
            lane.film.append(grid)  # undistorted, as every later frame of it
        return lane

    def _seen(self, image: ImageArray, episode: Sequence[int], chunk: int) -> ImageArray:
        return image if self.distortion is None else self.distortion(image, episode, chunk)

    def _act(self, policy: Policy, lanes: Sequence[_Lane]) -> tuple[FloatArray, FloatArray]:
        frames = torch.from_numpy(np.stack([lane.image for lane in lanes]))
        states = torch.from_numpy(np.stack([lane.state for lane in lanes]))
        instructions = [lane.instruction for lane in lanes]
        base, combined = policy.act(frames, states, instructions, [lane.prompt for lane in lanes])
        return base.numpy(), combined.numpy()

    def _ask_expert(self, lane: _Lane, expert: Expert) -> None:
        chunk, images = self.environment(lane.spec.task).expert_preview(frames=expert == "video")
        lane.expert.append(chunk)
        if expert == "video":
            shown = [stitch({name: found[i] for name, found in images.items()}, self.cells) for i in range(len(chunk))]
            lane.expert_film.append(np.stack(shown))

    def _step(self, lane: _Lane, base: FloatArray, combined: FloatArray, film: bool) -> StepResult:
        chunk = len(lane.frames)
        executed = np.clip(combined + lane.offsets[chunk], -1.0, 1.0).astype(np.float32)
        lane.frames.append(lane.image)
        lane.states.append(lane.state)
        lane.base.append(base)
        lane.executed.append(executed)
        lane.prompts.append(lane.prompt)
        result = self.environment(lane.spec.task).step(executed, "all" if film else "last")
        count = len(next(iter(result.images.values())))
        grids = [stitch({name: frames[i] for name, frames in result.images.items()}, self.cells) for i in range(count)]
        if film:
            lane.film += grids
        lane.success |= result.success
        lane.image = self._seen(grids[-1], lane.episode, chunk + 1)
        lane.state = result.states[-1]
        if self.segmented:
            lane.prompt = lane.skill.update(result.states[:, self.spec.gripper_width_index])
        return result

    def _finish(self, lane: _Lane, version: int, split: Split) -> Run:
        trajectory = Trajectory(
            task=lane.spec.task,
            split=split.value,
            index=lane.spec.index,
            version=version,
            frames=np.stack(lane.frames),
            states=np.stack(lane.states),
            base=np.stack(lane.base),
            executed=np.stack(lane.executed),
            prompts=tuple(lane.prompts),
            instruction=lane.instruction,
            key=lane.spec.key,
        )
        expert = np.stack(lane.expert) if lane.expert else None
        seen = np.stack(lane.expert_film) if lane.expert_film else None
        return Run(trajectory, lane.success, np.stack(lane.film) if lane.film else None, expert, seen)
