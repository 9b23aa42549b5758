"""Stage 1: align video dynamics and actions in one latent space, with the world model frozen (METHOD section 3).

    python -m world2act.stage1 --demos DIR --worldmodel FILE --out FILE [--preset default|paper] [--seed 0]

Latents are a pure function of (weights, clip, prompt, seed): `build_data` computes them once, `train` reads them from memory.
The video window and the action window of a pair are cut by the same indices: latent k with chunk k - 1.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from world2act import objectives
from world2act.console import command_line
from world2act.data.clips import cut_clips
from world2act.data.robomimic import read_root
from world2act.models.adapters import Adapters
from world2act.normalisation import Statistics
from world2act.presets import STAGE1, Preset, Stage1Settings
from world2act.splits import Split
from world2act.types import Clip, M, chunk_of_latent

Progress = Callable[[int, int, dict[str, float]], None]
"""Called with (step, steps, metrics of that step)."""

RETRIEVAL = 16
"""Retrieval picks the true action sequence out of this many; chance is 1 / 16."""


class VideoModel(Protocol):
    """What Stage 1 needs of a world model (world2act.models.worldmodel.WorldModel has it)."""

    @property
    def hash(self) -> str: ...

    def encode(self, frames: Tensor) -> Tensor: ...

    def imagine(self, start: Tensor, prompts: Sequence[str], horizon: int, seeds: Sequence[int]) -> Tensor: ...

    def denoise_once(self, frames: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True)
class Stage1Data:
    """Cached clips, padded to one length K = 1 + chunks.

    true, predicted: float16 (N, K, C, h, w) latents of the encoded video and of the world model; actions: (N, K-1, M, A) in the
    simulator's units; mask: bool (N, K-1), False where padded; intended: bool (N, K-1), inside mask, False where a disturbance
    acted, which true latents show and predicted ones do not; tasks, skills: int (N,), equal for clips of one task, prompt.
    """

    true: Tensor
    predicted: Tensor
    actions: Tensor
    mask: Tensor
    intended: Tensor
    tasks: Tensor
    skills: Tensor
    task_names: tuple[str, ...]
    worldmodel_hash: str

    def __len__(self) -> int:
        return len(self.true)

    def rows(self, which: slice | Tensor) -> Stage1Data:
        """Some of the clips; numbers int64 (B,) may name one more than once."""
        per_clip = ("true", "predicted", "actions", "mask", "intended", "tasks", "skills")
        return replace(self, **{name: getattr(self, name)[which] for name in per_clip})

    def pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Views aligned by pair: true, predicted (N, K-1, C, h, w), actions (N, K-1, M, A), mask, intended (N, K-1)."""
        chunks = [chunk_of_latent(k) for k in range(1, self.true.shape[1])]
        labels = (self.actions, self.mask, self.intended)
        # A slice of the latents: a list of indices would copy all of them at every step, most of a training's time.
        return self.true[:, 1:], self.predicted[:, 1:], *(x[:, chunks] for x in labels)  # type: ignore[return-value]


@dataclass(frozen=True)
class Batch:
    """latents (B, W, C, h, w), normalised actions (B, W, M, A), mask bool (B, W): pairs, already aligned."""

    latents: Tensor
    actions: Tensor
    mask: Tensor


