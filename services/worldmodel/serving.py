"""What the Triton models do, without Triton: requests in, named arrays or an error out. model.py files only translate.

Requests that the dynamic batcher put together are computed together where horizon, steps and guidance are equal.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from services.worldmodel.backbones import Backbone, BackboneMemoryError, Frames, Latents, load_backbone, weights_hash
from services.worldmodel.settings import WorldModelSettings
from world2act.models.adapters import Adapters
from world2act.types import M

MAX_GUIDANCE = 100.0
FRAMES = frozenset({"last_frame", "frames"})
DECODE: dict[int, frozenset[str]] = {0: frozenset(), 1: frozenset({"last_frame"}), 2: FRAMES}
"""The input `decode` -> the decoded outputs it allows."""
Answer = dict[str, npt.NDArray[Any]] | ValueError | BackboneMemoryError
"""Named arrays; or the caller's fault; or ours."""


@dataclass(frozen=True)
class Call:
    """One Triton request to `worldmodel`: b rows with one horizon, steps, guidance; `wants` names the outputs asked for."""

    start: Frames
    prompts: list[str]
    seeds: list[int]
    horizon: int
    steps: int
    guidance: float
    wants: frozenset[str]


def read_call(inputs: dict[str, npt.NDArray[Any]], wants: Sequence[str]) -> Call:
    """Named Triton inputs, each with a leading row dimension -> Call. Raises ValueError naming the field.

    An ensemble asks its members for every output, whatever its own caller wants: so the input `decode` says which frames to make.
    """
    if not ((inputs["guidance"] >= 0.0) & (inputs["guidance"] <= MAX_GUIDANCE)).all():  # also refuses NaN
        raise ValueError(f"guidance: {inputs['guidance'].max()} is outside [0, {MAX_GUIDANCE:g}]")
    same: dict[str, Any] = {}
    for name in ("horizon", "steps", "guidance", "decode"):
        values = inputs[name].reshape(-1)
        if (values != values[0]).any():
            raise ValueError(f"{name}: must be equal for all rows of a request")
        same[name] = values[0].item()
    if same["decode"] not in DECODE:
        raise ValueError(f"decode: {same['decode']} is outside [0, {len(DECODE) - 1}]")
    try:
        prompts = [cast(bytes, p).decode() for p in inputs["prompt"].reshape(-1)]
    except UnicodeDecodeError:
        raise ValueError("prompt: is not UTF-8 text") from None
    return Call(
        inputs["start_frame"],
        prompts,
        [int(s) for s in inputs["seed"].reshape(-1)],
        same["horizon"],
        same["steps"],
        same["guidance"],
        frozenset(wants) - (FRAMES - DECODE[same["decode"]]),
    )


