"""Task schemas: which skills a task is made of, in order, and what ends each (METHOD: paper section 3, language stream).

All of them live in one readable file, schemas.json; this module reads and validates it and matches instructions to rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
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


def _object(content: Any, where: str, known: Collection[str] = ()) -> dict[str, Any]:
    """`content`, an object; `known`: the fields that it can have, where they are given. Raises ValueError naming the field."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: must be an object, got {type(content).__name__}")
    if known and (unknown := sorted(set(content) - set(known))):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return content


def _texts(content: Any, where: str) -> tuple[str, ...]:
    if not isinstance(content, list) or not all(isinstance(text, str) for text in content):
        raise ValueError(f"{where}: must be a list of texts")
    return tuple(content)


def _schema(row: Any, where: str) -> TaskSchema:
    """One task row. Raises ValueError naming the row and field."""
    if not isinstance(row, dict) or not isinstance(row.get("task"), str) or not row["task"]:
        raise ValueError(f"{where}.task: a name is needed")
    _object(row, where, ("task", "patterns", "slots", "steps"))
    patterns, slots = _texts(row.get("patterns", []), f"{where}.patterns"), _object(row.get("slots", {}), f"{where}.slots")
    for slot, value in slots.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}.slots.{slot}: must be text, got {value!r}")
    steps = row.get("steps")
    if not isinstance(steps, list) or not 1 <= len(steps) <= MAX_STEPS:
        raise ValueError(f"{where}.steps: 1 to {MAX_STEPS} steps are needed")
    made = tuple(_step(step, slots, f"{where}.steps[{i}]") for i, step in enumerate(steps))
    if (early := next((i for i, s in enumerate(made[:-1]) if s.ends == "end"), None)) is not None:
        raise ValueError(f"{where}.steps[{early}].ends: only the last step can end with the episode")
    if all(s.optional for s in made):
        raise ValueError(f"{where}.steps: at least one step must not be optional")
    return TaskSchema(row["task"], made, patterns, slots)


def _step(step: Any, slots: Mapping[str, str], where: str) -> Step:
    _object(step, where, ("prompt", "ends", "optional"))
    prompt, ends, optional = step.get("prompt"), step.get("ends"), step.get("optional", False)
    if ends not in ENDINGS:
        raise ValueError(f"{where}.ends: {ends!r} must be one of {', '.join(ENDINGS)}")
    if not isinstance(optional, bool):
        raise ValueError(f"{where}.optional: must be true or false, got {optional!r}")
    if not isinstance(prompt, str):
        raise ValueError(f"{where}.prompt: text is needed")
    named = re.compile(r"\{([^\W\d]\w*)\}")
    if re.search("[{}]", named.sub("", prompt)):
        raise ValueError(f"{where}.prompt: {prompt!r} has braces around what is no slot's name")
    if unknown := [slot for slot in named.findall(prompt) if slot not in slots]:
        raise ValueError(f"{where}.prompt: slot {unknown[0]!r} has no default in slots")
    if not prompt.format(**slots).strip():
        raise ValueError(f"{where}.prompt: text is needed")
    return Step(prompt, ends, optional)


def _calibration(values: Any, where: str) -> GripperCalibration:
    """One hand. Raises ValueError naming the field."""
    kinds = {f.name: f.type for f in fields(GripperCalibration)}
    for name, value in _object(values, where, kinds).items():
        if type(value) not in ((int,) if kinds[name] == "int" else (int, float)):
            raise ValueError(f"{where}.{name}: {value!r} is no {'whole number' if kinds[name] == 'int' else 'number'}")
    try:
        return GripperCalibration(**values)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{where}: {e}") from None


def _suite(name: str, row: Any, calibrations: Mapping[str, GripperCalibration]) -> Suite:
    """One suite; a list of instructions names its tasks as LIBERO does, with underscores. Raises ValueError naming the field."""
    where = f"schemas.suites.{name}"
    if not isinstance(row, dict) or set(row) != {"embodiment", "tasks"}:
        raise ValueError(f"{where}: must be an object with embodiment and tasks")
    if row["embodiment"] not in [*calibrations]:
        raise ValueError(f"{where}.embodiment: {row['embodiment']!r} has no calibration; there are {', '.join(calibrations)}")
    tasks = row["tasks"]
    if isinstance(tasks, list) and all(isinstance(text, str) for text in tasks):
        tasks = {text.replace(" ", "_"): text for text in tasks}
    if not isinstance(tasks, dict) or not tasks or not all(isinstance(text, str) for text in tasks.values()):
        raise ValueError(f"{where}.tasks: must be instructions, or an object of task names and instructions")
    checked = {}
    for task, text in tasks.items():
        try:
            checked[task] = check_instruction(text)
        except ValueError as e:
            raise ValueError(f"{where}.tasks.{task[:60]}: {e}") from None
    return Suite(name, row["embodiment"], checked)


def parse_schemas(content: Any) -> SchemaTable:
    """The content of a schemas.json (parsed JSON) as a table. Raises ValueError naming the row and field that is wrong."""
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), list):
        raise ValueError("schemas: must be an object with a list 'tasks'")
    _object(content, "schemas", ("about", "calibrations", "verbs", "tasks", "suites"))
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
    hands = _object(content.get("calibrations", {}), "schemas.calibrations")
    calibrations = {name: _calibration(values, f"schemas.calibrations.{name}") for name, values in hands.items()}
    groups = _object(content.get("verbs", {}), "schemas.verbs", (*ENDINGS, "other"))
    verbs: dict[str, Any] = {verb: kind for kind, group in groups.items() for verb in _texts(group, f"schemas.verbs.{kind}")}
    benchmarks = _object(content.get("suites", {}), "schemas.suites")
    suites = tuple(_suite(name, row, calibrations) for name, row in benchmarks.items())
    return SchemaTable(tasks, calibrations, verbs, tuple(compiled), suites)


def load_schemas(path: Path | None = None) -> SchemaTable:
    """The table at `path`, by default the one shipped with the package. Raises ValueError as `parse_schemas`."""
    return _parse(path.read_text()) if path else _shipped()


@lru_cache(maxsize=1)
def _shipped() -> SchemaTable:
    return _parse((resources.files(__package__) / "schemas.json").read_text())


def _parse(text: str) -> SchemaTable:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"schemas: not JSON: {e}") from None
    return parse_schemas(content)
