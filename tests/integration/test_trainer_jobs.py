"""Jobs through the job runner and a real coordinator on small gRPC doors: rollout, imagine, evaluate; Redis killed under them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from services.runtime.artifacts import ArtifactStore
from services.runtime.jobs import Job, JobStore
from services.runtime.messages import JOBS, ROLLOUT_REQUESTS, JobRequest, RolloutRequest
from services.runtime.streams import connect
from services.trainer.consume import KeptConsumer, StoppingError
from services.trainer.jobs import JobRunner
from services.trainer.ledger import Ledger, finished_key
from services.trainer.rollout import Coordinator
from services.trainer.settings import TrainerSettings
from tests.processes import running_valkey, wait_for
from tests.trainer_fakes import FakePolicy, FakeSimulator, Recorded, make_adapters, serving
from tests.vla_server import make_zoo
from world2act.models.adapters import Adapters
from world2act.splits import Split
from world2act.types import Clip, M

pytestmark = pytest.mark.integration


class ImagineOnly(Recorded):
    """Recorded imaginations beside a real coordinator: a start frame has no metadata, so its targets are drawn for one task."""

    def __init__(self, client: redis.Redis, artifacts: str) -> None:
        super().__init__(client, artifacts)
        self._threads = self._threads[1:]
        self.asked: list[Any] = []

    def _imagine(self, request: Any) -> None:
        self.asked.append(request)
        from services.runtime.messages import ImagineResult, imagined
        from services.runtime.streams import publish

        videos = [self.store.put(f"video {i}".encode(), "mp4") for i in range(len(request.skills))] if request.video else []
        answer = ImagineResult(id=request.id, reply=request.reply, artifact=request.starts, videos=videos)
        publish(self.client, imagined(request.reply), answer)


class Rig:
    """Coordinator and job runner in threads of this process, each with its own connection, as in the services."""

    def __init__(self, url: str, settings: TrainerSettings) -> None:
        self.settings, self.stop = settings, threading.Event()
        self.client = connect(url)
        self.jobs = JobStore(self.client)
        self.coordinator = Coordinator(settings, connect(url), self.stop)
        self.runner = JobRunner(settings, connect(url), self.stop)
        self._threads = [
            threading.Thread(target=self._consume, args=(ROLLOUT_REQUESTS, RolloutRequest, self.coordinator)),
            threading.Thread(target=self._consume, args=(JOBS, JobRequest, self.runner)),
        ]

    def _consume(self, stream: str, model: Any, target: Any) -> None:
        consumer: KeptConsumer[Any] = KeptConsumer(
            target.client, stream, "test", "a", model, claim_ms=2000, retryable=(StoppingError,), buried=target.buried
        )
        consumer.run(target.handle, self.stop)

    def __enter__(self) -> Rig:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(20)

    def ended(self, job: Job, seconds: float = 30) -> Job:
        def done() -> bool:
            found = self.jobs.get(job.id)
            return found is not None and found.status in ("succeeded", "failed", "cancelled")

        wait_for(done, seconds, "the job ends")
        found = self.jobs.get(job.id)
        assert found is not None
        return found

    def run(self, kind: str, **params: Any) -> Job:
        return self.ended(self.jobs.create(kind, params))


@contextmanager
def make_rig(url: str, folder: Path, simulator: FakeSimulator, policy: FakePolicy) -> Iterator[Rig]:
    make_adapters(folder)
    with serving(simulator, policy) as (sim, vla):
        settings = TrainerSettings(
            artifacts_url=f"file://{folder}/artifacts",
            zoo=folder,
            simulator_addresses=sim,
            vla_address=vla,
            in_flight=3,
            data_root=folder / "data",
        )
        with Rig(url, settings) as rig:
            yield rig


@pytest.fixture
def rig(valkey_server: Any, valkey: redis.Redis, tmp_path: Path) -> Iterator[Rig]:
    with make_rig(valkey_server.url, tmp_path, FakeSimulator(), FakePolicy()) as rig:
        yield rig


def test_evaluate_says_what_was_left_to_the_base(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakePolicy, "unseen", ["pick up the puck and place it at the goal"])
    Ledger(rig.client).publish_version("ns", 1, rig.coordinator.artifacts.put(b"bundle", "safetensors"))
    job = rig.run("evaluate", tasks=["reach"], episodes=1, namespace="ns")
    assert job.status == "succeeded", job.error
    assert [p["unseen"] for p in job.result["policies"]] == [[], ["reach"]]
    job = rig.run("rollout", task="reach", indices=[4], mode="execute", namespace="ns")
    assert job.result["rollouts"][0]["unseen"] and job.result["rollouts"][0]["version"] == 1


def test_evaluate_matches_scenes_and_compares(rig: Rig) -> None:
    name = rig.coordinator.artifacts.put(b"bundle", "safetensors")
    Ledger(rig.client).publish_version("ns", 1, name)
    job = rig.run("evaluate", tasks=["reach", "pick-place"], episodes=3, namespace="ns")
    assert job.status == "succeeded", job.error
    result = job.result
    assert [p["name"] for p in result["policies"]] == ["base", "ns/1"] and len(result["episodes"]) == 2 * 2 * 3
    scenes = [{(e["task"], e["index"]) for e in result["episodes"] if e["policy"] == p} for p in ("base", "ns/1")]
    assert scenes[0] == scenes[1] and len(scenes[0]) == 6
    assert {e["version"] for e in result["episodes"] if e["policy"] == "ns/1"} == {1}
    overall = result["rows"][-1]
    assert overall["task"] == "all" and overall["episodes"] == 6 and overall["base"]["rate"] == 1.0
    assert overall["mcnemar"] == {"gained": 0, "lost": 0, "p": 1.0} and 0.5 < overall["base"]["low"] < 1.0
    assert overall["difference"]["value"] == 0.0 and overall["difference"]["low"] < 0.0 < overall["difference"]["high"]
    assert "McNemar" in result["table"]


def test_rollout_imagines_and_executes_the_same_states(rig: Rig) -> None:
    with ImagineOnly(rig.client, rig.settings.artifacts_url) as imagine:
        job = rig.run("rollout", task="pick-place", indices=[4, 9], mode="both", version=0, video=True)
    assert job.status == "succeeded", job.error
    first, second = job.result["rollouts"]
    assert (first["index"], second["index"]) == (4, 9) and first["success"] and first["chunks"] == 4
    store = ArtifactStore(rig.settings.artifacts_url)
    assert store.exists(first["executed_video"]) and store.get(second["imagined_video"]) == b"video 1"
    (request,) = imagine.asked
    assert len(request.skills) == 2 and sum(s.chunks for s in request.skills[0]) == 6 and request.video
    assert store.get_tensors(request.starts)["frames"].shape == (2, 16, 16, 3)
    assert first["skills"] == ["pick up the puck", "place the puck at the goal"]


def test_imagine_takes_skills_or_an_instruction(rig: Rig) -> None:
    with ImagineOnly(rig.client, rig.settings.artifacts_url) as imagine:
        job = rig.run("imagine", task="reach", index=2, skills=[{"prompt": "reach the goal", "chunks": 3}])
        other = rig.run("imagine", task="reach", instruction="open the drawer and then close it", video=False)
    assert job.status == other.status == "succeeded", job.error + other.error
    assert [(s.prompt, s.chunks) for s in imagine.asked[0].skills[0]] == [("reach the goal", 3)]
    assert len(other.result["skills"]) == 2 and job.result["imagined_video"]


@pytest.mark.parametrize(
    ("kind", "params", "words"),
    [
        ("evaluate", {"tasks": ["fly"], "version": 0}, "task: 'fly' is unknown"),
        ("evaluate", {"tasks": ["reach"], "namespace": "typo"}, "namespace: 'typo' has no published version"),
        ("rollout", {"task": "reach", "indices": [0], "namespace": "typo"}, "namespace: 'typo' has no published version"),
        ("rollout", {"task": "fly", "indices": [0], "mode": "imagine"}, "task: 'fly' is unknown"),
        ("rollout", {"task": "reach", "indices": [0], "mode": "execute", "namespace": "n", "version": 3}, "never published"),
        ("imagine", {"task": "reach", "instruction": "x" * 501}, "instruction: "),
        ("stage1", {"demos": "../.."}, "outside the data folder"),
    ],
)
def test_bad_jobs_fail_with_a_sentence(rig: Rig, kind: str, params: dict[str, Any], words: str) -> None:
    job = rig.run(kind, **params)
    assert job.status == "failed" and words in job.error and "Traceback" not in job.error


def test_a_job_that_ended_is_not_run_again(rig: Rig) -> None:
    job = rig.run("rollout", task="reach", indices=[0], mode="execute", video=False)
    before = rig.jobs.get(job.id)
    rig.runner.handle(JobRequest(id=job.id, kind="rollout", params=job.params))
    assert rig.jobs.get(job.id) == before
    rig.runner.handle(JobRequest(id="nobody", kind="rollout", params={}))


def test_redis_killed_under_a_job(tmp_path: Path) -> None:
    """The database is killed and started again in the middle: the job ends, every episode counted once."""
    simulator = FakeSimulator()
    with running_valkey(tmp_path / "valkey") as server, make_rig(server.url, tmp_path, simulator, FakePolicy()) as rig:
        job = rig.jobs.create("evaluate", {"tasks": ["reach"], "episodes": 60, "versions": [["default", 0]]})
        wait_for(lambda: rig.client.hlen(finished_key(job.id)) >= 5, 30, "some episodes are finished")
        server.kill()
        time.sleep(0.5)
        server.start()
        found = rig.ended(job, 60)
        assert found.status == "succeeded", found.error
        assert len(found.result["episodes"]) == 60 == rig.client.hlen(finished_key(job.id))
        assert rig.client.xlen(f"w2a:trajectories:{job.id}") == 60


def test_stage1_trains_adapters_that_load(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random world model, synthetic clips instead of demonstration files: the job's own part, not the method."""
    folder = rig.settings.zoo
    worldmodel = make_zoo(folder).worldmodel
    (folder / "data" / "demos").mkdir(parents=True)
    rng = np.random.default_rng(0)

    def clips(root: Path, split: Split) -> Iterator[Clip]:
        assert root == (folder / "data" / "demos").resolve()
        for index in range(17):
            frames = rng.integers(0, 255, (1 + M, 128, 128, 3)).astype(np.uint8)
            actions = rng.uniform(-1, 1, (1, M, 4)).astype(np.float32)
            yield Clip("reach", "reach the goal", frames, actions, np.ones(1, bool), split.value, index)

    monkeypatch.setattr("world2act.stage1.read_clips", clips)
    job = rig.run("stage1", demos="demos", steps=3, seed=2)
    assert job.status == "succeeded", job.error
    path = folder / "made.safetensors"
    path.write_bytes(ArtifactStore(rig.settings.artifacts_url).get(job.result["artifact"]))
    adapters = Adapters.load(path)
    adapters.check_worldmodel(worldmodel)
    assert adapters.hash == job.result["hash"] and adapters.card["seed"] == 2
    assert job.result["clips"] == {"worldmodel": 17, "validation": 17} and len(job.result["history"]) == 3
    assert [data["step"] for _, name, data in rig.jobs.events(job.id) if name == "metrics"] == [1, 2, 3]
