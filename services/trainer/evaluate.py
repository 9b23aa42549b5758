"""The evaluate job: several policies on the same initial states, with intervals and paired tests."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

from services.runtime.messages import RolloutRequest, RolloutResult
from services.trainer.context import JobContext, run_all
from services.trainer.params import EvaluateParams, PolicyRef
from world2act.evaluation import Comparison, Outcome, compare, paired_difference, plain_table, wilson


def pinned(context: JobContext, ref: PolicyRef) -> PolicyRef:
    """`ref` with -1 replaced by the newest published version, so that every episode meets the same policy.

    Raises ValueError where nothing was published: the base alone would act, under the name of a policy that does not exist.
    """
    if ref.version >= 0:
        return ref
    newest = context.ledger.newest(ref.namespace)
    if newest is None:
        raise ValueError(f"namespace: {ref.namespace!r} has no published version; post-train or import one, or name a job's")
    return PolicyRef(namespace=ref.namespace, version=newest)


def request(context: JobContext, params: EvaluateParams, ref: PolicyRef, task: str, index: int) -> RolloutRequest:
    """The episode of one policy on one initial state; its id names all that decides its outcome."""
    return RolloutRequest(
        id=f"evaluate/{ref.namespace}/{ref.version}/{task}/{params.split.value}/{index}",
        job=context.id,
        task=task,
        split=params.split.value,
        index=index,
        namespace=ref.namespace,
        version=ref.version,
        seed=params.seed,
    )


def name(ref: PolicyRef) -> str:
    """How a policy is called in the result."""
    return "base" if ref.version == 0 else f"{ref.namespace}/{ref.version}"


def run(context: JobContext, params: EvaluateParams) -> dict[str, Any]:
    """Execute everything. The first policy is the reference of all comparisons.

    Result: `policies` with rates per task and overall and the tasks that each left to the base, `comparisons` (policy, rows with
    difference, gained, lost, McNemar p), `rows` and `table` of the last comparison, `episodes` one by one.
    """
    refs = list(dict.fromkeys(pinned(context, ref) for ref in params.policies()))
    scenes = [(task, params.first_index + i) for i in range(params.episodes) for task in sorted(params.tasks)]
    # Scene by scene through all policies, so that a run that is cut short is still matched.
    wanted = {(ref, *scene): request(context, params, ref, *scene) for scene, ref in itertools.product(scenes, refs)}

    def progress(done: int, of: int) -> None:
        context.progress(done / of, f"{done} of {of} episodes")

    results, _ = run_all(context, list(wanted.values()), [], progress)
    by_policy = {ref: [results[wanted[ref, *scene].id] for scene in scenes] for ref in refs}
    outcomes = {ref: [Outcome(r.task, r.split, r.index, r.success) for r in episodes] for ref, episodes in by_policy.items()}
    comparisons = [(ref, compare(outcomes[refs[0]], outcomes[ref], params.split)) for ref in refs[1:]]
    rows = [row_json(row) for row in comparisons[-1][1]] if comparisons else []
    return {
        "split": params.split.value,
        "tasks": sorted(params.tasks),
        "episodes_per_task": params.episodes,
        "policies": [policy_json(ref, by_policy[ref]) for ref in refs],
        "comparisons": [
            {"policy": name(ref), "reference": name(refs[0]), "rows": [row_json(row) for row in found]}
            for ref, found in comparisons
        ],
        "rows": rows,
        "table": plain_table(comparisons[-1][1]) if comparisons else "",
        "episodes": [episode_json(ref, r) for ref in refs for r in by_policy[ref]],
    }


def rate_json(results: list[RolloutResult]) -> dict[str, Any]:
    """Success with its Wilson interval."""
    rate = wilson(sum(r.success for r in results), len(results))
    return {"successes": rate.successes, "n": rate.n, "rate": rate.rate, "low": rate.low, "high": rate.high}


def policy_json(ref: PolicyRef, results: list[RolloutResult]) -> dict[str, Any]:
    """One policy's success, overall and per task."""
    tasks = {task: rate_json([r for r in results if r.task == task]) for task in sorted({r.task for r in results})}
    unseen = sorted({r.task for r in results if r.unseen})
    policy = {"name": name(ref), "namespace": ref.namespace, "version": ref.version, "unseen": unseen}
    return {**policy, "all": rate_json(results), "tasks": tasks}


def row_json(row: Comparison) -> dict[str, Any]:
    """One row of a comparison; the last row, "all", is over every task."""
    rates = {
        label: {"successes": rate.successes, "n": rate.n, "rate": rate.rate, "low": rate.low, "high": rate.high}
        for label, rate in (("base", row.base), ("post-trained", row.post))
    }
    mcnemar = {"gained": row.gained, "lost": row.lost, "p": row.p}
    return {"task": row.name, "episodes": row.base.n, **rates, "difference": asdict(paired_difference(row)), "mcnemar": mcnemar}


def episode_json(ref: PolicyRef, result: RolloutResult) -> dict[str, Any]:
    """One evaluated episode."""
    kept = ("task", "split", "index", "success", "chunks", "trajectory", "started", "finished")
    return {"policy": name(ref), "version": result.version, **{key: getattr(result, key) for key in kept}}
