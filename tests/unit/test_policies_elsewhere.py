"""Base policies behind other people's protocols: what they send, what they make of answers, and every bad answer by name.

The servers are those of tests/policy_servers.py, which share no code with the adapters.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from services.runtime.rpc import RpcError
from services.vla.engine import ActJob, Engine
from services.vla.observations import Observations, check_state
from services.vla.policies import base, elsewhere
from services.vla.policies.base import BasePolicy
from services.vla.settings import VlaSettings
from services.vla.vision import Vision
from tests.policy_servers import SERVERS, TOKEN, Brain, openpi_server
from tests.vla_server import make_bundle, make_zoo, serving_tiny
from world2act.bundle import Origin
from world2act.types import FloatArray, ImageArray

Code = grpc.StatusCode
NAMES = sorted(SERVERS)
TEXT = "put the cup on the plate"


@contextmanager
def pair(name: str, robot: str = "libero", **settings: object) -> Iterator[tuple[BasePolicy, Brain]]:
    """A policy and the brain of its server."""
    brain = Brain(name, robot)
    with SERVERS[name](brain) as address:
        values = {"vla_policy": name, "vla_remote": address, "vla_layout": robot, "vla_image_size": 16, "vla_remote_timeout": 5.0}
        policy = base.make(VlaSettings(**{**values, **settings}))  # type: ignore[arg-type]
        yield policy, brain
        policy.disconnect()  # type: ignore[attr-defined]


def row(policy: BasePolicy, seed: int = 0) -> tuple[ImageArray, FloatArray, Sequence[str]]:
    rng, size = np.random.default_rng(seed), 2 * policy.spec.height
    grids = rng.integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    return grids, rng.uniform(-0.5, 0.5, (1, policy.spec.state_size)).astype(np.float32), [TEXT]


def refused(policy: BasePolicy, code: Code, *words: str) -> None:
    with pytest.raises(RpcError) as caught:
        policy.act(*row(policy))
    assert caught.value.code == code, caught.value
    for word in (f"policy {policy.spec.name} at 127.0.0.1:", *words):
        assert word in str(caught.value), caught.value


def test_a_server_that_is_away_is_said_at_the_start() -> None:
    for name in NAMES:
        with pair(name) as (policy, _):
            assert policy.away() == ""
        reason = base.make(VlaSettings(vla_policy=name, vla_remote="127.0.0.1:9", vla_layout="libero")).away()
        assert reason.startswith(f"policy {name} at 127.0.0.1:9: cannot be reached"), reason


def test_an_observation_of_another_robot_names_the_table() -> None:
    spec = base.make(VlaSettings(vla_policy="openpi", vla_remote="127.0.0.1:9")).spec
    with pytest.raises(ValueError, match=r"state: shape must be \(7,\) \(layout libero, W2A_VLA_LAYOUT\), got \(4,\)"):
        check_state(np.zeros(4, np.float32), spec, "state")


def test_libero_in_every_dialect() -> None:
    """One observation: the same cameras, state and instruction, each policy's way; and its gripper sign brought back to ours."""
    for name in NAMES:
        with pair(name, vla_image_size=256) as (policy, brain):
            grids, states, _ = row(policy)
            states[0] = [0.1, 0.2, 0.9, 3.0, 0.5, -0.25, 0.06]
            chunk = policy.act(grids, states, [TEXT])[0]
            (seen,) = brain.seen
            assert seen[brain.layout.policy.instruction] == TEXT
            primary = grids[0, :256, :256]
            if name == "gr00t":
                assert [seen[k].tolist() for k in ("x", "y", "z")] == [[np.float32(v)] for v in (0.1, 0.2, 0.9)]
                assert np.allclose(seen["gripper"], [0.03, -0.03])
                assert np.array_equal(seen["image"], primary[:, ::-1])
            elif name == "cosmos_policy":
                angle = np.linalg.norm([3.0, 0.5, -0.25])
                quaternion = [*(np.array([3.0, 0.5, -0.25]) / angle * np.sin(angle / 2)), np.cos(angle / 2)]
                assert np.allclose(seen["proprio"], [0.03, -0.03, 0.1, 0.2, 0.9, *quaternion], atol=1e-6)
                assert np.array_equal(seen["primary_image"], primary)
            else:
                state = seen["observation/state" if name == "openpi" else "state"]
                assert np.allclose(state, [0.1, 0.2, 0.9, 3.0, 0.5, -0.25, 0.03, -0.03], atol=1e-6)
                assert seen["observation/image" if name == "openpi" else "full_image"].shape == (224, 224, 3)
            answer = brain.actions(seen)
            theirs = np.concatenate(list(answer.values()), axis=1)[:4]
            if name in ("gr00t", "openvla_oft"):
                assert np.array_equal(chunk[:, 6], np.where(theirs[:, 6] > 0.5, -1.0, 1.0))
                theirs = theirs[:, :6]
            assert np.array_equal(chunk[:, : theirs.shape[1]], theirs)