# --- data -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def build_data(model: VideoModel, clips: Iterable[Clip], horizon: int, seed: int, one_step: bool = False) -> Stage1Data:
    """Encode every clip, and let the world model predict each of its latents from a real frame at most `horizon` before it.

    one_step: predicted latents are the noised true ones, denoised in one step (METHOD section 3, the authors' code), instead.

    Start frames lie `horizon` chunks apart with a random phase per clip (frame 0 first); horizon 0: frame 0 alone, the whole
    clip. Clips are read one at a time; only latents stay. Raises ValueError when there is none or their sizes differ.
    """
    kept: list[Clip] = []  # without their frames
    true: list[Tensor] = []
    predicted: list[Tensor] = []
    rng = np.random.default_rng(seed)
    for clip in clips:
        shape = (kept or [clip])[0].actions.shape[1:]
        n = len(clip.actions)
        if clip.actions.shape[1:] != shape or len(clip.frames) != 1 + M * n:
            raise ValueError(
                f"clips: scene {clip.index} of {clip.task} has actions {clip.actions.shape} and {len(clip.frames)} frames; "
                f"expected actions (n, {shape[0]}, {shape[1]}) and 1 + {M} n frames"
            )
        true.append(model.encode(torch.from_numpy(clip.frames)[None])[0])
        starts = sorted({0, *range(int(rng.integers(horizon)), n, horizon)}) if horizon else [0]
        draw = seed * 1_000_003 + len(kept) * 1009
        if one_step:
            predicted.append(model.denoise_once(torch.from_numpy(clip.frames)[None], [clip.prompt], [draw])[0])
        else:
            predicted.append(_predict(model, clip, true[-1], starts, draw))
        kept.append(replace(clip, frames=clip.frames[:0].copy()))  # a view would keep the whole film
    if not kept:
        raise ValueError("clips: need at least one")
    return _assemble(model.hash, kept, true, predicted)


def _predict(model: VideoModel, clip: Clip, true: Tensor, starts: list[int], seed: int) -> Tensor:
    """Latents (1 + n, C, h, w): each start's prediction up to the next start; latent 0 is the encoded first frame."""
    out = true.clone()
    spans: dict[int, list[int]] = {}  # latents ahead -> starts
    for start, end in zip(starts, [*starts[1:], len(clip.actions)], strict=True):
        spans.setdefault(end - start, []).append(start)
    for ahead, rows in spans.items():
        frames = torch.from_numpy(clip.frames[[M * start for start in rows]])
        latents = model.imagine(frames, [clip.prompt] * len(rows), ahead, [seed + start for start in rows])
        for start, latent in zip(rows, latents, strict=True):
            out[start + 1 : start + 1 + ahead] = latent[1:]
    return out


def _assemble(worldmodel_hash: str, clips: list[Clip], true: list[Tensor], predicted: list[Tensor]) -> Stage1Data:
    padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    tasks, prompts = sorted({c.task for c in clips}), sorted({c.prompt for c in clips})
    return Stage1Data(
        true=padded(true).half(),
        predicted=padded(predicted).half(),
        actions=padded([torch.from_numpy(c.actions) for c in clips]),
        mask=padded([torch.ones(len(c.actions), dtype=torch.bool) for c in clips]),
        intended=padded([torch.from_numpy(c.intended) for c in clips]),
        tasks=torch.tensor([tasks.index(c.task) for c in clips]),
        skills=torch.tensor([prompts.index(c.prompt) for c in clips]),
        task_names=tuple(tasks),
        worldmodel_hash=worldmodel_hash,
    )


def name_actions(read: Callable[[Tensor], Tensor], data: Stage1Data, keep: slice = slice(0)) -> Stage1Data:
    """`data` with `read`(true latents (N, K-1, C, h, w)) in place of its actions, but for the clips in `keep`: pseudo-actions."""
    actions = read(data.pairs()[0])
    actions[keep] = data.actions[keep]
    return replace(data, actions=actions)


# --- batches --------------------------------------------------------------------------------------------------------------


def draw_clips(skills: Tensor, batch: int, hard_ratio: float, generator: torch.Generator) -> Tensor:
    """Rows of a batch: ceil(hard_ratio * batch) of one skill, hard negatives of each other; the rest of other skills (easy).

    Without replacement where the skills have enough clips.
    """
    anchor = skills[torch.randint(len(skills), (), generator=generator)]
    hard, easy = torch.where(skills == anchor)[0], torch.where(skills != anchor)[0]
    wanted = batch if len(easy) == 0 else max(1, int(np.ceil(hard_ratio * batch)))
    return torch.cat([_choose(hard, wanted, generator), _choose(easy, batch - wanted, generator)])


