"""The rollout and imagine jobs: the same initial states imagined skill by skill, executed, or both."""

from __future__ import annotations

from typing import Any

from services.runtime.messages import ImagineRequest, ImagineResult, RolloutRequest
from services.trainer import describe
from services.trainer.context import JobContext, run_all
from services.trainer.episode import imagine_request
from services.trainer.evaluate import pinned
from services.trainer.params import ImagineParams, PolicyRef, RolloutParams
from world2act.segmentation import RuleBasedPlanner

LONGEST = 24
"""Chunks of one imagined skill at most: the embedded world model's horizon."""


def planned_skills(instruction: str, task: str | None, chunks: int) -> list[dict[str, Any]]:
    """The skills that `instruction` asks for, sharing the task's customary `chunks` evenly. Raises ValueError as the planner."""
    prompts = RuleBasedPlanner().plan(instruction, task).prompts
    each = [chunks // len(prompts) + (i < chunks % len(prompts)) for i in range(len(prompts))]
    return [{"prompt": prompt, "chunks": min(max(n, 1), LONGEST)} for prompt, n in zip(prompts, each, strict=True)]


def imagination(
    context: JobContext,
    task: str,
    split: str,
    indices: list[int],
    *,
    seed: int,
    video: bool,
    instruction: str | None = None,
    skills: list[dict[str, Any]] | None = None,
) -> tuple[ImagineRequest, list[str]]:
    """The request that imagines `skills` (planned where None) from each initial state, and the skills' prompts."""
    frames, own, limit = describe.start_frames(context, task, split, indices)
    row = skills or planned_skills(instruction or own, None if instruction else task, limit)
    starts = context.artifacts.put_tensors({"frames": frames})
    request = imagine_request(
        context.id,
        starts,
        [ImagineRequest.model_validate({"id": "", "reply": "", "starts": "", "skills": [row]}).skills[0]] * len(indices),
        seed=seed,
        steps=context.settings.imagine_steps,
        guidance=context.settings.imagine_guidance,
        latents=True,
        video=video,
    )
    return request, [str(skill["prompt"]) for skill in row]


def imagined_json(result: ImagineResult, row: int, prompts: list[str]) -> dict[str, Any]:
    """What a report needs of row `row` of an imagination."""
    video = result.videos[row] if row < len(result.videos) else ""
    return {
        "skills": prompts,
        "imagined_video": video,
        "imagined": result.artifact,
        "imagined_row": row,
        "cache_hit": result.cache_hit,
    }


def run(context: JobContext, params: RolloutParams) -> dict[str, Any]:
    """Result: `rollouts`, one entry per initial state with the names of its artifacts and, where executed, its outcome."""
    ref = PolicyRef(namespace=params.namespace, version=params.version)
    if params.mode != "imagine" and (ref.namespace != "default" or context.ledger.newest("default") is not None):
        ref = pinned(context, ref)  # the default namespace without a version is the base policy alone
    split, indices = params.split.value, list(dict.fromkeys(params.indices))
    imagines: list[ImagineRequest] = []
    prompts: list[str] = []
    if params.mode != "execute":
        request, prompts = imagination(context, params.task, split, indices, seed=params.seed, video=params.video)
        imagines.append(request)
    executions = {index: _execution(context, params, ref, index) for index in indices} if params.mode != "imagine" else {}

    def progress(done: int, of: int) -> None:
        context.progress(done / of, f"{done} of {of}")

    executed, answers = run_all(context, list(executions.values()), imagines, progress)
    rollouts = []
    for row, index in enumerate(indices):
        entry: dict[str, Any] = {"task": params.task, "split": split, "index": index, "seed": params.seed}
        if imagines:
            entry |= imagined_json(answers[imagines[0].id], row, prompts)
        if executions:
            result = executed[executions[index].id]
            kept = ("success", "chunks", "version", "unseen", "trajectory", "started", "finished")
            entry |= {"executed_video": result.video, **{name: getattr(result, name) for name in kept}}
        rollouts.append(entry)
    return {"task": params.task, "split": split, "mode": params.mode, "namespace": ref.namespace, "rollouts": rollouts}


def _execution(context: JobContext, params: RolloutParams, ref: PolicyRef, index: int) -> RolloutRequest:
    return RolloutRequest(
        id=f"rollout/{params.task}/{params.split.value}/{index}",
        job=context.id,
        task=params.task,
        split=params.split.value,
        index=index,
        namespace=ref.namespace,
        version=ref.version,
        seed=params.seed,
        video=params.video,
    )


def run_imagine(context: JobContext, params: ImagineParams) -> dict[str, Any]:
    """Result: as one entry of a rollout job's `rollouts`."""
    skills = [skill.model_dump() for skill in params.skills] if params.skills else None
    request, prompts = imagination(
        context,
        params.task,
        params.split.value,
        [params.index],
        seed=params.seed,
        video=params.video,
        instruction=params.instruction,
        skills=skills,
    )
    _, answers = run_all(context, [], [request])
    entry = {"task": params.task, "split": params.split.value, "index": params.index, "seed": params.seed}
    return {**entry, **imagined_json(answers[request.id], 0, prompts)}
