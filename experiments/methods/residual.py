"""Stage 2's loop with any source of targets and any adapter: what ours, the inverse-dynamics residual, LoRA and oracles share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from experiments.arena import Expert, Policy, Run
from experiments.methods.base import Frozen, Parts, Shown, WithResidual
from world2act import schedule, stage2
from world2act.splits import Split
from world2act.stage2 import Learner, Stage2Dataset, Targets


def post_train(
    parts: Parts,
    target: Callable[[Run], Targets],
    *,
    expert: Expert | None = None,
    learner: Learner | None = None,
    policy_of: Callable[[Learner], Policy] | None = None,
    film: Iterable[Shown] | None = None,
) -> Policy:
    """Round by round: execute the plan's episodes, label them with `target`, train on everything so far.

    learner: another than the residual's; policy_of: what acts with it (both or none). film: episodes of demonstrations and video,
    inside from the first round on.
    """
    learner = learner or Learner(parts.adapters, parts.settings, parts.seed, device="auto")
    policy_of = policy_of or (lambda trained: WithResidual(parts.base, trained.bundle(parts.base.hash), parts.model.encode))
    allowed = (Split.POSTTRAIN,) if film is None else (Split.POSTTRAIN, Split.BASE, Split.WORLDMODEL)
    data = Stage2Dataset(parts.adapters, learner.settings, parts.model.encode, allowed)
    for episode in film or ():
        data.add(*episode)
    seconds = {"execute": 0.0, "target": 0.0, "train": 0.0}
    policy: Policy = Frozen(parts.base)
    for number, members in schedule.rounds(schedule.plan(parts.settings, parts.tasks, parts.seed)):
        started = time.monotonic()
        runs = parts.arena.run(members, policy, expert=expert)
        executed = time.monotonic()
        for spec, run in zip(members, runs, strict=True):
            data.add(spec, run.trajectory, target(run))
        labelled = time.monotonic()
        history = learner.train_round(data, schedule.steps_of(number, parts.settings))
        policy = policy_of(learner)
        seconds["execute"] += executed - started
        seconds["target"] += labelled - executed
        seconds["train"] += time.monotonic() - labelled
        for name in ("decode", "positive_cosine", "residual_norm"):
            parts.note(f"round_{number}/{name}", _last(history, name))
        parts.on_round(number, policy)
    for name, value in seconds.items():
        parts.note(f"seconds/{name}", value)
    parts.note("updates_per_second", learner.total_steps / seconds["train"])
    parts.note("parameters", sum(p.numel() for p in learner.policy.parameters() if p.requires_grad))
    return policy


def _last(history: list[stage2.Metrics], name: str, steps: int = 20) -> float:
    values = [metrics[name] for metrics in history[-steps:]]
    return sum(values) / len(values)
