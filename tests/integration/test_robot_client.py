"""examples/robot_client.py against the real policy server: dry run, bounds, rate limit, and late replies that stop the arm."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from services.runtime.generated import policy_pb2
from tests.vla_server import VlaProcess, make_bundle

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import robot_client  # noqa: E402
from robot_parts import DryRobot, Policy, StoppedError, Watchdog  # noqa: E402

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VlaProcess]:
    process = VlaProcess(tmp_path_factory.mktemp("robot")).start()
    process.load(3)
    yield process
    process.close()


def settings(server: VlaProcess, **changes: object) -> robot_client.Settings:
    values = {
        "instruction": "open the drawer",
        "address": f"127.0.0.1:{server.port}",
        "rate_hz": 200.0,
        "late": 30.0,
        "chunks": 5,
    }
    return robot_client.Settings(**(values | changes))  # type: ignore[arg-type]


def drive(asked: robot_client.Settings) -> tuple[DryRobot, Policy, float]:
    policy = Policy(asked.address, asked.instruction, asked.namespace, asked.version)
    robot = DryRobot(policy.spec)
    return robot, policy, robot_client.run(robot, policy, asked)


def test_dry_run_from_the_command_line(server: VlaProcess) -> None:
    command = [sys.executable, str(ROOT / "examples/robot_client.py"), "--instruction", "open the drawer"]
    address = ["--address", f"127.0.0.1:{server.port}", "--late", "30", "--chunks", "3"]
    done = subprocess.run([*command, *address], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("dry run: 3 chunks by version 3, largest residual 0.") and not done.stderr
    for extra, words in (
        (["--version", "9"], "version: 9 is not loaded in namespace 'default'"),
        (["--robot", "no_such_arm:Arm"], "No module named"),
        (["--address", "127.0.0.1:1"], "policy server at 127.0.0.1:1 answered UNAVAILABLE"),
    ):
        done = subprocess.run([*command, *address, *extra], capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and done.stderr.startswith("stopped: ") and words in done.stderr
        assert "Traceback" not in done.stderr


def test_residual_is_bounded_and_actions_change_slowly(server: VlaProcess) -> None:
    wide, policy, largest = drive(settings(server, residual=9.0, change=9.0))
    assert policy.version == 3 and largest > 0.02 and len(wide.commands) == 20 and wide.stopped == 1
    narrow, _, bounded = drive(settings(server, residual=0.01, change=0.1))
    assert 0.0 < bounded <= 0.01 + 1e-6
    steps = np.diff(np.array([np.zeros(4), *narrow.commands]), axis=0)
    assert np.abs(steps).max() <= 0.1 + 1e-6
    alone, _, nothing = drive(settings(server, residual=0.0, change=9.0))
    base, _, _, _ = server.act([0], 0)
    assert nothing == 0.0 and np.abs(np.array(alone.commands)).max() <= 1.0 and base.shape == (1, 4, 4)


def test_the_operator_hears_that_the_base_alone_acts(server: VlaProcess, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(server.origin, 1)
    bundle.instructions = ("open the drawer",)
    uri = server.artifacts.put(bundle.to_bytes(), "safetensors")
    server.stub.Load(policy_pb2.LoadRequest(namespace="drawers", version=1, uri=uri), timeout=30)
    _, _, known = drive(settings(server, namespace="drawers"))
    assert known > 0.0 and not capsys.readouterr().err
    _, policy, unknown = drive(settings(server, namespace="drawers", instruction="close the drawer"))
    assert unknown == 0.0 and policy.version == 1
    assert capsys.readouterr().err == "version 1 was not post-trained on this instruction: the base alone acts\n"


def test_a_late_reply_stops_the_arm_at_once(server: VlaProcess) -> None:
    """The server is frozen in mid run: the arm is stopped within the limit, and no command comes after it."""
    asked = settings(server, late=1.0, chunks=100_000)
    policy = Policy(asked.address, asked.instruction)
    robot = DryRobot(policy.spec)
    threading.Timer(1.0, lambda: server.process.send_signal(signal.SIGSTOP)).start()  # type: ignore[union-attr]
    try:
        with pytest.raises(StoppedError, match=r"within 1 s"):
            robot_client.run(robot, policy, asked)
    finally:
        server.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
    count = len(robot.commands)
    time.sleep(0.2)
    assert robot.stopped >= 1 and len(robot.commands) == count


def test_watchdog_stops_an_arm_whose_loop_hangs() -> None:
    stopped = threading.Event()
    with Watchdog(0.05, stopped.set) as watchdog:
        assert stopped.wait(10)
        with pytest.raises(StoppedError, match=r"no action was ready within 0.05 s"):
            watchdog.feed()


def test_a_restarted_server_does_not_act_with_the_base_alone(server: VlaProcess) -> None:
    """Version -1 is fixed by the first answer: after a restart, when nothing is loaded, the run ends instead of going on."""
    asked = settings(server)
    policy = Policy(asked.address, asked.instruction)
    images, state = DryRobot(policy.spec).observe()
    policy.act(images, state, 30.0)
    server.kill()
    server.start()
    with pytest.raises(StoppedError, match=r"version: 3 is not loaded|UNAVAILABLE"):
        for _ in range(100):
            policy.act(images, state, 30.0)
