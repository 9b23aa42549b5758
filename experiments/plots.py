"""One small plot per experiment: success with Wilson intervals as dots, as a curve, or against the cosine round by round; and
gains against what the targets know better than the base."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.catalogue import EXPERIMENTS
from world2act.evaluation import Difference

if TYPE_CHECKING:
    from experiments.tables import Line, Table

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
GREY = "#888888"


def draw(table: Table, path: Path) -> None:
    """Write the plot of `table` to `path` (PNG), whole or not at all."""
    experiment = EXPERIMENTS[table.plan.experiment]
    measured = [line for line in table.lines if line.rate is not None]
    height = 0.9 + 0.26 * len(measured) if experiment.plot == "dots" else 3.4
    with _figure(path, height) as axes:
        {"dots": _dots, "curve": _curve, "rounds": _rounds}[experiment.plot](axes, measured)
        if experiment.plot == "curve":
            axes.set_xlabel(experiment.axis)


def teachers(points: Sequence[tuple[str, float, float | None, Difference]], path: Path) -> None:
    """Write the plot of (regime, error of its imagined targets over its base's at visited states, the same on held-out
    demonstrations or None, gain of post-training) to `path` (PNG)."""
    colours = dict(zip(dict.fromkeys(_kind(name) for name, *_ in points), cycle(COLOURS), strict=False))
    visited = [(at, name, gain) for name, at, _, gain in points]
    held_out = [(at, name, gain) for name, _, at, gain in points if at is not None]
    with _figure(path, 3.8, panels=2) as panels:
        for axes, where, found in zip(
            panels, ("states that the base visits", "held-out demonstrations"), (visited, held_out), strict=True
        ):
            for ratio, name, gain in found:
                errors, colour = [[gain.value - gain.low], [gain.high - gain.value]], colours[_kind(name)]
                axes.errorbar(ratio, gain.value, errors, marker="o", markersize=4, capsize=2, color=colour)
            axes.axhline(0.0, color=GREY, linestyle=":")
            _name_points(axes, [(at, gain.value, name, colours[_kind(name)]) for at, name, gain in found])
            axes.set_title(where, fontsize=9)
            axes.set_xlabel("error of imagined targets / of the base")
        panels[0].set_ylabel("success after - before, 95 %")


def _name_points(axes: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names (x, y, name, colour) beside their points, from the top on, each as far down as keeps it off the others."""
    written: list[tuple[float, float, float]] = []  # left, height, right, in points of print
    axes.autoscale_view()
    for at, value, name, colour in sorted(points, key=lambda point: -point[1]):
        left, height = axes.transData.transform((at, value)) * 72 / axes.figure.dpi
        right, down = left + 4 * len(name), 0
        while any(abs(height - down - taken) < 8 and left < until and since < right for since, taken, until in written):
            down += 1
        written.append((left, height - down, right))
        axes.annotate(name, (at, value), (5, 4 - down), textcoords="offset points", fontsize=7, color=colour)


def _kind(regime: str) -> str:
    """Without its number of demonstrations and its world model."""
    return re.sub(r"-\d+(-\w+-wm)?$", "", regime)


@contextmanager
def _figure(path: Path, height: float, panels: int = 1) -> Iterator[Any]:
    """Axes that are saved to `path` whole or not at all; several panels share their y."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(6.4 + 3.2 * (panels - 1), height), layout="constrained", sharey=True)
    yield axes
    for one in figure.axes:
        one.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    temporary.replace(path)
    plt.close(figure)


def _dots(axes: Any, lines: list[Line]) -> None:
    for number, line in enumerate(lines):
        assert line.rate is not None
        colour = GREY if line.label.startswith("base") else COLOURS[2] if line.bound else COLOURS[0]
        axes.plot([line.rate.low, line.rate.high], [number, number], color=colour, linewidth=2)
        axes.plot(list(line.seeds.values()), [number] * len(line.seeds), "|", color=colour, markersize=7, alpha=0.6)
        axes.plot(line.rate.rate, number, "o", color=colour, markersize=5)
    axes.set_yticks(range(len(lines)), [line.label for line in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("success; bar: Wilson 95 %, ticks: training seeds", fontsize=8)


def _curve(axes: Any, lines: list[Line]) -> None:
    series: dict[str, list[Line]] = {}
    for line in lines:
        if line.x is not None:
            series.setdefault(line.series, []).append(line)
    for (name, members), colour in zip(series.items(), cycle(COLOURS), strict=False):
        points = sorted((line.x, line.rate) for line in members if line.x is not None and line.rate is not None)
        x = [at for at, _ in points]
        y = [rate.rate for _, rate in points]
        errors = [[r.rate - r.low for _, r in points], [r.high - r.rate for _, r in points]]
        style = "-" if name.endswith("rich") or name in ("base", "world2act") else "--"
        axes.errorbar(x, y, errors, marker="o", markersize=4, capsize=2, color=colour, linestyle=style, label=name)
    axes.set_ylabel("success, Wilson 95 %")
    axes.legend(fontsize=7, frameon=False)


def _rounds(axes: Any, lines: list[Line]) -> None:
    for line, colour in zip((line for line in lines if line.rounds), cycle(COLOURS), strict=False):
        for number, points in enumerate(line.rounds.values()):
            cosines, rates = zip(*points, strict=True)
            axes.plot(cosines, rates, "-", color=colour, linewidth=0.8, alpha=0.6, label=line.label if number == 0 else None)
            axes.scatter(cosines, rates, s=[8 + 6 * i for i in range(len(points))], color=colour)
    for line in lines:
        if not line.rounds and line.rate is not None:
            axes.axhline(line.rate.rate, color=GREY, linestyle=":", label=line.label)
    axes.set_xlabel("cosine of actions and imagined targets (larger dots: later rounds)")
    axes.set_ylabel("success")
    axes.legend(fontsize=7, frameon=False)
