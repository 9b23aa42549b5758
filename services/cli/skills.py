"""`world2act build-skills`: demonstrations of any origin in, a data set of skills out, with what segmentation did to them.

    <out>/clips/           the authors' layout, one mp4 a skill, demonstrations numbered through the source (--formats clips)
    <out>/lerobot/         LeRobot v3, skills as subtasks                (--formats lerobot)
    <out>/episodes.jsonl   one line an episode: its skills, or why it has none
    <out>/summary.json     counts, synchronisation rate, discard reasons, scores
    <out>/index.html       all of it on one page, with the figure of lengths and the contact sheet (also as PNG)

Everything grows in <out>.partial, which takes the final name when it is whole. episodes.jsonl is the journal: what is in it is
done, and --resume goes on after it. Episodes are cut in parallel (world2act/skillset.py); LeRobot's files hold many episodes
each, so one process writes those. Nothing of the data set is kept in memory but keys and lengths.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from services.runtime.artifacts import ArtifactStore
from services.runtime.llm import LLMSettings, make_asker
from services.runtime.pool import default_workers, in_order
from world2act import skillset
from world2act.console import terminal
from world2act.data.clip_folder import ClipFolderWriter
from world2act.data.formats import FormatError, Source, open_source
from world2act.data.robomimic import RobomimicSource
from world2act.segmentation import Segmentation, summarise
from world2act.segmentation.comparison import METHODS, MODEL
from world2act.segmentation.llm import LLMAligner, LLMPlanner
from world2act.segmentation.scoring import Score
from world2act.skillset import Model, Recipe, Record
from world2act.splits import Split

EPISODES, SUMMARY, BEGUN = "episodes.jsonl", "summary.json", "begun.json"
LISTED = 200
"""Skipped episodes that the summary names; the journal has all."""
NO_MODEL = "not run: no endpoint"


@dataclass
class BuildSettings:
    """Cut demonstrations into a data set of skills, in parallel."""

    source: Path
    """A file or folder: LIBERO or RoboCasa HDF5, LeRobot v2 or v3, the authors' clips, our own."""
    out: Path
    """Folder to make."""
    split: tyro.conf.EnumChoicesFromValues[Split] | None = None
    """What the data may be used for. Our own files say it, and of several splits this one is taken; of others you must say it."""
    source_format: str | None = None
    """By default the format is detected."""
    gripper: tuple[int, ...] = ()
    """LeRobot: columns of the state whose absolute values add up to the gripper's width in metres; else as the data says."""
    mirrored: bool = False
    """LeRobot: mirror the images left to right, as the public conversions of LIBERO need it."""
    formats: tuple[Literal["clips", "lerobot"], ...] = ("clips",)
    """What to write: the authors' clip folder, LeRobot v3, both; none: only look."""
    embodiment: str | None = None
    """Whose gripper calibration to use (schemas.json); by default that of the source's robot."""
    cue: skillset.Cue = "gripper"
    """visual: cut episodes without gripper widths where their film changes, instead of discarding them."""
    planner: Literal["rule", "llm"] = "rule"
    """llm: plan and align by the language model of W2A_LLM_*."""
    score: bool = False
    """Score segmentations against the truth, in sources that carry it; with a language model too, if one is configured."""
    tolerances: tuple[int, ...] = (4, 8)
    """Frames by which a boundary may be off."""
    language: bool = True
    """LeRobot: with language columns, as version 0.6 reads them; 0.4 cannot open those."""
    workers: int = field(default_factory=default_workers)
    """Processes. A language model's budget belongs to one process: with one there is one."""
    limit: int | None = None
    """Take only that many episodes, the first."""
    resume: bool = False
    """Go on where an earlier run stopped."""


def asked_model(settings: BuildSettings) -> str | None:
    """Name of the language model that this run asks, None if it asks none."""
    model = LLMSettings()
    return model.llm_model if settings.planner == "llm" or (settings.score and model.llm_configured) else None


def make_model() -> Model:
    """Planner and aligner of the configured language model."""
    settings = LLMSettings()
    asker, _ = make_asker(settings, ArtifactStore(settings.artifacts_url))
    asker = replace(asker, refused={})  # episodes of one task share a question
    return LLMPlanner(asker), LLMAligner(asker)


def start_cutting(
    source: Source, recipe: Recipe, numbers: dict[str, int], options: dict[str, Any], model: Callable[[], Model] | None
) -> Callable[[str], Record]:
    """What a worker process does with a key. numbers: each key's place in the source."""
    planned = model() if model else None
    return lambda key: skillset.cut(source, key, recipe, number=numbers[key], model=planned, **options)