def test_robocasa_rests_what_a_policy_does_not_move_and_keeps_our_order() -> None:
    with pair("cosmos_policy", "robocasa") as (policy, brain):
        grids, states, _ = row(policy)
        turn = np.array([0.0, 0.0, np.sin(0.5), np.cos(0.5)], np.float32)  # the base turned by one radian about z
        states[0] = [1.0, 2.0, 0.0, *turn, 0.5, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.02, -0.02]
        chunk = policy.act(grids, states, [TEXT])[0]
        assert np.array_equal(chunk[:, 7:], [[0, 0, 0, 0, -1]] * 4)
        world = [1.0 + 0.5 * np.cos(1.0), 2.0 + 0.5 * np.sin(1.0), 1.0]
        assert np.allclose(brain.seen[0]["proprio"], [0.02, -0.02, *world, *turn], atol=1e-6)
    with pair("gr00t", "robocasa") as (policy, brain):
        chunk = policy.act(*row(policy))[0]
        answer = brain.actions(brain.seen[0])
        assert np.array_equal(chunk[:, :3], answer["end_effector_position"][:4])
        assert np.array_equal(chunk[:, 7:11], answer["base_motion"][:4])
        assert set(np.unique(chunk[:, [6, 11]])) <= {-1.0, 1.0}