class WorldModelServer:
    """The model `worldmodel`."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.info = json.dumps(backbone.info.as_dict())

    def run(self, calls: Sequence[Call]) -> list[Answer]:
        """One answer per call, in order. A call that asks for `hash` and `info` alone is answered without imagining."""
        answers: dict[int, Answer] = {}
        groups: dict[tuple[int, int, float], list[int]] = defaultdict(list)
        for i, call in enumerate(calls):
            if call.wants & {"latents", "last_frame", "frames"}:
                groups[call.horizon, call.steps, call.guidance].append(i)
            else:
                answers[i] = {}
        for members in groups.values():
            try:
                computed = self._imagine([calls[i] for i in members])
            except (ValueError, BackboneMemoryError):  # one bad call must not spoil the others'
                computed = [self._alone(calls[i]) for i in members]
            answers.update(zip(members, computed, strict=True))
        for i, call in enumerate(calls):
            self._describe(answers[i], len(call.start))
        return [answers[i] for i in range(len(calls))]

    def _alone(self, call: Call) -> Answer:
        try:
            return self._imagine([call])[0]
        except (ValueError, BackboneMemoryError) as error:
            return error

    def _describe(self, answer: Answer, rows: int) -> None:
        if isinstance(answer, dict):
            answer["hash"] = _texts(self.backbone.info.hash, rows)
            answer["info"] = _texts(self.info, rows)

    def _imagine(self, calls: list[Call]) -> list[Answer]:
        first = calls[0]
        latents = self.backbone.imagine(
            np.concatenate([c.start for c in calls]),
            [p for c in calls for p in c.prompts],
            [s for c in calls for s in c.seeds],
            first.horizon,
            first.steps,
            first.guidance,
        )
        edges = np.cumsum([len(c.start) for c in calls])[:-1]
        return [self._outputs(c, part) for c, part in zip(calls, np.split(latents, edges), strict=True)]

    def _outputs(self, call: Call, latents: Latents) -> Answer:
        outputs: dict[str, npt.NDArray[Any]] = {}
        if "latents" in call.wants:
            outputs["latents"] = latents
        if "frames" in call.wants:
            outputs["frames"] = self.backbone.decode(latents)
        if "last_frame" in call.wants:
            frames = outputs.get("frames")
            outputs["last_frame"] = self.backbone.last_frame(latents) if frames is None else frames[:, -1]
        return outputs


class VideoAdapterServer:
    """The model `video_adapter`: E_v on latents 1 .. K; latent 0 is conditioning only (METHOD section 0)."""

    def __init__(self, adapters: Adapters, device: str = "cpu") -> None:
        self.adapters = adapters.to(device)
        self.hash = adapters.hash
        self.device = device

    def run(self, batches: Sequence[npt.NDArray[np.float32]]) -> list[Answer]:
        """Latents (b, 1+K, C, h, w) per request -> `e_v` (b, K, D) and `hash` (b, 1)."""
        answers: list[Answer] = []
        for latents in batches:
            channels = self.adapters.settings.channels
            if latents.ndim != 5 or latents.shape[1] < 2 or latents.shape[2] != channels:
                answers.append(
                    ValueError(f"latents: shape must be (rows, 1 + K, {channels}, h, w) with K >= 1, got {latents.shape}")
                )
                continue
            with torch.no_grad():
                e_v = self.adapters.video(torch.tensor(latents[:, 1:], device=self.device)).cpu().numpy()
            answers.append({"e_v": e_v, "hash": _texts(self.hash, len(latents))})
        return answers


def _texts(text: str, rows: int) -> npt.NDArray[Any]:
    return np.array([[text.encode()]] * rows, dtype=object)


def device_of(instance_kind: str) -> str:
    """Triton's instance kind (KIND_AUTO arrives resolved) -> torch device."""
    return "cuda" if instance_kind == "GPU" and torch.cuda.is_available() else "cpu"


def load_worldmodel(device: str) -> WorldModelServer:
    """The backbone W2A_BACKBONE. Raises ValueError for one whose latents pair with no action chunk."""
    settings = WorldModelSettings()
    torch.set_num_threads(settings.torch_threads)
    return WorldModelServer(check_compression(load_backbone(settings, device)))


def check_compression(backbone: Backbone) -> Backbone:
    """Raise ValueError unless one latent shows the result of one action chunk (METHOD section 0)."""
    found = backbone.info.temporal_compression
    if found != M:
        raise ValueError(
            f"W2A_BACKBONE: the VAE of {backbone.info.name} makes one latent of {found} frames, but an action chunk is M = {M} "
            "actions: its latents pair with no chunk. It can be fine-tuned and measured, not used for Stage 1 and Stage 2"
        )
    return backbone


def load_video_adapter(device: str) -> VideoAdapterServer:
    """From the folder W2A_ZOO. Raises ValueError when the adapters were trained on another world model's latents."""
    settings = WorldModelSettings()
    torch.set_num_threads(settings.torch_threads)
    adapters = Adapters.load(settings.zoo / "adapters.safetensors")
    adapters.check_worldmodel(weights_hash(settings, device))
    return VideoAdapterServer(adapters, device)
