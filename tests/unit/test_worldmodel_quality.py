"""Quality of world models: metrics whose right answer is known, the judge against a scripted server, the command's table."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av")

from services.runtime.llm import LLMSettings
from services.worldmodel import evaluate, quality
from services.worldmodel.backbones import BackboneInfo
from services.worldmodel.evaluate import Arguments
from services.worldmodel.judge import IMAGES, Judge, question
from services.worldmodel.quality import ClipEncoder, HeldOut, Imagined, distances, errors, frechet
from tests.integration.triton_process import make_zoo
from tests.scripted_llm import Server, refused, said
from tests.unit.test_finetune import demos
from world2act.data.video import decode_image
from world2act.types import Episode, Skill


class Oracle:
    """A backbone whose latents are the mean grey of frames; it imagines a clip `share` of the way from the start to the truth."""

    def __init__(self, truth: dict[str, np.ndarray], share: float) -> None:
        self.truth, self.share, self.asked = truth, share, []
        self.info = BackboneInfo("oracle", "0" * 64, (16, 16, 3), 16, (1, 1, 1), 4, 8, 10.0)

    def encode(self, frames: np.ndarray) -> np.ndarray:
        return frames[:, ::4].mean(axis=(2, 3, 4), dtype=np.float32)[..., None, None, None]

    def imagine(self, start: np.ndarray, prompts: Any, seeds: Any, horizon: int, steps: int, guidance: float) -> np.ndarray:
        self.asked += prompts
        first, true = self.encode(start[:, None]), self.encode(self.truth[prompts[0]][None])[:, : 1 + horizon]
        return first + self.share * (true - first)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        grey = np.repeat(latents[:, :, 0, 0, 0], 4, axis=1)[:, 3:]
        return np.broadcast_to(grey[..., None, None, None].round().astype(np.uint8), (*grey.shape, 16, 16, 3))


def ramp(step: int, chunks: int = 4) -> np.ndarray:
    """Frames whose grey rises by `step` a chunk, in one jump at its end, so that a latent decodes exactly."""
    levels = 20 + step * np.r_[0, np.repeat(np.arange(1, chunks + 1), 4)]
    return np.broadcast_to(levels.astype(np.uint8)[:, None, None, None], (1 + 4 * chunks, 16, 16, 3)).copy()


def imagined(share: float, foreseeable: int = 4) -> list[Imagined]:
    truth = {"up": ramp(20), "slow": ramp(4)}
    model = Oracle(truth, share)
    clips = [HeldOut("t", prompt, "do it", frames, foreseeable) for prompt, frames in truth.items()]
    return quality.imagine_clips(model, clips, False)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 0.25), (1.0, 0.0)])
def test_errors_are_relative_to_copying(share: float, expected: float) -> None:
    found = errors(imagined(share), 4, 16)
    assert set(found) == {"latent_at_1", "pixel_at_1", "latent_at_4", "pixel_at_4"}
    assert all(value == pytest.approx(expected, abs=1e-3) for value in found.values())


def test_what_a_disturbance_did_does_not_count() -> None:
    assert set(errors(imagined(0.5, foreseeable=1), 4, 16)) == {"latent_at_1", "pixel_at_1"}


def test_frechet_distance_of_known_normals() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4000, 3))
    assert frechet(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet(a, a + np.array([3.0, 0.0, 4.0])) == pytest.approx(25.0, abs=1e-6)
    assert frechet(a, 2 * a) == pytest.approx(np.trace(np.cov(a, rowvar=False)) + (a.mean(0) ** 2).sum(), rel=1e-6)


def test_the_distance_sees_motion_and_orders_models() -> None:
    truth = {f"p{i}": ramp(4 + 3 * i) for i in range(5)}
    clips = [HeldOut("t", prompt, "do it", frames, 4) for prompt, frames in truth.items()]
    still, half, exact = (distances(quality.imagine_clips(Oracle(truth, share), clips, False)) for share in (0.0, 0.5, 1.0))
    assert exact["frechet"] == pytest.approx(0.0, abs=1e-6) and still["frechet"] == pytest.approx(1.0)
    assert 0.01 < half["frechet"] < 0.99
    assert half["frechet_floor"] >= 0 and distances(imagined(1.0)) == {}, "two clips are too few"
    encode = ClipEncoder()
    assert np.array_equal(encode(ramp(9)), ClipEncoder()(ramp(9))) and not encode(ramp(0)).any(), (
        "nothing happens in a still clip"
    )


def two_skills() -> Episode:
    widths = np.array([0.09] * 9 + [0.03] * 8, np.float32)
    frames = np.concatenate([ramp(10, 2), ramp(10, 2)[1:] + 20])
    actions, states = np.zeros((16, 4), np.float32), np.zeros((17, 4), np.float32)
    return Episode("t", "validation", 0, "up slow", {"grid": frames}, states, widths, actions, True)


def test_drift_across_a_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that stops half-way in the first skill starts the second one in the wrong place."""
    episode = two_skills()
    skills = (Skill("first", 0, 8), Skill("second", 8, 16))
    monkeypatch.setattr(quality, "skills_of", lambda _: (skills, False))
    frames = episode.images["grid"]
    model = Oracle({"first": frames[:9], "second": frames[8:], "up slow": frames[:9]}, 0.5)
    found = quality.drift(model, [episode], False)
    assert found["second_skill_fresh"] == pytest.approx(0.25, abs=0.02) and found["second_skill_chained"] > 0.5
    assert model.asked[-3:] == ["first", "second", "second"]
    quality.drift(model, [episode], True)
    assert set(model.asked[-3:]) == {"up slow"}, "Base-WM is asked with the instruction"


