"""`world2act train-worldmodel [--backbone NAME]`: the embedded world model (default), or the fine-tuning of a large one.

Each has its own options: world2act train-worldmodel --help, and with --backbone NAME --help.
"""

from __future__ import annotations

import sys


def without_backbone() -> list[str] | None:
    """None where the command line asks for the embedded model (no --backbone, or `small`, which is then taken out of sys.argv);
    else the arguments."""
    arguments = sys.argv[1:]
    at = next((i for i, a in enumerate(arguments) if a == "--backbone" or a.startswith("--backbone=")), None)
    if at is None:
        return None
    joined = "=" in arguments[at]
    name = arguments[at].partition("=")[2] if joined else "".join(arguments[at + 1 : at + 2])
    if name != "small":
        return arguments
    sys.argv[1:] = arguments[:at] + arguments[at + (1 if joined else 2) :]
    return None


def main() -> None:
    """Whichever is asked for."""
    arguments = without_backbone()
    if arguments is None:
        from world2act import worldmodel_training

        worldmodel_training.main()
    else:
        from services.worldmodel import finetune

        finetune.main(arguments)


if __name__ == "__main__":
    main()
