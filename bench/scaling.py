"""How many pods for how many trajectories: a queueing model, checked by simulating it. `python -m bench.scaling` rewrites the
table of docs/scaling.md.

A trajectory passes three stations: execution (a simulator's environment, with the policy), generation (a world model), learning
(a trainer). At most `in_flight` are between request and learning, as in services/trainer/flow.py; rounds are left out, as they
are where the staleness bound is at least one. Each station has `servers` equal servers and one queue.
"""

from __future__ import annotations

import heapq
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
UTILISATION = 0.8
"""Share of its time that a server is planned to be busy; the rest is for restarts, uneven arrivals, and what we got wrong."""
SIMULATED = 20_000
DAY = 86_400.0


@dataclass(frozen=True)
class Station:
    """`seconds` of one server a trajectory; `cv`: spread of that time over its mean; a pod is `servers` servers."""

    name: str
    seconds: float
    cv: float = 0.0
    servers: int = 1


@dataclass(frozen=True)
class System:
    """`stations` in the order a trajectory passes them; `policy`: seconds of one policy server a trajectory, within execution."""

    name: str
    stations: tuple[Station, Station, Station]
    policy: float


# Active seconds for 784 trajectories of `make demo` (README): execution 186 with two environments, generation 88, learning 95.
# The policy: as many requests as clips (a state each), 163 clips/s * 88 s / 784, at the 218 requests/s of `make bench`.
DEMO = 784
EMBEDDED = System(
    "embedded",
    (Station("simulator", 2 * 186 / DEMO, 0.3, 2), Station("worldmodel", 88 / DEMO, 0.1), Station("trainer", 95 / DEMO, 0.1)),
    policy=163 * 88 / DEMO / 218,
)
# Peers' published rates, but for the learner's nothing of it measured here: see the page. 1.69 skills a demonstration (114,192
# clips of 67,593 episodes) of 93 frames each; one observation an action; the paper's pixel encoder, 5,000 updates for 24 x 50.
SKILLS, FRAMES = 114_192 / 67_593, 93
FULL = System(
    "Cosmos-Predict2 2B",
    (
        Station("simulator", SKILLS * FRAMES / 450, 0.3),
        Station("worldmodel", SKILLS * 50.2, 0.1),
        Station("trainer", 5_000 / 1_200 / 1.6, 0.1),
    ),
    policy=SKILLS * FRAMES * 0.004,
)
GOALS = ((1_000, 1.0), (100_000, 7.0), (10_000_000, 30.0))
"""(trajectories, days)."""


@dataclass(frozen=True)
class Plan:
    """Pods of each station, policy pods, and trajectories in flight over all jobs."""

    system: System
    rate: float  # trajectories/s
    pods: tuple[int, ...]
    policies: int
    in_flight: int


def waiting(station: Station, servers: int, rate: float) -> float:
    """Mean seconds in the queue of a station at random arrivals: Sakasegawa's approximation of G/G/c."""
    busy = rate * station.seconds / servers
    spread = (1 + station.cv**2) / 2
    return spread * station.seconds * busy ** (math.sqrt(2 * (servers + 1)) - 1) / (servers * (1 - busy))


def plan(system: System, rate: float) -> Plan:
    """Fewest pods that keep every server at most UTILISATION busy; half as much again in flight as Little's law says."""
    pods = tuple(math.ceil(rate * s.seconds / s.servers / UTILISATION) for s in system.stations)
    stay = sum(s.seconds + waiting(s, n * s.servers, rate) for s, n in zip(system.stations, pods, strict=True))
    return Plan(system, rate, pods, math.ceil(rate * system.policy / UTILISATION), max(8, math.ceil(1.5 * rate * stay)))


def simulate(
    stations: Sequence[Station], servers: Sequence[int], in_flight: int, trajectories: int, seed: int = 0
) -> tuple[float, list[float]]:
    """(seconds until all have passed, busy share of each station's servers), with gamma-distributed times."""
    draw = random.Random(seed)
    waiting_at = [0] * len(stations)
    free = list(servers)
    busy = [0.0] * len(stations)
    events: list[tuple[float, int, int]] = []
    now, started, number, done = 0.0, 0, 0, 0

    def serve(at: int) -> None:
        nonlocal number
        while free[at] and waiting_at[at]:
            free[at] -= 1
            waiting_at[at] -= 1
            cv, mean = stations[at].cv, stations[at].seconds
            seconds = draw.gammavariate(1 / cv**2, mean * cv**2) if cv else mean
            busy[at] += seconds
            number += 1
            heapq.heappush(events, (now + seconds, number, at))

    started = waiting_at[0] = min(in_flight, trajectories)
    serve(0)
    while events:
        now, _, at = heapq.heappop(events)
        free[at] += 1
        if at + 1 < len(stations):
            waiting_at[at + 1] += 1
            serve(at + 1)
        else:
            done += 1
            if started < trajectories:
                started += 1
                waiting_at[0] += 1
                serve(0)
        serve(at)
    assert done == trajectories
    return now, [time / n / now for time, n in zip(busy, servers, strict=True)]


def simulated(made: Plan, trajectories: int, seed: int = 0) -> tuple[float, list[float]]:
    """(days for `trajectories`, busy shares). Long runs are a sample of SIMULATED, scaled."""
    sample = min(trajectories, SIMULATED)
    servers = [n * s.servers for n, s in zip(made.pods, made.system.stations, strict=True)]
    seconds, busy = simulate(made.system.stations, servers, made.in_flight, sample, seed)
    return seconds * trajectories / sample / DAY, busy


def table() -> str:
    """The page's table."""
    lines = [
        "| system | trajectories | within | simulator | policy | world model | trainer | in flight | simulated | busiest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for system in (EMBEDDED, FULL):
        for trajectories, days in GOALS:
            made = plan(system, trajectories / (days * DAY))
            took, busy = simulated(made, trajectories)
            share, name = max((share, s.name) for share, s in zip(busy, system.stations, strict=True))
            cells = [system.name, f"{trajectories:,}", f"{days:g} d", made.pods[0], made.policies, made.pods[1], made.pods[2]]
            cells += [f"{made.in_flight:,}", f"{took:.2g} d" if took < 0.1 else f"{took:.1f} d", f"{name}, {share:.0%}"]
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def demo_seconds() -> float:
    """What the model says of the main job: one pod each, eight in flight."""
    return simulate(EMBEDDED.stations, [s.servers for s in EMBEDDED.stations], 8, DEMO)[0]


def run() -> list[dict[str, object]]:
    """For `python -m bench`: the model beside the one run that it can be held against."""
    return [{"name": "main job by the queueing model (measured: 197 s)", "value": demo_seconds(), "unit": "s", "ratio": ""}]


def rewritten(page: str) -> str:
    """`page` with its table as this makes it, and what the model says of the main job."""
    page = re.sub(r"(?<=<!-- table -->\n).*?(?=\n<!-- end -->)", lambda _: table(), page, flags=re.DOTALL)
    return re.sub(r"(?<=the model says )\d+ s", f"{demo_seconds():.0f} s", page)


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
    print(table())
