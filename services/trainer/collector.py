"""The thread beside the learner: asks for episodes as versions appear, takes what comes back, and joins it with its targets."""

from __future__ import annotations

import json
import threading
import time
from itertools import groupby
from typing import Any

import torch

from services.runtime.messages import ImagineRequest, ImagineResult, RolloutRequest, RolloutResult, SkillPrompt
from services.trainer import metrics
from services.trainer.context import JobContext, answers
from services.trainer.episode import closed_loop, closed_loop_starts, imagine_request
from services.trainer.flow import Flow, PosttrainError, Progress
from world2act.models.adapters import Adapters
from world2act.presets import Stage2Settings
from world2act.schedule import EpisodeSpec
from world2act.splits import Split
from world2act.stage2 import Targets, aligned
from world2act.types import Trajectory


class Collector(threading.Thread):
    """Runs until `close`. The learner calls `wait(round)` and `take(episode)`, and raises `version` when it has published one."""

    def __init__(self, context: JobContext, flow: Flow, adapters: Adapters, settings: Stage2Settings, namespace: str) -> None:
        super().__init__(daemon=True, name=f"collector-{context.id}")
        self.context, self.flow, self.adapters, self.stage2, self.namespace = context, flow, adapters, settings, namespace
        self.adapters_hash = adapters.hash
        self.version = 0
        self.records: dict[str, tuple[Trajectory, Targets] | None] = {}  # None: taken
        self.error: Exception | None = None
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._asked: dict[str, float] = {}
        self._progressed = 0.0

    # --- the learner's side ---

    def wait(self, round_: int) -> None:
        """Until every episode of the rounds up to `round_` is in `records`. Raises what the collector met, or the job's stop."""
        while True:
            self.context.check()
            with self._changed:
                if self.error is not None:
                    raise self.error
                if all(spec.key in self.records for spec in self.flow.specs if spec.round <= round_):
                    return
                self._changed.wait(0.3)

    def take(self, spec: EpisodeSpec) -> tuple[Trajectory, Targets] | None:
        """What `spec` brought, once: its frames need not stay in memory after the data set has what it reads of them."""
        found = self.records[spec.key]
        self.records[spec.key] = None
        return found

    def close(self) -> None:
        """Stop asking and taking."""
        self._closed.set()
        self.join(timeout=10)

    # --- the thread ---

    def run(self) -> None:
        """See the class."""
        reader = answers(self.context)
        try:
            while not self._closed.is_set():
                for progress in self.flow.admit(self.version):
                    self.context.ledger.request(self._request(progress))
                for message in reader.poll():
                    if isinstance(message, RolloutResult):
                        self._executed(message)
                    elif isinstance(message, ImagineResult):
                        self._imagined(message)
                self._ask_again()
                self._report()
                with self._changed:
                    self._changed.notify_all()
        except Exception as error:
            with self._changed:
                self.error = error
                self._changed.notify_all()

    def _request(self, progress: Progress) -> RolloutRequest:
        spec = progress.spec
        return RolloutRequest(
            id=progress.id,
            job=self.context.id,
            task=spec.task,
            split=Split.POSTTRAIN.value,
            index=spec.index,
            namespace=self.namespace,
            version=self.version,
            noise=spec.noise,
            seed=int(spec.key, 16),
            round=spec.round,
            imagine=self.stage2.target == "closed-loop",
            horizon=self.stage2.closed_loop_every,
            stop_at_success=False,
        )

    def _executed(self, result: RolloutResult) -> None:
        progress = self.flow.executed(result)
        if progress is None or progress.state != "executed":
            if progress is not None and not result.error:
                metrics.TOO_STALE.inc()
            return
        imagine = result.imagine_id or self._ask_open_loop(result)
        self._asked[imagine] = time.monotonic()
        staleness = progress.spec.round - result.version
        key = progress.spec.key
        if ("episode", key) not in self.context.emitted:
            metrics.STALENESS.observe(staleness)
        shared = {"task": result.task, "index": result.index, "round": progress.spec.round, "version": result.version}
        times = {"started": result.started, "finished": result.finished}
        self.context.event("episode", key, {**shared, "staleness": staleness, "chunks": result.chunks, **times})
        if self.flow.expect(progress, imagine):
            self._join(progress)

    def _ask_open_loop(self, result: RolloutResult) -> str:
        """The paper's target: the skills that were active, one clip each from the first frame on, as long as each lasted."""
        trajectory = self._trajectory(result)
        starts = self.context.artifacts.put_tensors({"frames": trajectory.frames[:1]})
        skills = [SkillPrompt(prompt=prompt, chunks=len(list(same))) for prompt, same in groupby(trajectory.prompts)]
        request = imagine_request(self.context.id, starts, [skills], **self._quality())
        self.context.ledger.publish_imagine(request)
        return request.id

    def _quality(self) -> dict[str, Any]:
        return {"steps": self.context.settings.imagine_steps, "guidance": self.context.settings.imagine_guidance}

    def _imagined(self, result: ImagineResult) -> None:
        for progress in self.flow.imagined(result):
            self._join(progress)
        if result.error and result.id in self._asked:
            self._asked[result.id] = float("-inf")  # ask again at once; flow counts the failures

    def _ask_again(self) -> None:
        """Targets that failed or do not come are asked for again: equal requests have equal ids, so this costs a cache hit."""
        for progress in self.flow.episodes.values():
            late = time.monotonic() - self._asked.get(progress.imagine_id, time.monotonic())
            if progress.state == "executed" and progress.result and late > self.context.settings.imagine_patience:
                self._asked[progress.imagine_id] = time.monotonic()
                if self.stage2.target == "closed-loop":
                    self.context.ledger.publish_imagine(self._closed_loop(progress.result))
                else:
                    self._ask_open_loop(progress.result)

    def _closed_loop(self, result: RolloutResult) -> ImagineRequest:
        trajectory, every = self._trajectory(result), self.stage2.closed_loop_every
        starts, prompts = closed_loop_starts(
            self.context.artifacts, result.trajectory, list(trajectory.frames), trajectory.prompts, every
        )
        request = closed_loop(self.context.id, starts, prompts, every, **self._quality())
        return request.model_copy(update={"id": result.imagine_id})

    def _join(self, progress: Progress) -> None:
        """Load what belongs together and put it into `records`."""
        assert progress.result is not None and progress.imagination is not None
        trajectory = self._trajectory(progress.result)
        targets = self._targets(progress.imagination, trajectory)
        answer = progress.imagination
        data = {"task": trajectory.task, "round": progress.spec.round, "cache_hit": answer.cache_hit}
        times = {"started": answer.started, "finished": answer.finished}
        self.context.event("imagined", progress.spec.key, {**data, **times})
        metrics.COUNTED.inc()
        self.records[progress.spec.key] = (trajectory, targets)

    def _trajectory(self, result: RolloutResult) -> Trajectory:
        """What Stage 2 may see of an episode: neither reward nor success."""
        arrays = self.context.artifacts.get_tensors(result.trajectory)
        metadata = self.context.artifacts.get_metadata(result.trajectory)
        return Trajectory(
            task=metadata["task"],
            split=metadata["split"],
            index=int(metadata["index"]),
            version=int(metadata["version"]),
            frames=arrays["frames"],
            states=arrays["states"],
            base=arrays["base"],
            executed=arrays["executed"],
            prompts=tuple(json.loads(metadata["prompts"])),
            instruction=metadata["instruction"],
            key=metadata["key"],
        )

    def _targets(self, result: ImagineResult, trajectory: Trajectory) -> Targets:
        """Closed loop: one row per clip, as in `stage2.closed_loop_targets`. Open loop: one row, one chunk after the other."""
        for name, found, mine in (
            ("world model", result.worldmodel_hash, self.adapters.worldmodel_hash),
            ("adapters", result.adapters_hash, self.adapters_hash),
        ):
            if found and found != mine:
                raise PosttrainError(f"targets: imagined with {name} {found[:12]}, but the trainer has {mine[:12]}")
        arrays = {name: torch.tensor(array) for name, array in self.context.artifacts.get_tensors(result.artifact).items()}
        if self.stage2.target == "open-loop":
            targets = Targets(arrays["embeddings"][0].float(), arrays["mask"][0].bool())
            return aligned(targets, self.adapters, trajectory) if self.stage2.alignment == "monotone" else targets
        n = len(trajectory.frames)
        visual = arrays["latents"][:, 0].float() if "latents" in arrays and self.stage2.closed_loop_every == 1 else None
        return Targets(arrays["embeddings"].flatten(0, 1)[:n].float(), arrays["mask"].flatten(0, 1)[:n].bool(), visual)

    def _report(self) -> None:
        joined = len(self.records)
        if time.monotonic() - self._progressed > 1.0 and joined < len(self.flow.episodes):
            self._progressed = time.monotonic()
            self.context.progress(joined / len(self.flow.episodes), f"{joined} of {len(self.flow.episodes)} episodes")
