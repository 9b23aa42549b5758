"""Post-training with every real process, each of them killed once with SIGKILL on the way: every episode counts once.

Weights are random: this is about processes, queues and restarts. What the method does to a policy is measured elsewhere.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from services.cli.settings import CliSettings
from services.cli.specs import service_specs
from services.cli.supervisor import Supervisor, busy_ports
from services.runtime.artifacts import ArtifactStore
from services.runtime.jobs import Job, JobStore
from services.runtime.messages import DEAD
from services.runtime.streams import connect
from services.trainer.ledger import finished_key
from tests.processes import wait_for
from tests.vla_server import make_zoo
from world2act.bundle import Bundle
from world2act.signature import name_of

pytestmark = pytest.mark.integration
VICTIMS = ("simulator", "rollout", "triton", "vla", "gateway", "trainer", "segmenter", "worldmodel", "redis")
PARAMS: dict[str, Any] = {
    "tasks": ["reach", "drawer-close"],
    "mode": "asynchronous",
    "eta": 1,
    "rounds": 1,
    "episodes": 8,
    "steps": 30,
}
EPISODES = 2 * 2 * 8
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PACE = EPISODES // (len(VICTIMS) + 1)
"""A service is killed each time this many more episodes are finished."""


def settings_on_free_ports(folder: Path) -> CliSettings:
    """Settings whose every port is free, everything in `folder`."""
    for _ in range(50):
        values = {"run_dir": folder / "run", "zoo": folder / "zoo", "artifacts_url": f"file://{folder}/artifacts"}
        settings = CliSettings(port_offset=random.randrange(1_000, 15_000, 10), **values).shifted()
        if not busy_ports(service_specs(settings), settings.host):
            return settings
    raise AssertionError("no free ports")


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Supervisor, CliSettings, list[str]]]:
    """Every service; the policy server loads only what this trainer has signed."""
    (tmp_path / "key.pem").write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "key.pub").write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    monkeypatch.setenv("W2A_TRAINER_SIGNING_KEY_FILE", str(tmp_path / "key.pem"))
    monkeypatch.setenv("W2A_VLA_TRUSTED_KEYS", str(tmp_path / "key.pub"))
    (tmp_path / "zoo").mkdir()
    make_zoo(tmp_path / "zoo")
    settings = settings_on_free_ports(tmp_path)
    events: list[str] = []
    supervisor = Supervisor(
        service_specs(settings),
        tmp_path / "run",
        start_timeout_s=240,
        on_event=lambda name, text: events.append(f"{name}: {text}"),
    )
    with supervisor:
        yield supervisor, settings, events


def kill(supervisor: Supervisor, name: str) -> None:
    """SIGKILL to the running process of service `name`."""
    process = supervisor.services[name].process
    assert process is not None, f"{name} does not run"
    os.kill(process.pid, signal.SIGKILL)


@pytest.mark.timeout(900)
def test_kill_every_service_once(stack: tuple[Supervisor, CliSettings, list[str]]) -> None:
    supervisor, settings, events = stack
    client = connect(settings.redis_url)
    jobs = JobStore(client)
    job = jobs.create("posttrain", PARAMS)
    finished = finished_key(job.id)
    for number, victim in enumerate(VICTIMS, start=1):
        wait_for(lambda n=number: client.hlen(finished) >= n * PACE, 240, f"{number * PACE} episodes; {events[-3:]}")
        wait_for(lambda v=victim: supervisor.services[v].state == "ready", 120, f"{victim} is ready")
        kill(supervisor, victim)
        wait_for(lambda v=victim: supervisor.services[v].restarts >= 1, 20, f"{victim} is restarted")

    def ended() -> Job | None:
        found = jobs.get(job.id)
        return found if found is not None and found.status in ("succeeded", "failed", "cancelled") else None

    wait_for(lambda: ended() is not None, 300, "the job ends")
    found = ended()
    assert found is not None and found.status == "succeeded", found and found.error
    restarts = {row["name"]: row["restarts"] for row in supervisor.rows()}
    assert all(restarts[name] >= 1 for name in VICTIMS), restarts

    assert found.result["episodes"] == found.result["planned"] == EPISODES == client.hlen(finished)
    names: dict[str, list[str]] = {}
    after = "0"
    while batch := list(jobs.events(job.id, after)):
        after = batch[-1][0]
        for _, name, data in batch:
            names.setdefault(name, []).append(str(data.get("key")))
    for name, count in (("episode", EPISODES), ("imagined", EPISODES), ("round", 2)):
        assert len(names[name]) == len(set(names[name])) == count, name
    assert max(map(int, found.result["staleness"])) <= 1 and sum(found.result["staleness"].values()) == EPISODES
    bundle = Bundle.from_bytes(ArtifactStore(settings.artifacts_url).get(found.result["artifact"]))
    assert bundle.version == found.result["version"] == 2 and bundle.signed_by == name_of(KEY.public_key())
    assert not client.exists(DEAD) or client.xlen(DEAD) == 0, "nothing went to the dead letters"
    print(f"overlap {found.result['overlap']}, seconds {found.result['seconds']}, restarts {restarts}, at {time.time():.0f}")
