"""Planner and aligner by a language model (METHOD: paper section 3, language stream and alignment; supplement E).

The model sees the instruction, the task schemas and the detected indices, and answers JSON. Every answer is checked: the steps
against the schema and the instruction, the boundaries by `validate_answer`. A wrong one is rejected and asked for again, with
what was wrong; it is never repaired. There is no network here: what connects to a model is given, as `Complete`
(services/runtime/llm.py has one for any OpenAI-compatible server). What is sent can be replayed: same question, same key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from world2act.segmentation.alignment import (
    MIN_SEPARATION,
    Alignment,
    AnswerRejectedError,
    align,
    candidates_of,
    validate_answer,
)
from world2act.segmentation.events import ContactEvent, GripperCalibration
from world2act.segmentation.planner import Plan, RuleBasedPlanner, undone
from world2act.segmentation.schemas import MAX_STEPS, PREPOSITIONS, SchemaTable, Step, TaskSchema, check_instruction, load_schemas

MAX_ANSWER = 20_000
"""Characters of an answer that are looked at; a longer one is rejected."""

MAX_DIGITS = 20
"""Of a whole number in an answer."""

Messages = Sequence[Mapping[str, str]]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Completion:
    """One answer: its text; truncated: the model was stopped before it was done; tokens as the server counts them."""

    text: str
    truncated: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


Complete = Callable[[Messages, Mapping[str, Any]], Completion]
"""(messages, JSON schema of the answer) -> answer. Raises what it likes where no answer can be had; nothing here catches it."""


class Memory(Protocol):
    """Where accepted answers are kept; services/runtime/artifacts.py's store is one."""

    def recall(self, key: str) -> str | None:
        """The text under `key`, or None."""
        ...

    def remember(self, key: str, value: str) -> None:
        """Keep `value` under `key`."""
        ...


class InProcess(dict[str, str]):
    """`Memory` that ends with the process."""

    def recall(self, key: str) -> str | None:
        """See `Memory`."""
        return self.get(key)

    def remember(self, key: str, value: str) -> None:
        """See `Memory`."""
        self[key] = value


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class PlannedStep(_Answer):
    """One step of a plan."""

    prompt: str = Field(min_length=1, max_length=200)
    ends: Literal["contact_on", "contact_off", "touch_on", "touch_off", "end"]


class PlanAnswer(_Answer):
    """The planner's answer."""

    task: str = Field(min_length=1, max_length=100)
    steps: list[PlannedStep] = Field(min_length=1, max_length=MAX_STEPS)
    explanation: str = Field(min_length=1, max_length=500)


class Boundary(_Answer):
    """Where one step ends."""

    step: int
    index: int
    reason: str = Field(min_length=1, max_length=500)


class Missing(_Answer):
    """A step that no index shows."""

    step: int
    reason: str = Field(min_length=1, max_length=500)


class AlignAnswer(_Answer):
    """The aligner's answer."""

    boundaries: list[Boundary] = Field(max_length=2 * MAX_STEPS)
    missing: list[Missing] = Field(max_length=MAX_STEPS)
    explanation: str = Field(min_length=1, max_length=1000)


