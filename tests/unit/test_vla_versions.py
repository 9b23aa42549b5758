"""Which versions stay in memory, which one acts, and what one broken residual does to its neighbours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import structlog
import torch

from services.runtime.rpc import RpcError
from services.vla.__main__ import load_engine
from services.vla.engine import ActJob, Chunks, Engine
from services.vla.observations import Observations
from services.vla.policies import base
from services.vla.settings import VlaSettings
from services.vla.versions import Residual, Versions
from services.vla.vision import Vision
from tests.vla_server import make_bundle, make_zoo
from world2act.bundle import Bundle, Origin
from world2act.models import store
from world2act.models.store import WeightsError
from world2act.models.worldmodel import WorldModel

BUNDLE = make_bundle(Origin("b", "w", "a"), 1)


def residual(version: int, uri: str = "") -> Residual:
    return Residual(version, uri or f"uri-{version}", BUNDLE)


def refused(versions: Versions, namespace: str, version: int) -> str:
    with pytest.raises(RpcError) as caught:
        versions.resolve(namespace, version)
    assert caught.value.code == grpc.StatusCode.FAILED_PRECONDITION
    return str(caught.value)


def test_newest_base_and_missing_versions() -> None:
    versions = Versions(keep_versions=8, keep_namespaces=4)
    assert versions.resolve("job", -1) is None and versions.resolve("job", 0) is None
    assert refused(versions, "job", 2) == "version: 2 is not loaded in namespace 'job' (loaded: none); call Load"
    two, three = residual(2), residual(3)
    assert versions.add("job", three) == [3] and versions.add("job", two) == [2, 3]
    assert versions.resolve("job", -1) is three and versions.resolve("job", 2) is two and versions.resolve("job", 0) is None
    assert versions.resolve("other", -1) is None and versions.loaded("other") == []
    with pytest.raises(ValueError, match="version: must be >= -1, got -2"):
        versions.resolve("job", -2)


def test_oldest_unused_version_goes_but_never_the_newest_or_the_one_just_loaded() -> None:
    versions = Versions(keep_versions=3, keep_namespaces=4)
    for v in (1, 2, 3):
        versions.add("job", residual(v))
    versions.resolve("job", 1)
    assert versions.add("job", residual(4)) == [1, 3, 4]  # 2 was used least recently
    versions.resolve("job", 1)
    versions.resolve("job", 3)
    assert versions.add("job", residual(2)) == [2, 3, 4]  # 4 would be next in line, but is the newest
    one = Versions(keep_versions=1, keep_namespaces=1)
    one.add("job", residual(5))
    assert one.add("job", residual(6)) == [6] and one.resolve("job", -1).version == 6  # type: ignore[union-attr]


def test_same_version_again_replaces_and_find_knows_the_artifact() -> None:
    versions = Versions(8, 4)
    versions.add("job", residual(1, "old"))
    again = residual(1, "new")
    assert versions.add("job", again) == [1] and versions.resolve("job", 1) is again
    assert versions.find("job", 1, "new") and not versions.find("job", 1, "old") and not versions.find("x", 1, "new")


def test_namespaces_are_bounded_and_a_dropped_one_does_not_fall_back_to_the_base() -> None:
    versions = Versions(keep_versions=8, keep_namespaces=2)
    versions.add("a", residual(1))
    versions.add("b", residual(1))
    versions.resolve("a", -1)
    versions.add("c", residual(1))  # "b" was used least recently
    assert versions.loaded("a") == [1] and versions.loaded("b") == []
    assert "namespace 'b' was dropped from memory (at most 2 stay)" in refused(versions, "b", -1)
    assert "1 is not loaded in namespace 'b'" in refused(versions, "b", 1)
    assert versions.resolve("b", 0) is None
    versions.add("b", residual(2))
    assert versions.resolve("b", -1).version == 2  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    zoo = tmp_path_factory.mktemp("zoo")
    origin = make_zoo(zoo)
    settings = VlaSettings(zoo=zoo)
    return Engine(base.make(settings), Vision(zoo / "worldmodel.safetensors"), origin.adapters, settings.vla_block)


def rows(count: int, seed: int) -> Observations:
    rng = np.random.default_rng(seed)
    grids = rng.integers(0, 256, (count, 128, 128, 3), dtype=np.uint8)
    return Observations(grids, rng.normal(size=(count, 4)).astype(np.float32), ("open the drawer",) * count)


def loaded(engine: Engine, version: int, vision: str = "latent") -> Residual:
    origin = Origin(engine.policy.spec.hash, engine.vision.hash, engine.adapters_hash)
    return engine.check(make_bundle(origin, version, vision).to_bytes(), version, f"uri-{version}")


def test_each_request_gets_its_rows_from_its_version(engine: Engine) -> None:
    one, two, pixels = loaded(engine, 1), loaded(engine, 2), loaded(engine, 3, "pixels")
    jobs = [ActJob(rows(n, seed), who) for seed, (n, who) in enumerate([(2, one), (1, None), (3, two), (5, one), (2, pixels)])]
    for job, result in zip(jobs, engine.compute(jobs), strict=True):
        (alone,) = engine.compute([job])
        assert isinstance(result, Chunks) and isinstance(alone, Chunks)
        assert result.version == (job.residual.version if job.residual else 0)
        assert result.combined.shape == (len(job), 4, 4)
        for part in ("base", "residual", "combined"):
            assert getattr(result, part).tobytes() == getattr(alone, part).tobytes()
        assert np.allclose(result.combined, np.clip(result.base + result.residual, -1, 1), atol=1e-6)
        assert bool(result.residual.any()) == (job.residual is not None)


def test_tasks_that_a_residual_was_not_trained_on_are_left_to_the_base(engine: Engine) -> None:
    knowing = loaded(engine, 1)
    knowing.bundle.instructions = ("open the drawer",)
    three = replace(rows(3, 0), instructions=("Open the drawer.", "close the drawer", "open the drawer"))
    (alone,) = engine.compute([ActJob(three, None)])
    with structlog.testing.capture_logs() as log:
        mixed, other = engine.compute([ActJob(three, knowing), ActJob(three, None)])
    assert [(said["instruction"], said["closest"]) for said in log] == [("close the drawer", "open the drawer")]
    assert isinstance(mixed, Chunks) and isinstance(alone, Chunks) and isinstance(other, Chunks)
    assert mixed.unseen.tolist() == [False, True, False] and mixed.version == 1 and other.unseen.size == 0
    assert mixed.residual.any(axis=(1, 2)).tolist() == [True, False, True]
    assert mixed.combined[1].tobytes() == alone.combined[1].tobytes()
    assert knowing.told == {"close the drawer"}
    engine.everywhere = True
    (everywhere,) = engine.compute([ActJob(three, knowing)])
    engine.everywhere = False
    assert isinstance(everywhere, Chunks) and everywhere.residual[1].any() and not everywhere.unseen.any()


def test_a_setting_lets_residuals_act_everywhere(tmp_path: Path) -> None:
    make_zoo(tmp_path)
    assert [load_engine(VlaSettings(zoo=tmp_path, vla_unseen=what)).everywhere for what in ("base", "residual")] == [False, True]


def test_a_residual_that_fails_spoils_only_its_own_requests(engine: Engine) -> None:
    good, bad = loaded(engine, 1), loaded(engine, 2)
    bad.bundle.policy.state_std.fill_(0.0)  # passes every check on load, then divides by zero
    results = engine.compute([ActJob(rows(1, 0), good), ActJob(rows(1, 1), bad), ActJob(rows(1, 2), None)])
    assert isinstance(results[0], Chunks) and isinstance(results[2], Chunks)
    assert isinstance(results[1], RpcError) and "residual version 2 failed: actions are not finite" in str(results[1])


def test_vision_is_the_world_models_encoder(engine: Engine, tmp_path: Path) -> None:
    worldmodel = WorldModel()
    worldmodel.save(tmp_path / "w.safetensors", {})
    vision, grids = Vision(tmp_path / "w.safetensors"), rows(3, 0).grids
    expected = worldmodel.encode(torch.from_numpy(grids)[:, None])[:, 0].numpy()
    assert vision.hash == worldmodel.hash and vision.shape == expected.shape[1:]
    assert np.abs(vision.encode(grids) - expected).max() < 1e-4
    tensors = {k: v for k, v in worldmodel.state_dict().items() if k != "vae.mean"}
    store.write(tmp_path / "bad.safetensors", tensors, worldmodel._metadata({}))
    with pytest.raises(WeightsError, match="of the VAE do not fit"):
        Vision(tmp_path / "bad.safetensors")


def test_check_tries_the_residual_and_minds_the_adapters(engine: Engine) -> None:
    origin = Origin(engine.policy.spec.hash, engine.vision.hash, engine.adapters_hash)
    wrong: Bundle = make_bundle(origin, 1)
    wrong.policy.state[0] = torch.nn.Linear(5, 128)
    wrong.policy.settings = replace(wrong.policy.settings, state_size=5)
    wrong.policy.state_mean, wrong.policy.state_std = torch.zeros(5), torch.ones(5)
    with pytest.raises(WeightsError, match="cannot run on this policy's observations"):
        engine.check(wrong.to_bytes(), 1, "uri")
    foreign = make_bundle(replace(origin, adapters="f" * 64), 1).to_bytes()
    with pytest.raises(WeightsError, match="trained beside adapters ffffffffffff"):
        engine.check(foreign, 1, "uri")
    assert Engine(engine.policy, engine.vision, "", engine.block).check(foreign, 1, "uri").version == 1
