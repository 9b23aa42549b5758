"""Stage 2: residual post-training towards imagined latents (METHOD section 4), base, E_v, E_a and G frozen. No reward.

    plan -> execute (trajectories) + imagine (targets e_v) -> Stage2Dataset -> Learner.train_round -> bundle, round by round

`post_train` runs it in one process; the distributed trainer calls the same `plan`, `Stage2Dataset` and `Learner`, and with the
same recorded data and seed gets the same bits. Data is read in the plan's order, so the order of arrival does not matter.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from world2act import objectives, splits
from world2act.bundle import ActionLayout, Bundle, Origin
from world2act.models import store
from world2act.models.adapters import Adapters
from world2act.models.residual import ResidualPolicy, ResidualSettings
from world2act.normalisation import Statistics
from world2act.optimisation import device_of
from world2act.presets import Stage2Settings
from world2act.schedule import EpisodeSpec, rounds, steps_of
from world2act.types import Device, Trajectory

CHECKPOINT = "stage2-checkpoint"

Metrics = dict[str, float]


# --- targets --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """What the world model says should have happened at each of n chunks.

    embeddings: e_v float32 (n, D); mask: bool (n,), False where there is no target; visual: latents (n, C, h, w) of the visited
    frames, if they were computed on the way (closed loop: latent 0 of each imagined clip). chunks: normalised action chunks
    (n, M, A) that the decode term aims at instead of D_a(e_v): baselines that label actions otherwise, and the oracle.
    """

    embeddings: Tensor
    mask: Tensor
    visual: Tensor | None = None
    chunks: Tensor | None = None

    def cpu(self) -> Targets:
        """The same on the CPU."""
        visual, chunks = (part if part is None else part.cpu() for part in (self.visual, self.chunks))
        return Targets(self.embeddings.cpu(), self.mask.cpu(), visual, chunks)


class Imagination(Protocol):
    """What targets need of a world model (world2act.models.worldmodel.WorldModel has it)."""

    @property
    def hash(self) -> str: ...

    def encode(self, frames: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def imagine(self, start: Tensor, prompts: Sequence[str], horizon: int, seeds: Sequence[int]) -> Tensor: ...


@torch.no_grad()
def closed_loop_targets(model: Imagination, adapters: Adapters, trajectory: Trajectory, seed: int = 0, every: int = 1) -> Targets:
    """One clip of `every` chunks from every `every`-th visited frame, under the skill active there.

    Latent k pairs with the k-th chunk from that frame on; of the last clip, what reaches beyond the episode is dropped. Visited
    frames come back as latents only with every = 1, where each starts a clip.
    """
    frames = torch.from_numpy(trajectory.frames)
    n = len(frames)
    latents = model.imagine(frames[::every], trajectory.prompts[::every], every, [seed + i for i in range(0, n, every)])
    embeddings = adapters.video(latents[:, 1:]).flatten(0, 1)[:n]
    visited = latents[:, 0].clone() if every == 1 else None  # a view would keep what was imagined, too
    return Targets(embeddings, torch.ones(n, dtype=torch.bool), visited)


@torch.no_grad()
def open_loop_targets(model: Imagination, adapters: Adapters, trajectory: Trajectory, seed: int = 0) -> Targets:
    """The paper's: skill by skill from the first frame; a clip's last frame starts the next; latent k, chunk k - 1 of a skill."""
    start = torch.from_numpy(trajectory.frames[:1])
    parts = []
    for prompt, chunks in ((p, len(list(same))) for p, same in itertools.groupby(trajectory.prompts)):
        latents = model.imagine(start, [prompt], chunks, [seed])
        parts.append(adapters.video(latents[:, 1:])[0])
        start = model.decode(latents)[:, -1]
    return Targets(torch.cat(parts), torch.ones(len(trajectory.frames), dtype=torch.bool))


@torch.no_grad()
def aligned(targets: Targets, adapters: Adapters, trajectory: Trajectory) -> Targets:
    """Open-loop targets matched in time: each chunk takes the target of the imagined chunk that `objectives.monotone_path` gives
    to what was executed there, skill by skill. What was executed says how far the episode is; the base's chunk would not."""
    chunks = adapters.actions.normalise(torch.from_numpy(trajectory.executed).float())
    executed = adapters.action(chunks.to(targets.embeddings.device)[None])[0]
    paths, first = [], 0
    for _, same in itertools.groupby(trajectory.prompts):
        end = first + len(list(same))
        paths.append(first + objectives.monotone_path(targets.embeddings[first:end], executed[first:end]))
        first = end
    path = torch.cat(paths)
    return replace(targets, embeddings=targets.embeddings[path], mask=targets.mask[path])


