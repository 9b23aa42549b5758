"""Fixtures that many tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import redis

from services.runtime.streams import connect
from tests.processes import ValkeyProcess, running_valkey

# Stand-ins for LIBERO's meshes; a user's own download, named by the variable, goes before.
STAND_INS = Path(__file__).resolve().parents[2] / "shared/libero-assets.tar.xz"
if STAND_INS.exists():
    os.environ.setdefault("W2A_LIBERO_ASSETS", str(STAND_INS))


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    """One real Valkey for the session (a test that kills it starts its own with `running_valkey`)."""
    with running_valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def valkey(valkey_server: ValkeyProcess) -> Iterator[redis.Redis]:
    """An empty database on the session's Valkey."""
    client = connect(valkey_server.url)
    client.flushall()
    yield client
    client.close()
