"""The report page is drawn whole from a record, and says what the record says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.cli import report


def rate(value: float) -> dict[str, float]:
    return {"rate": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1)}


def sample_record() -> dict[str, Any]:
    events: list[dict[str, Any]] = []
    for i in range(12):
        events.append({"name": "episode", "started": i * 1.0, "finished": i + 1.4, "staleness": i % 2, "round": i // 6})
        events.append({"name": "imagined", "started": i + 1.5, "finished": i + 1.9, "cache_hit": False})
    for i in range(40):
        events.append({"name": "metrics", "update": i * 20, "loss": 1 / (1 + i), "cosine": i / 40, "residual_norm": 0.01 * i})
    for i in range(2):
        row = {"round": i, "trajectories": 6, "updates": 400 * (i + 1), "loss": 0.1, "cosine": 0.5 + i / 4, "residual_norm": 0.2}
        events.append({"name": "round", "started": 6 + 7 * i, "finished": 12 + 7 * i, "version": i + 1, **row})
    mcnemar, gain = {"gained": 5, "lost": 1, "p": 0.21}, {"value": 0.2, "low": -0.05, "high": 0.42}
    rows = [
        {"task": t, "episodes": 20, "base": rate(0.4), "post-trained": rate(0.6), "difference": gain, "mcnemar": mcnemar}
        for t in ("push", "overall")
    ]
    widths = [0.1] * 20 + [0.05] * 20 + [0.1] * 9
    skills = [{"prompt": "pick <b>", "start": 0, "end": 24}, {"prompt": "place", "start": 24, "end": 48}]
    return {
        "about": "a test",
        "segmentation": [
            {"task": "pick-place", "instruction": "pick & place", "gripper_width_m": widths, "skills": skills, "discarded": None},
            {"task": "push", "instruction": "push", "gripper_width_m": widths, "skills": [], "discarded": "no contact"},
        ],
        "rollouts": [
            {
                "task": "push",
                "index": 3,
                "imagined_video": "a",
                "executed_video": "b",
                "success": True,
                "skills": ["push the puck"],
            }
        ],
        "stage1": {
            "history": [{"step": i, "loss": 1 / (1 + i), "cosine": i / 9} for i in range(9)],
            "metrics": {"top1_of_16": 0.93},
        },
        "posttrain": {
            "events": events,
            "result": {
                "eta": 1,
                "episodes": 12,
                "seconds": {"execution": 16.8, "generation": 4.8, "optimisation": 12.0, "wall": 20.0},
            },
        },
        "evaluation": {"rows": rows},
        "cost": {"post-training": 20.0},
    }


def test_page_holds_every_section_escaped_and_whole(tmp_path: Path) -> None:
    source, out = tmp_path / "record.json", tmp_path / "report.html"
    source.write_text(json.dumps(sample_record()))
    report.write(source, out, lambda name: name.encode())
    page = out.read_text()
    for heading in ("Success", "Segmentation", "Imagined and executed", "Stage 1", "Stage 2", "What it cost"):
        assert f"<h2>{heading}" in page
    assert (
        "+20.0 points [-5.0, +42.0]: 0.400 to 0.600" in page
        and "+0.20 [-0.05, +0.42]" in page
        and "1 of 2 demonstrations" in page
        and "12 trajectories" in page
    )
    assert "were active for 34 s in all; side by side the run took 20 s" in page
    assert "pick &lt;b&gt;" in page and "pick <b>" not in page
    assert page.count("data:video/mp4;base64,") == 2 and page.count("<svg") >= 6
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons", ""
    )


def test_page_of_an_unfinished_run_shows_what_there_is(tmp_path: Path) -> None:
    record = sample_record()
    del record["evaluation"], record["posttrain"]
    page = report.render(record, lambda name: b"")
    assert "Segmentation" in page and "<h2>Success" not in page


def test_missing_artifact_leaves_no_half_page(tmp_path: Path) -> None:
    source, out = tmp_path / "record.json", tmp_path / "report.html"
    source.write_text(json.dumps(sample_record()))

    def missing(name: str) -> bytes:
        raise FileNotFoundError(name)

    with pytest.raises(FileNotFoundError):
        report.write(source, out, missing)
    assert not out.exists()
