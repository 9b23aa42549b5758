"""The robot's own play as episodes, frame by frame: what world model and Stage 1 of regime `practised` see beside demonstrations.

A base policy in new scenes, interrupted by random motion (`policies.Playing`), for whole episodes. What it did is known, no label
says what it should have done, and success is not recorded. Random chunks are marked as not intended: they show states off the
demonstrated path and what motion looks like from there; the world model learns to foresee only what the policy itself did next.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from experiments.policies import Playing
from services.simulator.envs.base import Environment, make
from world2act.console import Progress, no_progress
from world2act.data.grid import stitch
from world2act.data.robomimic import EpisodeWriter
from world2act.models.tiny_policy import TinyPolicy
from world2act.schedule import INDICES_PER_SEED
from world2act.splits import Split, scene_seed
from world2act.types import Episode

EPISODES = 40
"""Per task."""
SEED = 98
"""The seed of `schedule.plan` whose scenes of split posttrain are practised in; neither a method nor `naming.play` uses it."""


def write(out: Path, base: TinyPolicy, tasks: Sequence[str], count: int = EPISODES, progress: Progress = no_progress) -> None:
    """<out>/posttrain/<task>.hdf5 with `count` episodes each; a task that is there stays."""
    environment = make("metaworld")
    playing = Playing(base, SEED)
    for number, task in enumerate(tasks):
        path = out / Split.POSTTRAIN.value / f"{task}.hdf5"
        if path.exists():
            continue
        with EpisodeWriter(path, split=Split.POSTTRAIN, env_args=environment.spec.env_args(task)) as writer:
            for index in range(count):
                writer.write(_episode(environment, playing, task, SEED * INDICES_PER_SEED + index))
                progress("practice", number * count + index + 1, len(tasks) * count, {})
    environment.close()


def _episode(environment: Environment, playing: Playing, task: str, index: int) -> Episode:
    spec = environment.spec
    cells = {camera.name: camera.cell for camera in spec.cameras}
    seen = environment.reset(task, scene_seed(Split.POSTTRAIN, index))
    images = {name: [image[None]] for name, image in seen.images.items()}
    states, actions, intended = [seen.state[None]], [], []
    done = False
    while not done:
        grid = stitch({name: frames[-1][-1] for name, frames in images.items()}, cells)
        now = torch.from_numpy(grid)[None], torch.from_numpy(states[-1][-1:])
        wanted, moved = (chunk[0].numpy() for chunk in playing.act(*now, [seen.instruction], [""]))
        executed = np.clip(moved, -1.0, 1.0).astype(np.float32)
        result = environment.step(executed, "all")
        done = result.done
        actions.append(executed)
        intended += [np.array_equal(moved, wanted)] * len(executed)
        states.append(result.states)
        for name, frames in result.images.items():
            images[name].append(frames)
    stacked = np.concatenate(states)
    return Episode(
        task=task,
        split=Split.POSTTRAIN.value,
        index=index,
        instruction=seen.instruction,
        images={name: np.concatenate(frames) for name, frames in images.items()},
        states=stacked,
        widths=stacked[:, spec.gripper_width_index],
        actions=np.concatenate(actions),
        success=False,
        intended=np.array(intended),
    )
