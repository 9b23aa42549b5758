"""Which skill is active at a visited state of a rollout: causal, from the gripper widths seen so far (METHOD section 2, 4).

Agrees with `segment_series` at every chunk start of an episode that grasps once (property test), because boundaries are cut
upwards to chunk starts there. Two things exist only here: a closure that holds nothing, and an object let go while the step
that needs it runs, go back to the step that grasps. A step that is optional is never active: its absence cannot be foreseen.
"""

from __future__ import annotations

import numpy.typing as npt

from world2act.segmentation.events import GripperCalibration, check_widths
from world2act.segmentation.planner import Plan
from world2act.segmentation.schemas import DEFAULT_EMBODIMENT, TaskSchema, load_schemas


class OnlineSkill:
    """The active skill of one running episode.

    plan: what to do; stride: simulator frames between two widths given (1 = every action, M = chunk starts only).
    """

    def __init__(self, plan: Plan | TaskSchema, calibration: GripperCalibration | None = None, stride: int = 1) -> None:
        if stride < 1:
            raise ValueError(f"stride: {stride} must be at least 1")
        self.schema = plan.schema if isinstance(plan, Plan) else plan
        self.calibration = calibration or load_schemas().calibration(DEFAULT_EMBODIMENT)
        self.stride = stride
        self._active = [i for i, s in enumerate(self.schema.steps) if not s.optional]
        self.reset()

    def reset(self) -> None:
        """Back to the first frame of a new episode."""
        self._position = 0
        self._frame = 0
        self._contact = False
        self._ignored = False
        self._empty = False

    @property
    def index(self) -> int:
        """Position of the active step in `schema.steps`."""
        return self._active[self._position]

    @property
    def prompt(self) -> str:
        """Prompt of the active step."""
        return self.schema.steps[self.index].prompt

    def update(self, widths: npt.ArrayLike) -> str:
        """Take the next width or widths (n,) in metres, `stride` frames apart; the prompt that is active after them.

        Raises ValueError naming the field for a bad width, as `check_widths`.
        """
        for w in check_widths([widths] if isinstance(widths, int | float) else widths):
            self._step(float(w))
        return self.prompt

    def _step(self, w: float) -> None:
        closure = self.calibration.open_width_m - w
        was = self._contact
        if closure >= self.calibration.delta_on_m:
            self._contact = True
        elif closure < self.calibration.delta_off_m:
            self._contact = False
        if self._contact and not was:
            self._ignored = self._frame < self.calibration.start_frames
        # Fingers that met once hold nothing until they have opened again, whatever they are pushed apart by.
        self._empty = self._contact and (self._empty or w < self.calibration.min_object_width_m)
        self._frame += self.stride
        if self._ignored:
            self._ignored = self._contact
            return
        steps = self.schema.steps
        ends = steps[self.index].ends
        before = steps[self._active[self._position - 1]].ends if self._position else ""
        if before == "contact_on" and (self._empty or (not self._contact and ends == "end")):
            self._position -= 1  # the grasp missed, or the object was let go too early: grasp again
        elif self._position + 1 < len(self._active) and not self._empty:
            contact_made = ends == "contact_on" and self._contact
            contact_left = ends == "contact_off" and was and not self._contact
            if contact_made or contact_left:
                self._position += 1


def skill_index_online(
    widths_so_far: npt.ArrayLike, schema: Plan | TaskSchema, calibration: GripperCalibration | None = None, stride: int = 1
) -> int:
    """Position in `schema.steps` of the step that is active after the widths (n,) seen so far; no look-ahead."""
    online = OnlineSkill(schema, calibration, stride)
    online.update(widths_so_far)
    return online.index
