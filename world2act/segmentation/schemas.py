"""Task schemas: which skills a task is made of, in order, and what ends each (METHOD: paper section 3, language stream).

All of them live in one readable file, schemas.json; this module reads and validates it and matches instructions to rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from world2act.segmentation.events import GripperCalibration

Ending = Literal["contact_on", "contact_off", "touch_on", "touch_off", "end"]
ENDINGS: tuple[str, ...] = get_args(Ending)

MAX_INSTRUCTION = 500
"""Characters in an instruction."""

MAX_STEPS = 32

DEFAULT_EMBODIMENT = "metaworld"

HANDS = dict.fromkeys(("libero", "robocasa", "robocasa365", "PandaOmron", "franka"), "panda")
"""What simulators, formats and LeRobot's robot_type call a robot -> its calibration, where that has another name."""

PREPOSITIONS = (
    *("at", "on", "onto", "in", "into", "to", "from", "with", "over", "under", "near", "inside", "beside", "off", "out"),
    *("toward", "towards", "by", "between", "next", "behind"),
)
# A noun phrase: words, but never a conjunction (a pattern must not swallow a second command) or a particle; a short one has
# no preposition either. Two colours may be joined: "the yellow and white mug".
_WORD = r"(?!(?:and|then|up|down)\b)[\w'-]+"
_SHORT_WORD = rf"(?!(?:and|then|up|down|{'|'.join(PREPOSITIONS)})\b)[\w'-]+"
_COLOURS = r"(?:(?:the |a )?(?:black|white|yellow|red|blue|green|brown) and )?"
_DETERMINERS = ("the", "a", "an", "this", "that", "my", "your", "its", "all", "both", "some", "it", "them")


@dataclass(frozen=True)
class Step:
    """One skill of a task: its prompt (a template until an instruction fills it) and the event that ends it."""

    prompt: str
    ends: Ending
    optional: bool = False


@dataclass(frozen=True)
class TaskSchema:
    """One row of schemas.json."""

    task: str
    steps: tuple[Step, ...]
    patterns: tuple[str, ...] = ()
    slots: Mapping[str, str] = field(default_factory=dict)

    def fill(self, slots: Mapping[str, str]) -> TaskSchema:
        """The same schema with prompts filled from `slots`, then from the row's defaults."""
        values = {**self.slots, **slots}
        return replace(self, steps=tuple(replace(s, prompt=" ".join(s.prompt.format(**values).split())) for s in self.steps))

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts of the steps that must occur, in order."""
        return tuple(s.prompt for s in self.steps if not s.optional)


@dataclass(frozen=True)
class Suite:
    """A benchmark's tasks: its name for each -> one instruction as the benchmark words it; the hand that does them."""

    name: str
    embodiment: str
    instructions: Mapping[str, str]


@dataclass(frozen=True)
class SchemaTable:
    """schemas.json, validated."""

    tasks: tuple[TaskSchema, ...]
    calibrations: Mapping[str, GripperCalibration]
    verbs: Mapping[str, Ending | Literal["other"]]
    compiled: tuple[tuple[re.Pattern[str], TaskSchema], ...] = ()
    suites: tuple[Suite, ...] = ()

    def instruction(self, task: str) -> str | None:
        """How the benchmark that has a task of this name words it (a LIBERO name may have its scene in front), or None."""
        name = re.sub(r"^[A-Z_]+_SCENE\d+_", "", task)
        return next((s.instructions[name] for s in self.suites if name in s.instructions), None)

    def task(self, name: str) -> TaskSchema:
        """The row of task `name`. Raises ValueError naming the choices."""
        for row in self.tasks:
            if row.task == name:
                return row
        raise ValueError(f"task: {name!r} has no schema; there are {', '.join(r.task for r in self.tasks)}")

    def calibration(self, embodiment: str) -> GripperCalibration:
        """The gripper calibration of `embodiment`. Raises ValueError naming the choices."""
        if embodiment not in self.calibrations:
            raise ValueError(f"embodiment: {embodiment!r} is unknown; choose one of {', '.join(self.calibrations)}")
        return self.calibrations[embodiment]

    def hand(self, robot: str) -> str | None:
        """The calibration for a robot, simulator or format of this name, or None."""
        name = HANDS.get(robot, robot)
        return name if name in self.calibrations else None

    def calibration_of(self, robot: str, open_width_m: float) -> GripperCalibration:
        """The calibration of the hand of a robot or simulator that opens this wide; of an unknown one by that alone."""
        if (hand := self.hand(robot)) is not None:
            return replace(self.calibration(hand), open_width_m=open_width_m)
        return GripperCalibration(open_width_m, 0.45 * open_width_m, 0.3 * open_width_m)

    def match(self, instruction: str) -> TaskSchema | None:
        """The row that `instruction` names, or the first whose pattern is all of it; prompts filled. None if there is none."""
        text = re.sub(r"(?:,| and then | then )[ ,]*(?:and |then )*", " then ", normalise(instruction)).replace("  ", " ")
        for row in self.tasks:
            if text.replace(" ", "-") == row.task:
                return row.fill({})
        for pattern, row in self.compiled:
            if found := pattern.fullmatch(text):
                groups = {k: with_determiner(v) for k, v in found.groupdict().items() if v and not k.startswith("_")}
                return row.fill(groups)
        return None


