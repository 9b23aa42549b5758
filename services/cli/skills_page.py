"""How a skill data set is shown: in the terminal, as a page of its own, and several of them as docs/skills.md.

`world2act skills-report RUN RUN --out docs/skills.md` writes that page, its figure and its contact sheet; nobody edits them.
"""

from __future__ import annotations

import base64
import json
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from services.cli import skill_figures as figures
from services.cli.figures import svg
from services.cli.report import STYLE, table, text
from services.cli.skills import EPISODES, SUMMARY, records
from world2act.data.formats import FormatError, Source
from world2act.segmentation.comparison import MODEL
from world2act.segmentation.scoring import Score
from world2act.skillset import moments

Summary = Mapping[str, Any]

SHEET_SKILLS, SHEET_CLIPS = 10, 2
LENGTHS, SHEET, PAGE = "lengths.png", "contact-sheet.png", "index.html"
PAPER = "sync rate 96.2 % RoboCasa, 86.9 % LIBERO; density ratio +17 % RoboCasa, +72 % LIBERO"
SCORE_HEADER = ("method", "episodes", "cut", "boundary F1", "precision", "recall", "mean error", "labels right")
COUNT_HEADER = ("data", "episodes in", "skipped", "cut", "clips out", "sync rate", "median length", "density ratio")


def percent(value: float) -> str:
    """0.123 -> '12.3 %'."""
    return f"{100 * value:.1f} %"


def count_row(name: str, summary: Summary) -> list[str]:
    """A data set's row under COUNT_HEADER."""
    s = summary["statistics"]
    medians = f"{s['median_before']:g} to {s['median_after']:g}"
    counts = [f"{s['episodes'] + summary['skipped']:,}", str(summary["skipped"]), f"{s['synced']:,}", f"{s['clips']:,}"]
    return [name, *counts, percent(s["sync_rate"]), medians, f"{100 * s['density_gain']:+.0f} %"]


def score_rows(summary: Summary) -> list[list[str]]:
    """Rows under SCORE_HEADER, one a method; F1, precision and recall at each tolerance, the error at the widest."""
    rows = []
    for method, content in summary["scores"].items():
        if isinstance(content, str):
            rows.append([method, content, *[""] * (len(SCORE_HEADER) - 2)])
            continue
        score = Score.from_json(content)
        each = [" / ".join(f"{getattr(b, part):.2f}" for b in score.boundaries) for part in ("f1", "precision", "recall")]
        name = f"{method} ({summary['model']})" if method == MODEL else method
        last = (f"{score.boundaries[-1].mean_error:.1f}", percent(score.label_accuracy))
        rows.append([name, str(score.episodes), str(score.cut), *each, *last])
    return rows


def score_note(summary: Summary) -> str:
    """What the columns of scores mean, and what was scored. (Runs made before both were kept had no cues.)"""
    at = " / ".join(map(str, summary["tolerances"]))
    cues = ", ".join(summary.get("cues_scored", [])) or "none, so commands and pushes are not scored"
    asked = ""
    if isinstance(summary["scores"].get(MODEL), dict):
        kept = summary.get("llm")
        how = ", ".join(f"{name} {value}" for name, value in kept.items()) if kept else "settings not recorded"
        asked = f" {MODEL} ({summary['model']}): {how}."
    return (
        f"Boundaries within {at} frames of the simulator's truth; mean error of those within the widest, in frames; labels: "
        "share of actions with the true prompt; cut: episodes that were not discarded. "
        f"{summary['unscored']} episodes have no truth to score against. Contact cues beside widths: {cues}.{asked}"
    )


def unknown_note(summary: Summary) -> str:
    """What is said of episodes whose instructions no row of schemas.json knows; empty where there are none."""
    return f"Of {summary['unknown']:,} no schema row knows the instruction: cut by its verbs." if summary["unknown"] else ""


