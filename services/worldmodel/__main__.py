"""`python -m services.worldmodel [worker|triton]`: the imagination worker (default), or Triton itself."""

from __future__ import annotations

import sys

from services.worldmodel.settings import WorldModelSettings


def main(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "worker"
    if command == "triton" and len(arguments) == 1:
        from services.worldmodel import triton

        triton.main(WorldModelSettings())
    elif command == "worker" and len(arguments) <= 1:
        from services.worldmodel import worker

        worker.main(WorldModelSettings())
    else:
        raise SystemExit(f"usage: python -m services.worldmodel [worker|triton], got {' '.join(arguments)[:200]!r}")


if __name__ == "__main__":
    main(sys.argv[1:])
