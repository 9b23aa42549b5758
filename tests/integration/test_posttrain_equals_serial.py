"""The distributed learner equals the serial one to the bit; every episode counts once; a killed trainer goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis
import torch

from services.runtime.artifacts import ArtifactStore
from services.runtime.jobs import Job, JobStore
from services.runtime.messages import POLICY_VERSIONS, JobRequest, PolicyVersion
from services.runtime.streams import read_all
from services.trainer.jobs import JobRunner
from services.trainer.ledger import Ledger
from services.trainer.params import PosttrainParams
from services.trainer.posttrain import stage2_settings
from services.trainer.settings import TrainerSettings
from tests.processes import ValkeyProcess, free_port, wait_for
from tests.trainer_fakes import (
    BASE_HASH,
    LATENT,
    FakePolicy,
    FakeSimulator,
    Recorded,
    make_adapters,
    recorded_targets,
    recorded_trajectory,
    serving,
)
from world2act.bundle import Bundle
from world2act.models.adapters import Adapters
from world2act.schedule import plan
from world2act.stage2 import Learner, Stage2Dataset, Targets, aligned, post_train
from world2act.types import Trajectory

pytestmark = pytest.mark.integration
PARAMS: dict[str, Any] = {"tasks": ["reach", "drawer-open"], "episodes": 3, "rounds": 2, "steps": 4, "seed": 1}
EPISODES = 2 * 3 * 3


def serial(adapters: Adapters, params: dict[str, Any]) -> Bundle:
    """Stage 2 in one process, without any service, on the recorded data."""

    def targets(trajectory: Trajectory) -> Targets:
        found = recorded_targets(trajectory.task, trajectory.index, len(trajectory.frames))
        return aligned(found, adapters, trajectory) if settings.alignment == "monotone" else found

    settings = stage2_settings(PosttrainParams.model_validate(params))
    learner = Learner(adapters, settings, params["seed"], 4, LATENT)
    specs = plan(settings, params["tasks"], params["seed"])
    post_train(
        specs,
        lambda members, _: [recorded_trajectory(s.task, s.index, s.key) for s in members],
        targets,
        learner,
        Stage2Dataset(adapters, settings),
    )
    return learner.bundle(BASE_HASH)


def assert_equal_bits(one: Bundle, other: Bundle) -> None:
    a, b = one.policy.state_dict(), other.policy.state_dict()
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"weights differ in {different}"
    assert one.version == other.version and one.origin == other.origin


class Rig:
    """A job runner in this process, with recorded neighbours."""

    policy: FakePolicy

    def __init__(self, client: redis.Redis, folder: Path, sim: str, vla: str, adapters: Adapters) -> None:
        self.client, self.adapters = client, adapters
        self.settings = TrainerSettings(
            artifacts_url=f"file://{folder}/artifacts",
            zoo=folder,
            simulator_addresses=sim,
            vla_address=vla,
            metrics_every=2,
            trainer_device="cpu",
            in_flight=5,
        )
        self.jobs = JobStore(client)
        self.stop = threading.Event()

    def recorded(self, **options: Any) -> Recorded:
        return Recorded(self.client, self.settings.artifacts_url, **options)

    def run(self, **changes: Any) -> Job:
        job = self.jobs.create("posttrain", {**PARAMS, **changes})
        JobRunner(self.settings, self.client, self.stop).handle(
            JobRequest.model_validate(job.model_dump(include={"id", "kind", "params"}))
        )
        found = self.jobs.get(job.id)
        assert found is not None
        return found

    def bundle(self, result: dict[str, Any]) -> Bundle:
        return Bundle.from_bytes(ArtifactStore(self.settings.artifacts_url).get(result["artifact"]))

    def events(self, job: str) -> list[tuple[str, dict[str, Any]]]:
        return [(name, data) for _, name, data in self.jobs.events(job)]


@pytest.fixture
def rig(valkey: redis.Redis, tmp_path: Path) -> Any:
    adapters = make_adapters(tmp_path)
    policy = FakePolicy(adapters.hash)
    with serving(FakeSimulator(), policy) as (sim, vla):
        rig = Rig(valkey, tmp_path, sim, vla, adapters)
        rig.policy = policy
        yield rig


@pytest.mark.parametrize("mode", ["serial", "synchronous", "asynchronous"])
def test_distributed_equals_serial_to_the_bit(rig: Rig, mode: str) -> None:
    with rig.recorded(seed=3, duplicates=True) as recorded:
        job = rig.run(mode=mode)
    assert job.status == "succeeded", job.error
    assert_equal_bits(rig.bundle(job.result), serial(rig.adapters, PARAMS))
    assert job.result["episodes"] == job.result["planned"] == EPISODES == len(recorded.executed)
    assert set(recorded.executed.values()) == {1} and not recorded.stopping, "success would show in an episode's length"
    eta = {"asynchronous": 1}.get(mode, 0)
    assert all(round_ - version <= eta for round_, version in recorded.versions.values())
    assert sum(job.result["staleness"].values()) == EPISODES and max(map(int, job.result["staleness"])) <= eta
    if mode != "asynchronous":
        assert all(version == round_ for round_, version in recorded.versions.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"closed_loop_every": 2, "decode_weight": 1.0, "cosine_weight": 0.5, "residual_penalty": 0.1},
        {"target": "open-loop", "alignment": "monotone", "contrastive_weight": 0.1, "contrastive.form": "marginal"},
    ],
)
def test_other_targets_and_objectives_equal_serial_too(rig: Rig, settings: dict[str, Any]) -> None:
    """Pixels, because these targets bring no latents and the rig has no world model to encode with."""
    params = {**PARAMS, "episodes": 2, "rounds": 1, "steps": 2}
    params["settings"] = {**settings, "vision": "pixels", "episodes_per_step": 2}
    with rig.recorded(seed=5, duplicates=True):
        job = rig.run(**params)
    assert job.status == "succeeded", job.error
    assert_equal_bits(rig.bundle(job.result), serial(rig.adapters, params))
    other = {**params["settings"], "alignment": "same-index", "cosine_weight": 0.0}
    with pytest.raises(AssertionError, match="weights differ"):
        assert_equal_bits(rig.bundle(job.result), serial(rig.adapters, {**params, "settings": other}))


def test_order_of_arrival_does_not_matter(rig: Rig) -> None:
    results = []
    for seed in (1, 2):
        with rig.recorded(seed=seed, pause=0.002) as _:
            results.append(rig.run(mode="sync").result)
        rig.client.flushall()
    assert_equal_bits(rig.bundle(results[0]), rig.bundle(results[1]))


def test_events_and_versions_tell_the_whole_story(rig: Rig) -> None:
    with rig.recorded(duplicates=True):
        job = rig.run(mode="asynchronous", eta=2)
    events = rig.events(job.id)
    count = {name: sum(n == name for n, _ in events) for name in ("episode", "imagined", "round", "metrics")}
    assert count == {"episode": EPISODES, "imagined": EPISODES, "round": 3, "metrics": 6}
    assert len({data["key"] for name, data in events if name == "episode"}) == EPISODES
    rounds = [data for name, data in events if name == "round"]
    assert [r["trajectories"] for r in rounds] == [6, 12, 18] and [r["updates"] for r in rounds] == [4, 8, 12]
    assert all(r["started"] <= r["finished"] and {"loss", "cosine", "residual_norm"} <= r.keys() for r in rounds)
    published = [v for _, v in read_all(rig.client, POLICY_VERSIONS, PolicyVersion)]
    assert [(v.namespace, v.version) for v in published] == [(job.id, 1), (job.id, 2), (job.id, 3)]
    assert Ledger(rig.client).newest(job.id) == 3 and Ledger(rig.client).artifact(job.id, 3) == job.result["artifact"]
    assert job.result["seconds"].keys() == {"generation", "execution", "optimisation", "wall"} and job.result["overlap"] > 0


def test_an_episode_of_another_split_is_refused(rig: Rig) -> None:
    with rig.recorded() as recorded:
        recorded.split = "evaluation"
        job = rig.run(mode="sync")
    assert job.status == "failed" and "posttrain" in job.error and "evaluation" in job.error
    refused = rig.run(split="evaluation")
    assert refused.status == "failed" and refused.error.startswith("split: ")


def test_bad_jobs_fail_with_a_sentence(rig: Rig) -> None:
    assert "tasks: fly" in rig.run(tasks=["fly"]).error
    assert "eta: " in rig.run(mode="sync", eta=2).error
    assert "stpes: " in rig.run(stpes=3).error
    assert "settings: bond: no such setting" in rig.run(settings={"bond": 1.0}).error
    Ledger(rig.client).publish_version("mine", 1, "sha256-" + "0" * 64 + ".safetensors")
    assert "namespace: 'mine'" in rig.run(namespace="mine").error


def test_weights_that_do_not_belong_together_are_refused(rig: Rig) -> None:
    rig.policy.worldmodel_hash = "c" * 64
    job = rig.run()
    assert job.status == "failed" and "trained on world model aaaaaaaaaaaa" in job.error and "cccccccccccc" in job.error
    rig.policy.worldmodel_hash, rig.policy.adapters_hash = "a" * 64, "d" * 64
    assert "the policy server has dddddddddddd" in rig.run().error
    (rig.settings.zoo / "adapters.safetensors").unlink()
    assert "adapters.safetensors is missing" in rig.run().error


def test_a_cancelled_job_stops(rig: Rig) -> None:
    job = rig.jobs.create("posttrain", PARAMS)  # nobody executes: it would wait for ever
    request = JobRequest.model_validate(job.model_dump(include={"id", "kind", "params"}))
    thread = threading.Thread(target=JobRunner(rig.settings, rig.client, rig.stop).handle, args=(request,))
    thread.start()
    wait_for(lambda: (found := rig.jobs.get(job.id)) is not None and found.status == "running", 10)
    rig.jobs.cancel(job.id)
    thread.join(10)
    found = rig.jobs.get(job.id)
    assert found is not None and found.status == "cancelled"


def start_trainer(rig: Rig, server: ValkeyProcess, log: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "W2A_REDIS_URL": server.url,
        "W2A_ARTIFACTS_URL": rig.settings.artifacts_url,
        "W2A_ZOO": str(rig.settings.zoo),
        "W2A_SIMULATOR_ADDRESSES": rig.settings.simulator_addresses,
        "W2A_VLA_ADDRESS": rig.settings.vla_address,
        "W2A_METRICS_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    with log.open("ab") as out:
        return subprocess.Popen([sys.executable, "-m", "services.trainer"], env=environment, stdout=out, stderr=out)


def test_a_killed_trainer_goes_on_and_ends_with_the_same_bits(rig: Rig, valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    params = {**PARAMS, "mode": "sync", "steps": 40}
    job = rig.jobs.create("posttrain", params)
    processes = [start_trainer(rig, valkey_server, tmp_path / "trainer.log")]
    try:
        with rig.recorded(pause=0.02) as recorded:
            for version in (1, 2):  # kill it once after each of the first two rounds, in the middle of what comes next
                wait_for(lambda v=version: (Ledger(rig.client).newest(job.id) or 0) >= v, 150, f"version {version}")
                time.sleep(0.1)
                processes[-1].send_signal(signal.SIGKILL)
                processes[-1].wait()
                processes.append(start_trainer(rig, valkey_server, tmp_path / "trainer.log"))
            wait_for(lambda: rig.jobs.get(job.id).status == "succeeded", 150, "the job ends")
    finally:
        for process in processes:
            process.terminate()
            process.wait(60)
    found = rig.jobs.get(job.id)
    assert found is not None and found.result["episodes"] == EPISODES
    assert set(recorded.executed.values()) == {1} and len(recorded.executed) == EPISODES
    names = [name for name, _ in rig.events(job.id)]
    assert names.count("episode") == names.count("imagined") == EPISODES and names.count("round") == 3
    assert_equal_bits(rig.bundle(found.result), serial(rig.adapters, params))
