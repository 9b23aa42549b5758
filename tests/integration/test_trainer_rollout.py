"""The rollout coordinator on a real Valkey and small gRPC doors: what it records, repeats, counts and refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from services.runtime.jobs import JobStore
from services.runtime.messages import (
    IMAGINE_REQUESTS,
    ROLLOUT_REQUESTS,
    ImagineRequest,
    RolloutRequest,
    RolloutResult,
    trajectories,
)
from services.runtime.rpc import start_server
from services.runtime.streams import connect, publish, read_all
from services.trainer.consume import KeptConsumer, StoppingError
from services.trainer.context import JobContext
from services.trainer.doors import Simulator
from services.trainer.ledger import Ledger
from services.trainer.rollout import Coordinator, Lease
from services.trainer.settings import TrainerSettings
from tests.processes import free_port, wait_for
from tests.trainer_fakes import FakePolicy, FakeSimulator, make_adapters, serving
from world2act.data.video import decode_mp4

pytestmark = pytest.mark.integration


class Rig:
    """A coordinator and the doors behind it."""

    def __init__(self, coordinator: Coordinator, simulator: FakeSimulator, policy: FakePolicy, client: redis.Redis) -> None:
        self.coordinator, self.simulator, self.policy, self.client = coordinator, simulator, policy, client
        self.store = coordinator.artifacts

    def run(self, **changes: Any) -> RolloutResult:
        request = make_request(**changes)
        self.coordinator.handle(request)
        return self.results(request.job)[-1]

    def results(self, job: str = "job") -> list[RolloutResult]:
        return [r for _, r in read_all(self.client, trajectories(job), RolloutResult)]


def make_request(**changes: Any) -> RolloutRequest:
    values = {"id": "e1", "job": "job", "task": "pick-place", "split": "posttrain", "index": 3, **changes}
    return RolloutRequest.model_validate(values)


def make_settings(tmp_path: Path, simulator: str, policy: str, **changes: Any) -> TrainerSettings:
    values = {"artifacts_url": f"file://{tmp_path}/artifacts", "zoo": tmp_path, **changes}
    return TrainerSettings(simulator_addresses=simulator, vla_address=policy, **values)


@pytest.fixture
def rig(valkey: redis.Redis, tmp_path: Path) -> Iterator[Rig]:
    simulator, policy = FakeSimulator(), FakePolicy()
    make_adapters(tmp_path)
    with serving(simulator, policy) as (sim, vla):
        yield Rig(Coordinator(make_settings(tmp_path, sim, vla), valkey, threading.Event()), simulator, policy, valkey)


def test_an_episode_is_recorded_as_it_was_executed(rig: Rig) -> None:
    result = rig.run(imagine=True, round=2, version=0, max_chunks=4)
    assert (result.success, result.chunks, result.error, result.round, result.version) == (True, 4, "", 2, 0)
    arrays, metadata = rig.store.get_tensors(result.trajectory), rig.store.get_metadata(result.trajectory)
    assert arrays["frames"].shape == (4, 16, 16, 3) and arrays["states"].shape == (4, 4)
    assert arrays["base"].shape == arrays["executed"].shape == (4, 4, 4)
    # Frame and state k are what was seen before chunk k: the primary camera top-left, wrist top-right, black below.
    assert [int(f[0, 0, 0]) for f in arrays["frames"]] == [10, 20, 30, 40] and int(arrays["frames"][1, 0, 8, 0]) == 21
    assert not arrays["frames"][:, 8:].any() and arrays["states"][0, 0] == 3
    assert json.loads(metadata["prompts"]) == ["pick up the puck"] * 3 + ["place the puck at the goal"]
    assert metadata["split"] == "posttrain" and metadata["key"] == "e1" and "success" not in metadata
    (_, imagine), *rest = list(read_all(rig.client, IMAGINE_REQUESTS, ImagineRequest))
    assert not rest and imagine.id == result.imagine_id and imagine.starts == result.trajectory
    assert [row[0].prompt for row in imagine.skills] == json.loads(metadata["prompts"])
    assert all(len(row) == 1 and row[0].chunks == 1 for row in imagine.skills)
    assert not rig.simulator.open and not rig.client.smembers(rig.coordinator.leases), "the environment is given back"


def test_clips_of_two_chunks_are_asked_for_from_every_second_state(rig: Rig) -> None:
    result = rig.run(imagine=True, horizon=2, version=0, max_chunks=3)
    ((_, imagine),) = read_all(rig.client, IMAGINE_REQUESTS, ImagineRequest)
    assert imagine.id == result.imagine_id and imagine.starts != result.trajectory and not imagine.latents
    assert [int(f[0, 0, 0]) for f in rig.store.get_tensors(imagine.starts)["frames"]] == [10, 30]
    assert [(row[0].prompt, row[0].chunks) for row in imagine.skills] == [("pick up the puck", 2)] * 2


def test_success_ends_an_episode_only_where_nothing_learns_from_it(rig: Rig) -> None:
    watched, learned = rig.run(id="watched"), rig.run(id="learned", stop_at_success=False, max_chunks=6)
    assert (watched.success, watched.chunks) == (True, 4)
    assert (learned.success, learned.chunks) == (True, 6), "the length would tell the learner of success"


def test_environments_of_a_killed_coordinator_are_given_back(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # a kill: neither the simulator nor Redis hears of the end
        patch.setattr(Simulator, "close", lambda self: None)
        patch.setattr(Lease, "returned", lambda self: None)
        rig.run()
    assert len(rig.simulator.open) == 1
    rig.coordinator.return_leases()
    assert not rig.simulator.open and not rig.client.smembers(rig.coordinator.leases)


def test_noise_is_seeded_bounded_and_spares_the_gripper(rig: Rig) -> None:
    one, same, other = (
        rig.store.get_tensors(rig.run(id=f"n{i}", noise=0.6, seed=seed).trajectory) for i, seed in enumerate((5, 5, 6))
    )
    assert np.array_equal(one["executed"], same["executed"]) and not np.array_equal(one["executed"], other["executed"])
    offset = one["executed"] - one["base"]
    assert np.abs(offset[..., 3]).max() == 0 and np.abs(offset[..., :3]).max() > 0
    assert np.ptp(offset, axis=1).max() < 1e-6, "one offset for the whole chunk"
    strong = rig.store.get_tensors(rig.run(id="n3", noise=3.0, seed=1).trajectory)
    assert np.abs(strong["executed"]).max() <= 1.0


def test_an_episode_counts_once_however_often_it_is_delivered(rig: Rig) -> None:
    for _ in range(3):
        rig.coordinator.handle(make_request(imagine=True))
    assert len(rig.results()) == 1 and rig.simulator.resets == 1
    assert not rig.coordinator.ledger.finish(rig.results()[0]), "a second publisher of the same episode loses"
    assert len(rig.results()) == 1 and rig.client.xlen(IMAGINE_REQUESTS) == 1


def test_the_newest_version_is_pinned_and_loaded_on_demand(rig: Rig) -> None:
    ledger = Ledger(rig.client)
    name = rig.store.put(b"bundle", "safetensors")
    ledger.publish_version("ns", 1, name)
    ledger.publish_version("ns", 2, name)
    result = rig.run(namespace="ns", version=-1)
    assert result.version == 2 and rig.policy.loaded == {("ns", 2): name} and set(rig.policy.acted) == {("ns", 2)}
    assert np.allclose(rig.store.get_tensors(result.trajectory)["executed"], 0.12)
    missing = rig.run(id="e2", namespace="ns", version=9)
    assert "version: 9" in missing.error and "never published" in missing.error
    assert rig.run(id="e3", namespace="empty", version=-1).version == 0
    rig.policy.refuses = "the residual was trained beside base policy f091, but the one in use is 84fb"
    refused = rig.run(id="e4", namespace="ns", version=1)
    fits = f"version: 1 of policy namespace 'ns' does not fit: {rig.policy.refuses}; version 0 is the base alone"
    assert refused.error == fits and rig.run(id="e5", namespace="ns", version=0).success


def test_video_shows_every_frame(rig: Rig) -> None:
    result = rig.run(video=True)
    assert decode_mp4(rig.store.get(result.video)).shape == (1 + 4 * 4, 8, 16, 3), "the black lower half is left out"


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"task": "fly"}, "task: 'fly' is unknown"), ({"max_chunks": 1, "version": 4}, "version: 4"), ({"noise": 1.0}, "noise: ")],
)
def test_a_wrong_request_is_answered_with_its_reason(
    valkey: redis.Redis, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with serving(FakeSimulator(), FakePolicy()) as (sim, vla):  # no adapters here: the unit of noise is unknown
        coordinator = Coordinator(make_settings(tmp_path, sim, vla), valkey, threading.Event())
        coordinator.handle(make_request(**changes))
    (_, result) = next(read_all(valkey, trajectories("job"), RolloutResult))
    assert words in result.error and not result.trajectory


def test_an_episode_survives_doors_that_are_away(valkey: redis.Redis, tmp_path: Path) -> None:
    sim_port, vla_port = free_port(), free_port()
    settings = make_settings(tmp_path, f"127.0.0.1:{sim_port}", f"127.0.0.1:{vla_port}")
    coordinator = Coordinator(settings, valkey, threading.Event())
    thread = threading.Thread(target=coordinator.handle, args=(make_request(),))
    thread.start()
    from services.runtime.generated.policy_pb2_grpc import add_PolicyServicer_to_server
    from services.runtime.generated.simulator_pb2_grpc import add_SimulatorServicer_to_server

    simulator = FakeSimulator()
    sim, _, _ = start_server(lambda s: add_SimulatorServicer_to_server(simulator, s), f"127.0.0.1:{sim_port}")
    wait_for(lambda: simulator.resets > 0, 10, "the coordinator found the simulator")
    assert not list(read_all(valkey, trajectories("job"), RolloutResult)), "without a policy there is no result"
    wait_for(lambda: str(vla_port) in coordinator.jobs.waits_for("job"), 10, "the job says what it waits for")
    job = coordinator.jobs.create("rollout", {})
    valkey.rename("w2a:job:job:waits", f"w2a:job:{job.id}:waits")
    JobContext(job.id, settings, valkey, threading.Event()).progress(0.0, "0 of 1")
    told = coordinator.jobs.get(job.id)
    assert told is not None and told.message.startswith("0 of 1, waits: ") and told.message.endswith("(UNAVAILABLE)")
    vla, _, _ = start_server(lambda s: add_PolicyServicer_to_server(FakePolicy(), s), f"127.0.0.1:{vla_port}")
    thread.join(20)
    sim.stop(0).wait()
    vla.stop(0).wait()
    (_, result) = next(read_all(valkey, trajectories("job"), RolloutResult))
    assert result.success and not result.error and not coordinator.jobs.waits_for("job")


def test_stopping_and_cancelling_end_a_wait(valkey: redis.Redis, tmp_path: Path) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    stop = threading.Event()
    coordinator = Coordinator(make_settings(tmp_path, nowhere, nowhere), valkey, stop)
    jobs = JobStore(valkey)
    job = jobs.create("posttrain", {})
    thread = threading.Thread(target=coordinator.handle, args=(make_request(job=job.id),))
    thread.start()
    jobs.cancel(job.id)
    thread.join(10)
    (_, result) = next(read_all(valkey, trajectories(job.id), RolloutResult))
    assert result.error == "cancelled"
    stop.set()
    with pytest.raises(StoppingError):
        coordinator.handle(make_request(id="other"))
    assert not coordinator.ledger.finished("job", "other"), "it stays for the next process"


def test_a_request_in_the_dead_letters_is_answered(valkey: redis.Redis, tmp_path: Path) -> None:
    coordinator = Coordinator(make_settings(tmp_path, "127.0.0.1:1", "127.0.0.1:1"), valkey, threading.Event())
    consumer: KeptConsumer[RolloutRequest] = KeptConsumer(
        valkey, ROLLOUT_REQUESTS, "rollout", "a", RolloutRequest, claim_ms=1, max_deliveries=1, buried=coordinator.buried
    )
    consumer.ensure_group()
    publish(valkey, ROLLOUT_REQUESTS, make_request())
    valkey.xadd(ROLLOUT_REQUESTS, {"json": "{poison"})
    assert len(consumer.fetch()) == 1
    wait_for(lambda: consumer.fetch(block_ms=10) == [] and valkey.xpending(ROLLOUT_REQUESTS, "rollout")["pending"] == 0, 5)
    (_, result) = next(read_all(valkey, trajectories("job"), RolloutResult))
    assert "gave up" in result.error


def test_a_long_episode_is_not_taken_over(valkey_server: Any, valkey: redis.Redis) -> None:
    publish(valkey, ROLLOUT_REQUESTS, make_request())
    handled: list[str] = []
    stop = threading.Event()

    def slow(request: RolloutRequest) -> None:
        handled.append(request.id)
        stop.wait(1.2)

    consumers = [
        KeptConsumer(connect(valkey_server.url), ROLLOUT_REQUESTS, "rollout", name, RolloutRequest, claim_ms=300) for name in "ab"
    ]
    consumers[0].ensure_group()
    threads = [threading.Thread(target=c.run, args=(slow, stop)) for c in consumers]
    for thread in threads:
        thread.start()
    wait_for(lambda: valkey.xpending(ROLLOUT_REQUESTS, "rollout")["pending"] == 0 and bool(handled), 10)
    stop.set()
    for thread in threads:
        thread.join()
    assert handled == ["e1"]