def imagined_targets(
    model: Imagination, adapters: Adapters, settings: Stage2Settings, trajectory: Trajectory, seed: int = 0
) -> Targets:
    """The targets that `settings` name, on the device of `model` and `adapters`."""
    if settings.target == "closed-loop":
        return closed_loop_targets(model, adapters, trajectory, seed, settings.closed_loop_every)
    targets = open_loop_targets(model, adapters, trajectory, seed)
    return aligned(targets, adapters, trajectory) if settings.alignment == "monotone" else targets


# --- data -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """B episodes padded to n chunks. visual (B, n, C, h, w) latents or (B, n, H, W, 3) frames; states (B, n, S); base
    (B, n, M, A) normalised; target e_v (B, n, D); chunk D_a(e_v) (B, n, M, A); mask bool (B, n); tasks int (B,);
    instructions, one per episode."""

    visual: Tensor
    states: Tensor
    base: Tensor
    target: Tensor
    chunk: Tensor
    mask: Tensor
    tasks: Tensor
    instructions: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        moved = {name: getattr(self, name).to(device) for name in (*FIELDS, "tasks")}
        return replace(self, **moved)


FIELDS = ("visual", "states", "base", "target", "chunk", "mask")


class Stage2Dataset:
    """Recorded trajectories with their targets, in the plan's order; each counts once.

    encode: the world model's, (n, 1, H, W, 3) uint8 -> (n, 1, C, h, w); used where vision is "latent" and the targets bring no
    latents of the visited frames. allowed: splits of which it takes episodes.
    """

    def __init__(
        self,
        adapters: Adapters,
        settings: Stage2Settings,
        encode: Callable[[Tensor], Tensor] | None = None,
        allowed: Collection[splits.Split] = (splits.Split.POSTTRAIN,),
    ) -> None:
        self._actions = adapters.actions
        self._decoder = adapters.decoder
        self._size = adapters.settings.size
        self._settings = settings
        self._encode = encode
        self._allowed = allowed
        self._rows: dict[EpisodeSpec, dict[str, Tensor]] = {}
        self._instructions: dict[EpisodeSpec, str] = {}
        self._stacked: tuple[Batch, list[Tensor]] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def keys(self) -> set[str]:
        """Keys of the episodes inside."""
        return {spec.key for spec in self._rows}

    @property
    def instructions(self) -> tuple[str, ...]:
        """Of the tasks inside, sorted, where each has one; else none: other scenes of a task may have others still."""
        pairs = {(spec.task, text) for spec, text in self._instructions.items()}
        closed = len(pairs) == len({task for task, _ in pairs})
        return tuple(sorted({text for _, text in pairs})) if closed else ()

    def add(self, spec: EpisodeSpec, trajectory: Trajectory, targets: Targets) -> bool:
        """Add one episode; False (and no change) if it is inside already.

        Raises LeakageError unless it comes from an allowed split, ValueError naming the field where shapes do not fit.
        """
        splits.require([trajectory.split], self._allowed, "stage 2")
        if (trajectory.task, trajectory.index) != (spec.task, spec.index):
            raise ValueError(f"trajectory: is of {trajectory.task} {trajectory.index}, the plan asks {spec.task} {spec.index}")
        if spec in self._rows:
            return False
        n = len(trajectory.frames)
        if n < 1 or targets.embeddings.shape != (n, self._size) or targets.mask.shape != (n,):
            got = f"{tuple(targets.embeddings.shape)} and {tuple(targets.mask.shape)}"
            raise ValueError(f"targets: must be ({n}, {self._size}) with mask ({n},), one per chunk, got {got}")
        targets = targets.cpu()
        with torch.no_grad():
            chunks = self._decoder(targets.embeddings.float()) if targets.chunks is None else targets.chunks
        row = {
            "visual": self._visual(trajectory, targets),
            "states": torch.from_numpy(trajectory.states).float(),
            "base": self._actions.normalise(torch.from_numpy(trajectory.base).float()),
            "target": torch.where(targets.mask[:, None], targets.embeddings.float(), 0.0),
            "chunk": torch.where(targets.mask[:, None, None], chunks.float(), 0.0),
            "mask": targets.mask,
        }
        for name, value in row.items():
            if len(value) != n or not bool(torch.isfinite(value.float()).all()):
                raise ValueError(f"{name}: must be {n} finite rows, one per chunk")
        self._rows[spec] = row
        self._instructions[spec] = trajectory.instruction
        self._stacked = None
        return True

    def _visual(self, trajectory: Trajectory, targets: Targets) -> Tensor:
        frames = torch.from_numpy(trajectory.frames)
        if self._settings.vision == "pixels":
            return frames
        if targets.visual is not None:
            return targets.visual
        if self._encode is None:
            raise ValueError("targets: bring no latents of the visited frames, and no encoder was given")
        with torch.no_grad():
            return self._encode(frames[:, None])[:, 0]

    def stack(self) -> tuple[Batch, list[Tensor]]:
        """All episodes in order, padded to one length, and the rows of each task."""
        if self._stacked is None:
            if not self._rows:
                raise ValueError("stage 2: the data set is empty")
            specs = sorted(self._rows)
            fields = {
                name: torch.nn.utils.rnn.pad_sequence([self._rows[spec][name] for spec in specs], batch_first=True)
                for name in FIELDS
            }
            names = sorted({spec.task for spec in specs})
            tasks = torch.tensor([names.index(spec.task) for spec in specs])
            rows = [torch.where(tasks == number)[0] for number in range(len(names))]
            instructions = tuple(self._instructions[spec] for spec in specs)
            self._stacked = Batch(**fields, tasks=tasks, instructions=instructions), rows
        return self._stacked

    def state_statistics(self) -> Statistics:
        """Of proprioception over all chunks."""
        everything, _ = self.stack()
        return Statistics.fit(everything.states, everything.mask)

    def draw(self, generator: torch.Generator) -> Batch:
        """`episodes_per_step` episodes of each of `tasks_per_step` tasks: the negatives of a scene are scenes of its task."""
        everything, by_task = self.stack()
        chosen = torch.randperm(len(by_task), generator=generator)[: self._settings.tasks_per_step].tolist()
        wanted = self._settings.episodes_per_step
        picked = torch.cat([by_task[t][torch.randperm(len(by_task[t]), generator=generator)[:wanted]] for t in chosen])
        length = max([1, *(everything.mask[picked].any(0).nonzero()[:, 0] + 1).tolist()])
        cut = {name: getattr(everything, name)[picked, :length] for name in FIELDS}
        instructions = tuple(everything.instructions[i] for i in picked.tolist())
        return Batch(**cut, tasks=everything.tasks[picked], instructions=instructions)


# --- learning -------------------------------------------------------------------------------------------------------------


class Learner:
    """The residual policy, its optimiser and all random numbers of Stage 2. version: rounds trained; consumed: episodes seen.

    Equal adapters, settings, seed and data give equal bits, also across `checkpoint` and `restore` in the middle of a round.
    device: where the residual is trained; data, random numbers, bundles and checkpoints stay on the CPU, so that a job begun on
    a GPU goes on without one. Bits are equal on one kind of device only. instructions: of the tasks that it was trained on.
    """

    def __init__(
        self,
        adapters: Adapters,
        settings: Stage2Settings,
        seed: int,
        state_size: int = 4,
        latent_shape: tuple[int, int, int] = (16, 8, 16),
        device: Device = "cpu",
    ) -> None:
        self.adapters, self.settings, self.device = adapters, settings, device_of(device)
        shown = settings.vision, settings.instruction
        residual = ResidualSettings(state_size, latent_shape, *shown, settings.bound, settings.width)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policy = ResidualPolicy.from_adapters(residual, adapters).to(self.device)
        self.optimiser = settings.optimiser.build(self.policy.parameters())
        self.generator = torch.Generator().manual_seed(seed)
        self.version = 0
        self.consumed: set[str] = set()
        self.instructions: tuple[str, ...] = ()
        self.step_in_round = 0
        self.total_steps = 0

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Terms by name and their weighted sum as "loss", with the noise of the settings. No target, no part."""
        batch = batch.to(self.device)
        settings, mask = self.settings, batch.mask
        visual, states = batch.visual[mask], batch.states[mask]
        if settings.latent_noise and settings.vision == "latent":
            visual = visual + settings.latent_noise * self._noise(visual)
        if settings.state_noise:
            states = states + settings.state_noise * self.policy.state_std * self._noise(states)
        episodes = mask.nonzero()[:, 0].tolist()
        residual = self.policy(visual, states, batch.base[mask], [batch.instructions[i] for i in episodes])
        combined = batch.base.masked_scatter(mask[..., None, None], batch.base[mask] + residual)
        e_a = self.policy.action_adapter(combined)
        cosine = objectives.positive_cosine(batch.target, e_a, mask)
        terms = {"decode": objectives.decode_loss(combined, batch.chunk, mask)}
        if settings.contrastive_weight:
            terms["contrastive"] = objectives.contrastive_loss(batch.target, e_a, mask, batch.tasks, settings.contrastive)
        if settings.cosine_weight:
            terms["cosine"] = 1.0 - cosine
        if settings.residual_penalty:
            terms["penalty"] = residual.square().mean()
        weights = {
            "decode": settings.decode_weight,
            "contrastive": settings.contrastive_weight,
            "cosine": settings.cosine_weight,
            "penalty": settings.residual_penalty,
        }
        return {
            **terms,
            "loss": torch.stack([weights[name] * term for name, term in terms.items()]).sum(),
            "positive_cosine": cosine,
            "residual_norm": residual.detach().square().mean().sqrt(),
        }

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like)

    def step(self, batch: Batch, steps: int) -> Metrics:
        """One update, the next of a round of `steps`. Returns losses, cosine of positives (Fig. 5a), residual norm."""
        terms = self.losses(batch)
        self.settings.optimiser.update(self.optimiser, terms["loss"], self.step_in_round, steps)
        self.step_in_round += 1
        self.total_steps += 1
        values = torch.stack([value.detach() for value in terms.values()]).tolist()
        return dict(zip(terms, values, strict=True))

    def train_round(self, data: Stage2Dataset, steps: int, on_step: Callable[[Metrics], None] | None = None) -> list[Metrics]:
        """Train on `data` until the round has `steps` steps (a resumed learner goes on where it stopped); raises `version`."""
        if self.total_steps == 0:
            statistics = data.state_statistics()
            self.policy.set_state_statistics(statistics.mean, statistics.std)
        history = []
        while self.step_in_round < steps:
            history.append(self.step(data.draw(self.generator), steps))
            if on_step:
                on_step(history[-1])
        self.consumed |= data.keys
        self.instructions = data.instructions
        self.version += 1
        self.step_in_round = 0
        return history

    def bundle(self, base_hash: str, layout: ActionLayout | None = None) -> Bundle:
        """The present policy as a bundle of version `version` (a copy: further training does not change it)."""
        origin = Origin(base_hash, self.adapters.worldmodel_hash, self.adapters.hash)
        policy = copy.deepcopy(self.policy).cpu().eval().requires_grad_(False)
        card = {"settings": asdict(self.settings), "steps": self.total_steps, "episodes": len(self.consumed)}
        settings, actions = self.adapters.settings, self.adapters.actions
        shape, instructions = layout or ActionLayout(), self.instructions
        return Bundle(policy, settings, actions, shape, origin, self.version, card, instructions=instructions)

    def checkpoint(self, path: Path | str) -> str:
        """Write weights, optimiser, random state and counters to one safetensors file; returns its hash."""
        tensors = {f"policy.{name}": value for name, value in self.policy.state_dict().items()}
        tensors["generator"] = self.generator.get_state()
        for number, slots in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{name}": torch.as_tensor(value) for name, value in slots.items()}
        counters = {
            "version": self.version,
            "step_in_round": self.step_in_round,
            "total_steps": self.total_steps,
            "consumed": sorted(self.consumed),
            "instructions": self.instructions,
        }
        return store.write(path, tensors, {"kind": CHECKPOINT, "identity": self._identity(), "counters": counters})

    def _identity(self) -> dict[str, Any]:
        return {
            "settings": json.loads(json.dumps(asdict(self.settings))),
            "residual": json.loads(json.dumps(asdict(self.policy.settings))),
            "adapters": self.adapters.hash,
        }

    def resume(self, path: Path | str) -> None:
        """Take over the state of a checkpoint. Raises WeightsError if it was made with other settings or adapters."""
        tensors, metadata, _ = store.read(path, CHECKPOINT)
        for name, value in self._identity().items():
            if metadata["identity"].get(name) != value:
                raise store.WeightsError(f"{path}: the checkpoint was made with other {name}; start this job anew")
        self.policy.load_state_dict({k.removeprefix("policy."): v for k, v in tensors.items() if k.startswith("policy.")})
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimiser."):
                _, number, name = key.split(".")
                state.setdefault(int(number), {})[name] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.generator.set_state(tensors["generator"])
        counters = metadata["counters"]
        self.version, self.step_in_round = counters["version"], counters["step_in_round"]
        self.total_steps, self.consumed = counters["total_steps"], set(counters["consumed"])
        self.instructions = tuple(counters.get("instructions", ()))  # checkpoints made before it was kept have none


# --- the whole, in one process --------------------------------------------------------------------------------------------

Execute = Callable[[Sequence[EpisodeSpec], Learner], Iterable[Trajectory]]
"""Executes a round's episodes with the learner's present policy; one trajectory per spec, in order."""


def post_train(
    specs: Sequence[EpisodeSpec],
    execute: Execute,
    imagine: Callable[[Trajectory], Targets],
    learner: Learner,
    data: Stage2Dataset,
    on_step: Callable[[Metrics], None] | None = None,
) -> list[list[Metrics]]:
    """Serial Stage 2: per round execute, imagine, train on everything so far. Returns the metrics of every step by round."""
    history = []
    for number, members in rounds(specs):
        for spec, trajectory in zip(members, execute(members, learner), strict=True):
            data.add(spec, trajectory, imagine(trajectory))
        history.append(learner.train_round(data, steps_of(number, learner.settings), on_step))
    return history
