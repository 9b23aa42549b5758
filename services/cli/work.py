"""The commands that ask the gateway for work, and how their results look in a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from services.cli.client import CliError, Gateway

Result = dict[str, Any]


def segment(
    gateway: Gateway,
    console: Console,
    instruction: str | None,
    file: Path | None,
    demo: str | None,
    planner: str = "rule",
    episode: str | None = None,
    **hand: Any,
) -> Result:
    """Skills of an instruction, of an uploaded file, or of data in the gateway's data folder; waits for a slow one.

    hand: `embodiment` and `gripper` of the request.
    """
    if [instruction, file, episode].count(None) != 2:
        raise CliError("segment: give an instruction, or --file, or --episode")
    asked = {"instruction": instruction, "episode": episode, "demo": demo, "planner": planner, **hand}
    asked = {key: value for key, value in asked.items() if value is not None}
    if file is None:
        found = gateway.call("POST", "/segment", json=asked)
    else:
        try:
            with file.open("rb") as f:
                found = gateway.call("POST", "/segment", files={"file": (file.name, f)}, data=asked)
        except OSError as error:
            raise CliError(f"{file}: {error.strerror}") from None
    if "events" in found and "job" in found:
        found = gateway.follow(found["id"], console, "segment")["result"]
    return {"instruction": instruction, **found}


def show_segments(result: Result, console: Console) -> None:
    """Prompts, or a row for each episode."""
    from world2act.skillset import understood

    if result.get("skills"):
        console.print("; ".join(result["skills"]))
        if result.get("instruction") and not understood(result["task"], result["instruction"]):
            console.print(unknown(result["skills"]), highlight=False)
    if not result.get("episodes"):
        return
    table = Table(box=None, pad_edge=False)
    for name in ("episode", "instruction", "skills (frames)", "verdict"):
        table.add_column(name)
    for e in result["episodes"]:
        skills = "; ".join(f"{s['prompt']} ({s['start']}-{s['end']})" for s in e["skills"])
        known = understood(e["task"], e["instruction"])
        verdict = f"discarded: {e['discarded']}" if e["discarded"] else "kept" if known else f"kept; {unknown(e['skills'])}"
        table.add_row(e["demo"] or "-", e["instruction"], skills or "-", verdict)
    for s in result.get("skipped", []):
        table.add_row(s["demo"], "-", "-", f"not readable: {s['reason']}")
    console.print(table)


def unknown(skills: list[Any]) -> str:
    """What is said of an instruction that was cut into `skills` without a row of schemas.json."""
    return f"no schema row knows the instruction ({'one skill' if len(skills) == 1 else f'{len(skills)} skills, by its verbs'})"


LEFT = "not post-trained on, left to the base alone (W2A_VLA_UNSEEN)"


def show_rollouts(result: Result, console: Console) -> None:
    """One row for each initial state."""
    table = Table(box=None, pad_edge=False)
    for name in ("initial state", "skills", "outcome"):
        table.add_column(name, overflow="fold")
    for r in result.get("rollouts", [result]):
        outcome = "-" if "success" not in r else f"{'success' if r['success'] else 'no success'}, {r['chunks']} chunks"
        outcome += f"; {LEFT}" if r.get("unseen") else ""
        skills = "; ".join(r.get("skills", [])) or "-"
        table.add_row(str(r.get("index")), skills, outcome)
    console.print(table)


def show_videos(result: Result, url: str, console: Console) -> None:
    """Where the gateway at `url` serves them: a line each, whole however narrow the terminal."""
    for r in result.get("rollouts", [result]):
        for kind in ("imagined", "executed"):
            if artifact := r.get(f"{kind}_video"):
                line = f"{kind} video of initial state {r['index']}: {url}/artifacts/{artifact}"
                console.print(line, soft_wrap=True, highlight=False)


def rate(cell: dict[str, Any]) -> str:
    """A success rate with its Wilson 95 % interval."""
    return f"{cell['rate']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"


def difference(cell: dict[str, Any]) -> str:
    """Post-trained minus base on the same scenes, with Newcombe's 95 % interval."""
    return f"{cell['value']:+.2f} [{cell['low']:+.2f}, {cell['high']:+.2f}]"


def show_evaluation(result: Result, console: Console) -> None:
    """A table for each comparison with the reference policy, or the rates alone where there is but one policy."""
    for comparison in result.get("comparisons", []):
        title = f"{comparison['policy']} against {comparison['reference']}, {result['split']} split"
        table = Table(title=title, title_justify="left")
        for name in ("task", "n", "base", "post-trained", "difference", "gained / lost", "McNemar p"):
            table.add_column(name, justify="left" if name == "task" else "right")
        for row in comparison["rows"]:
            test = row["mcnemar"]
            cells = (str(row["episodes"]), rate(row["base"]), rate(row["post-trained"]), difference(row["difference"]))
            table.add_row(row["task"], *cells, f"+{test['gained']} / -{test['lost']}", f"{test['p']:.2g}")
        console.print(table)
    if not result.get("comparisons"):
        for policy in result.get("policies", []):
            for task, cell in {**policy["tasks"], "all": policy["all"]}.items():
                console.print(f"{policy['name']}  {task}  {rate(cell)}")
    for policy in result.get("policies", []):
        if unseen := policy.get("unseen"):
            console.print(f"{policy['name']}: {', '.join(unseen)}: {LEFT}", soft_wrap=True, highlight=False)


