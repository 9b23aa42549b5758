"""A policy of LeRobot (SmolVLA, pi0, ACT, ...) in this process, out of a local folder that `save_pretrained` wrote.

LeRobot's own server moves pickles over an open channel (CVE-2026-25874): it is neither used nor copied. The package needs an
environment of its own (numpy 2): install it there beside this project's `vla` extra without its pins, and run `python -m
services.vla` there. Rows go one at a time under one seed, so that a policy that samples gives the same actions for the same row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.vla.policies import layouts
from services.vla.policies.base import BasePolicy, PolicySpec
from services.vla.settings import VlaSettings
from world2act.types import FloatArray, ImageArray, M

SEED = 0


class LeRobot(BasePolicy):
    """`policy`, `before` and `after`: LeRobot's policy with the two processor pipelines that were saved beside it."""

    def __init__(self, policy: Any, before: Any, after: Any, layout: layouts.Layout, settings: VlaSettings, digest: str) -> None:
        self._policy, self._before, self._after, self._layout = policy, before, after, layout
        self._sizes = {name: tuple(feature.shape[1:]) for name, feature in policy.config.image_features.items()}
        self._check()
        robot = layout.robot
        self._spec = PolicySpec(
            name="lerobot",
            hash=digest,
            cameras=dict(robot.cameras),
            height=settings.vla_image_size,
            width=settings.vla_image_size,
            state_size=robot.state,
            low=tuple(robot.low),
            high=tuple(robot.high),
            chunk=M,
            block=1,
            horizon=settings.vla_remote_horizon or int(policy.config.n_action_steps),
        )

    def _check(self) -> None:
        """Raises ValueError naming what of the table is not what the policy was trained with."""
        config, table = self._policy.config, self._layout.policy
        if set(self._sizes) != set(table.cameras):
            raise ValueError(f"layout: cameras are {', '.join(table.cameras)}, the policy's {', '.join(self._sizes) or 'none'}")
        state, action = config.robot_state_feature, config.action_feature
        for name, ours, theirs in (
            ("state", sum(self._layout.state_sizes.values()), state.shape[0] if state is not None else 0),
            ("action", sum(self._layout.action_sizes.values()), action.shape[0]),
        ):
            if ours != theirs:
                raise ValueError(f"layout: {name} has {ours} numbers, the policy's {theirs}")

    @property
    def spec(self) -> PolicySpec:
        return self._spec

    def _act(self, grids: ImageArray, states: FloatArray, instructions: Sequence[str]) -> FloatArray:
        (grid,), (state,), (instruction,) = grids, states, instructions  # block is 1
        table = self._layout.policy
        batch: dict[str, Any] = {table.instruction: [instruction]}
        for name, image in self._layout.images(grid).items():
            fitted = layouts.fit(image, *self._sizes[name])
            batch[name] = torch.from_numpy(fitted).permute(2, 0, 1)[None].float() / 255.0
        for name, vector in self._layout.states(state).items():
            batch[name] = torch.from_numpy(vector)[None]
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(SEED)
            chunk = self._policy.predict_action_chunk(self._before(batch))[:, : self.spec.horizon]
            # The saved pipeline takes one action at a time, (B, A).
            actions = torch.stack([self._after(chunk[:, step]) for step in range(chunk.shape[1])], dim=1)
        (name,) = self._layout.action_sizes
        return self._layout.our_actions({name: np.asarray(actions[0].float().cpu())})[None]


def digest(folder: Path) -> str:
    """sha256 over the folder's weights, configuration and processors."""
    total = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        with path.open("rb") as file:
            total.update(f"{path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def build(settings: VlaSettings) -> LeRobot:
    """Load the folder that `vla_base` names. Raises ValueError or FileNotFoundError with one sentence; never asks a hub."""
    try:
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    except ImportError as error:
        raise ValueError(f"policy lerobot: the package lerobot is not installed in this environment ({error})") from None
    folder = settings.weights(settings.vla_base)
    for name in ("config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"vla_base: {folder} has no {name}; lerobot needs the folder of a saved policy with its processors"
            )
    layout = layouts.load(settings.vla_layout, "lerobot")
    try:
        config = PreTrainedConfig.from_pretrained(folder, local_files_only=True)
        config.device = settings.vla_device
        policy = get_policy_class(config.type).from_pretrained(folder, config=config, local_files_only=True)
        device = {"device_processor": {"device": settings.vla_device}}
        before, after = make_pre_post_processors(
            config,
            pretrained_path=str(folder),
            preprocessor_overrides=device,
            postprocessor_overrides={"device_processor": {"device": "cpu"}},
        )
    except (KeyError, TypeError, RuntimeError, OSError) as error:
        raise ValueError(f"policy lerobot: {folder} cannot be loaded ({str(error).splitlines()[0][:300]})") from None
    return LeRobot(policy.eval(), before, after, layout, settings, digest(folder))