def _choose(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if count <= len(rows):
        return rows[torch.randperm(len(rows), generator=generator)[:count]]
    return rows[torch.randint(len(rows), (count,), generator=generator)]


def draw_batch(data: Stage1Data, actions: Statistics, settings: Stage1Settings, generator: torch.Generator) -> Batch:
    """Clips, then one window per clip (same indices for latents and actions), then true or predicted latents per clip."""
    rows = draw_clips(data.skills, settings.batch, settings.hard_ratio, generator)
    true, predicted, chunks, mask, intended = data.pairs()
    lengths = mask[rows].sum(1)
    window = min(settings.window, int(lengths.max()))
    random = torch.rand(2, len(rows), generator=generator)
    latest = (lengths - window).clamp_min(0)
    start = torch.where(random[0] < settings.random_start, (torch.rand(len(rows), generator=generator) * (latest + 1)).long(), 0)
    index = start[:, None] + torch.arange(window)
    # What nobody intended, no model predicts: a clip without an intended chunk shows its true latents.
    from_model = (torch.rand(len(rows), generator=generator) < settings.predicted_share) & intended[rows].any(1)
    picked = torch.where(
        from_model[:, None, None, None, None], predicted[rows[:, None], index], true[rows[:, None], index]
    ).float()
    if settings.latent_noise:
        picked = picked + settings.latent_noise * torch.randn(picked.shape, generator=generator)
    valid = torch.where(from_model[:, None], intended[rows[:, None], index], mask[rows[:, None], index])
    return Batch(picked, actions.normalise(chunks[rows[:, None], index]), valid)


# --- training -------------------------------------------------------------------------------------------------------------


def losses(adapters: Adapters, batch: Batch, settings: Stage1Settings, generator: torch.Generator) -> dict[str, Tensor]:
    """Every term by name, and their weighted sum as "loss". Padded pairs take no part."""
    weights, mask = settings.weights, batch.mask
    actions = torch.where(mask[..., None, None], batch.actions, 0.0)
    e_v = adapters.video(torch.where(mask[..., None, None, None], batch.latents, 0.0))
    e_a = adapters.action(actions)
    noise = torch.randn(actions.shape, generator=generator) * settings.action_noise
    terms: dict[str, Tensor] = {"action": objectives.decode_loss(adapters.decoder(e_a), actions, mask)}
    if weights.video:
        terms["video"] = objectives.decode_loss(adapters.decoder(e_v), actions, mask)
    if weights.noisy:
        noisy = actions + noise
        terms["noisy"] = objectives.decode_loss(adapters.decoder(adapters.action(noisy)), noisy, mask)
    everyone = torch.zeros(len(mask), dtype=torch.long)
    terms["contrastive"] = objectives.contrastive_loss(e_v, e_a, mask, everyone, settings.contrastive)
    cosine = objectives.positive_cosine(e_v, e_a, mask)
    terms["cosine"] = 1.0 - cosine
    total = torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
    return {**terms, "positive_cosine": cosine, "loss": total}


def train(
    data: Stage1Data, settings: Stage1Settings, seed: int, progress: Progress | None = None
) -> tuple[Adapters, list[dict[str, float]]]:
    """Adapters trained on cached latents, and the metrics of every step. Equal data, settings and seed give equal weights.

    How many channels latents have and how long actions are is the data's to say, not the settings'.
    """
    generator = torch.Generator().manual_seed(seed)
    statistics = Statistics.fit(data.actions, data.mask)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shapes = replace(settings.adapters, channels=data.true.shape[2], action_size=data.actions.shape[-1])
        adapters = Adapters(shapes, statistics, data.worldmodel_hash)
    optimiser = settings.optimiser.build(adapters.parameters())
    history: list[dict[str, float]] = []
    for step in range(settings.steps):
        batch = draw_batch(data, statistics, settings, generator)
        terms = losses(adapters, batch, settings, generator)
        settings.optimiser.update(optimiser, terms["loss"], step, settings.steps)
        history.append({name: float(term.detach()) for name, term in terms.items()})
        if progress:
            progress(step + 1, settings.steps, history[-1])
    return adapters.eval().requires_grad_(False), history


# --- held-out metrics -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(adapters: Adapters, data: Stage1Data, seed: int = 0) -> dict[str, float]:
    """Held-out metrics, for encoded video (_true) and for the world model's latents (_predicted).

    retrieval: how often a clip's own action sequence is the most similar of 16 (chance 1/16); retrieval_same_task: the other 15
    from the same task; cosine of true pairs; r2 of D_a(E_v), over all and the mean of each task's own.
    """
    true, predicted, chunks, executed, intended = data.pairs()
    actions = adapters.actions.normalise(chunks)
    e_a = adapters.action(actions)
    out = {"retrieval_chance": 1 / RETRIEVAL, "r2_action": objectives.r2(adapters.decoder(e_a), actions, executed)}
    for name, latents, mask in (("true", true, executed), ("predicted", predicted, intended)):
        e_v = torch.cat([adapters.video(part.float()) for part in torch.split(latents, 64)])
        scores = objectives.similarity(e_v, e_a, mask, mask)
        decoded = adapters.decoder(e_v)
        per_task = [
            objectives.r2(decoded[data.tasks == t], actions[data.tasks == t], mask[data.tasks == t])
            for t in range(len(data.task_names))
        ]
        out |= {
            f"retrieval_{name}": retrieval(scores, torch.zeros_like(data.tasks), seed),
            f"retrieval_same_task_{name}": retrieval(scores, data.tasks, seed),
            f"cosine_{name}": float(objectives.positive_cosine(e_v, e_a, mask)),
            f"r2_{name}": objectives.r2(decoded, actions, mask),
            f"r2_per_task_{name}": float(np.mean(per_task)),
        }
    return out


def unmeasured(clips: int) -> str:
    """What is said where `clips` held-out clips are too few for `retrieval`; empty where they are enough."""
    return f"retrieval needs {RETRIEVAL} held-out clips, there are {clips}" if clips < RETRIEVAL else ""


def retrieval(scores: Tensor, groups: Tensor, seed: int, draws: int = 20) -> float:
    """Mean top-1 of row i among itself and 15 random rows of its group, `draws` times per row. nan without a group of 16."""
    generator = torch.Generator().manual_seed(seed)
    hits: list[bool] = []
    for row in range(len(scores)):
        others = torch.where(groups == groups[row])[0]
        others = others[others != row]
        if len(others) >= RETRIEVAL - 1:
            for _ in range(draws):
                rivals = others[torch.randperm(len(others), generator=generator)[: RETRIEVAL - 1]]
                hits.append(bool(scores[row, row] > scores[row, rivals].max()))
    return float(np.mean(hits)) if hits else float("nan")


# --- command --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arguments:
    """Train the adapters on demonstrations (split worldmodel) and measure them on held-out ones (split validation).

    On a large world model: world2act stage1 --backbone NAME --help (there --data, not --demos).
    """

    demos: Path
    """Folder of demonstrations: <demos>/<split>/<task>.hdf5."""
    worldmodel: Path
    """World-model weights; the adapters will refuse any other."""
    out: Path
    """Where the adapters go."""
    preset: Preset = "default"
    seed: int = 0
    episodes: int = 0
    """Demonstrations per task and split at most; 0: all."""
    steps: int = 0
    """Training steps; 0: the preset's."""
    threads: int = 1
    """CPU threads."""


def read_clips(root: Path, split: Split, per_task: int = 0, phases: int = 1) -> Iterator[Clip]:
    """Skill clips of the demonstrations of `split` under `root`; of at most `per_task` episodes a task (0: all)."""
    seen: Counter[str] = Counter()
    for episode in read_root(root, allowed=[split]):
        seen[episode.task] += 1
        if not per_task or seen[episode.task] <= per_task:
            yield from cut_clips(episode, phases=range(0, M, max(1, M // phases)))


def run(arguments: Arguments, progress: Progress | None = None) -> dict[str, Any]:
    """The command as a function: data, training, metrics, file. Returns the card."""
    from world2act.models.worldmodel import (
        WorldModel,  # diffusers takes seconds to import; the rest of this file needs none of it
    )

    settings, seed = STAGE1[arguments.preset], arguments.seed
    settings = replace(settings, steps=arguments.steps or settings.steps)
    began = time.perf_counter()
    model = WorldModel.load(arguments.worldmodel)
    data, held_out = (
        build_data(model, read_clips(arguments.demos, split, arguments.episodes, phases), settings.horizon, seed)
        for split, phases in ((Split.WORLDMODEL, settings.phases), (Split.VALIDATION, 1))
    )
    built = time.perf_counter()
    adapters, history = train(data, settings, seed, progress)
    card = {
        "what": "Stage 1 adapters: E_v, E_a, D_a (METHOD section 3)",
        "data": f"{len(data)} skill clips of split worldmodel; metrics on {len(held_out)} of split validation",
        "command": command_line("world2act stage1", arguments),
        "seed": seed,
        "threads": arguments.threads,
        "settings": asdict(replace(settings, adapters=adapters.settings)),
        "metrics": evaluate(adapters, held_out),
        "note": unmeasured(len(held_out)),
        "history": [{"step": i, **{k: round(v, 5) for k, v in history[i].items()}} for i in range(0, len(history), 20)],
        "seconds": {"latents": round(built - began, 1), "training": round(time.perf_counter() - built, 1)},
    }
    digest = adapters.save(arguments.out, card)
    arguments.out.with_suffix(".md").write_text(card_text(card, digest, model.hash))
    return card


def card_text(card: dict[str, Any], digest: str, worldmodel: str) -> str:
    """The card as Markdown, for people; the weights file holds it whole."""
    lines = [
        "# Stage 1 adapters",
        "",
        "E_v (latent frame -> 32 numbers), E_a (action chunk -> 32 numbers), D_a (32 numbers -> action chunk), METHOD section 3.",
        "",
        f"- weights: sha256 `{digest}`, float32",
        f"- world model whose latents they read: sha256 `{worldmodel}`; any other is refused",
        f"- data: {card['data']}",
        f"- command: `{card['command']}`",
        f"- seconds on {card['threads']} thread(s): {card['seconds']}",
        "",
        "Held out; `true`: encoded video, `predicted`: imagined one chunk ahead from real frames. Chunks that were disturbed",
        "count with their true latents, which show it, and not with predicted ones.",
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {value:.3f} |" for name, value in card["metrics"].items()),
        "",
        *([f"nan: {card['note']}.", ""] if card["note"] else []),
        f"`retrieval_*`: a clip's own action sequence is the most similar of {RETRIEVAL}; chance {1 / RETRIEVAL:.4f}.",
        "`r2_*`: variance of normalised actions that D_a explains; `r2_action` from E_a, the others from E_v.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line; progress on standard error, the metrics on standard output."""
    import json
    import sys

    import tyro

    def show(step: int, steps: int, metrics: dict[str, float]) -> None:
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}  " + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()), file=sys.stderr, flush=True)

    arguments = tyro.cli(Arguments, prog="world2act stage1")
    torch.set_num_threads(arguments.threads)
    card = run(arguments, show)
    print(json.dumps({"metrics": card["metrics"], "seconds": card["seconds"]}, indent=2))
    if card["note"]:
        print(card["note"], file=sys.stderr)


if __name__ == "__main__":
    main()
