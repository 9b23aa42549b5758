"""The report's figures: each takes plain data and returns an inline SVG."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GENERATION, EXECUTION, OPTIMISATION = "#0f8b8d", "#ec9a29", "#7b3fa0"
BASE, POST = "#9aa5b1", "#1f6feb"
SKILLS = ["#1f6feb", "#ec9a29", "#0f8b8d", "#a8201a", "#7b3fa0", "#5a6b2f"]
Record = Mapping[str, Any]

plt.rcParams.update(
    {
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "svg.fonttype": "none",
        "svg.hashsalt": "world2act",
    }
)


def svg(figure: Figure) -> str:
    """The figure as an <svg> element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def skill_timeline(title: str, widths: Sequence[float], skills: Sequence[Record]) -> str:
    """Gripper opening over the episode's frames, with the skills that were cut."""
    figure, axes = plt.subplots(figsize=(7.2, 1.9))
    axes.plot(range(len(widths)), [w * 1000 for w in widths], color="#222", lw=1.4)
    top = max(widths, default=0.1) * 1000
    for i, skill in enumerate(skills):
        colour = SKILLS[i % len(SKILLS)]
        axes.axvspan(skill["start"], skill["end"], color=colour, alpha=0.16, lw=0)
        middle = (skill["start"] + skill["end"]) / 2
        axes.text(middle, top * 1.06, skill["prompt"], ha="center", va="bottom", color=colour, fontsize=8)
    axes.set(xlabel="frame", ylabel="gripper opening (mm)", ylim=(0, top * 1.25), xlim=(0, max(len(widths) - 1, 1)))
    axes.set_title(title, loc="left", fontsize=9, pad=12)
    return svg(figure)


def curves(history: Sequence[Record], x: str, names: Sequence[str], title: str, markers: Sequence[float] = ()) -> str:
    """Small multiples: one panel a name; vertical lines at `markers` (a version was published)."""
    present = [n for n in names if any(n in h for h in history)]
    if not present:
        return "<p>no data</p>"
    figure, panels = plt.subplots(1, len(present), figsize=(3.1 * len(present), 2.2), squeeze=False)
    for axes, name in zip(panels[0], present, strict=True):
        points = [(h[x], h[name]) for h in history if name in h]
        axes.plot(*zip(*points, strict=True), color=OPTIMISATION, lw=1.3)
        for marker in markers:
            axes.axvline(marker, color="#999", lw=0.7, ls=":")
        axes.set_title(name.replace("_", " "), fontsize=9, loc="left")
        axes.set_xlabel(x.replace("_", " "))
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    figure.tight_layout()
    return svg(figure)


def success_bars(rows: Sequence[Record], names: tuple[str, str] = ("base", "post-trained")) -> str:
    """Success per task and overall with Wilson 95 % intervals. Row: task, then per name {rate, low, high}."""
    figure, axes = plt.subplots(figsize=(7.2, 0.42 * len(rows) + 1.0))
    for i, row in enumerate(rows):
        for name, colour, offset in zip(names, (BASE, POST), (-0.18, 0.18), strict=True):
            value = row[name]
            error = [[value["rate"] - value["low"]], [value["high"] - value["rate"]]]
            label = name if i == 0 else None
            axes.barh(i + offset, value["rate"], 0.34, color=colour, label=label)
            axes.errorbar(value["rate"], i + offset, xerr=error, color="#333", lw=0.8, capsize=2)
    axes.set(xlim=(0, 1), xlabel="success rate, Wilson 95 %", ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [r["task"] for r in rows])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=2, frameon=False)
    return svg(figure)


def _spans(axes: Axes, lane: int, spans: Sequence[tuple[float, float]], colour: str) -> None:
    axes.broken_barh([(a, max(b - a, 0.02)) for a, b in spans], (lane - 0.36, 0.72), facecolors=colour, alpha=0.75, lw=0)


def overlap(lanes: Mapping[str, Sequence[tuple[float, float]]], published: Sequence[tuple[float, int]]) -> str:
    """Time line of generation, execution and optimisation; triangles where a policy version was published."""
    figure, axes = plt.subplots(figsize=(7.2, 2.0))
    colours = (EXECUTION, GENERATION, OPTIMISATION)
    start = min((a for spans in lanes.values() for a, _ in spans), default=0.0)
    for lane, (spans, colour) in enumerate(zip(lanes.values(), colours, strict=False)):
        _spans(axes, lane, [(a - start, b - start) for a, b in spans], colour)
    for time, version in published:
        axes.plot(time - start, len(lanes) - 0.45, marker="v", color="#333", ms=5, clip_on=False)
        axes.text(time - start, len(lanes) - 0.3, f"v{version}", ha="center", va="bottom", fontsize=7)
    axes.set_yticks(range(len(lanes)), list(lanes))
    axes.set(xlabel="seconds since the first episode", ylim=(-0.6, len(lanes) - 0.1))
    return svg(figure)


def staleness_histogram(values: Sequence[int], bound: int | None) -> str:
    """How many policy versions old each trajectory was when its round was trained."""
    figure, axes = plt.subplots(figsize=(3.4, 2.0))
    counts = Counter(values)
    ticks = range(0, max([*counts, bound or 0]) + 1)
    axes.bar(list(ticks), [counts.get(t, 0) for t in ticks], color=EXECUTION, width=0.6)
    if bound is not None:
        axes.axvline(bound + 0.5, color="#a8201a", lw=1, ls="--")
        axes.text(bound + 0.45, axes.get_ylim()[1], f"bound {bound}", ha="right", va="top", color="#a8201a", fontsize=8)
    axes.set(xlabel="staleness (versions)", ylabel="trajectories")
    axes.set_xticks(list(ticks))
    return svg(figure)
