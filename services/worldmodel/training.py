"""`world2act train-worldmodel [--backbone NAME]`: the embedded world model (default), or the fine-tuning of a large one.

Each has its own options: world2act train-worldmodel --help, and with --backbone NAME --help.
"""

from __future__ import annotations

import sys


def main() -> None:
    """`--backbone small`, or none, is the embedded model's own training."""
    arguments = sys.argv[1:]
    named = [a.partition("=") for a in arguments if a.startswith("--backbone=")]
    name = named[0][2] if named else None
    if name is None and "--backbone" in arguments[:-1]:
        name = arguments[arguments.index("--backbone") + 1]
    if name not in (None, "small"):
        from services.worldmodel import finetune

        finetune.main(arguments)
        return
    if name == "small":
        at = next(i for i, a in enumerate(arguments) if a.startswith("--backbone"))
        sys.argv[1:] = arguments[:at] + arguments[at + (1 if "=" in arguments[at] else 2) :]
    from world2act import worldmodel_training

    worldmodel_training.main()


if __name__ == "__main__":
    main()