def check(settings: BuildSettings) -> None:
    """Raise ValueError naming the option that makes no sense."""
    for name, value, low, high in (
        ("workers", settings.workers, 1, 256),
        ("limit", settings.limit, 1, 10**9),
        *(("tolerances", t, 0, 1000) for t in settings.tolerances),
    ):
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name}: {value} is outside [{low}, {high}]")
    if not settings.tolerances:
        raise ValueError("tolerances: at least one is needed")
    if settings.planner == "llm" and not LLMSettings().llm_configured:
        raise ValueError("planner: no language model is configured (W2A_LLM_KEY or W2A_LLM_BASE_URL); use --planner rule")
    if settings.out.exists():
        raise ValueError(f"out: {settings.out.name} exists already")


def begin(settings: BuildSettings, source: Source, recipe: Recipe) -> Path:
    """The folder that grows. Raises ValueError where one is left from another run, or from this one without --resume."""
    folder = settings.out.with_name(settings.out.name + ".partial")
    about = {
        "source": source.path.name,
        "format": source.name,
        "robot": source.robot,
        "split": str(source.split or "its own"),
        "embodiment": recipe.embodiment,
        "gripper": list(settings.gripper),
        "mirrored": settings.mirrored,
        "formats": list(settings.formats),
        "cue": settings.cue,
        "planner": settings.planner,
        "model": (model := asked_model(settings)),
        "llm": LLMSettings().llm_answering if model else {},
        "score": settings.score,
        "tolerances": list(settings.tolerances),
        "limit": settings.limit,
    }
    left = folder / BEGUN
    if left.exists() and not settings.resume:
        raise ValueError(f"out: {folder.name} is left from an earlier run; --resume goes on with it, or remove it")
    if left.exists() and (before := json.loads(left.read_text(encoding="utf-8"))) != about:
        name = next(k for k in about if before.get(k) != about[k])
        raise ValueError(f"{name}: {folder.name} was begun with {before.get(name)}, now it is {about[name]}; remove it")
    folder.mkdir(parents=True, exist_ok=True)
    left.write_text(json.dumps(about), encoding="utf-8")
    return folder


def records(folder: Path) -> Iterator[Record]:
    """The journal, line by line."""
    if (folder / EPISODES).exists():
        with (folder / EPISODES).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def cut_all(settings: BuildSettings, source: Source, recipe: Recipe, folder: Path, keys: list[str], progress: Progress) -> None:
    """Every episode into the journal, and its clips beside it. Raises WorkError where the work itself fails."""
    journal = folder / EPISODES
    if journal.exists():  # its last line may have been cut short by a kill
        whole = journal.read_bytes()
        journal.write_bytes(whole[: whole.rfind(b"\n") + 1])
    done = {record["key"] for record in records(folder)}
    left = [key for key in keys if key not in done]
    bar = progress.add_task("cut", total=len(keys), completed=len(keys) - len(left))
    clips = None
    if "clips" in settings.formats and not (folder / "clips").exists():
        clips = ClipFolderWriter(folder / "clips", names=recipe.names, fps=recipe.fps, resume=True)
    options: dict[str, Any] = {
        "cue": settings.cue,
        "images": bool(settings.formats),
        "videos": clips.videos if clips else None,
        "tolerances": settings.tolerances if settings.score else (),
        "by_model": settings.planner == "llm",
    }
    asked = asked_model(settings)
    arguments = (source, recipe, {key: n for n, key in enumerate(keys)}, options, make_model if asked else None)
    if asked:
        progress.console.print(f"asking {asked} at {LLMSettings().llm_base_url}, in one process", highlight=False)
    with journal.open("a", encoding="utf-8") as lines:
        for key, result in in_order(left, start_cutting, arguments, 1 if asked else settings.workers):
            record = result or {"key": key, "skipped": f"{key}: the process that read it died of it"}
            if clips is not None and record.get("clips") and key not in clips.written:
                clips.add(key, record["clips"])
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            progress.advance(bar)
            if "skipped" in record:
                progress.console.print(f"skipped {record['skipped']}", highlight=False, markup=False, soft_wrap=True)
    if clips is not None:
        clips.close()


