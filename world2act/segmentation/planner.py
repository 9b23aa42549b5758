"""Instruction -> ordered skill prompts (METHOD: paper section 3, language stream, and section 4's skill-wise inference).

The paper asks an LLM, guided by task schemas. `RuleBasedPlanner` needs none: it matches the instruction to a schema, and
splits an instruction that no schema knows into verb phrases. An LLM planner is another class with the same `plan`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

from world2act.segmentation.schemas import (
    MAX_STEPS,
    PREPOSITIONS,
    SchemaTable,
    Step,
    TaskSchema,
    check_instruction,
    load_schemas,
    normalise,
)

_PARTICLES = r"up|down|out|on|off|over|back"


@dataclass(frozen=True)
class Plan:
    """What an instruction asks for: `schema` has its prompts filled in; task is None where no schema knew the instruction."""

    instruction: str
    task: str | None
    schema: TaskSchema

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts of the skills that must occur, in order."""
        return self.schema.prompts


class Planner(Protocol):
    """Anything that turns an instruction into ordered skills."""

    def plan(self, instruction: str, task: str | None = None) -> Plan:
        """The plan for `instruction`; `task` is the simulator's name of the task where it is known.

        Raises ValueError naming the field for an empty or too long instruction.
        """
        ...


class RuleBasedPlanner:
    """Schemas first, verb phrases otherwise. Deterministic, no network."""

    def __init__(self, table: SchemaTable | None = None) -> None:
        self.table = table or load_schemas()
        self._cached = lru_cache(maxsize=4096)(self._plan)

    def plan(self, instruction: str, task: str | None = None) -> Plan:
        """See `Planner.plan`. A `task` that has no schema is ignored: the instruction decides."""
        return self._cached(check_instruction(instruction), task)

    def _plan(self, instruction: str, task: str | None) -> Plan:
        found = self.understand(instruction)
        # The simulator knows its task better than the wording does.
        row = next((row.fill({}) for row in self.table.tasks if row.task == task), None)
        wording = self.table.instruction(task) if task is not None and row is None else None
        known = row or (self.understand(wording) if wording else None)
        if known is not None and found.task != known.task:
            found = known
        row_name = found.task if "+" not in found.task else ""
        return Plan(instruction, task if known else row_name or None, found)

    def understand(self, instruction: str) -> TaskSchema:
        """The row that knows the whole instruction, or the steps of its verb phrases one after the other.

        Its task is the row's, the rows' joined by '+', or '' where a phrase is known to no row.
        """
        if (found := self.table.match(instruction)) is not None:
            return found
        phrases = split_phrases(instruction, self.table)
        if len(phrases) > MAX_STEPS:
            raise ValueError(f"instruction: has {len(phrases)} steps, the limit is {MAX_STEPS}")
        steps: list[Step] = []
        rows = []
        for phrase in phrases:
            holding = bool(steps) and steps[-1].ends == "contact_on"  # then "put it down" is one step, not a pick and a place
            row = None if holding else self.table.match(phrase)
            rows.append(row)
            ends = self.table.verbs.get(phrase.split()[0])
            new = list(row.steps) if row else [Step(phrase, "contact_on" if ends == "contact_on" else "contact_off")]
            # A step that would end with the episode ends with its contact: something follows (the paper's action cycle).
            steps += [replace(s, ends="contact_off") if s.ends == "end" else s for s in new]
        steps[-1] = replace(steps[-1], ends="end")
        if len(steps) > MAX_STEPS:
            raise ValueError(f"instruction: has {len(steps)} steps, the limit is {MAX_STEPS}")
        return TaskSchema("+".join(r.task for r in rows if r) if all(rows) else "", tuple(steps))


def split_phrases(instruction: str, table: SchemaTable) -> list[str]:
    """Verb phrases of an instruction: split at 'and then', 'then', 'and', ','; 'it' becomes the phrase before's object.

    A part that starts with no known verb is joined back ('put the salt and the pepper in the box' is one phrase); adverbs before
    a verb are left out ('gently place').
    """
    parts = re.split(r"(\s*,?\s*\band then\b\s*|\s*,?\s*\bthen\b\s*|\s*,?\s*\band\b\s*|\s*,\s*)", normalise(instruction))
    phrases: list[str] = []
    for i in range(0, len(parts), 2):
        part = parts[i].strip(" ,")
        if not part:
            continue
        if (adverbs := re.match(r"(?:\w+ly )+(\w+)", part)) and adverbs[1] in table.verbs:
            part = part[adverbs.start(1) :]
        separator = parts[i - 1] if i else ""
        if phrases and part.split()[0] not in table.verbs and "then" not in separator:
            phrases[-1] += f"{', ' if separator.strip() == ',' else ' and '}{part}"
            continue
        of = _place if part.split()[0] in ("open", "close", "shut") else _object  # "put it in the drawer and close it"
        if phrases and (noun := of(phrases[-1])):
            part = re.sub(r"\b(?:it|them)\b", noun, part, count=1)
        phrases.append(part)
    return phrases or [normalise(instruction)]


def _place(phrase: str) -> str:
    """'put the red cup in the drawer' -> 'the drawer'; the object if there is none."""
    *_, last = re.split(rf"\s*\b(?:{'|'.join(PREPOSITIONS)})\b\s*", phrase)
    return last if last != phrase else _object(phrase)


def _object(phrase: str) -> str:
    """'pick up the red cup from the shelf' -> 'the red cup'; '' if there is none."""
    rest = re.sub(rf"^\S+\s*(?:(?:{_PARTICLES})\s+)?", "", phrase)
    return re.split(rf"\s*\b(?:{'|'.join(PREPOSITIONS)})\b", rest, maxsplit=1)[0].strip()


def undone(instruction: str, steps: Sequence[Step], table: SchemaTable) -> str:
    """The first verb phrase of `instruction` that no step does after the steps of those before it; '' if all are done.

    A step does a phrase by its verb, or by one that grasps or lets go where the phrase's does ('get the cup' by 'pick up the
    cup'), a move also by letting go ('bring it there'), and has the phrase's object.
    """
    left = iter(steps)
    for phrase in split_phrases(instruction, table):
        verb = phrase.split()[0]
        kind = table.verbs.get(verb)
        if kind is not None and not any(_does(step, verb, kind, _object(phrase), table) for step in left):
            return phrase
    return ""


def _does(step: Step, verb: str, kind: str, thing: str, table: SchemaTable) -> bool:
    own = step.prompt.split()[0]
    same = own == verb or table.verbs.get(own) == ("contact_off" if kind == "other" else kind)
    words = set(thing.split()) - {"the", "a", "an", "and", "it", "them"}
    return same and (not words or not words.isdisjoint(_object(step.prompt.lower()).split()))


def check_suites(table: SchemaTable) -> list[str]:
    """What is wrong with the suites: one line per instruction that the rows do not know whole, naming the field."""
    planner = RuleBasedPlanner(table)
    return [
        f"schemas.suites.{suite.name}.{task}: no row's pattern knows all of {text!r}; understood so far: "
        + "; ".join(planner.understand(text).prompts)
        for suite in table.suites
        for task, text in suite.instructions.items()
        if not planner.understand(text).task
    ]