def show(summary: Summary, console: Console) -> None:
    """The summary in a terminal."""
    counts = Table(title=f"Skills of {summary['source']} ({summary['format']})")
    for column in COUNT_HEADER[1:]:
        counts.add_column(column, justify="right")
    counts.add_row(*count_row("", summary)[1:])
    console.print(counts)
    if note := unknown_note(summary):
        console.print(note, highlight=False)
    for reason, number in summary["statistics"]["discard_reasons"].items():
        console.print(f"discarded {number}: {reason}", highlight=False, markup=False, soft_wrap=True)
    if summary["scores"]:
        scores = Table(title="Scored", caption=score_note(summary))
        for column in SCORE_HEADER:
            scores.add_column(column)
        for row in score_rows(summary):
            scores.add_row(*row)
        console.print(scores)


def lengths_of(name: str, folder: Path) -> figures.Lengths:
    """Lengths of episodes and clips, from the journal."""
    before: list[int] = []
    after: list[int] = []
    for record in (r for r in records(folder) if "skipped" not in r):
        before.append(record["segmentation"]["length"])
        after += [s["end"] - s["start"] for s in record["segmentation"]["skills"]]
    return figures.Lengths(name, before, after)


def strips_of(folder: Path, source: Source, skills: Mapping[str, int]) -> list[figures.Strip]:
    """Some clips of the most frequent skills, each of another episode, as far as their frames can be read."""
    wanted = list(skills)[:SHEET_SKILLS]
    chosen: dict[str, list[Any]] = defaultdict(list)
    for record in (r for r in records(folder) if "skipped" not in r):
        for skill in record["segmentation"]["skills"]:
            of = chosen[skill["prompt"]]
            if skill["prompt"] in wanted and len(of) < SHEET_CLIPS and not any(key == record["key"] for key, *_ in of):
                of.append((record["key"], skill["start"], skill["end"]))
    strips = []
    for prompt in wanted:
        shown = []
        for key, start, end in chosen[prompt]:
            try:
                shown.append(moments(source, key, start, end))
            except FormatError:
                continue
        if shown:
            strips.append(figures.Strip(prompt, shown))
    return strips


def write(folder: Path, summary: Summary, source: Source) -> None:
    """index.html, and its two figures as PNG."""
    data = lengths_of(f"{summary['source']} ({summary['format']})", folder)
    (folder / LENGTHS).write_bytes(figures.png(figures.lengths([data])))
    strips = strips_of(folder, source, summary["skills"])
    if strips:
        (folder / SHEET).write_bytes(figures.png(figures.contact_sheet(strips)))
    (folder / PAGE).write_text(page(folder, summary, data), encoding="utf-8")


def page(folder: Path, summary: Summary, data: figures.Lengths) -> str:
    """The page: nothing in it is loaded from elsewhere."""
    s = summary["statistics"]
    numbers = frozenset(range(1, len(COUNT_HEADER)))
    lead = (
        f"{s['synced']:,} of {s['episodes']:,} episodes were cut into {s['clips']:,} skills: synchronisation rate "
        f"{percent(s['sync_rate'])}. {unknown_note(summary)} {summary['skipped']} could not be read. Paper: {PAPER}."
    )
    parts = [
        f"<section><p class=big>{text(lead)}</p>{table(COUNT_HEADER, [count_row(summary['source'], summary)], numbers)}"
        f"<p class=lead>Planner {text(summary['planner'])}, cue {text(summary['cue'])}, gripper {text(summary['embodiment'])}; "
        f"{summary['seconds']} s.</p><pre>{text(summary['command'])}</pre></section>",
        f"<section><h2>Lengths</h2><p class=lead>Density of lengths, before and after; the ratio is that of the densities at the "
        f"two medians, less one.</p>{svg(figures.lengths([data]))}</section>",
    ]
    if summary["scores"]:
        scores = table(SCORE_HEADER, score_rows(summary))
        parts.append(f"<section><h2>Scored</h2><p class=lead>{text(score_note(summary))}</p>{scores}</section>")
    if (folder / SHEET).exists():
        picture = base64.b64encode((folder / SHEET).read_bytes()).decode()
        lead = "First, middle and last frame of some clips of the most frequent skills."
        parts.append(
            f'<section><h2>Contact sheet</h2><p class=lead>{lead}</p><img alt="skills" style="max-width:100%" '
            f'src="data:image/png;base64,{picture}"></section>'
        )
    rates = [[task, percent(rate)] for task, rate in s["sync_rate_by_task"].items()]
    parts.append(f"<section><h2>Tasks</h2>{table(['task', 'sync rate'], rates, frozenset({1}))}</section>")
    reasons = [[reason, number] for reason, number in s["discard_reasons"].items()]
    skills = [[prompt, number] for prompt, number in summary["skills"].items()]
    for title, header, rows in (
        ("Discarded", ["why", "episodes"], reasons),
        ("Not read", ["why"], [[why] for why in summary["skipped_first"]]),
        ("Skills", ["prompt", "clips"], skills),
    ):
        if rows:
            parts.append(f"<section><h2>{title}</h2>{table(header, rows, frozenset({1}))}</section>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Skills of {text(summary['source'])}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>Skills of {text(summary['source'])}</h1>{''.join(parts)}</main></body></html>\n"
    )


