"""Instruction -> ordered skill prompts (METHOD: paper section 3, language stream, and section 4's skill-wise inference).

The paper asks an LLM, guided by task schemas. `RuleBasedPlanner` needs none: it matches the instruction to a schema, and
splits an instruction that no schema knows into verb phrases. An LLM planner is another class with the same `plan`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
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

_PARTICLES = r"up|down|out|off|over|back"


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
        found = self.table.match(instruction)
        if task is not None and (found is None or found.task != task):
            # The simulator knows its task better than the wording does.
            found = next((row.fill({}) for row in self.table.tasks if row.task == task), found)
        if found is not None:
            return Plan(instruction, found.task, found)
        return Plan(instruction, None, self._generic(split_phrases(instruction, self.table)))

    def _generic(self, phrases: list[str]) -> TaskSchema:
        """A schema for phrases no row knows: picking ends at contact, all else at the end of contact (the paper's cycle)."""
        if len(phrases) > MAX_STEPS:
            raise ValueError(f"instruction: has {len(phrases)} steps, the limit is {MAX_STEPS}")
        steps = []
        for i, phrase in enumerate(phrases):
            kind = self.table.verbs.get(phrase.split()[0])
            last = i == len(phrases) - 1
            steps.append(Step(phrase, "end" if last else "contact_on" if kind == "contact_on" else "contact_off"))
        return TaskSchema("", tuple(steps))


def split_phrases(instruction: str, table: SchemaTable) -> list[str]:
    """Verb phrases of an instruction: split at 'and then', 'then', 'and', ','; 'it' becomes the phrase before's object.

    A part that starts with no known verb is joined back ('put the salt and the pepper in the box' is one phrase).
    """
    parts = re.split(r"(\s*,?\s*\band then\b\s*|\s*,?\s*\bthen\b\s*|\s*,?\s*\band\b\s*|\s*,\s*)", normalise(instruction))
    phrases: list[str] = []
    for i in range(0, len(parts), 2):
        part = parts[i].strip(" ,")
        if not part:
            continue
        separator = parts[i - 1] if i else ""
        if phrases and part.split()[0] not in table.verbs and "then" not in separator:
            phrases[-1] += f"{', ' if separator.strip() == ',' else ' and '}{part}"
            continue
        if phrases and (noun := _object(phrases[-1])):
            part = re.sub(r"\b(?:it|them)\b", noun, part, count=1)
        phrases.append(part)
    return phrases or [normalise(instruction)]


def _object(phrase: str) -> str:
    """'pick up the red cup from the shelf' -> 'the red cup'; '' if there is none."""
    rest = re.sub(rf"^\S+\s*(?:(?:{_PARTICLES})\s+)?", "", phrase)
    return re.split(rf"\s*\b(?:{'|'.join(PREPOSITIONS)})\b", rest, maxsplit=1)[0].strip()
