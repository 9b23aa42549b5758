"""A Franka-style control loop around the policy server: base + bounded residual chunk, rate limit, watchdog.

Without --robot it is a dry run that moves nothing. With --robot module:Class it drives your arm through the three methods of
`robot_parts.Robot`. Not run here on a real arm: docs/robot.md says what to check first.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent))
from robot_parts import Policy, RateLimit, Robot, StoppedError, Watchdog, load_robot


@dataclass(frozen=True)
class Settings:
    """residual: largest change of a base action, in action units, 0 is the base alone; change: of an action from one control
    period to the next; late: seconds without a new action after which the arm is stopped."""

    instruction: str
    address: str = "127.0.0.1:50051"
    namespace: str = "default"
    version: int = -1
    robot: str = ""
    rate_hz: float = 20.0
    residual: float = 0.5
    change: float = 0.2
    late: float = 0.5
    chunks: int = 100


def run(robot: Robot, policy: Policy, settings: Settings) -> float:
    """Act for `settings.chunks` chunks; the largest residual that acted. Raises StoppedError. The arm is stopped in the end."""
    limit, largest = RateLimit(policy.spec.action_size, settings.change), 0.0
    policy.act(*robot.observe(), seconds=30.0)  # the first answer may be slow, and fixes the version
    if policy.unseen:
        print(f"version {policy.version} was not post-trained on this instruction: the base alone acts", file=sys.stderr)
    try:
        with Watchdog(settings.late, robot.stop) as watchdog:
            for _ in range(settings.chunks):
                base, combined = policy.act(*robot.observe(), seconds=settings.late)
                residual = np.clip(combined - base, -settings.residual, settings.residual)
                largest = max(largest, float(np.abs(residual).max()))
                due = time.monotonic()
                for action in base + residual:
                    watchdog.feed()
                    robot.command(limit(action))
                    due += 1 / settings.rate_hz
                    time.sleep(max(0.0, due - time.monotonic()))
    finally:
        robot.stop()
    return largest


def main() -> int:
    settings = tyro.cli(Settings, description=__doc__)
    try:
        policy = Policy(settings.address, settings.instruction, settings.namespace, settings.version)
        robot = load_robot(settings.robot, policy.spec)
        largest = run(robot, policy, settings)
    except (StoppedError, ImportError, AttributeError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: by hand", file=sys.stderr)
        return 1
    kind = settings.robot or "dry run"
    print(f"{kind}: {settings.chunks} chunks by version {policy.version}, largest residual {largest:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
