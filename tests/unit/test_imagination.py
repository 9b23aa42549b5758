"""The imagination worker and the code behind the Triton models, without Triton: a world model whose answers are known."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from services.runtime.artifacts import ArtifactStore
from services.runtime.messages import (
    DEAD,
    IMAGINE_REQUESTS,
    DeadLetter,
    ImagineRequest,
    ImagineResult,
    SkillPrompt,
    imagined,
)
from services.runtime.streams import backlog, publish, read_all
from services.worldmodel import worker as worker_module
from services.worldmodel.backbones import BackboneInfo, load_backbone
from services.worldmodel.client import Served, TritonFailedError, TritonRefusedError, TritonUnavailableError
from services.worldmodel.imagination import ServedChangedError, Task, imagine, read_task, row_seed
from services.worldmodel.serving import WorldModelServer, read_call
from services.worldmodel.settings import WorldModelSettings
from services.worldmodel.worker import GROUP, ImaginationWorker

INFO = BackboneInfo("fake", "wm", (4, 4, 3), 2, (1, 1, 2), 4, 24, 10.0)
SERVED = Served(INFO, "ad")


class FakeTriton:
    """Its frames count up: frame t of a clip is start + t; e_v of chunk k holds (start, chunk number, prompt length)."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, tuple[str, ...]]] = []
        self.seeds: list[int] = []
        self.errors: list[Exception] = []
        self.now = SERVED

    def served(self) -> Served:
        return self.now

    def imagine(
        self,
        start: np.ndarray,
        prompts: Sequence[str],
        seeds: Sequence[int],
        horizon: int,
        steps: int,
        guidance: float,
        wants: Sequence[str],
    ) -> tuple[dict[str, Any], str, str]:
        self.calls.append((len(start), horizon, tuple(wants)))
        self.seeds += seeds
        if self.errors:
            raise self.errors.pop(0)
        if "crash" in prompts:
            raise TritonFailedError("triton: Stub process is not healthy")
        if "too long" in prompts:
            raise TritonRefusedError("horizon: 25 is outside [1, 24]")
        if "bug" in prompts:
            raise KeyError("oops")
        first = start[:, 0, 0, 0].astype(np.float32)
        e_v = np.stack(
            [
                np.stack([np.array([f, k, len(p)], np.float32) for k in range(horizon)])
                for f, p in zip(first, prompts, strict=True)
            ]
        )
        frames = np.stack([np.stack([np.full((4, 4, 3), f + t, np.uint8) for t in range(1 + 4 * horizon)]) for f in first])
        latents = np.stack([np.stack([np.full((1, 1, 2), f + 4 * k, np.float32) for k in range(1 + horizon)]) for f in first])
        found = {"e_v": e_v, "frames": frames, "last_frame": frames[:, -1], "latents": latents}
        return {name: found[name] for name in wants}, self.now.worldmodel.hash, self.now.adapters_hash


def request(*rows: Sequence[tuple[str, int]], **fields: Any) -> ImagineRequest:
    skills = [[SkillPrompt(prompt=p, chunks=n) for p, n in row] for row in rows]
    return ImagineRequest(**{"id": "i", "reply": "r", "starts": "", "skills": skills, **fields})


def task(asked: ImagineRequest, first: int = 0) -> Task:
    frames = np.stack([np.full((4, 4, 3), first + 10 * i, np.uint8) for i in range(len(asked.skills))])
    return Task(asked, frames, f"key{first}")


def test_a_skill_starts_at_the_last_frame_of_the_one_before() -> None:
    fake = FakeTriton()
    [result] = imagine([task(request([("pick", 2), ("place it", 1)], [("pick", 1)]))], fake.imagine, SERVED)
    assert result.embeddings.shape == (2, 3, 3) and result.embeddings.dtype == np.float32
    assert result.embeddings[0].tolist() == [[0, 0, 4], [0, 1, 4], [8, 0, 8]], "two chunks are eight frames: place starts at 8"
    assert result.embeddings[1].tolist() == [[10, 0, 4], [0, 0, 0], [0, 0, 0]]
    assert result.mask.tolist() == [[True, True, True], [True, False, False]]
    assert result.latents is None and result.videos == []
    assert fake.calls == [(1, 2, ("e_v", "last_frame")), (1, 1, ("e_v",)), (1, 1, ("e_v",))], "frames only where needed"


