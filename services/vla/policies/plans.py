"""What is left of the plans that policies with a horizon longer than M have made, per episode."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from world2act.types import FloatArray


@dataclass(frozen=True)
class Turn:
    """Where a row stands: its episode, and how many of the episode's actions were executed. No episode: no memory."""

    episode: str = ""
    step: int = 0


NOWHERE = Turn()


class Plans:
    """The last plan of each of the `keep` episodes used last. Not thread-safe: one thread computes.

    A plan is found by the step at which it was made, not by how often it was asked for: a request that is sent again after a
    time-out gets the same actions, and an episode that starts over (step 0) gets a new plan.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._plans: OrderedDict[str, tuple[int, str, FloatArray]] = OrderedDict()

    def rest(self, turn: Turn, instruction: str, needed: int) -> FloatArray | None:
        """The plan (H, A) from `turn.step` on, at least `needed` actions of it; None when a new one must be made."""
        kept = self._plans.get(turn.episode)
        if kept is None or turn.step == 0:
            return None
        start, text, plan = kept
        offset = turn.step - start
        if offset < 0 or offset + needed > len(plan) or text != instruction:
            return None
        self._plans.move_to_end(turn.episode)
        return plan[offset:]

    def keep(self, turn: Turn, instruction: str, plan: FloatArray) -> None:
        """Remember a plan (H, A) made at `turn`."""
        if not turn.episode:
            return
        self._plans[turn.episode] = (turn.step, instruction, plan)
        self._plans.move_to_end(turn.episode)
        while len(self._plans) > self._keep:
            self._plans.popitem(last=False)