# --- the judge -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Server]:
    scripted = Server()
    yield scripted
    scripted.close()


def llm(server: Server, tmp_path: Path, **changes: Any) -> LLMSettings:
    values = {
        "llm_base_url": server.url,
        "llm_format": "json_schema",
        "llm_log": tmp_path / "llm.jsonl",
        "llm_model": "judge",
        **changes,
    }
    return LLMSettings(**values)


def test_the_judge_sees_frames_in_order_and_scores_in_percent(server: Server, tmp_path: Path) -> None:
    yes, no = {"answer": "yes", "reason": "done"}, {"answer": "no", "reason": "it vanishes"}
    server.turns += [said(yes), said(no), said(yes), said(yes)]
    judge = Judge(llm(server, tmp_path))
    verdict = judge.judge(imagined(1.0))
    assert (verdict.scores, verdict.clips, verdict.unjudged) == ({"IF": 100.0, "PA": 50.0}, 2, 0)
    low, high = verdict.intervals["PA"]
    assert 9 < low < 10 and 90 < high < 91, "Wilson of 1 in 2"
    content = server.requests[0]["messages"][1]["content"]
    assert content[0]["type"] == "text" and "'up'" in content[0]["text"]
    urls = [part["image_url"]["url"] for part in content[1:]]
    levels = [decode_image(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))).mean() for url in urls]
    assert len(urls) == IMAGES and levels == sorted(levels) and levels[0] == pytest.approx(20, abs=3)
    assert server.requests[0]["response_format"]["json_schema"]["schema"]["properties"]["answer"]["enum"] == ["yes", "no"]
    logged = (tmp_path / "llm.jsonl").read_text()
    assert "data:image" not in logged and "sha256:" in logged and len(logged.splitlines()) == 4
    assert json.loads(judge.used())["requests"] == 4


def test_grades_are_scaled_and_bad_answers_are_asked_again(server: Server, tmp_path: Path) -> None:
    server.turns += [
        said({"grade": 9, "reason": "!"}),
        said({"grade": 2, "reason": "a little"}),
        said({"grade": 5, "reason": "well"}),
    ]
    server.turns += [said("no JSON")] * 3
    verdict = Judge(llm(server, tmp_path), "graded").judge(imagined(1.0))
    assert (verdict.scores, verdict.clips, verdict.unjudged) == ({"IF": 25.0, "PA": 100.0}, 1, 1) and verdict.intervals == {}


