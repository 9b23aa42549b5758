"""Admission and joining of episodes, under every order of arrival that hypothesis thinks of."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.runtime.messages import ImagineResult, RolloutResult
from services.trainer.flow import TRIES, Flow, PosttrainError, Progress
from world2act.presets import Rounds, Stage2Settings
from world2act.schedule import EpisodeSpec, StalenessManager, plan

SETTINGS = dataclasses.replace(Stage2Settings(), plan=Rounds(base=2, perturbed=1, rounds=2, on_policy=2, first_steps=1, steps=1))
SPECS = plan(SETTINGS, ["push", "reach"], 0)
ROUNDS = 3


def result(progress: Progress, version: int, error: str = "") -> RolloutResult:
    spec = progress.spec
    values: dict[str, Any] = {"id": progress.id, "job": "j", "task": spec.task, "split": "posttrain", "index": spec.index}
    return RolloutResult(**values, round=spec.round, version=version, imagine_id=f"i-{progress.id}", error=error)


def imagination(name: str, error: str = "") -> ImagineResult:
    return ImagineResult(id=name, reply="j", error=error)


def make(eta: int = 0, limit: int = 100) -> Flow:
    return Flow(SPECS, StalenessManager(eta), limit)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), eta=st.integers(0, 3), limit=st.integers(1, 20))
def test_any_order_joins_every_episode_once_and_keeps_the_bound(data: st.DataObject, eta: int, limit: int) -> None:
    """The adversary delivers executions and imaginations late, twice, or before their episode, and publishes versions late."""
    flow = make(eta, limit)
    version, finished_rounds = 0, 0
    executions: list[tuple[Progress, RolloutResult]] = []
    imaginations: list[ImagineResult] = []
    delivered: list[RolloutResult | ImagineResult] = []
    joined: list[str] = []
    for _ in range(2000):
        for progress in flow.admit(version):
            assert progress.spec.round - version <= eta, "admitted beyond the bound"
            executions.append((progress, result(progress, version)))
            imaginations.append(imagination(f"i-{progress.id}"))
        assert flow.outstanding() <= limit
        moves = [m for m, able in (("run", executions), ("imagine", imaginations), ("again", delivered)) if able]
        ready = finished_rounds < ROUNDS and flow.complete(finished_rounds)
        moves += ["publish"] if ready else []
        if not moves:
            break
        move = data.draw(st.sampled_from(moves))
        if move == "publish":
            finished_rounds, version = finished_rounds + 1, version + 1
        elif move == "imagine" or (move == "again" and isinstance(delivered[-1], ImagineResult)):
            answer = imaginations.pop(data.draw(st.integers(0, len(imaginations) - 1))) if move == "imagine" else delivered.pop()
            delivered += [answer] if move == "imagine" else []
            joined += [p.spec.key for p in flow.imagined(answer)]
        else:
            found = executions.pop(data.draw(st.integers(0, len(executions) - 1)))[1] if move == "run" else delivered.pop()
            delivered += [found] if move == "run" else []
            progress_ = flow.executed(found)
            if progress_ is not None and flow.expect(progress_, found.imagine_id):
                joined.append(progress_.spec.key)
    assert finished_rounds == ROUNDS, "the run got stuck"
    assert sorted(joined) == sorted(spec.key for spec in SPECS), "every episode joined exactly once"
    accepted = flow.staleness.accepted
    assert sum(accepted.values()) == len(SPECS) and max(accepted) <= eta and not flow.staleness.rejected


def test_limits_alone_make_the_mode() -> None:
    serial, synchronous, asynchronous = make(0, 1), make(0), make(1)
    assert len(serial.admit(0)) == 1 and serial.admit(0) == []
    assert {p.spec.round for p in synchronous.admit(0)} == {0}
    assert {p.spec.round for p in asynchronous.admit(0)} == {0, 1}
    assert {p.spec.round for p in asynchronous.admit(1)} == {2}


def test_order_of_admission_is_the_plan() -> None:
    flow = make(2)
    assert [p.spec for p in flow.admit(0)] == sorted(SPECS)


def test_a_failed_episode_is_tried_again_under_another_id_then_ends_the_run() -> None:
    flow = make()
    first = flow.admit(0)[0]
    old = result(first, 0, "simulator broke")
    assert flow.executed(old) is first and first.state == "waiting"
    assert flow.executed(old) is None, "the failure is delivered twice and counts once"
    assert flow.admit(0) == [first] and first.id == f"{first.spec.key}.1"
    for _ in range(TRIES - 2):
        flow.executed(result(first, 0, "again"))
        flow.admit(0)
    with pytest.raises(PosttrainError, match=f"{first.spec.task} {first.spec.index}: simulator gone"):
        flow.executed(result(first, 0, "simulator gone"))


def test_a_stale_episode_is_executed_again() -> None:
    flow = Flow([EpisodeSpec(2, "reach", 5, 0.0, "ab")], StalenessManager(1), 4)
    assert flow.admit(0) == []
    (progress,) = flow.admit(1)
    assert flow.executed(result(progress, 0)) is progress and progress.state == "waiting"
    assert flow.staleness.rejected[2] == 1 and flow.admit(1) == [progress]
    progress_ = flow.executed(result(progress, 1))
    assert progress_ is progress and progress.state == "executed"


def test_failing_targets_end_the_run() -> None:
    flow = make()
    first = flow.admit(0)[0]
    flow.executed(result(first, 0))
    flow.expect(first, "x")
    for _ in range(TRIES - 1):
        assert flow.imagined(imagination("x", "no start")) == []
    with pytest.raises(PosttrainError, match="no start"):
        flow.imagined(imagination("x", "no start"))


def test_strangers_change_nothing() -> None:
    flow = make()
    flow.admit(0)
    stranger = RolloutResult(id="zz", job="j", task="push", split="posttrain", index=0)
    assert (
        flow.executed(stranger) is None
        and flow.imagined(imagination("zz")) == []
        and flow.outstanding() == len([s for s in SPECS if s.round == 0])
    )