def test_gr00t_flat_keys_for_the_simulation_wrapper_and_one_request_a_batch() -> None:
    with pair("gr00t", vla_gr00t_wrapper=True) as (policy, brain):
        grids, states, texts = (np.concatenate([a, b]) for a, b in zip(row(policy, 0), row(policy, 1), strict=True))  # type: ignore[type-var]
        together = policy.act(grids, states, list(texts))
        assert len(brain.seen) == 2
        assert np.array_equal(together[1], policy.act(*row(policy, 1))[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_silent_server_is_a_named_time_out_and_the_next_question_is_answered(name: str) -> None:
    with pair(name, vla_remote_timeout=0.5) as (policy, brain):
        before = policy.act(*row(policy))
        brain.fault = "silent"
        refused(policy, Code.DEADLINE_EXCEEDED, "no answer within 0.5 s (W2A_VLA_REMOTE_TIMEOUT)")
        brain.fault = ""
        if name == "gr00t":  # its server answers one request at a time and is still busy with the lost one
            return
        assert np.array_equal(policy.act(*row(policy)), before)


@pytest.mark.parametrize("name", NAMES)
def test_nobody_there(name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"  # bound, not listening
        settings = VlaSettings(vla_policy=name, vla_remote=address, vla_image_size=16, vla_remote_timeout=0.5)
        # ZeroMQ connects when somebody is there; until then there is only silence.
        code = Code.DEADLINE_EXCEEDED if name == "gr00t" else Code.UNAVAILABLE
        refused(base.make(settings), code, "no answer" if name == "gr00t" else "cannot be reached")


@pytest.mark.parametrize("name", ["openpi", "cosmos_policy", "openvla_oft"])
def test_a_lost_connection_is_opened_again(name: str) -> None:
    with pair(name) as (policy, brain):
        before = policy.act(*row(policy))
        brain.fault = "drop"  # once
        assert np.array_equal(policy.act(*row(policy)), before) and brain.fault == ""


@pytest.mark.parametrize("name", NAMES)
def test_wrong_sizes_short_horizons_and_values_that_are_no_numbers(name: str) -> None:
    with pair(name) as (policy, brain):
        brain.fault = "size"
        refused(policy, Code.INTERNAL, "must be (horizon, ", "numbers, got float32")
        brain.fault = "short"
        refused(policy, Code.INTERNAL, "answers 3 actions, the horizon is")
        brain.fault = "nan"
        refused(policy, Code.INTERNAL, "actions are not finite")


@pytest.mark.parametrize("name", NAMES)
def test_oversized_answers_are_not_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("wire", "policies.openpi", "policies.http_act", "policies.gr00t"):
        monkeypatch.setattr(f"services.vla.{module}.MAX_BYTES", 1_000_000)
    monkeypatch.setattr("tests.policy_servers.TOO_LONG", 1_500_000)
    with pair(name, vla_remote_timeout=1.0) as (policy, brain):
        brain.fault = "long"
        if name == "gr00t":  # ZeroMQ drops the connection of who sends too much
            refused(policy, Code.DEADLINE_EXCEEDED, "no answer within 1 s")
        else:
            refused(policy, Code.INTERNAL, "more than 1000000 bytes")


def test_errors_of_the_server_are_told() -> None:
    with pair("openpi") as (policy, brain):
        brain.layout = Brain("openpi", "robocasa").layout  # wants a third camera
        refused(policy, Code.INTERNAL, "answers with an error: KeyError: 'observation/right_image'")
        brain.layout = Brain("openpi", "libero").layout
        brain.fault = "garbage"
        refused(policy, Code.INTERNAL, "message: not msgpack")
        brain.fault = "object"
        refused(policy, Code.INTERNAL, "dtype '|O' is not one of")
    with pair("openvla_oft") as (policy, brain):
        brain.layout = Brain("openvla_oft", "robocasa").layout
        refused(policy, Code.INTERNAL, 'answers with an error: "error" (its log has the reason')
    with pair("gr00t") as (policy, brain):
        policy.act(*row(policy))
        brain.layout = Brain("gr00t", "robocasa").layout
        refused(policy, Code.INTERNAL, "answers with an error: 'res256_image_side_0'")


def test_gr00t_says_what_it_wants_and_is_held_to_it() -> None:
    with pair("gr00t") as (policy, brain):
        brain.fault = "camera"
        refused(policy, Code.INTERNAL, "video keys are image, side_image; the layout's are image, wrist_image")
        brain.fault = "history"
        refused(policy, Code.INTERNAL, "the server wants 2 video steps of history; one is sent")
        brain.fault, brain.horizon = "", 8
        refused(policy, Code.INTERNAL, "the server plans 8 actions, the horizon is 16")


@pytest.mark.parametrize("name", ["gr00t", "openpi"])
def test_tokens(name: str) -> None:
    with pair(name, vla_remote_token="wrong") as (policy, brain):
        brain.token = TOKEN
        refused(policy, Code.UNAUTHENTICATED, "refuses us", "W2A_VLA_REMOTE_TOKEN")
    with pair(name, vla_remote_token=TOKEN) as (policy, brain):
        brain.token = TOKEN
        assert policy.act(*row(policy)).shape == (1, 4, 7)


def test_horizon_shorter_than_a_chunk_missing_address_and_wrong_tables(tmp_path: Path) -> None:
    def said(**settings: object) -> str:
        with pytest.raises(ValueError) as caught:
            base.make(VlaSettings(**{"vla_policy": "openpi", "vla_remote": "127.0.0.1:1", **settings}))  # type: ignore[arg-type]
        return str(caught.value)

    assert "horizon: 3 actions an answer are shorter than a chunk of M = 4" in said(vla_remote_horizon=3)
    assert "vla_remote: must be the address of the openpi server" in said(vla_remote="")
    assert "layout: 'kitchen' is unknown for openpi; choose one of libero, robocasa, metaworld" in said(vla_layout="kitchen")
    assert "vla_remote: must be the address of another policy server" in said(vla_policy="remote", vla_remote="")
    table = json.loads(Path("services/vla/policies/layouts.json").read_text())["policies"]["openpi"]["libero"]
    file = tmp_path / "mine.json"

    def written(**changes: object) -> str:
        file.write_text(json.dumps({"robot": "libero", "policy": {**table, **changes}}))
        return said(vla_layout=str(file))

    camera = {"ours": "front", "height": 224, "width": 224}
    assert "policy.cameras.observation/image: camera 'front' is not one of primary, wrist" in written(
        cameras={"observation/image": camera}
    )
    assert "columns 5:9 are beyond the 7 of the state" in written(state={"s": [{"start": 5, "size": 4}]})
    assert "are taken already or beyond 7" in written(actions={"actions": [{"start": 0, "size": 7}, {"start": 6, "size": 1}]})
    assert "moved by no part and rest nowhere" in written(actions={"actions": [{"start": 0, "size": 6}]})
    assert "policy.horizon" in written(horizon=0)
    file.write_text("{")
    assert "layout: " in said(vla_layout=str(file))


def test_replanning_sooner_than_the_horizon_is_a_setting_and_part_of_the_hash() -> None:
    with pair("openpi", vla_remote_horizon=4) as (policy, _), pair("openpi", vla_remote_model="pi0@2") as (other, _):
        assert policy.spec.horizon == 4 and policy.act(*row(policy)).shape == (1, 4, 7)
        assert len({policy.spec.hash, other.spec.hash}) == 2


def test_their_own_client_agrees_with_the_test_server() -> None:
    """openpi-client, unchanged, against the server that stands for openpi's: so the stand-in speaks the protocol."""
    brain = Brain("openpi", "libero")
    with openpi_server(brain) as address:
        host, port = address.split(":")
        client = WebsocketClientPolicy(host, int(port))
        image = np.zeros((224, 224, 3), np.uint8)
        answer = client.infer(
            {
                "observation/image": image,
                "observation/wrist_image": image,
                "observation/state": np.zeros(8, np.float32),
                "prompt": TEXT,
            }
        )
        assert answer["actions"].shape == (10, 7)
        client._ws.close()


def test_an_engine_shields_other_requests_from_one_that_its_policy_cannot_answer(tmp_path: Path) -> None:
    make_zoo(tmp_path)
    with pair("openpi") as (policy, brain):
        engine = Engine(policy, Vision(tmp_path / "worldmodel.safetensors"), "", 1)
        grids, states, _ = row(policy)
        made = brain.actions

        def picky(observation: dict[str, object]) -> dict[str, np.ndarray]:
            if observation["prompt"] == "bad":
                raise ValueError("no such task")
            return made(observation)

        brain.actions = picky  # type: ignore[method-assign, assignment]
        jobs = [ActJob(Observations(grids, states, (text,)), None) for text in (TEXT, "bad", TEXT)]
        good, bad, last = engine.compute(jobs)
        assert isinstance(bad, RpcError) and "no such task" in str(bad)
        assert not isinstance(good, Exception) and not isinstance(last, Exception)
        assert good.base.tobytes() == last.base.tobytes() and good.plans[0].shape == (10, 7)


def test_a_trickle_does_not_outlive_the_time_out() -> None:
    """A body that comes byte by byte, each in time, is still too late as a whole."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()

        def drip() -> None:
            connection, _ = server.accept()
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
            while not stop.wait(0.1):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        policy = base.make(VlaSettings(vla_policy="openvla_oft", vla_remote=address, vla_image_size=16, vla_remote_timeout=0.5))
        refused(policy, Code.DEADLINE_EXCEEDED, "no answer within 0.5 s")
        stop.set()
        thread.join(5)


def test_another_server_of_ours_is_a_base_policy_and_takes_its_residuals(tmp_path: Path) -> None:
    with serving_tiny(tmp_path) as address:
        policy = base.make(VlaSettings(vla_policy="remote", vla_remote=address, vla_remote_timeout=10))
        tiny = base.make(VlaSettings(zoo=tmp_path))
        spec = policy.spec
        assert (spec.hash, spec.cameras, spec.low, spec.high) == (
            tiny.spec.hash,
            tiny.spec.cameras,
            tiny.spec.low,
            tiny.spec.high,
        )
        grids, states, _ = (np.repeat(part, 6, axis=0) for part in row(policy))  # six rows: its batches hold four
        texts = [f"{TEXT} {i}" for i in range(6)]
        assert policy.act(grids, states, texts).tobytes() == tiny.act(grids, states, texts).tobytes()
        with pytest.raises(RpcError, match=r"policy remote at 127\.0\.0\.1:.*instruction: must not be empty"):
            policy.act(grids[:1], states[:1], [""])
        vision = Vision(tmp_path / "worldmodel.safetensors")
        bundle = make_bundle(Origin(spec.hash, vision.hash, "a" * 64), 2)
        assert Engine(policy, vision, "a" * 64, 4).check(bundle.to_bytes(), 2, "uri").version == 2
    with pytest.raises(RpcError) as caught:
        policy.act(grids[:1], states[:1], [TEXT])
    assert caught.value.code == Code.UNAVAILABLE


def test_a_policy_server_that_is_silent_at_start_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(OSError, match=rf"policy remote at {address}: .*DEADLINE_EXCEEDED"):
            base.make(VlaSettings(vla_policy="remote", vla_remote=address, vla_remote_timeout=0.5))


def test_lerobot_without_its_package_says_so() -> None:
    if importlib.util.find_spec("lerobot") is not None:
        pytest.skip("lerobot is installed here")
    with pytest.raises(ValueError, match="policy lerobot: the package lerobot is not installed in this environment"):
        base.make(VlaSettings(vla_policy="lerobot"))


def test_last_line_of_a_traceback() -> None:
    assert (
        elsewhere.last_line("Traceback ...\n  File\nKeyError: 'x'\n") == "KeyError: 'x'" and elsewhere.last_line(" ") == "(empty)"
    )
