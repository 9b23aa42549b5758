"""Fixtures of the tests with real processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.triton_process import TritonProcess, make_zoo, running_triton


@pytest.fixture(scope="session")
def triton_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    """One Triton for the session, on small random weights: `.address` (gRPC), `.zoo`. Who kills one uses `running_triton`."""
    folder = tmp_path_factory.mktemp("triton")
    with running_triton(make_zoo(folder / "zoo"), folder / "run") as server:
        yield server