@dataclass
class ReportSettings:
    """Gather skill data sets that build-skills made into one page for the documentation."""

    runs: Positional[tuple[Path, ...]]
    """Folders that build-skills made; each is named by its folder."""
    out: Path = Path("docs/skills.md")
    """Page to write; its pictures stand beside it."""
    note: tuple[str, ...] = ()
    """What a reader must know about the data, a paragraph each."""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(settings: ReportSettings) -> None:
    """Write the page and its pictures. Raises ValueError naming a folder that build-skills did not make."""
    summaries: dict[str, Summary] = {}
    for folder in settings.runs:
        if not (folder / SUMMARY).is_file() or not (folder / EPISODES).is_file():
            raise ValueError(f"runs: {folder.name} holds no {SUMMARY}; build-skills makes it")
        summaries[folder.name] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    if not summaries:
        raise ValueError("runs: at least one folder that build-skills made is needed")
    stem = settings.out.with_suffix("").name
    pictures = {
        f"{stem}-lengths.png": figures.png(figures.lengths([lengths_of(f.name, f) for f in settings.runs])),
        **{f"{stem}-{f.name}.png": (f / SHEET).read_bytes() for f in settings.runs if (f / SHEET).exists()},
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        settings.out.with_name(name).write_bytes(data)
    settings.out.write_text(report_page(stem, summaries, settings, [*pictures][1:]), encoding="utf-8")


def report_page(stem: str, summaries: Mapping[str, Summary], settings: ReportSettings, sheets: Sequence[str]) -> str:
    """docs/skills.md."""
    reasons: Counter[str] = Counter()
    for summary in summaries.values():
        reasons.update(summary["statistics"]["discard_reasons"])
    command = f"world2act skills-report {shlex.join(sys.argv[1:])}"
    parts = [
        "# Skill data sets",
        f"Written by the command below out of what `world2act build-skills` left; not edited by hand. Paper: {PAPER}.",
        f"```\n{chr(10).join([*(s['command'] for s in summaries.values()), command])}\n```",
        *settings.note,
        markdown(COUNT_HEADER, [count_row(name, summary) for name, summary in summaries.items()]),
        "Lengths in actions. The ratio compares the densities of clip and episode lengths, each at its own median (Gaussian "
        "kernel of one chunk). Where tasks are cut into a short and a long skill, the median of clips lies between the two.",
        f"![Lengths before and after]({stem}-lengths.png)",
        "Discarded: " + ("; ".join(f"{n} x {reason}" for reason, n in reasons.most_common()) or "none") + ".",
        "## Scored against the simulator",
    ]
    scored = {name: summary for name, summary in summaries.items() if summary["scores"]}
    for name, summary in scored.items():
        parts += [f"**{name}.** {score_note(summary)}", markdown(SCORE_HEADER, score_rows(summary))]
    if not scored:
        parts.append("No run was scored (`build-skills --score`).")
    parts += ["## Contact sheets", *(f"![Skills]({sheet})" for sheet in sheets)]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Console entry; errors are one line and status 2."""
    settings = tyro.cli(ReportSettings, prog="world2act skills-report")
    try:
        report(settings)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(settings.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
