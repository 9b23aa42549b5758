"""The residual bundle: what Stage 2 ships and the policy server loads. One safetensors file with its JSON inside.

It holds the residual's weights, action and state statistics, the bound, the action layout, the hashes of the base policy,
world model and adapters that it was trained beside, the instructions that it was trained on, and a signature where its maker has
a key (world2act/signature.py).
`load` refuses, with a sentence that says what differs.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from world2act import signature
from world2act.models import store
from world2act.models.adapters import ActionAdapter, ActionDecoder, Adapters, AdapterSettings
from world2act.models.residual import ResidualPolicy, ResidualSettings
from world2act.models.text import words
from world2act.normalisation import Statistics

KIND = "residual"
PARTS = {"base": "base policy", "worldmodel": "world model", "adapters": "adapters"}


@dataclass(frozen=True)
class ActionLayout:
    """The simulator's action: a name and the limits of each of A components, in the simulator's units."""

    names: tuple[str, ...] = ("dx", "dy", "dz", "gripper")
    low: tuple[float, ...] = (-1.0, -1.0, -1.0, -1.0)
    high: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.low) == len(self.high):
            raise ValueError(f"action layout: {len(self.names)} names, {len(self.low)} low, {len(self.high)} high limits")
        if not all(-math.inf < low < high < math.inf for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError("action layout: limits must be finite and every low one below its high one")

    def difference(self, other: ActionLayout) -> str:
        """What the first component that differs is here and there; empty where none does."""
        mine, theirs = (list(zip(layout.names, layout.low, layout.high, strict=True)) for layout in (self, other))
        if len(mine) != len(theirs):
            return f"has {len(mine)} components, the one in use {len(theirs)}"
        for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if a != b:
                return f"has {a[0]} in [{a[1]:g}, {a[2]:g}] as component {number}, the one in use {b[0]} in [{b[1]:g}, {b[2]:g}]"
        return ""


@dataclass(frozen=True)
class Origin:
    """sha256 of the weights that a residual was trained beside; it is worthless with others."""

    base: str
    worldmodel: str
    adapters: str


class _Config(BaseModel):
    """The JSON part as it must be: no unknown field, no silent conversion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    residual: ResidualSettings
    adapters: AdapterSettings
    layout: ActionLayout
    origin: Origin
    version: Annotated[int, Field(ge=1, lt=2**63)]
    instructions: tuple[str, ...] = ()  # bundles made before it was kept have none

    @classmethod
    def read(cls, found: Any) -> _Config:
        """Raises ValueError naming the field."""
        for part, key in (("residual", "bound"), ("layout", "names"), ("layout", "low"), ("layout", "high")):
            if not isinstance(found, dict) or not isinstance(found.get(part), dict) or key not in found[part]:
                raise ValueError(f"missing {part}.{key}")  # the classes have defaults, which are for making, not for reading
        try:
            return cls.model_validate_json(json.dumps(found))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where, why = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{where}: {why[:1].lower()}{why[1:]}") from None