def write_lerobot(settings: BuildSettings, source: Source, recipe: Recipe, folder: Path, progress: Progress) -> list[str]:
    """LeRobot v3 of the episodes that were cut; returns why some could not be written."""
    from world2act.data.lerobot_writer import LeRobotWriter

    refused: list[str] = []
    total = sum(1 for record in records(folder) if "skipped" not in record)
    bar = progress.add_task("lerobot", total=total)
    robot = recipe.embodiment or source.robot
    with LeRobotWriter(folder / "lerobot", fps=recipe.fps, robot=robot, language=settings.language, resume=True) as writer:
        for record in (r for r in records(folder) if "skipped" not in r):
            progress.advance(bar)
            segmentation = Segmentation.from_json(record["segmentation"])
            if segmentation.discarded is not None or record["key"] in writer.written:
                continue
            try:
                writer.write(record["key"], source.read(record["key"]), segmentation.skills)
            except ValueError as error:
                refused.append(f"lerobot: {record['key']}: {error}")
                progress.console.print(f"not written {refused[-1]}", highlight=False, markup=False, soft_wrap=True)
    return refused


def summary(settings: BuildSettings, folder: Path, refused: list[str], seconds: float) -> dict[str, Any]:
    """What the journal says, in numbers. JSON."""
    skipped, unscored, unknown, cues = [], 0, 0, set[str]()
    scores: dict[str, Score] = {}
    skills: Counter[str] = Counter()
    for record in records(folder):
        if "skipped" in record:
            skipped.append(record["skipped"])
            continue
        skills.update(s["prompt"] for s in record["segmentation"]["skills"])
        unscored += not record["scores"]
        unknown += bool(record["segmentation"]["skills"]) and not record["understood"]
        cues |= {cue for cue in record["cues"] if record["scores"]}
        for method, content in record["scores"].items():
            score = Score.from_json(content)
            scores[method] = scores[method] + score if method in scores else score
    read = (r for r in records(folder) if "skipped" not in r)
    statistics = summarise(Segmentation.from_json(r["segmentation"]) for r in read)
    missing = {m: NO_MODEL if m == MODEL and not asked_model(settings) else "not run: the source lacks it" for m in METHODS}
    return {
        **json.loads((folder / BEGUN).read_text(encoding="utf-8")),
        "command": "world2act build-skills " + shlex.join(sys.argv[1:]),
        "seconds": round(seconds, 1),
        "skipped": len(skipped),
        "skipped_first": [*skipped, *refused][:LISTED],
        "statistics": statistics.to_json(),
        "skills": dict(skills.most_common()),
        "unknown": unknown,
        "unscored": unscored,
        "cues_scored": sorted(cues),
        "scores": {m: scores[m].to_json() if m in scores else missing[m] for m in METHODS} if settings.score else {},
    }


def build(settings: BuildSettings, console: Console) -> dict[str, Any]:
    """The whole command; returns the summary. Raises ValueError for bad settings or sources, WorkError, OSError."""
    from services.cli import skills_page  # matplotlib

    started = time.monotonic()
    check(settings)
    given = {name: value for name in ("gripper", "mirrored") if (value := getattr(settings, name))}
    source = open_source(settings.source, split=settings.split, format=settings.source_format, **given)
    if source.split is None and isinstance(source, RobomimicSource) and len(there := sorted({*source.splits.values()})) > 1:
        raise ValueError(f"split: {source.path.name} holds episodes of {', '.join(there)}, which stay apart; name one of them")
    recipe = skillset.survey(source, settings.embodiment)
    if "lerobot" in settings.formats and recipe.calibration is None:
        raise ValueError(
            "formats: LeRobot data sets need gripper widths, this source has none; name their columns (--gripper) or write clips"
        )
    folder = begin(settings, source, recipe)
    keys = list(islice(source.keys(), settings.limit))
    columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    refused: list[str] = []
    with Progress(*columns, console=console) as progress:
        cut_all(settings, source, recipe, folder, keys, progress)
        if "lerobot" in settings.formats and not (folder / "lerobot").exists():
            refused = write_lerobot(settings, source, recipe, folder, progress)
    found = summary(settings, folder, refused, time.monotonic() - started)
    (folder / SUMMARY).write_text(json.dumps(found, indent=1), encoding="utf-8")
    skills_page.write(folder, found, source)
    (folder / BEGUN).unlink()
    folder.replace(settings.out)
    return found


def main() -> int:
    """Console entry; errors are one line and status 2."""
    settings = tyro.cli(BuildSettings, prog="world2act build-skills")
    console = Console(stderr=True)
    try:
        found = build(settings, console)
    except (FormatError, ValueError, RuntimeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the same command with --resume goes on", file=sys.stderr)
        return 2
    from services.cli import skills_page

    skills_page.show(found, terminal())
    print(settings.out / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
