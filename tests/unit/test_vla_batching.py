"""The policy server's parts without gRPC: batcher, blocks, validation of observations."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from services.runtime.generated import policy_pb2
from services.runtime.tensors import to_tensor
from services.vla.batcher import Batcher
from services.vla.observations import Observations, read_namespace, read_observations
from services.vla.policies.base import PolicySpec, in_blocks

SPEC = PolicySpec(
    "fake", "hash", {"primary": 0, "wrist": 1}, height=4, width=4, state_size=2, low=(-1.0,) * 3, high=(1.0,) * 3, chunk=4
)


class Recorder:
    """Doubles every number, remembers the batches, optionally waits for a gate."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, requests: Sequence[list[int]]) -> list[list[int] | Exception]:
        self.gate.wait(10)
        self.batches.append([list(r) for r in requests])
        return [ValueError("negative") if min(r) < 0 else [2 * n for n in r] for r in requests]


def test_requests_that_come_together_share_a_batch() -> None:
    work = Recorder()
    batcher: Batcher[list[int], list[int]] = Batcher(work, max_rows=100, max_wait=0.2)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: batcher.submit([n]).result(5), range(8)))
    batcher.close()
    assert answers == [[2 * n] for n in range(8)]
    assert len(work.batches) < 8 and max(len(b) for b in work.batches) > 1


def test_a_full_batch_does_not_wait_and_the_wait_is_bounded() -> None:
    batcher: Batcher[list[int], list[int]] = Batcher(Recorder(), max_rows=4, max_wait=0.5)
    started = time.monotonic()
    assert batcher.submit([1, 2, 3, 4]).result(5) == [2, 4, 6, 8]
    assert time.monotonic() - started < 0.3
    started = time.monotonic()
    assert batcher.submit([1]).result(5) == [2]
    assert 0.4 < time.monotonic() - started < 1.5
    batcher.close()


def test_batches_hold_at_most_max_rows_in_order_of_arrival() -> None:
    work = Recorder()
    work.gate.clear()
    batcher: Batcher[list[int], list[int]] = Batcher(work, max_rows=4, max_wait=0.0)
    first = batcher.submit([0])
    futures = [batcher.submit([n, n]) for n in range(1, 6)]
    time.sleep(0.05)  # the first is being computed, the others gather
    work.gate.set()
    assert [f.result(5) for f in [first, *futures]] == [[0], *([2 * n, 2 * n] for n in range(1, 6))]
    batcher.close()
    assert all(sum(len(r) for r in batch) <= 4 for batch in work.batches)
    assert [r for batch in work.batches for r in batch] == [[0], *([n, n] for n in range(1, 6))]


def test_one_bad_request_does_not_spoil_its_neighbours() -> None:
    work = Recorder()
    batcher: Batcher[list[int], list[int]] = Batcher(work, max_rows=8, max_wait=0.1)
    good, bad = batcher.submit([1]), batcher.submit([-1])
    assert good.result(5) == [2]
    with pytest.raises(ValueError, match="negative"):
        bad.result(5)
    assert len(work.batches) == 1
    batcher.close()


