"""Other words for the tasks' instructions: what a user says who does not know the words that policies were trained on.

Three a task, fixed before anything was measured, from near to far (`KINDS`). Scene i hears that of i modulo three.
"""

from __future__ import annotations

KINDS = ("a filler more", "another verb or order", "hardly a word in common")
"""Of wordings, in their order."""
OTHER: dict[str, tuple[str, str, str]] = {
    "reach the green goal": (
        "please reach the green goal",
        "go to the green goal",
        "bring your hand to the target",
    ),
    "push the puck to the green goal": (
        "now push the puck to the green goal",
        "slide the puck over to the green goal",
        "shove that blue disc across the table onto the target",
    ),
    "pick up the puck and place it at the green goal": (
        "could you pick up the puck and place it at the green goal",
        "lift the puck and put it at the green goal",
        "grasp that blue disc and carry it over to the target",
    ),
    "open the drawer": (
        "please open the drawer",
        "pull the drawer open",
        "get this box to slide out",
    ),
    "close the drawer": (
        "close the drawer now",
        "push the drawer shut",
        "get this box to slide back in",
    ),
    "press the red button": (
        "please press the red button",
        "push the red button in",
        "hit that switch",
    ),
    "open the door": (
        "could you open the door",
        "pull the door open",
        "swing this thing wide",
    ),
}


def other(instruction: str, index: int) -> str:
    """What scene `index` hears in place of `instruction`. Raises KeyError for one that has no other words."""
    return OTHER[instruction][index % len(KINDS)]