def show_posttrain(result: Result, console: Console) -> None:
    """Rounds, and how far the parts overlapped."""
    table = Table(box=None, pad_edge=False)
    for name in ("round", "version", "trajectories", "updates", "loss", "cosine"):
        table.add_column(name, justify="right")
    for r in result.get("rounds", []):
        cells = [str(r.get(name, "-")) for name in ("round", "version", "trajectories", "updates")]
        table.add_row(*cells, f"{r.get('loss', float('nan')):.4f}", f"{r.get('cosine', float('nan')):.4f}")
    console.print(table)
    seconds = result.get("seconds", {})
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items() if name != "wall")
    if seconds:
        console.print(
            f"{parts}; wall {seconds['wall']:.1f} s; the parts add up to {result.get('overlap', 0):.2f} times the wall time"
        )
    console.print(f"policies: namespace {result.get('namespace')}, newest version {result.get('version')}")


def show_json(result: Result, console: Console) -> None:
    """Anything else, without long lists."""
    console.print_json(json.dumps({k: v for k, v in result.items() if not (isinstance(v, list) and len(v) > 20)}))


SHOW = {
    "segment": show_segments,
    "rollout": show_rollouts,
    "imagine": show_rollouts,
    "evaluate": show_evaluation,
    "posttrain": show_posttrain,
}


def round_line(console: Console) -> Any:
    """Prints a line for each finished round of a post-training job while its progress bar runs."""

    def heard(name: str, data: dict[str, Any]) -> None:
        if name == "round":
            loss, cosine = data.get("loss", 0.0), data.get("cosine", 0.0)
            line = f"round {data.get('round')}: version {data.get('version')}, {data.get('trajectories')} trajectories"
            console.print(f"{line}, loss {loss:.4f}, cosine {cosine:.4f}")

    return heard


def run_job(gateway: Gateway, console: Console, kind: str, body: dict[str, Any], wait: bool) -> Result | None:
    """Submit, follow, show. Without `wait` only the job's id is printed."""
    if kind == "evaluate" and body.get("namespace") is None:
        body = body | {"namespace": newest_namespace(gateway)}
    job = gateway.submit(f"/{kind}", body)
    if not wait:
        console.print(f"job {job}: world2act watch {job}")
        return None
    return finish(gateway, console, kind, job)


def finish(gateway: Gateway, console: Console, kind: str, job: str) -> Result:
    """Follow a job to its end and show its result."""
    ended = gateway.follow(job, console, f"{kind} {job}", round_line(console))
    result = dict(ended.get("result") or {})
    SHOW.get(kind, show_json)(result, console)
    if kind in ("rollout", "imagine"):
        show_videos(result, gateway.url, console)
    return result


def newest_namespace(gateway: Gateway) -> str:
    """Where the newest post-training run that succeeded published its policies; "default" where there is none."""
    for job in gateway.call("GET", "/jobs", params={"limit": 1000}):
        if job["kind"] == "posttrain" and job["status"] == "succeeded":
            return str(job["params"].get("namespace") or job["id"])
    return "default"


def export(gateway: Gateway, console: Console, namespace: str | None, version: int, out: Path, key: str = "") -> Path:
    """Write the residual bundle of a published version to a file, signed with the private key `key` (PEM) if there is one."""
    from world2act.signature import name_of, private_key, short, sign

    signer = private_key(key, "signing_key") if key else None
    namespace = namespace or newest_namespace(gateway)
    versions = {v["version"]: v for v in gateway.call("GET", f"/policies/{namespace}")}
    if not versions:
        raise CliError(f"namespace: {namespace!r} has no published version")
    wanted = max(versions) if version < 0 else version
    if wanted not in versions:
        raise CliError(f"version: {wanted} of {namespace!r} is not published; there are {', '.join(map(str, sorted(versions)))}")
    change = (lambda content: sign(content, signer)) if signer is not None else None
    size = gateway.download(versions[wanted]["artifact"], out, change)
    signed = f"signed by key {short(name_of(signer.public_key()))}" if signer is not None else "not signed"
    console.print(f"{out}: version {wanted} of {namespace}, {size / 1024:.0f} KiB, {signed}", soft_wrap=True)
    return out


def import_bundle(gateway: Gateway, console: Console, file: Path, namespace: str) -> Result:
    """Register a bundle file as the next version of `namespace`; the policy server checks it and refuses what does not fit."""
    try:
        with file.open("rb") as f:
            found = gateway.call("POST", f"/policies/{quote(namespace, safe='')}", files={"file": (file.name, f)})
    except OSError as error:
        raise CliError(f"{file}: {error.strerror}") from None
    console.print(f"{file}: version {found['version']} of {found['namespace']}", soft_wrap=True)
    return dict(found)