def parse_answer(text: str) -> Any:
    """The JSON object that `text` is, and nothing else. Raises AnswerRejectedError: prose around it, broken, too long, a key
    twice, NaN, an endless number."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise AnswerRejectedError("answer: an object has a key twice")
        return dict(pairs)

    def no_constant(name: str) -> Any:
        raise AnswerRejectedError(f"answer: {name} is no JSON number")

    def whole(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise AnswerRejectedError(f"answer: a number has {len(digits)} digits, the limit is {MAX_DIGITS}")
        return int(digits)

    if len(text) > MAX_ANSWER:
        raise AnswerRejectedError(f"answer: has {len(text)} characters, the limit is {MAX_ANSWER}")
    if not text.strip():
        raise AnswerRejectedError("answer: is empty")
    try:
        found = json.loads(text, object_pairs_hook=once, parse_constant=no_constant, parse_int=whole)
    except json.JSONDecodeError as e:
        raise AnswerRejectedError(f"answer: must be one JSON object and nothing around it: {e.msg} at {e.pos}") from None
    except RecursionError:
        raise AnswerRejectedError("answer: is nested too deeply") from None
    if not isinstance(found, dict):
        raise AnswerRejectedError(f"answer: must be a JSON object, got {type(found).__name__}")
    return found


def question_key(model: str, messages: Messages, schema: Mapping[str, Any]) -> str:
    """sha256 (hex) of all that decides an answer."""
    return hashlib.sha256(json.dumps([model, messages, schema], sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Asker:
    """Asks until an answer passes its check: `attempts` answers at most, each rejection fed back.

    memory: accepted answers, by question (they are checked again when recalled). refused: why questions were given up, so that
    none is asked, and paid for, again; None: each time anew. log: takes one JSON-ready record per answer: key, model, messages,
    schema, answer, rejected (why, or null), cached, tokens, seconds.
    """

    complete: Complete
    model: str = ""
    attempts: int = 3
    memory: Memory = field(default_factory=InProcess)
    refused: dict[str, str] | None = None
    log: Callable[[dict[str, Any]], None] = lambda record: None

    def ask(
        self, messages: Messages, answer: type[BaseModel], check: Callable[[Any], Value], **only: Sequence[str | int] | int
    ) -> Value:
        """What `check` makes of the first answer that it accepts. Raises AnswerRejectedError with the last reason.

        only: field -> the values that it can have in this question, or how many items at most. A server that holds answers to
        their schema can give no other; `check` is for those that do not.
        """
        schema = _narrowed(answer.model_json_schema(), only)
        key = question_key(self.model, messages, schema)
        if (kept := self.memory.recall(key)) is not None:
            try:
                value = check(_validated(answer, parse_answer(kept)))
            except AnswerRejectedError:
                pass  # the rules became stricter since: ask again
            else:
                self._record(messages, schema, Completion(kept), None, cached=True)
                return value
        if self.refused is not None and key in self.refused:
            raise AnswerRejectedError(self.refused[key])
        said = [dict(m) for m in messages]
        why = ""
        for _ in range(self.attempts):
            found = self.complete(said, schema)
            try:
                if found.truncated:
                    raise AnswerRejectedError("answer: was cut off at the token limit; answer shorter")
                value = check(_validated(answer, parse_answer(found.text)))
            except AnswerRejectedError as e:
                why = str(e)
                self._record(said, schema, found, why)
                sendable = found.text[:2000].encode(errors="replace").decode()  # a lone surrogate is not
                said += [
                    {"role": "assistant", "content": sendable},
                    {"role": "user", "content": f"Rejected: {why[:1000]}\nAnswer again, with one JSON object only."},
                ]
                continue
            self._record(said, schema, found, None)
            self.memory.remember(key, found.text)
            return value
        why = f"{self.attempts} answers were rejected, the last one because {why}"
        if self.refused is not None:
            self.refused[key] = why
        raise AnswerRejectedError(why)

    def _record(
        self, said: Messages, schema: Mapping[str, Any], found: Completion, why: str | None, cached: bool = False
    ) -> None:
        tokens = {"prompt_tokens": found.prompt_tokens, "completion_tokens": found.completion_tokens}
        rest = {"truncated": found.truncated, "cached": cached, "seconds": round(found.seconds, 3), **tokens}
        head = {"key": question_key(self.model, said, schema), "model": self.model, "messages": [dict(m) for m in said]}
        self.log({**head, "schema": dict(schema), "answer": found.text[: MAX_ANSWER + 1], "rejected": why, **rest})


class ReplayError(LookupError):
    """The log has no answer to a question."""


def replay(records: Iterable[Mapping[str, Any]], model: str = "") -> Complete:
    """A `Complete` that answers from the records of a log: the same questions in any order, the same answers, no model."""
    tape = {r["key"]: Completion(r["answer"], bool(r["truncated"])) for r in records if not r["cached"]}

    def complete(messages: Messages, schema: Mapping[str, Any]) -> Completion:
        key = question_key(model, messages, schema)
        if key not in tape:
            raise ReplayError(f"the log has no answer to question {key[:12]}")
        return tape[key]

    return complete


def _narrowed(schema: Any, only: Mapping[str, Sequence[str | int] | int]) -> Any:
    """A JSON schema in which the fields named in `only`, however deep, are as it says (see `Asker.ask`)."""
    if isinstance(schema, list):
        return [_narrowed(s, only) for s in schema]
    if not isinstance(schema, dict):
        return schema
    narrow = {name: _narrowed(s, only) for name, s in schema.items()}
    fields = narrow.get("properties", {})
    for name in only.keys() & fields.keys():
        to = only[name]
        if isinstance(to, int):
            fields[name]["maxItems"] = to
        else:
            fields[name] = {"type": fields[name]["type"], "enum": list(to)}
    return narrow


def _validated(answer: type[BaseModel], content: Any) -> Any:
    """`content` as `answer`. Raises AnswerRejectedError naming the first field that is wrong."""
    try:
        return answer.model_validate(content)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False, include_context=False)[0]
        raise AnswerRejectedError(f"{'.'.join(str(p) for p in first['loc']) or 'answer'}: {first['msg']}") from None


_PLAN = """You split an instruction to a robot arm into atomic skills. Answer one JSON object and nothing else.
`schemas` lists the tasks that are known: the steps of each, in order, with {slots} to be filled from the instruction.
If one of them is the instruction's task, give its name as `task` and exactly its steps (optional ones may be left out).
If none is, or several are asked for one after the other, `task` is "none"; use the steps of each part, in the order said.
Each prompt is one imperative phrase; it begins with a verb of `verbs` and uses only words of the instruction and the schemas.
`ends` says what ends a step: contact_on (something is grasped), contact_off (it is let go), end (of the episode: the last step,
always and only)."""

_ALIGN = f"""You find where the skills of a recorded robot episode end. Answer one JSON object and nothing else.
`steps` are the skills in order; each that does not end with the episode ends at one of `indices`: frames at which the gripper
closed on something (contact_on), let go (contact_off), or the arm began or stopped to push (touch_on, touch_off).
Some indices are false: closures on nothing, or less than {MIN_SEPARATION} frames after another. Leave those out.
`boundaries`: for each step that ends at a contact, in order, its position in `steps` and the index; the kind must be the step's
`ends`. Use only the given indices, each at most once, in increasing order.
`missing`: steps that no index shows, with the reason; never invent one. An optional step that did not happen goes there too."""


@dataclass(frozen=True)
class LLMPlanner:
    """`Planner` by a language model. Raises AnswerRejectedError where no answer is valid, ValueError for a bad instruction."""

    asker: Asker
    table: SchemaTable = field(default_factory=load_schemas)

    def plan(self, instruction: str, task: str | None = None) -> Plan:
        """See `Planner.plan`."""
        text = check_instruction(instruction)
        rows = [{"task": r.task, "steps": [_step_json(s) for s in r.steps]} for r in self.table.tasks]
        asked = {"instruction": text, "benchmark_task": task, "schemas": rows, "verbs": sorted(self._verbs())}
        messages = _messages(_PLAN, asked)
        names = [*(r.task for r in self.table.tasks), "none"]
        return self.asker.ask(messages, PlanAnswer, lambda answer: self._check(answer, text, task), task=names)

    def _verbs(self) -> set[str]:
        return set(self.table.verbs) | {s.prompt.split()[0] for r in self.table.tasks for s in r.steps}

    def _check(self, answer: PlanAnswer, instruction: str, task: str | None) -> Plan:
        steps = tuple(Step(" ".join(s.prompt.split()), s.ends) for s in answer.steps)
        for i, s in enumerate(steps):
            if (s.ends == "end") != (i == len(steps) - 1):
                raise AnswerRejectedError(f"steps.{i}.ends: {s.ends!r}; the last step, and no other, ends with 'end'")
            self._check_words(i, s.prompt, instruction)
        row = next((r for r in self.table.tasks if r.task == answer.task), None)
        if row is None and answer.task != "none":
            raise AnswerRejectedError(f"task: {answer.task!r} is no schema and not 'none'")
        known = RuleBasedPlanner(self.table).understand(instruction)
        name = "none" if "+" in known.task else known.task
        if name and answer.task != name:
            raise AnswerRejectedError(f"task: {answer.task!r}, but the instruction's is {name!r}")
        if (schema := known if known.task else row) is not None:
            steps = _as_in_row(steps, schema)
        if not known.task and (phrase := undone(instruction, steps, self.table)):
            raise AnswerRejectedError(f"steps: none does {phrase!r}, or not in the instruction's order")
        return Plan(instruction, task or (row.task if row else None), TaskSchema(row.task if row else "", steps))

    def _check_words(self, i: int, prompt: str, instruction: str) -> None:
        """An object that the instruction does not name is invented."""
        if slot := re.search(r"\{\w*\}", prompt):
            raise AnswerRejectedError(f"steps.{i}.prompt: {slot[0]} of {prompt!r} is not filled from the instruction")
        words = _words(prompt)
        if not words or words[0] not in self._verbs():
            raise AnswerRejectedError(f"steps.{i}.prompt: {prompt!r} must begin with one of the verbs")
        known = set(_words(instruction)) | {w for r in self.table.tasks for s in r.steps for w in _words(s.prompt)}
        known |= {*self._verbs(), *PREPOSITIONS, *("the", "a", "an", "of", "up", "down", "and", "it", "its")}
        for word in words:
            if word not in known and word.removesuffix("s") not in known and f"{word}s" not in known:
                raise AnswerRejectedError(f"steps.{i}.prompt: {word!r} is neither in the instruction nor in the schemas")


def _as_in_row(steps: tuple[Step, ...], row: TaskSchema) -> tuple[Step, ...]:
    """`steps`, which must end as the row's do and say the same, optional ones left out or not. Raises AnswerRejectedError."""
    at = 0
    as_in: list[Step] = []
    for s in row.steps:
        if at < len(steps) and steps[at].ends == s.ends and (not s.optional or len(steps) - at > _mandatory(row, s)):
            as_in.append(s)
            at += 1
        elif not s.optional:
            at = -1
            break
    if at != len(steps):
        wanted = ", ".join(f"{s.ends}{' (optional)' if s.optional else ''}" for s in row.steps)
        got = ", ".join(s.ends for s in steps)
        raise AnswerRejectedError(f"steps: task {row.task!r} has {len(row.steps)} steps that end at {wanted}; got {got}")
    for i, (step, s) in enumerate(zip(steps, as_in, strict=True)):
        if _said(step.prompt, s.prompt) != _said(s.prompt, s.prompt):
            raise AnswerRejectedError(f"steps.{i}.prompt: {step.prompt!r} is not {s.prompt!r}")
    return tuple(replace(step, optional=s.optional) for step, s in zip(steps, as_in, strict=True))