def test_latents_and_video_join_without_repeating_the_seam() -> None:
    [result] = imagine([task(request([("a", 2), ("b", 1)], [("c", 1)], latents=True, video=True))], FakeTriton().imagine, SERVED)
    assert result.latents is not None
    assert result.latents[:, :, 0, 0, 0].tolist() == [[0, 4, 8, 12], [10, 14, 0, 0]]
    assert result.videos[0][:, 0, 0, 0].tolist() == list(range(13))
    assert result.videos[1][:, 0, 0, 0].tolist() == list(range(10, 15))
    assert result.videos[0].shape[1:] == (2, 4, 3), "cropped to the active rows"


def test_rows_of_many_requests_share_calls() -> None:
    fake = FakeTriton()
    tasks = [task(request(*[[("a", 1)]] * 50), first) for first in (0, 1, 2)]
    results = imagine(tasks, fake.imagine, SERVED)
    assert [n for n, _, _ in fake.calls] == [64, 64, 22]
    for first, result in enumerate(results):
        assert result.embeddings[:, 0, 0].tolist() == [(first + 10 * i) % 256 for i in range(50)]


def test_every_row_and_skill_has_its_own_seed_in_every_run() -> None:
    seeds = {row_seed(s, r, k) for s in range(3) for r in range(50) for k in range(3)}
    assert len(seeds) == 450 and all(0 <= s < 2**63 for s in seeds)
    assert row_seed(7, 0, 1) == 336116171425593442
    fake = FakeTriton()
    imagine([task(request([("a", 1), ("b", 1)], seed=7))], fake.imagine, SERVED)
    assert fake.seeds == [row_seed(7, 0, 0), row_seed(7, 0, 1)]


def test_results_of_two_world_models_are_never_mixed() -> None:
    fake = FakeTriton()
    fake.now = replace(SERVED, adapters_hash="newer")
    with pytest.raises(ServedChangedError):
        imagine([task(request([("a", 1)]))], fake.imagine, SERVED)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(f"file://{tmp_path}/artifacts")


def put_starts(store: ArtifactStore, rows: int, first: int = 0, **changes: Any) -> str:
    frames = np.stack([np.full((4, 4, 3), first + 10 * i, np.uint8) for i in range(rows)])
    return store.put_tensors(changes or {"frames": frames})


def test_the_key_is_what_the_result_depends_on(store: ArtifactStore) -> None:
    starts = put_starts(store, 1)
    base = request([("a", 1)], starts=starts)

    def key(asked: ImagineRequest, served: Served = SERVED) -> str:
        return read_task(asked, store, served, 10).key

    same = store.put_tensors({"frames": np.zeros((1, 4, 4, 3), np.uint8), "other": np.zeros(1, np.float32)})
    assert key(base) == key(base.model_copy(update={"id": "other", "reply": "else", "starts": same}))
    others = [
        request([("b", 1)], starts=starts),
        request([("a", 2)], starts=starts),
        request([("a", 1)], starts=put_starts(store, 1, 5)),
        *(base.model_copy(update=u) for u in ({"seed": 1}, {"steps": 2}, {"guidance": 2.0}, {"latents": True}, {"video": True})),
    ]
    keys = [key(base), *map(key, others), key(base, replace(SERVED, adapters_hash="x"))]
    keys.append(key(base, replace(SERVED, worldmodel=replace(INFO, hash="x"))))
    assert len(set(keys)) == 11


