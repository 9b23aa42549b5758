"""A residual from one installation to another: export, sign, import through gateway and policy server, act. Real processes."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.cli import main
from services.runtime.jobs import JobStore
from services.runtime.policies import publish_version, published
from services.runtime.rpc import connect_channel
from services.runtime.streams import connect
from services.trainer.doors import Policy
from services.trainer.ledger import Ledger
from tests.processes import free_port, running_valkey, wait_for
from tests.vla_server import VlaProcess, make_bundle
from world2act.bundle import Bundle
from world2act.models import store
from world2act.signature import name_of, sign

pytestmark = pytest.mark.integration
KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))


class Site:
    """A policy server that trusts one key, a gateway, a Valkey; and `world2act` as its user calls it."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self.folder, self.redis = folder, connect(redis_url)
        (folder / "lab.pem").write_bytes(
            KEY.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        (folder / "lab.pub").write_bytes(
            KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
        self.vla = VlaProcess(folder, redis_url, vla_trusted_keys=folder / "lab.pub", vla_max_bound=2.0)
        gateway_port = free_port()
        settings = {"redis_url": redis_url, "artifacts_url": self.vla.settings["artifacts_url"], "vla_port": self.vla.port}
        settings |= {"gateway_port": gateway_port, "metrics_port": free_port(), "run_dir": folder / "run"}
        self.environment = {f"W2A_{k.upper()}": str(v) for k, v in settings.items()}
        self.gateway_log = folder / "gateway.log"
        with self.gateway_log.open("wb") as log:
            command = [sys.executable, "-m", "services.gateway"]
            self.gateway = subprocess.Popen(command, env={**os.environ, **self.environment}, stdout=log, stderr=log)
        self.vla.start()
        url = f"http://127.0.0.1:{gateway_port}/healthz"
        wait_for(lambda: httpx.get(url).status_code == 200, 60, "gateway answers")

    def world2act(self, *arguments: object, **extra: str) -> tuple[int, str]:
        """Exit status and what was said."""
        said = io.StringIO()
        with (
            mock.patch.dict(os.environ, self.environment | extra),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            status = main.main([str(a) for a in arguments])
        return status, said.getvalue()

    def refused(self, content: bytes, namespace: str = "default") -> str:
        """What `world2act import` says of a file with `content`; nothing was published."""
        before = published(self.redis, namespace)
        file = self.folder / "refused.safetensors"
        file.write_bytes(content)
        status, said = self.world2act("import", file, "--namespace", namespace)
        assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said
        assert published(self.redis, namespace) == before
        return said

    def close(self) -> None:
        self.gateway.terminate()
        self.gateway.wait(20)
        self.vla.close()
        self.redis.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with running_valkey(folder / "valkey") as valkey:
        found = Site(folder, valkey.url)
        yield found
        found.close()


def test_export_signs_and_import_makes_it_act(site: Site) -> None:
    """As a trainer publishes it, so it acts on the other side: equal to the bit, through a restart, and for rollouts too."""
    made = make_bundle(site.vla.origin, 7)
    publish_version(site.redis, "job-1", 7, site.vla.artifacts.put(made.to_bytes(), "safetensors"))
    file = site.folder / "residual.safetensors"
    status, said = site.world2act("export", "job-1", "--out", file)
    assert status == 0 and "version 7 of job-1" in said and "not signed" in said and file.read_bytes() == made.to_bytes()
    status, said = site.world2act("export", "job-1", "--out", file, W2A_SIGNING_KEY_FILE=str(site.folder / "lab.pem"))
    assert status == 0 and f"signed by key {name_of(KEY.public_key())[:16]}" in said
    assert file.read_bytes() == sign(made.to_bytes(), KEY) and Bundle.load(file).signed_by == name_of(KEY.public_key())

    assert site.world2act("import", file) == (0, f"{file}: version 1 of default\n")
    assert site.world2act("import", file) == (0, f"{file}: version 1 of default\n")  # again is the same
    base, _, combined, version = site.vla.act([1], -1)
    assert version == 1 and np.abs(combined - base).max() > 0.05 and site.redis.ttl("w2a:policy:default") == -1
    assert acts_alone(site.folder / "alone", file) == (7, combined.tobytes())  # under the bundle's own version

    site.vla.kill()
    site.vla.start()
    with connect_channel(f"127.0.0.1:{site.vla.port}") as channel:  # the coordinator's door finds the import and loads it
        policy = Policy(channel, Ledger(site.redis).artifact)
        rng = np.random.default_rng(1)
        images = {name: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for name in ("primary", "wrist")}
        state = rng.uniform(-0.5, 0.5, 4).astype(np.float32)
        found = policy.act(images, state, "open the drawer", "default", 1)
        assert found[2] == 1 and found[1].tobytes() == combined[0].tobytes()


def acts_alone(folder: Path, file: Path) -> tuple[int, bytes]:
    """Version and combined chunk of a policy server that was started with the bundle: no gateway, no import, no Redis."""
    alone = VlaProcess(folder, vla_bundle=file)
    try:
        _, _, combined, version = alone.start().act([1], -1)
        return version, combined.tobytes()
    finally:
        alone.close()


def test_import_refuses_what_does_not_belong_here(site: Site) -> None:
    made, other = make_bundle(site.vla.origin, 1), "f" * 64
    signed = sign(made.to_bytes(), KEY)
    assert "it is not signed; only bundles signed by a trusted key" in site.refused(made.to_bytes())
    assert "not among the trusted ones" in site.refused(sign(made.to_bytes(), OTHER))
    assert "the signature does not hold" in site.refused(signed[:-1] + bytes([signed[-1] ^ 1]))
    for part, name in (("base", "base policy"), ("worldmodel", "world model"), ("adapters", "adapters")):
        foreign = replace(made, origin=replace(made.origin, **{part: other}))
        assert f"file: the residual was trained beside {name} ffffffffffff" in site.refused(sign(foreign.to_bytes(), KEY))
    tensors, metadata, _ = store.parse(made.to_bytes(), "residual", "")
    scaled = store.to_bytes({**tensors, "actions.std": tensors["actions.std"] * 10}, metadata)
    assert "action statistics differ: std of dx is 5, but 0.5" in site.refused(sign(scaled, KEY))
    bound = metadata | {"config": metadata["config"] | {"residual": metadata["config"]["residual"] | {"bound": 9.0}}}
    assert "up to 9 standard deviations" in site.refused(sign(store.to_bytes(tensors, bound), KEY))
    assert "is not a safetensors file, or is truncated" in site.refused(b"PK\x03\x04" + bytes(100))
    assert "not a safetensors file" in site.refused(signed[:-100])
    assert "namespace" in site.refused(signed, "no spaces please")
    job = JobStore(site.redis).create("posttrain", {"tasks": ["reach"], "namespace": "busy"})
    assert f"job {job.id} publishes its versions in 'busy'" in site.refused(signed, "busy")
    status, said = site.world2act("import", site.folder / "none.safetensors")
    assert status == 2 and "No such file" in said
    status, said = site.world2act("export", "job-1", W2A_SIGNING_KEY="hunter2")
    assert status == 2 and "signing_key: holds no private key" in said and "hunter2" not in said
    assert b"PRIVATE" not in site.gateway_log.read_bytes() and "Traceback" not in site.vla.log.read_text()


def test_policy_server_away_is_said(site: Site) -> None:
    site.vla.kill(signal.SIGKILL)
    assert (
        "vla at 127.0.0.1" in (said := site.refused(sign(make_bundle(site.vla.origin, 1).to_bytes(), KEY)))
        and "try again" in said
    )
    missing = VlaProcess(site.folder / "wrong", vla_trusted_keys="/nowhere.pub")
    assert missing.spawn().wait(120) == 1 and "vla_trusted_keys: cannot read /nowhere.pub" in missing.log.read_text()
    missing.close()
