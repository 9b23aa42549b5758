"""The capacity plan: its page is current, and its simulation agrees with what queueing theory knows exactly."""

from __future__ import annotations

import pytest

from bench import scaling
from bench.scaling import Station


def test_page_is_current() -> None:
    page = scaling.PAGE.read_text()
    assert page == scaling.rewritten(page), "run: python -m bench.scaling"


def test_one_server_in_a_row_of_constant_times() -> None:
    """Three constant stations in a row: the first passes after their sum, then one each time the slowest is done."""
    stations = (Station("a", 1.0), Station("b", 3.0), Station("c", 2.0))
    seconds, busy = scaling.simulate(stations, [1, 1, 1], in_flight=10, trajectories=100)
    assert seconds == pytest.approx(1 + 3 * 100 + 2)
    assert busy == pytest.approx([100 / seconds, 300 / seconds, 200 / seconds])
    alone, _ = scaling.simulate(stations, [1, 1, 1], in_flight=1, trajectories=100)
    assert alone == pytest.approx(600)  # serial: one after the other


def test_waiting_is_exact_for_one_exponential_server() -> None:
    """M/M/1: u s / (1 - u)."""
    assert scaling.waiting(Station("a", 2.0, cv=1.0), 1, rate=0.25) == pytest.approx(0.5 * 2.0 / 0.5)


@pytest.mark.parametrize("system", (scaling.EMBEDDED, scaling.FULL), ids=lambda s: s.name)
@pytest.mark.parametrize("trajectories,days", scaling.GOALS)
def test_plan_is_in_time_and_no_pod_too_many(system: scaling.System, trajectories: int, days: float) -> None:
    made = scaling.plan(system, trajectories / (days * scaling.DAY))
    took, busy = scaling.simulated(made, trajectories, seed=1)
    assert took < days and all(share <= 1 for share in busy)
    for station, pods in zip(system.stations, made.pods, strict=True):
        assert pods == 1 or made.rate * station.seconds > scaling.UTILISATION * (pods - 1) * station.servers
