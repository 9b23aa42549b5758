"""One episode: act, perturb, step, track the active skill, until the chunk limit.

Success stands in reports and ends an episode that is only watched or evaluated. It never ends one that Stage 2 learns from, which
would tell the learner about it by the episode's length; nor does what is recorded (`Recorded.arrays`) contain it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from services.runtime.artifacts import ArtifactStore, content_key
from services.runtime.messages import ImagineRequest, RolloutRequest, RolloutResult, SkillPrompt
from services.trainer.doors import Policy, Simulator
from world2act.data.video import encode_mp4
from world2act.segmentation import OnlineSkill, RuleBasedPlanner, load_schemas
from world2act.types import FloatArray, ImageArray

PERTURBED_AXES = 3
"""Rollout noise moves x, y, z; the gripper and whatever follows stay as the policy wants them."""


@dataclass
class Recorded:
    """What an episode of n chunks left; shapes as in world2act.types.Trajectory. `unseen`: see RolloutResult. `video`: every
    frame, if it was asked for, of which the upper `video_rows` rows show a camera."""

    instruction: str = ""
    version: int = 0
    unseen: bool = False
    success: bool = False
    video_rows: int = 0
    frames: list[ImageArray] = field(default_factory=list)
    states: list[FloatArray] = field(default_factory=list)
    base: list[FloatArray] = field(default_factory=list)
    executed: list[FloatArray] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    video: list[ImageArray] = field(default_factory=list)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """frames (n, H, W, 3), states (n, S), base and executed (n, M, A)."""
        return {
            "frames": np.stack(self.frames),
            "states": np.stack(self.states),
            "base": np.stack(self.base),
            "executed": np.stack(self.executed),
        }


class Perturbation:
    """Chunk-wise noise, one xyz offset for a whole chunk, from the request's seed: chunk by chunk the rows of
    `world2act.schedule.perturbation`. `std` (A,): the actions' standard deviations."""

    def __init__(self, seed: int, noise: float, std: FloatArray) -> None:
        self.rng = np.random.default_rng(seed)
        self.noise, self.std = noise, std

    def __call__(self, chunk: FloatArray, low: FloatArray, high: FloatArray) -> FloatArray:
        """Chunk (M, A) + offset (A,), clipped to the action limits (A,)."""
        offset = (self.rng.standard_normal(len(self.std)) * self.noise * self.std).astype(np.float32)
        offset[PERTURBED_AXES:] = 0.0
        return np.clip(chunk + offset, low, high).astype(np.float32)


def run_episode(
    request: RolloutRequest, simulator: Simulator, policy: Policy, version: int, std: FloatArray, wait: float
) -> Recorded:
    """Execute `request` with policy `version`; -1 becomes the version of the first answer, and that one acts to the end.

    `std`: the actions' standard deviations (A,). Raises ValueError for a wrong request, grpc.RpcError from the doors.
    """
    limit = simulator.max_chunks(request.task)
    if request.max_chunks:
        limit = min(limit, request.max_chunks)
    recorded = Recorded(version=version, video_rows=simulator.used_rows)
    state, recorded.instruction = simulator.reset(request.task, request.split, request.index, wait)
    width = simulator.spec.gripper_width_index
    hand = load_schemas().calibration_of(simulator.spec.simulator, simulator.spec.gripper_open_width)
    online = OnlineSkill(RuleBasedPlanner().plan(recorded.instruction, request.task), hand)
    prompt = online.update([max(float(state[width]), 0.0)])
    perturb = Perturbation(request.seed, request.noise, std)
    grid = simulator.grid()
    recorded.video.append(grid)
    attempt, done_actions = uuid.uuid4().hex, 0  # a request that is delivered twice must not go on with the other's plan
    for _ in range(limit):
        base, combined, recorded.version, recorded.unseen = policy.act(
            simulator.images, state, recorded.instruction, request.namespace, recorded.version, attempt, done_actions
        )
        done_actions += len(combined)
        executed = perturb(combined, simulator.low, simulator.high)
        recorded.frames.append(grid)
        recorded.states.append(state)
        recorded.base.append(base)
        recorded.executed.append(executed)
        recorded.prompts.append(prompt)
        frames, states, recorded.success, done = simulator.step(executed, request.video)
        grid, state = frames[-1], np.array(states[-1], np.float32)
        if request.video:
            recorded.video.extend(frames)
        prompt = online.update(np.clip(states[:, width], 0.0, None))
        if done or (recorded.success and request.stop_at_success):
            break
    return recorded


def store(artifacts: ArtifactStore, request: RolloutRequest, recorded: Recorded, fps: int) -> RolloutResult:
    """Write trajectory and video (one frame an action, `fps` a second); the result that names them (times are still zero)."""
    metadata = {
        "task": request.task,
        "split": request.split,
        "index": str(request.index),
        "version": str(recorded.version),
        "prompts": json.dumps(recorded.prompts),
        "instruction": recorded.instruction,
        "key": request.id,
    }
    name = artifacts.put_tensors(recorded.arrays(), metadata)
    video = ""
    if request.video:
        video = artifacts.put(encode_mp4(np.stack(recorded.video)[:, : recorded.video_rows], fps), "mp4")
    return RolloutResult(
        id=request.id,
        job=request.job,
        task=request.task,
        split=request.split,
        index=request.index,
        round=request.round,
        version=recorded.version,
        trajectory=name,
        unseen=recorded.unseen,
        success=recorded.success,
        chunks=len(recorded.frames),
        video=video,
    )


def imagine_request(
    reply: str,
    starts: str,
    skills: list[list[SkillPrompt]],
    *,
    seed: int = 0,
    steps: int = 1,
    guidance: float = 1.0,
    latents: bool = False,
    video: bool = False,
) -> ImagineRequest:
    """An ImagineRequest under its content key: equal work has an equal id, whoever asks."""
    rows = [[skill.model_dump() for skill in row] for row in skills]
    key = content_key("imagine", starts, rows, seed, steps, guidance, latents, video)
    return ImagineRequest(
        id=key, reply=reply, starts=starts, skills=skills, seed=seed, steps=steps, guidance=guidance, latents=latents, video=video
    )


def closed_loop(
    reply: str, starts: str, prompts: list[str], horizon: int, steps: int = 1, guidance: float = 1.0
) -> ImagineRequest:
    """Stage 2's closed-loop targets: `horizon` chunks ahead of each frame that `closed_loop_starts` names, under its skill.

    With horizon 1 latents come along, because latent 0 of each row is the visited frame as the residual policy sees it: then the
    learner needs no encoder.
    """
    skills = [[SkillPrompt(prompt=prompt, chunks=horizon)] for prompt in prompts]
    return imagine_request(reply, starts, skills, steps=steps, guidance=guidance, latents=horizon == 1)


def closed_loop_starts(
    artifacts: ArtifactStore, trajectory: str, frames: Sequence[ImageArray], prompts: Sequence[str], every: int
) -> tuple[str, list[str]]:
    """Artifact of the frames that start a clip of `every` chunks (every `every`-th of n), and the skills active there.

    With `every` 1 that is the trajectory's own artifact, so nothing is stored twice.
    """
    if every == 1:
        return trajectory, list(prompts)
    return artifacts.put_tensors({"frames": np.stack(frames[::every])}), list(prompts[::every])
