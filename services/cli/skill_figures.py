"""Figures of a skill data set: lengths before and after segmentation (paper Fig. 3), and the contact sheet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from services.cli.figures import BASE, POST
from world2act.segmentation.statistics import density, density_at_median
from world2act.types import ImageArray

POINTS = 400


@dataclass(frozen=True)
class Lengths:
    """Lengths of a data set's episodes and of the clips cut from them, in actions."""

    name: str
    before: Sequence[int]
    after: Sequence[int]


@dataclass(frozen=True)
class Strip:
    """First, middle and last frames (3, H, W, 3) of some clips of one skill."""

    prompt: str
    clips: Sequence[ImageArray]


def png(figure: Figure, dpi: int = 80) -> bytes:
    """The figure as a small PNG file, of 256 colours."""
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, bbox_inches="tight")
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(256).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def lengths(data: Sequence[Lengths]) -> Figure:
    """A panel for each data set: density of episode and clip lengths, a dot at each median."""
    figure, panels = plt.subplots(1, len(data), figsize=(max(3.2 * len(data), 6.4), 2.5), squeeze=False)
    for axes, one in zip(panels[0], data, strict=True):
        longest = max([*one.before, *one.after, 1])
        x = np.linspace(0, 1.1 * longest, POINTS)
        for label, values, colour in (("episodes", one.before, BASE), ("clips", one.after, POST)):
            if len(values):
                y = density(values, x)
                axes.plot(x, y, color=colour, lw=1.4, label=f"{label} ({len(values):,})")
                axes.fill_between(x, y, color=colour, alpha=0.2, lw=0)
                axes.plot(*density_at_median(values), "o", color=colour, ms=4)
        axes.set(xlabel="length (actions)", xlim=(0, x[-1]), ylim=(0, None))
        axes.set_title(one.name, loc="left", fontsize=9)
        axes.legend(frameon=False, fontsize=7)
    panels[0][0].set_ylabel("density")
    figure.tight_layout()
    return figure


def contact_sheet(strips: Sequence[Strip]) -> Figure:
    """A row for each skill, three frames for each clip."""
    clips = max(len(strip.clips) for strip in strips)
    rows, columns = len(strips), 3 * clips
    figure, cells = plt.subplots(rows, columns, figsize=(1.05 * columns, 1.3 * rows), squeeze=False)
    for row, strip in zip(cells, strips, strict=True):
        for axes in row:
            axes.set_axis_off()
        row[0].set_title(strip.prompt, loc="left", fontsize=8, pad=3)
        for axes, frame in zip(row, (frame for clip in strip.clips for frame in clip), strict=False):
            axes.imshow(frame)
    figure.subplots_adjust(wspace=0.04, hspace=0.3, left=0, right=1, bottom=0, top=1)
    return figure