@dataclass
class Bundle:
    """A residual policy with everything needed to run it.

    version: the policy version it is (0 is the base alone). signed_by: the key that signed the file it was read from.
    instructions: those of the tasks that it was trained on, where each has one; none: an open set, or not kept.
    """

    policy: ResidualPolicy
    adapters: AdapterSettings
    actions: Statistics
    layout: ActionLayout
    origin: Origin
    version: int
    card: dict[str, Any] = field(default_factory=dict)
    signed_by: str = ""
    instructions: tuple[str, ...] = ()

    def knows(self, instruction: str) -> bool:
        """Whether it was trained on that instruction, word for word; always where `instructions` are not kept."""
        return not self.instructions or tuple(words(instruction)) in self._known

    @functools.cached_property
    def _known(self) -> frozenset[tuple[str, ...]]:
        return frozenset(tuple(words(text)) for text in self.instructions)

    @torch.no_grad()
    def combine(self, visual: Tensor, states: Tensor, base: Tensor, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Residual and combined = clip(base + residual), both (N, M, A) in the simulator's units.

        visual: latents (N, C, h, w) or uint8 frames (N, H, W, 3), see `policy.settings.vision`; states (N, S); base (N, M, A).
        """
        normalised = self.policy(visual, states, self.actions.normalise(base), instructions)
        residual = normalised * self.actions.std
        combined = torch.minimum(
            torch.maximum(base + residual, base.new_tensor(self.layout.low)), base.new_tensor(self.layout.high)
        )
        return residual, combined

    def act(
        self, frames: Tensor, states: Tensor, base: Tensor, instructions: Sequence[str], encode: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`combine` from camera grids uint8 (N, H, W, 3); encode: the world model's, (N, 1, H, W, 3) -> (N, 1, C, h, w)."""
        visual = encode(frames[:, None])[:, 0] if self.policy.settings.vision == "latent" else frames
        return self.combine(visual, states, base, instructions)

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        config = {
            "residual": asdict(self.policy.settings),
            "adapters": asdict(self.adapters),
            "layout": asdict(self.layout),
            "origin": asdict(self.origin),
            "version": self.version,
            "instructions": self.instructions,
        }
        tensors = {**self.policy.state_dict(), **self.actions.tensors("actions")}
        return tensors, {"kind": KIND, "config": config, "card": self.card}

    def to_bytes(self) -> bytes:
        """The file's content."""
        return store.to_bytes(*self._contents())

    def save(self, path: Path | str) -> str:
        """Write the file whole or not at all; returns its sha256."""
        return store.write(path, *self._contents())

    @classmethod
    def load(cls, path: Path | str, expected: Origin | None = None, layout: ActionLayout | None = None, **checks: Any) -> Bundle:
        """`from_bytes` of a file. Raises OSError where it cannot be read."""
        return cls.from_bytes(Path(path).read_bytes(), str(path), expected, layout, **checks)

    @classmethod
    def from_bytes(
        cls,
        content: bytes,
        name: str = "bundle",
        expected: Origin | None = None,
        layout: ActionLayout | None = None,
        *,
        adapters: Adapters | None = None,
        max_bound: float = math.inf,
        trusted: frozenset[str] = frozenset(),
    ) -> Bundle:
        """Read and check. `name` stands in the error.

        expected, layout, adapters: what the bundle must have been made with; None, or an empty hash: anything. max_bound: of
        the residual, in standard deviations of the actions. trusted: keys of which one must have signed it; none: a signature
        is not demanded, but one that is there must hold. Raises WeightsError naming what is damaged, missing, or differs
        (then a MismatchError).
        """
        tensors, metadata, _ = store.parse(content, KIND, name)
        try:
            signed_by = signature.signer(content, metadata)
            signature.check_signer(signed_by, trusted)
            bundle = cls._build(tensors, metadata, signed_by)
        except signature.SignatureError as error:
            raise store.WeightsError(f"{name}: {error}") from None
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).replace("\n", " ")[:500]
            raise store.WeightsError(f"{name}: does not hold a residual policy that can run ({reason})") from None
        difference = bundle._difference(expected, layout, adapters, max_bound)
        if difference:
            raise store.MismatchError(f"{name}: {difference}")
        return bundle

    @classmethod
    def _build(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], signed_by: str) -> Bundle:
        config = _Config.read(metadata.get("config"))
        missing = [key for key in ("state_mean", "state_std") if key not in tensors]
        if missing:
            raise ValueError(f"missing statistics: {', '.join(missing)}")
        actions = Statistics.take(tensors, "actions")
        wrong = [f"{key} is {value.dtype}" for key, value in tensors.items() if value.dtype != torch.float32]
        if wrong:
            raise ValueError(f"weights must be float32, but {wrong[0]}")
        not_finite = [key for key, value in tensors.items() if not bool(torch.isfinite(value).all())]
        if not_finite:
            raise ValueError(f"values that are not finite in {', '.join(not_finite[:3])}")
        if not bool((tensors["state_std"] > 0).all()):
            raise ValueError("statistics: state_std must be > 0")
        if not len(config.layout.names) == config.adapters.action_size == len(actions.mean):
            sizes = f"{config.adapters.action_size} in the adapters, {len(actions.mean)} in the statistics"
            raise ValueError(f"action layout: {len(config.layout.names)} components, but {sizes}")
        with torch.device("meta"):  # sizes are the file's word: nothing is allocated before they match its tensors
            parts = ActionAdapter(config.adapters), ActionDecoder(config.adapters)
            policy = ResidualPolicy(config.residual, *parts, config.adapters.size)
        weights = {key: value.clone() for key, value in tensors.items() if not key.startswith("actions.")}
        policy.load_state_dict(weights, assign=True)
        policy.eval().requires_grad_(False)
        card = metadata.get("card")
        return cls(
            policy,
            config.adapters,
            actions,
            config.layout,
            config.origin,
            config.version,
            card if isinstance(card, dict) else {},
            signed_by,
            config.instructions,
        )

    def _difference(
        self, expected: Origin | None, layout: ActionLayout | None, adapters: Adapters | None, max_bound: float
    ) -> str:
        """A sentence about the first thing that is not as it must be; empty where all is."""
        for part, called in PARTS.items():
            mine, theirs = getattr(self.origin, part), getattr(expected, part, "")
            if theirs and mine != theirs:
                return f"the residual was trained beside {called} {mine[:12]}, but the one in use is {theirs[:12]}"
        if layout is not None and (difference := self.layout.difference(layout)):
            return f"the residual's action layout {difference}"
        if self.policy.settings.bound > max_bound:
            return (
                f"the residual may add up to {self.policy.settings.bound:g} standard deviations to an action (bound), "
                f"the limit here is {max_bound:g}"
            )
        if adapters is not None:
            return self._difference_to(adapters)
        return ""

    def _difference_to(self, adapters: Adapters) -> str:
        """`_difference` in what the file repeats of the adapters: a changed scale would move an arm too far."""
        if self.adapters != adapters.settings:
            return f"the residual's adapters are {self.adapters}, but those in use are {adapters.settings}"
        for part in ("mean", "std"):
            mine, theirs = getattr(self.actions, part), getattr(adapters.actions, part)
            if not torch.equal(mine, theirs):
                where = int((mine != theirs).nonzero()[0])
                return (
                    f"the action statistics differ: {part} of {self.layout.names[where]} is {float(mine[where]):g}, "
                    f"but {float(theirs[where]):g} in the adapters in use"
                )
        return ""