@pytest.mark.parametrize(
    ("starts", "rows", "message"),
    [
        ("nonsense", 1, "artifact: 'nonsense' is not of the form"),
        ("sha256-" + "0" * 64 + ".safetensors", 1, "is not in the store"),
        ({"images": np.zeros((1, 4, 4, 3), np.uint8)}, 1, "has no tensor 'frames', only images"),
        ({"frames": np.zeros((1, 4, 4, 3), np.float32)}, 1, r"frames must be uint8 \(1, 4, 4, 3\) .*, got float32"),
        ({"frames": np.zeros((1, 4, 5, 3), np.uint8)}, 1, r"got uint8 \(1, 4, 5, 3\)"),
        ({"frames": np.zeros((2, 4, 4, 3), np.uint8)}, 1, r"got uint8 \(2, 4, 4, 3\)"),
        (b"no safetensors", 1, "holds no tensors"),
        ({"frames": np.zeros((1, 4, 4, 3), np.uint8)}, 25, r"skills\[0\]: chunks 25 is more than .* 24"),
    ],
)
def test_bad_requests_name_the_field(store: ArtifactStore, starts: Any, rows: int, message: str) -> None:
    if isinstance(starts, bytes):
        starts = store.put(starts, "safetensors")
    elif isinstance(starts, dict):
        starts = store.put_tensors(starts)
    with pytest.raises(ValueError, match=message):
        read_task(request([("a", rows)], starts=starts), store, SERVED, 10)
    with pytest.raises(ValueError, match=r"skills\[0\]: must name at least one skill"):
        read_task(request([], starts=put_starts(store, 1)), store, SERVED, 10)


