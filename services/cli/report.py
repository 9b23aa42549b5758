"""`report.html`: one self-contained page (figures inline, videos embedded) from the record that a run of the main job left.

The record is JSON; every number in the page is in it, and `world2act report` draws the page again from it.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from services.cli import figures
from services.cli.work import difference

Record = Mapping[str, Any]
GetArtifact = Callable[[str], bytes]

STYLE = """
:root{color-scheme:light}body{font:15px/1.5 system-ui,sans-serif;color:#1d2733;background:#f5f7fa;margin:0}
main{max-width:980px;margin:0 auto;padding:28px 18px}h1{font-size:25px;margin:0 0 4px}h2{font-size:18px;margin:0 0 8px}
section{background:#fff;border:1px solid #e1e7ee;border-radius:10px;padding:18px 20px;margin:16px 0}
.lead{color:#51606f;margin:0 0 10px}.big{font-size:21px;font-weight:600}table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:4px 10px 4px 0;border-bottom:1px solid #edf1f5;vertical-align:top}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.videos{display:grid;grid-template-columns:1fr 1fr;gap:14px}
figure{margin:0}video{width:100%;image-rendering:pixelated;border-radius:6px;background:#000}figcaption{font-size:13px;color:#51606f}
svg{max-width:100%;height:auto}.row{display:flex;flex-wrap:wrap;gap:16px;align-items:flex-start}.good{color:#18794e}.bad{color:#b42318}
"""


def text(value: object) -> str:
    """Escaped for HTML."""
    return html.escape(str(value))


def table(header: Sequence[str], rows: Sequence[Sequence[object]], numeric: frozenset[int] = frozenset()) -> str:
    """A plain table; columns in `numeric` are right-aligned."""
    kind = [' class="n"' if i in numeric else "" for i in range(len(header))]
    head = "".join(f"<th{k}>{text(h)}</th>" for h, k in zip(header, kind, strict=True))
    body = "".join("<tr>" + "".join(f"<td{k}>{text(c)}</td>" for c, k in zip(r, kind, strict=True)) + "</tr>" for r in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def video(data: bytes, caption: str) -> str:
    """An mp4 embedded in the page."""
    source = base64.b64encode(data).decode()
    player = f'<video controls loop muted autoplay playsinline src="data:video/mp4;base64,{source}"></video>'
    return f"<figure>{player}<figcaption>{caption}</figcaption></figure>"


def segmentation_section(episodes: Sequence[Record]) -> str:
    """What /segment made of the demonstrations."""
    kept = [e for e in episodes if not e.get("discarded")]
    plots = "".join(figures.skill_timeline(e["instruction"], e["gripper_width_m"], e["skills"]) for e in kept[:4])
    rows = [
        [e["task"], e["instruction"], "; ".join(s["prompt"] for s in e["skills"]) or "-", e.get("discarded") or "kept"]
        for e in episodes
    ]
    lead = f"{len(kept)} of {len(episodes)} demonstrations were cut into {sum(len(e['skills']) for e in kept)} skills."
    listing = table(["task", "instruction", "skills", "verdict"], rows)
    return f"<section><h2>Segmentation</h2><p class=lead>{lead}</p>{plots}{listing}</section>"


def rollout_section(rollouts: Sequence[Record], get: GetArtifact) -> str:
    """Imagined beside executed, from the same initial states."""
    cells = []
    for r in rollouts:
        place = f"{text(r['task'])}, initial state {text(r['index'])}"
        if r.get("imagined_video"):
            cells.append(video(get(r["imagined_video"]), f"{place}: <b>imagined</b> ({text(', '.join(r['skills']))})"))
        if r.get("executed_video"):
            outcome = "<span class=good>success</span>" if r.get("success") else "<span class=bad>no success</span>"
            cells.append(video(get(r["executed_video"]), f"{place}: <b>executed</b> by the base policy, {outcome}"))
    lead = "The world model imagines the task skill by skill from the first frame alone; the base policy executes it in the simulator."
    return f"<section><h2>Imagined and executed</h2><p class=lead>{lead}</p><div class=videos>{''.join(cells)}</div></section>"


def stage1_section(stage1: Record) -> str:
    """How well the shipped adapters tie video to action, on held-out clips."""
    history = figures.curves(stage1.get("history", []), "step", ["loss", "video", "contrastive", "positive_cosine"], "")
    rows = [
        [name.replace("_", " "), f"{value:.3f}"]
        for name, value in stage1.get("metrics", {}).items()
        if isinstance(value, float | int)
    ]
    lead = "Trained once on the world-model split (shipped weights); metrics on the validation split."
    listing = table(["held-out metric", "value"], rows, frozenset({1}))
    return f"<section><h2>Stage 1: adapters</h2><p class=lead>{lead}</p>{history}{listing}</section>"


def stage2_section(posttrain: Record) -> str:
    """Losses, cosine, overlap, staleness."""
    events = posttrain["events"]
    by = {name: [e for e in events if e["name"] == name] for name in ("episode", "imagined", "round", "metrics")}
    result = posttrain["result"]
    lanes = {
        "execution": [(e["started"], e["finished"]) for e in by["episode"]],
        "generation": [(e["started"], e["finished"]) for e in by["imagined"]],
        "optimisation": [(e["started"], e["finished"]) for e in by["round"]],
    }
    published = [(e["finished"], e["version"]) for e in by["round"]]
    markers = [e["updates"] for e in by["round"][:-1] if "updates" in e]
    loss = figures.curves(by["metrics"], "update", ["loss", "cosine", "residual_norm"], "", markers)
    timeline = figures.overlap(lanes, published)
    histogram = figures.staleness_histogram([e["staleness"] for e in by["episode"]], result.get("eta"))
    busy = result["seconds"]
    parts = busy["execution"] + busy["generation"] + busy["optimisation"]
    rounds = table(
        ["round", "trajectories", "updates", "loss", "cosine", "residual norm"],
        [
            [e["round"], e["trajectories"], e["updates"], f"{e['loss']:.4f}", f"{e['cosine']:.3f}", f"{e['residual_norm']:.3f}"]
            for e in by["round"]
        ],
        frozenset(range(6)),
    )
    lead = (
        f"{result['episodes']} trajectories, each counted once, no reward and no label. The parts were active for {parts:.0f} s in all; "
        f"side by side the run took {busy['wall']:.0f} s."
    )
    return f"<section><h2>Stage 2: post-training</h2><p class=lead>{lead}</p>{timeline}<div class=row>{histogram}{loss}</div>{rounds}</section>"


def evaluation_section(evaluation: Record) -> str:
    """Success of base and post-trained policy on held-out initial states, matched seeds."""
    rows = evaluation["rows"]
    overall = rows[-1]
    test = overall["mcnemar"]
    change, low, high = (100 * overall["difference"][name] for name in ("value", "low", "high"))
    headline = (
        f"{change:+.1f} points [{low:+.1f}, {high:+.1f}]: {overall['base']['rate']:.3f} to {overall['post-trained']['rate']:.3f}"
    )
    listing = table(
        ["task", "episodes", "base", "95 %", "post-trained", "95 %", "difference", "gained / lost", "McNemar p"],
        [
            [
                r["task"],
                r["episodes"],
                f"{r['base']['rate']:.2f}",
                f"[{r['base']['low']:.2f}, {r['base']['high']:.2f}]",
                f"{r['post-trained']['rate']:.2f}",
                f"[{r['post-trained']['low']:.2f}, {r['post-trained']['high']:.2f}]",
                difference(r["difference"]),
                f"+{r['mcnemar']['gained']} / -{r['mcnemar']['lost']}",
                f"{r['mcnemar']['p']:.2g}",
            ]
            for r in rows
        ],
        frozenset(range(1, 9)),
    )
    lead = f"Held-out initial states (evaluation split), the same for both policies; Wilson and, of differences, Newcombe intervals. Exact McNemar test over all: p = {test['p']:.2g}."
    return f"<section><h2>Success</h2><p class=big>{text(headline)}</p><p class=lead>{lead}</p>{figures.success_bars(rows)}{listing}</section>"


def cost_section(cost: Record) -> str:
    """Seconds per part of the whole job."""
    rows = [[name, f"{seconds:.1f}"] for name, seconds in cost.items()]
    return f"<section><h2>What it cost</h2>{table(['part', 'seconds'], rows, frozenset({1}))}</section>"


def render(record: Record, get: GetArtifact) -> str:
    """The whole page. `get` fetches an artifact's bytes by name."""
    sections = []
    if record.get("evaluation"):
        sections.append(evaluation_section(record["evaluation"]))
    if record.get("segmentation"):
        sections.append(segmentation_section(record["segmentation"]))
    if record.get("rollouts"):
        sections.append(rollout_section(record["rollouts"], get))
    if record.get("stage1"):
        sections.append(stage1_section(record["stage1"]))
    if record.get("posttrain"):
        sections.append(stage2_section(record["posttrain"]))
    if record.get("cost"):
        sections.append(cost_section(record["cost"]))
    lead = text(record.get("about", ""))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>World2Act report</title><style>{STYLE}</style></head><body><main><h1>World2Act</h1><p class=lead>{lead}</p>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def write(record_path: Path, out: Path, get: GetArtifact) -> None:
    """Read the record and write the page; nothing half-written stays."""
    record = json.loads(record_path.read_text())
    temporary = out.with_suffix(".tmp")
    temporary.write_text(render(record, get))
    temporary.replace(out)