def test_batcher_outlives_a_batch_that_raises_skips_cancelled_requests_and_finishes_on_close() -> None:
    def compute(requests: Sequence[list[int]]) -> list[list[int] | Exception]:
        if requests[0] == [13]:
            raise RuntimeError("boom")
        seen.extend(requests)
        return list(requests)

    seen: list[list[int]] = []
    batcher: Batcher[list[int], list[int]] = Batcher(compute, max_rows=8, max_wait=0.05)
    with pytest.raises(RuntimeError, match="boom"):
        batcher.submit([13]).result(5)
    cancelled, kept = batcher.submit([1]), batcher.submit([2])
    assert cancelled.cancel()
    assert kept.result(5) == [2] and seen == [[2]]
    last = batcher.submit([3])
    batcher.close()
    assert last.result(0) == [3] and not batcher.alive()
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit([4])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9])
def test_blocks_are_always_full_and_keep_the_order(rows: int) -> None:
    sizes = []

    def function(numbers: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        sizes.append((len(numbers), len(texts)))
        return np.array([float(text) + n for n, text in zip(numbers, texts, strict=True)], np.float32)

    numbers = np.arange(rows, dtype=np.float32)
    result = in_blocks(function, 4, numbers, [str(n) for n in range(rows)])
    assert set(sizes) == {(4, 4)} and (result == 2 * numbers).all()


def observation(**changes: object) -> policy_pb2.Observation:
    """A valid observation with some fields changed."""
    values: dict[str, object] = {
        "images": {name: np.full((4, 4, 3), cell, np.uint8) for name, cell in (("primary", 10), ("wrist", 20))},
        "state": np.array([0.1, 0.2], np.float32),
        "instruction": "open the drawer",
        **changes,
    }
    images = values["images"]
    assert isinstance(images, dict)
    return policy_pb2.Observation(
        images={name: to_tensor(image) for name, image in images.items()},
        state=to_tensor(np.asarray(values["state"])),
        instruction=str(values["instruction"]),
        episode=str(values.get("episode", "")),
        step=int(str(values.get("step", 0))),
    )


def test_observations_are_stitched_row_by_row() -> None:
    rows = read_observations(
        [observation(), observation(instruction="close the drawer", state=np.array([3, 4], np.float32))], SPEC, 8
    )
    assert rows.grids.shape == (2, 8, 8, 3) and rows.states.tolist()[1] == [3.0, 4.0]
    assert rows.instructions == ("open the drawer", "close the drawer")
    assert (rows.grids[0, :4, :4] == 10).all() and (rows.grids[0, :4, 4:] == 20).all() and (rows.grids[0, 4:] == 0).all()
    joined = Observations.join([rows, rows])
    assert len(joined) == 4 and joined.take(np.array([1, 3])).instructions == ("close the drawer",) * 2


IMAGE = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": {"primary": IMAGE}}, r"observations\[1\].images: camera 'wrist' is missing"),
        ({"images": {"primary": IMAGE, "wrist": IMAGE, "left": IMAGE}}, "camera 'left' is unknown; needed are primary, wrist"),
        ({"images": {"primary": IMAGE, "wrist": np.zeros((4, 5, 3), np.uint8)}}, r"images\['wrist'\]: shape must be \(4, 4, 3\)"),
        ({"images": {"primary": IMAGE.astype(np.float32), "wrist": IMAGE}}, r"images\['primary'\]: dtype must be uint8"),
        ({"state": np.zeros(3, np.float32)}, r"state: shape must be \(2,\), got \(3,\)"),
        ({"state": np.zeros(2, np.float64)}, "state: dtype must be float32, got float64"),
        ({"state": np.array([0.0, np.nan], np.float32)}, "state: must be finite, got NaN or infinity at index 1"),
        ({"instruction": " \n"}, "instruction: must not be empty"),
        ({"episode": "../x"}, r"observations\[1\].episode: must be at most 80 of"),
        ({"episode": "e", "step": -1}, r"observations\[1\].step: must be >= 0, got -1"),
        ({"instruction": "x" * 10_000}, "instruction: must have at most 500 characters, got 10000"),
    ],
)
def test_bad_observations_are_refused_with_row_field_and_limit(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_observations([observation(), observation(**changes)], SPEC, 8)


def test_row_limit_and_broken_tensor() -> None:
    with pytest.raises(ValueError, match="observations: must be 1 to 2 in one request, got 0"):
        read_observations([], SPEC, 2)
    with pytest.raises(ValueError, match="observations: must be 1 to 2 in one request, got 3"):
        read_observations([observation()] * 3, SPEC, 2)
    broken = observation()
    broken.state.data = b"abc"
    with pytest.raises(ValueError, match=r"observations\[0\].state: 3 bytes do not hold"):
        read_observations([broken], SPEC, 2)


@pytest.mark.parametrize("name", ["../x", "a b", "x" * 81, "-x"])
def test_namespace_is_a_short_plain_name(name: str) -> None:
    assert read_namespace("") == "default" and read_namespace("job-1.a_B") == "job-1.a_B"
    with pytest.raises(ValueError, match="namespace: must be 1 to 80"):
        read_namespace(name)
