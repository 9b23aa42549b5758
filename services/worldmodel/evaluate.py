"""Quality of world models on held-out clips: `world2act evaluate-worldmodel --data data/demos`.

By default the embedded Skill-WM and, if it was trained, its Base-WM (asked with the episode's instruction, as it was trained).
Always: latent and pixel error per step ahead, Frechet distance, drift across skills (quality.py). With --judge also IF and PA by
the model behind W2A_LLM_* (judge.py), the paper's protocol: 100 pick-and-place clips.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from services.runtime.artifacts import ArtifactStore
from services.runtime.llm import LLMSettings, LLMUnavailableError
from services.worldmodel import quality
from services.worldmodel.backbones import load_backbone
from services.worldmodel.judge import Judge, Verdict
from services.worldmodel.settings import WorldModelSettings
from services.worldmodel.windows import read_episodes
from world2act.splits import Split

BASE_WM = Path("data/experiments/base-wm/worldmodel.safetensors")
"""Where `world2act experiment worldmodel` keeps the embedded Base-WM."""
HOW = {
    "small": "world2act train-worldmodel --demos {data} --vae-from zoo/worldmodel.safetensors --no-segmented --out {out}",
    "other": "world2act train-worldmodel --backbone {backbone} --model BASE --data {data} --no-segmented --out {out}",
}


@dataclass(frozen=True)
class Arguments:
    """Measure world models on held-out clips."""

    data: Path
    """Demonstrations: <data>/<split>/<task>.hdf5, or anything that this project's readers know."""
    backbone: str = "small"
    skill: str = ""
    """Weights of Skill-WM: file, folder or hub id; by default W2A_BACKBONE_MODEL, or the zoo's."""
    base: str = ""
    """Weights of Base-WM; by default those of `world2act experiment worldmodel`, where they are."""
    clips: int = 100
    tasks: str = ""
    """Regular expression: clips of these tasks."""
    prompts: str = ""
    """Regular expression: clips with these prompts; 'pick|place' for the paper's."""
    split: Literal["validation", "tuning"] = "validation"
    episodes: int | None = None
    """Held-out episodes a task at most."""
    steps: int = 0
    """Denoising steps; 0: the world model's own."""
    guidance: float = 0.0
    judge: Literal["none", "binary", "graded"] = "none"
    seed: int = 0
    threads: int = 1
    json: Path | None = None
    markdown: Path | None = None

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise ValueError(f"clips: must be >= 1, got {self.clips}")


@dataclass(frozen=True)
class Row:
    """A world model and its numbers; missing: how to make it, where it is not there."""

    name: str
    values: dict[str, float]
    verdict: Verdict | None = None
    missing: str = ""
    clips: int = 0
    hash: str = ""
    seconds: float = 0.0


def measure(arguments: Arguments, name: str, model: str, by_instruction: bool, judge: Judge | None) -> Row:
    """One world model on the held-out clips."""
    began = time.perf_counter()
    values = {"backbone_model": model} if model else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = load_backbone(WorldModelSettings(backbone=arguments.backbone, **values), device)  # type: ignore[arg-type]
    episodes = list(read_episodes(arguments.data, Split(arguments.split), arguments.episodes))
    clips = quality.choose_clips(episodes, backbone, arguments.clips, arguments.seed, arguments.prompts, arguments.tasks)
    imagined = quality.imagine_clips(backbone, clips, by_instruction, arguments.steps, arguments.guidance)
    found = quality.errors(imagined, backbone.info.temporal_compression, backbone.info.active_rows)
    found |= quality.distances(imagined) | quality.drift(backbone, episodes, by_instruction)
    verdict = judge.judge(imagined) if judge else None
    return Row(name, found, verdict, "", len(clips), backbone.info.hash, round(time.perf_counter() - began, 1))


def evaluate(arguments: Arguments, judge: Judge | None) -> list[Row]:
    """Skill-WM and Base-WM. Raises ValueError, OSError, LLMUnavailableError."""
    torch.set_num_threads(arguments.threads)
    rows = [measure(arguments, "Skill-WM", arguments.skill, False, judge)]
    base = arguments.base or (str(BASE_WM) if arguments.backbone == "small" else "")
    if base and Path(base).exists():
        rows.append(measure(arguments, "Base-WM", base, True, judge))
    else:
        how = HOW["small" if arguments.backbone == "small" else "other"]
        out = base or "base-wm"
        rows.append(Row("Base-WM", {}, missing=how.format(data=arguments.data, out=out, backbone=arguments.backbone)))
    return rows


def columns(rows: list[Row]) -> list[tuple[str, list[str]]]:
    """Metric -> a cell for each row."""
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    out = [(name, [f"{row.values[name]:.3f}" if name in row.values else "-" for row in rows]) for name in names]
    for what in ("IF", "PA") if any(row.verdict for row in rows) else ():
        out.append((f"{what} (%)", [_judged(row.verdict, what) for row in rows]))
    return out


def _judged(verdict: Verdict | None, what: str) -> str:
    if verdict is None or what not in verdict.scores:
        return "-"
    interval = verdict.intervals.get(what)
    return f"{verdict.scores[what]:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def notes(rows: list[Row]) -> list[str]:
    """What stands below the table."""
    out = []
    for row in rows:
        if row.missing:
            out.append(f"{row.name}: not trained; {row.missing}")
            continue
        out.append(f"{row.name}: {row.clips} clips, weights {row.hash[:12]}, {row.seconds:g} s")
        if row.verdict and (row.verdict.unjudged or row.verdict.stopped):
            judged, lost = row.verdict.clips, row.verdict.unjudged
            out.append(f"{row.name}: judged {judged}, without an answer {lost}. {row.verdict.stopped}".rstrip())
    return [
        *out,
        "latent_at_k, pixel_at_k: squared error k latents ahead against copying the start frame, until a disturbance.",
        "frechet: 1 is as far from true clips as still images; random-weight encoder, not comparable with published FVD;",
        "frechet_floor: two halves of the true clips. second_skill_*: latent error over the second skill against copying its",
        "true first frame; chained: from the last frame imagined for the first skill.",
    ]


def markdown(rows: list[Row]) -> str:
    """The table and its notes."""
    names = [row.name for row in rows]
    lines = [f"| metric | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in columns(rows)]
    return "\n".join([*lines, "", *notes(rows)]) + "\n"


def main() -> None:
    """Command line."""
    try:
        arguments = tyro.cli(Arguments, prog="world2act evaluate-worldmodel", description=__doc__)
        judge = None
        if arguments.judge != "none":
            llm = LLMSettings()
            judge = Judge(llm, arguments.judge, ArtifactStore(llm.artifacts_url))
        rows = evaluate(arguments, judge)
    except (ValueError, OSError, LLMUnavailableError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())[:1000]}") from None
    table = Table("metric", *(row.name for row in rows), title=f"World models on held-out clips ({arguments.split})")
    for name, cells in columns(rows):
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    for line in [*notes(rows), *([f"judge: {judge.used()}"] if judge else [])]:
        console.print(line, highlight=False, soft_wrap=True)
    if arguments.json:
        content: list[dict[str, Any]] = [{**vars(row), "verdict": row.verdict and vars(row.verdict)} for row in rows]
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    if arguments.markdown:
        command = shlex.join(["world2act", "evaluate-worldmodel", *sys.argv[1:]])
        head = f"# World models on held-out clips\n\nWritten by `{command}`; not edited by hand.\n\n"
        arguments.markdown.write_text(head + markdown(rows))


if __name__ == "__main__":
    main()