def _said(prompt: str, wanted: str) -> list[str]:
    """What must be the same in `prompt` as in `wanted`: the verb of a template, else all words but articles, "up" and "down"."""
    words = _words(prompt)
    return words[:1] if "{" in wanted else [w for w in words if w not in ("the", "a", "an", "up", "down")]


def _mandatory(row: TaskSchema, step: Step) -> int:
    """Steps after `step` in `row` that must occur."""
    return sum(not s.optional for s in row.steps[row.steps.index(step) + 1 :])


@dataclass(frozen=True)
class LLMAligner:
    """`Aligner` by a language model. An episode with no valid answer, or a missing step, is discarded with its reason."""

    asker: Asker

    def align(
        self, events: Sequence[ContactEvent], schema: TaskSchema, actions: int, hand: GripperCalibration | None = None
    ) -> Alignment:
        """See `align`. Nothing is asked where nothing can be chosen: no step ends at a contact, or there is no contact."""
        given = candidates_of(events)
        if not given or all(s.ends == "end" for s in schema.steps):
            return align(events, schema, actions, hand)
        asked = {
            "steps": [_step_json(s) for s in schema.steps],
            "frames": actions + 1,
            "indices": [{"index": c.index, "kind": c.kind, "width_mm": round(c.width_m * 1000, 1)} for c in given],
            "open_width_mm": round(hand.open_width_m * 1000, 1) if hand else None,
            "holds_nothing_below_mm": round(hand.min_object_width_m * 1000, 1) if hand else None,
        }

        def check(answer: AlignAnswer) -> Alignment:
            missing = _missing(answer, schema)
            kept = tuple(s for i, s in enumerate(schema.steps) if i not in missing)
            found = validate_answer(answer.model_dump(), schema.steps, given, missing)
            notes = (f"aligner: {answer.explanation}",)
            for i, reason in missing.items():
                if not schema.steps[i].optional:
                    return Alignment((), (), (), notes, f"step missing: {schema.steps[i].prompt!r}: {reason}")
            rows = iter(found)
            chosen = [(actions, "ends with the episode") if s.ends == "end" else next(rows) for s in kept]
            reasons = tuple(f"{s.prompt!r} ends at frame {i}: {why}" for s, (i, why) in zip(kept, chosen, strict=True))
            return Alignment(kept, tuple(i for i, _ in chosen), reasons, notes)

        places = [i for i, s in enumerate(schema.steps) if s.ends != "end"]
        indices = sorted({c.index for c in given})
        most = len(places)
        try:
            return self.asker.ask(
                _messages(_ALIGN, asked), AlignAnswer, check, step=places, index=indices, boundaries=most, missing=most
            )
        except AnswerRejectedError as e:
            return Alignment((), (), (), (), f"no alignment: {e}")


def _missing(answer: AlignAnswer, schema: TaskSchema) -> dict[int, str]:
    """Position -> reason of the steps flagged as missing. Raises AnswerRejectedError for a position that cannot be."""
    missing: dict[int, str] = {}
    for i, m in enumerate(answer.missing):
        if not 0 <= m.step < len(schema.steps) or m.step in missing:
            raise AnswerRejectedError(f"missing.{i}.step: {m.step} is no position in steps, or comes twice")
        if schema.steps[m.step].ends == "end":
            raise AnswerRejectedError(f"missing.{i}.step: step {m.step} ends with the episode; it cannot be missing")
        missing[m.step] = m.reason
    return missing


def _messages(rules: str, asked: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"role": "system", "content": rules}, {"role": "user", "content": json.dumps(asked, ensure_ascii=False)}]


def _step_json(step: Step) -> dict[str, Any]:
    return {"prompt": step.prompt, "ends": step.ends, **({"optional": True} if step.optional else {})}


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", re.sub(r"\{\w+\}", " ", text.lower().replace("_", " ")))