def check_instruction(instruction: object) -> str:
    """`instruction` stripped. Raises ValueError naming the field: not text, empty, longer than 500 characters, no words."""
    if not isinstance(instruction, str):
        raise ValueError(f"instruction: must be text, got {type(instruction).__name__}")
    if len(instruction) > MAX_INSTRUCTION:
        raise ValueError(f"instruction: has {len(instruction)} characters, the limit is {MAX_INSTRUCTION}")
    text = instruction.strip()
    if not re.search(r"[^\W_]", text):
        raise ValueError(f"instruction: is empty; 1 to {MAX_INSTRUCTION} characters are needed")
    return text


def normalise(instruction: str) -> str:
    """Lower case, single blanks, no polite words, no punctuation but commas, hyphens and apostrophes."""
    text = re.sub(r"[^\w\s,'-]", " ", instruction.lower().replace("_", " "))
    text = re.sub(r"\s+", " ", text).strip(" ,")
    return re.sub(r"^(?:please |now |first |can you |could you |robot )+", "", text)


def with_determiner(phrase: str) -> str:
    """'drawer' -> 'the drawer', 'on shelf' -> 'on the shelf'; a phrase that has a determiner stays."""
    first, _, rest = phrase.partition(" ")
    if rest.startswith("top of "):  # "on top of cabinet"
        return f"{first} top of {with_determiner(rest.removeprefix('top of '))}"
    if first in PREPOSITIONS:
        return f"{first} {with_determiner(rest)}" if rest else first
    return phrase if first in _DETERMINERS else f"the {phrase}"


def _compile(pattern: str) -> re.Pattern[str]:
    """A pattern of schemas.json as a regular expression: <name> a noun phrase, <name:a|b> one that ends with a or b, <name!> one
    without prepositions."""

    def noun_phrase(found: re.Match[str]) -> str:
        name, short, head = found[1], found[2], found[3]
        word = _SHORT_WORD if short else _WORD
        return rf"(?P<{name}>{_COLOURS}(?:{word} ){{0,9}}{f'(?:{head})' if head else word})"

    return re.compile(re.sub(r"(?<!\?P)(?<!\?)<(\w+)(!?)(?::([\w| -]+))?>", noun_phrase, pattern))


