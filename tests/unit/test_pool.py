"""Work in several processes: in order, and whatever dies takes one item with it."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from services.runtime.pool import Work, WorkError, in_order


def start(tag: str) -> Work:
    """Work for the tests, by the item's first word."""

    def work(item: str) -> dict[str, Any]:
        if item.startswith("die"):
            os._exit(9)
        if item.startswith("fail"):
            raise ConnectionError("no model answers")
        if item.startswith("slow"):
            time.sleep(0.3)
        return {"said": f"{tag} {item}", "pid": os.getpid()}

    return work


def broken() -> Work:
    raise ValueError("cannot start")


def test_results_come_in_order_from_several_processes_and_a_dead_one_costs_its_item_only() -> None:
    items = ["slow 0", "1", "die 2", "3", "4", "die 5", "6"]
    found = list(in_order(items, start, ("ok",), workers=2))
    assert [item for item, _ in found] == items
    assert [result["said"] if result else None for _, result in found] == [
        f"ok {item}" if "die" not in item else None for item in items
    ]
    assert len({result["pid"] for _, result in found if result}) >= 2
    assert list(in_order([], start, ("ok",), workers=2)) == []


def test_work_that_raises_or_cannot_start_stops_everything_with_its_reason() -> None:
    done = []
    with pytest.raises(WorkError, match="no model answers"):
        for item, _ in in_order(["1", "fail 2", "3"], start, ("ok",)):
            done.append(item)
    assert done == ["1"]
    with pytest.raises(WorkError, match="cannot start"):
        list(in_order(["1"], broken))