class Running:
    """A worker in a thread."""

    def __init__(self, client: redis.Redis, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(worker_module, "FAILED_SECONDS", 0.01)
        self.client, self.store, self.fake, self.stop = client, store, FakeTriton(), threading.Event()
        self.worker = ImaginationWorker(client, store, self.fake, WorldModelSettings())  # type: ignore[arg-type]
        fetch = self.worker.consumer.fetch
        monkeypatch.setattr(self.worker.consumer, "fetch", lambda count: fetch(count, block_ms=50))  # tests end sooner
        self.thread = threading.Thread(target=self.worker.run, args=(self.stop,))

    def ask(self, name: str, *rows: Sequence[tuple[str, int]], first: int = 0, **fields: Any) -> None:
        starts = put_starts(self.store, len(rows), first)
        publish(self.client, IMAGINE_REQUESTS, request(*rows, **{"id": name, "starts": starts, **fields}))

    def results(self, count: int) -> dict[str, ImagineResult]:
        """The first `count` results; fails when there are more."""
        if not self.thread.is_alive():
            self.thread.start()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if self.client.xlen(imagined("r")) >= count and backlog(self.client, IMAGINE_REQUESTS, GROUP) == 0:
                break
            time.sleep(0.01)
        found = [m for _, m in read_all(self.client, imagined("r"), ImagineResult)]
        assert len(found) == count == len({m.id for m in found})
        return {m.id: m for m in found}

    def letters(self) -> list[DeadLetter]:
        return [m for _, m in read_all(self.client, DEAD, DeadLetter)]


@pytest.fixture
def running(valkey: redis.Redis, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    running = Running(valkey, store, monkeypatch)
    yield running
    running.stop.set()
    running.thread.join(20)


def test_results_and_cache(running: Running) -> None:
    running.ask("one", [("a", 2)], [("b", 1)], video=True)
    running.ask("twin", [("a", 2)], [("b", 1)], video=True)
    running.ask("else", [("a", 2)], [("b", 1)], seed=1)
    found = running.results(3)
    assert not found["one"].cache_hit and found["twin"].cache_hit and not found["else"].cache_hit
    assert found["one"].artifact == found["twin"].artifact and len(found["one"].videos) == 2
    assert found["one"].worldmodel_hash == "wm" and found["one"].adapters_hash == "ad"
    assert sum(n for n, _, _ in running.fake.calls) == 4, "the twin was not computed"
    tensors = running.store.get_tensors(found["one"].artifact)
    assert tensors["embeddings"].shape == (2, 2, 3) and tensors["mask"].tolist() == [[True, True], [True, False]]
    calls = len(running.fake.calls)
    running.ask("again", [("a", 2)], [("b", 1)], video=True)
    assert running.results(4)["again"].cache_hit and len(running.fake.calls) == calls
    assert 0 < found["one"].started <= found["one"].finished


def test_requests_share_calls_but_do_not_wait_for_all(running: Running) -> None:
    for i in range(5):
        running.ask(f"r{i}", *[[("a", 1)]] * (70 if i == 3 else 30), first=i)
    found = running.results(5)
    assert [n for n, _, _ in running.fake.calls] == [60, 30, 64, 6, 30]
    assert found["r0"].finished <= found["r2"].finished <= found["r4"].finished and len({r.artifact for r in found.values()}) == 5


def test_a_lost_artifact_is_computed_again(running: Running) -> None:
    running.ask("one", [("a", 1)])
    first = running.results(1)["one"]
    Path(running.store.path(first.artifact)).unlink()
    running.ask("two", [("a", 1)])
    second = running.results(2)["two"]
    assert not second.cache_hit and second.artifact == first.artifact and running.store.exists(second.artifact)


def test_new_weights_are_not_answered_from_the_old_cache(running: Running) -> None:
    running.ask("one", [("a", 1)])
    running.results(1)
    running.fake.now = replace(SERVED, adapters_hash="newer")
    running.ask("two", [("b", 1)])
    running.ask("three", [("a", 1)])
    found = running.results(3)
    assert found["two"].adapters_hash == "newer"
    assert not found["three"].cache_hit or found["three"].adapters_hash == "ad", "a hit may be at most five seconds old"


def test_bad_requests_do_not_spoil_the_others(running: Running) -> None:
    running.ask("good", [("a", 1)])
    running.ask("missing", [("a", 1)], starts="sha256-" + "0" * 64 + ".safetensors")
    running.ask("refused", [("too long", 1)], first=1)
    running.client.xadd(IMAGINE_REQUESTS, {"json": "{"})
    running.ask("bug", [("bug", 1)], first=2)
    running.ask("last", [("a", 1)], first=3)
    found = running.results(5)
    assert found["good"].artifact and found["last"].artifact and not found["good"].error
    assert "not in the store" in found["missing"].error and found["refused"].error.startswith("horizon: 25")
    assert found["bug"].error == "KeyError: 'oops'"
    assert sorted(letter.error[:10] for letter in running.letters()) == ["KeyError: ", "unreadable"]


def test_the_worker_waits_for_triton(running: Running) -> None:
    running.fake.errors = [TritonUnavailableError("triton: connection refused")] * 2 + [ServedChangedError()]
    running.ask("one", [("a", 1)])
    assert running.results(1)["one"].artifact and running.letters() == []


def test_a_request_that_kills_triton_is_buried_and_its_neighbours_are_not(running: Running) -> None:
    for i in range(3):
        running.ask(f"good{i}", [("a", 1)], first=i)
    running.ask("killer", [("crash", 1)], first=9)
    found = running.results(4)
    assert all(found[f"good{i}"].artifact for i in range(3))
    assert "not healthy" in found["killer"].error and len(running.letters()) == 1


def test_what_a_stopped_worker_held_is_done_by_the_next(running: Running) -> None:
    running.fake.errors = [TritonUnavailableError("triton: connection refused")] * 1000
    running.ask("one", [("a", 1)])
    running.thread.start()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not running.fake.calls:
        time.sleep(0.01)
    running.stop.set()
    running.thread.join(10)
    assert running.client.xlen(imagined("r")) == 0 and backlog(running.client, IMAGINE_REQUESTS, GROUP) == 1
    stop = threading.Event()
    worker = ImaginationWorker(running.client, running.store, FakeTriton(), WorldModelSettings())  # type: ignore[arg-type]
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not running.client.xlen(imagined("r")):
        time.sleep(0.01)
    stop.set()
    thread.join(10)
    assert [m.id for _, m in read_all(running.client, imagined("r"), ImagineResult)] == ["one"]


class FakeBackbone:
    """latents hold the seed; refuses prompts 'bad'."""

    info = INFO

    def __init__(self) -> None:
        self.batches: list[int] = []

    def imagine(self, start, prompts, seeds, horizon, steps, guidance):  # type: ignore[no-untyped-def]
        if "bad" in prompts:
            raise ValueError("prompt: bad")
        self.batches.append(len(start))
        return np.stack([np.full((1 + horizon, 1, 1, 2), s, np.float32) for s in seeds])

    def decode(self, latents):  # type: ignore[no-untyped-def]
        return np.zeros((len(latents), 1 + 4 * (latents.shape[1] - 1), 4, 4, 3), np.uint8)

    def last_frame(self, latents):  # type: ignore[no-untyped-def]
        return np.ones((len(latents), 4, 4, 3), np.uint8)


def inputs(rows: int, seed: int = 0, prompt: bytes = b"a", **changes: Any) -> dict[str, np.ndarray]:
    values = {"seed": seed, "horizon": 2, "steps": 1, "guidance": 1.0, "decode": 0, **changes}
    arrays = {name: np.full((rows, 1), value) for name, value in values.items()}
    return {**arrays, "start_frame": np.zeros((rows, 4, 4, 3), np.uint8), "prompt": np.full((rows, 1), prompt, dtype=object)}


ALL = ("latents", "last_frame", "frames", "hash", "info")


def test_triton_requests_are_computed_together_and_answered_apart() -> None:
    backbone = FakeBackbone()
    calls = [read_call(inputs(r, seed=s, horizon=h), ALL) for r, s, h in ((2, 1, 2), (1, 2, 3), (3, 3, 2))]
    answers = WorldModelServer(backbone).run(calls)
    assert sorted(backbone.batches) == [1, 5]
    for call, answer in zip(calls, answers, strict=True):
        assert isinstance(answer, dict)
        assert answer["latents"].shape == (len(call.start), 1 + call.horizon, 1, 1, 2)
        assert (answer["latents"] == call.seeds[0]).all() and answer["hash"].tolist() == [[b"wm"]] * len(call.start)


def test_one_bad_call_fails_alone() -> None:
    calls = [read_call(inputs(1), ALL), read_call(inputs(1, prompt=b"bad"), ALL), read_call(inputs(1), ALL)]
    answers = WorldModelServer(FakeBackbone()).run(calls)
    assert isinstance(answers[0], dict) and isinstance(answers[2], dict)
    assert isinstance(answers[1], ValueError) and str(answers[1]) == "prompt: bad"


def test_decode_says_which_frames_are_made() -> None:
    """An ensemble asks for every output; `decode` is what its caller wants."""
    server = WorldModelServer(FakeBackbone())
    made = [set(server.run([read_call(inputs(1, decode=d), ALL)])[0]) - {"hash", "info", "latents"} for d in (0, 1, 2)]
    assert made == [set(), {"last_frame"}, {"last_frame", "frames"}]
    backbone = FakeBackbone()
    WorldModelServer(backbone).run([read_call(inputs(1), ("hash", "info"))])
    assert backbone.batches == [], "asking for the hash imagines nothing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": np.array([[1], [2]])}, "horizon: must be equal"),
        ({"guidance": np.array([[np.nan], [1.0]])}, "guidance: nan is outside"),
        ({"guidance": np.array([[101.0], [101.0]])}, "guidance: 101.0 is outside"),
        ({"decode": np.array([[3], [3]])}, "decode: 3 is outside"),
        ({"prompt": np.array([[b"\xff"], [b"a"]], dtype=object)}, "prompt: is not UTF-8"),
    ],
)
def test_bad_inputs_name_the_field(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_call({**inputs(2), **change}, ALL)


def test_unknown_backbone() -> None:
    with pytest.raises(ValueError, match=r"backbone: 'huge' is unknown; choose one of cosmos_predict2, .*small"):
        load_backbone(WorldModelSettings(backbone="huge"), "cpu")