def _schema(row: Any, where: str) -> TaskSchema:
    """One task row. Raises ValueError naming the row and field."""
    if not isinstance(row, dict) or not isinstance(row.get("task"), str) or not row["task"]:
        raise ValueError(f"{where}.task: a name is needed")
    known = {"task", "patterns", "slots", "steps"}
    if unknown := set(row) - known:
        raise ValueError(f"{where}: unknown field {sorted(unknown)[0]!r}; there are {', '.join(sorted(known))}")
    steps, slots = row.get("steps"), row.get("slots", {})
    if not isinstance(steps, list) or not 1 <= len(steps) <= MAX_STEPS:
        raise ValueError(f"{where}.steps: 1 to {MAX_STEPS} steps are needed")
    made = []
    for i, step in enumerate(steps):
        if not isinstance(step, dict) or set(step) - {"prompt", "ends", "optional"}:
            raise ValueError(f"{where}.steps[{i}]: must be an object with prompt, ends and optional")
        if step.get("ends") not in ENDINGS:
            raise ValueError(f"{where}.steps[{i}].ends: {step.get('ends')!r} must be one of {', '.join(ENDINGS)}")
        if step["ends"] == "end" and i != len(steps) - 1:
            raise ValueError(f"{where}.steps[{i}].ends: only the last step can end with the episode")
        try:
            if not isinstance(step.get("prompt"), str) or not step["prompt"].format(**slots).strip():
                raise ValueError(f"{where}.steps[{i}].prompt: text is needed")
        except (KeyError, IndexError) as e:
            raise ValueError(f"{where}.steps[{i}].prompt: slot {e} has no default in slots") from None
        made.append(Step(step["prompt"], step["ends"], bool(step.get("optional", False))))
    if all(s.optional for s in made):
        raise ValueError(f"{where}.steps: at least one step must not be optional")
    return TaskSchema(row["task"], tuple(made), tuple(row.get("patterns", ())), dict(slots))


def _suite(name: str, row: Any, calibrations: Mapping[str, GripperCalibration]) -> Suite:
    """One suite; a list of instructions names its tasks as LIBERO does, with underscores. Raises ValueError naming the field."""
    where = f"schemas.suites.{name}"
    if not isinstance(row, dict) or set(row) != {"embodiment", "tasks"}:
        raise ValueError(f"{where}: must be an object with embodiment and tasks")
    if row["embodiment"] not in calibrations:
        raise ValueError(f"{where}.embodiment: {row['embodiment']!r} has no calibration; there are {', '.join(calibrations)}")
    tasks = row["tasks"]
    if isinstance(tasks, list) and all(isinstance(text, str) for text in tasks):
        tasks = {text.replace(" ", "_"): text for text in tasks}
    if not isinstance(tasks, dict) or not tasks or not all(isinstance(text, str) for text in tasks.values()):
        raise ValueError(f"{where}.tasks: must be instructions, or an object of task names and instructions")
    return Suite(name, row["embodiment"], {task: check_instruction(text) for task, text in tasks.items()})


def parse_schemas(content: Any) -> SchemaTable:
    """The content of a schemas.json (parsed JSON) as a table. Raises ValueError naming the row and field that is wrong."""
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), list):
        raise ValueError("schemas: must be an object with a list 'tasks'")
    tasks = tuple(_schema(row, f"schemas.tasks[{i}]") for i, row in enumerate(content["tasks"]))
    names = [t.task for t in tasks]
    if len(set(names)) != len(names):
        raise ValueError(f"schemas.tasks: {sorted(n for n in names if names.count(n) > 1)[0]!r} occurs twice")
    compiled = []
    for row in tasks:
        for pattern in row.patterns:
            try:
                compiled.append((_compile(pattern), row))
            except re.error as e:
                raise ValueError(f"schemas: task {row.task!r}: pattern {pattern!r} is no regular expression: {e}") from None
    calibrations = {}
    for name, values in content.get("calibrations", {}).items():
        try:
            calibrations[name] = GripperCalibration(**values)
        except TypeError as e:
            raise ValueError(f"schemas.calibrations.{name}: {e}") from None
    verbs = {verb: kind for kind, group in content.get("verbs", {}).items() for verb in group}
    suites = tuple(_suite(name, row, calibrations) for name, row in content.get("suites", {}).items())
    return SchemaTable(tasks, calibrations, verbs, tuple(compiled), suites)


def load_schemas(path: Path | None = None) -> SchemaTable:
    """The table at `path`, by default the one shipped with the package. Raises ValueError as `parse_schemas`."""
    return _parse(path.read_text()) if path else _shipped()


@lru_cache(maxsize=1)
def _shipped() -> SchemaTable:
    return _parse((resources.files(__package__) / "schemas.json").read_text())


def _parse(text: str) -> SchemaTable:
    try:
        return parse_schemas(json.loads(text))
    except json.JSONDecodeError as e:
        raise ValueError(f"schemas: not JSON: {e}") from None
