"""`python -m services.trainer` runs jobs; `python -m services.trainer rollout` runs the rollout coordinator."""

from __future__ import annotations

import argparse
import sys

import structlog

from services.runtime.telemetry import configure_logging, stop_on_signals
from services.trainer.settings import TrainerSettings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m services.trainer", description=__doc__)
    parser.add_argument("role", nargs="?", choices=("jobs", "rollout"), default="jobs")
    role = parser.parse_args().role
    settings = TrainerSettings()
    configure_logging("trainer" if role == "jobs" else "rollout", settings)
    stop = stop_on_signals()
    try:
        if role == "rollout":
            from services.trainer.rollout import serve
        else:
            from services.trainer.jobs import serve  # imports torch, which the coordinator does not need
        serve(settings, stop)
    except (OSError, ValueError) as error:
        structlog.get_logger().error("cannot start", reason=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