def test_a_spent_budget_ends_the_judging(server: Server, tmp_path: Path) -> None:
    server.turns += [said({"answer": "yes", "reason": "a"}, usage={"prompt_tokens": 30_000, "completion_tokens": 10})] * 4
    verdict = Judge(llm(server, tmp_path, llm_budget_tokens=65_000)).judge(imagined(1.0))
    assert verdict.clips == 1 and "the budget of 65000 tokens" in verdict.stopped


def test_images_are_small() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 480, 832, 3), np.uint8)
    urls = [part["image_url"]["url"] for part in question("IF", "binary", "x", frames)[1]["content"][1:]]
    assert max(len(url) for url in urls) < 100_000
    image = decode_image(base64.b64decode(urls[0].partition(",")[2]))
    assert image.shape == (148, 256, 3)


# --- the command ---------------------------------------------------------------------------------------------------------


def test_table_over_skill_and_base_wm(tmp_path: Path, server: Server) -> None:
    demos(tmp_path / "demos")
    skill, base = (make_zoo(tmp_path / name, seed) / "worldmodel.safetensors" for seed, name in enumerate(("skill", "base")))
    arguments = Arguments(tmp_path / "demos", skill=str(skill), base=str(base), clips=3)
    rows = evaluate.evaluate(arguments, None)
    assert [row.name for row in rows] == ["Skill-WM", "Base-WM"] and rows[0].clips == 2
    assert rows[0].hash != rows[1].hash and {"latent_at_1", "pixel_at_4"} <= set(rows[0].values)
    page = evaluate.markdown(rows)
    assert "| metric | Skill-WM | Base-WM |" in page and "| latent_at_1 |" in page
    server.turns += [said({"answer": "yes", "reason": "a"})] * 8
    judged = evaluate.evaluate(arguments, Judge(llm(server, tmp_path)))
    assert "| IF (%) | 100.0 [34.2, 100.0] | 100.0 [34.2, 100.0] |" in evaluate.markdown(judged)


def test_a_base_wm_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    demos(tmp_path / "demos")
    skill = make_zoo(tmp_path / "skill") / "worldmodel.safetensors"
    rows = evaluate.evaluate(Arguments(tmp_path / "demos", skill=str(skill), base=str(tmp_path / "none.safetensors")), None)
    assert "train-worldmodel" in rows[1].missing and "--no-segmented" in rows[1].missing
    assert "Base-WM: not trained; world2act train-worldmodel" in evaluate.markdown(rows)


def test_no_clip_like_that(tmp_path: Path) -> None:
    demos(tmp_path / "demos")
    skill = make_zoo(tmp_path / "skill") / "worldmodel.safetensors"
    arguments = Arguments(tmp_path / "demos", skill=str(skill))
    with pytest.raises(ValueError, match="data: no held-out clip has a prompt like 'pick'"):
        evaluate.evaluate(replace(arguments, prompts="pick"), None)
    with pytest.raises(ValueError, match="clips: must be >= 1"):
        replace(arguments, clips=0)


def test_a_judge_that_refuses_is_one_line(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demos(tmp_path / "demos")
    skill = make_zoo(tmp_path / "skill") / "worldmodel.safetensors"
    server.turns += [refused(401, "no such key")]
    monkeypatch.setenv("W2A_LLM_BASE_URL", server.url)
    monkeypatch.setenv("W2A_ARTIFACTS_URL", f"file://{tmp_path}/artifacts")
    monkeypatch.setenv("W2A_RUN_DIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["evaluate", "--data", str(tmp_path / "demos"), "--skill", str(skill), "--judge", "binary"])
    with pytest.raises(SystemExit, match=r"error: llm: .* refuses: status 401: no such key"):
        evaluate.main()
