"""The posttrain job: Stage 2, distributed. Calls the library's plan, data set and learner, and equals them to the bit.

While the learner trains on the rounds that are complete, the collector's thread has later rounds executed and imagined, as far
as the staleness bound allows. After each round the bundle is published, and with it, in one transaction, a checkpoint: a
trainer that is killed goes on from there, reading what was executed meanwhile from the streams.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import structlog
import torch

from services.trainer import describe, metrics, timeline
from services.trainer.collector import Collector
from services.trainer.context import JobContext
from services.trainer.flow import Flow
from services.trainer.params import PosttrainParams
from world2act.bundle import ActionLayout
from world2act.models.adapters import Adapters
from world2act.presets import STAGE2, Stage2Settings, changed
from world2act.schedule import StalenessManager, plan, steps_of
from world2act.signature import sign
from world2act.stage2 import Learner, Stage2Dataset

log = structlog.get_logger()
_seeding = threading.Lock()  # Learner seeds torch's global generator for a moment


def stage2_settings(params: PosttrainParams) -> Stage2Settings:
    """The preset with what the job overrides, `settings` last. `episodes` splits between base and perturbed as the preset does.

    Raises ValueError naming a setting that does not exist or is out of range.
    """
    settings = STAGE2[params.preset]
    rounds = settings.plan
    changes: dict[str, Any] = {}
    if params.episodes is not None:
        perturbed = round(params.episodes * rounds.perturbed / (rounds.base + rounds.perturbed))
        changes |= {"base": params.episodes - perturbed, "perturbed": perturbed, "on_policy": params.episodes}
    if params.steps is not None:
        changes |= {"first_steps": params.steps, "steps": params.steps}
    if params.rounds is not None:
        changes["rounds"] = params.rounds
    return changed(replace(settings, plan=replace(rounds, **changes)), params.settings)


def state_key(job: str) -> str:
    """Hash of what a posttrain job has finished: rounds, checkpoint, history, when it began."""
    return f"w2a:posttrain:{job}"


class Posttrain:
    """One run; `run` may be called again in another process after a kill, and continues."""

    def __init__(self, context: JobContext, params: PosttrainParams) -> None:
        self.context, self.params = context, params
        self.settings = stage2_settings(params)
        self.namespace = params.namespace or context.id
        self.specs = plan(self.settings, params.tasks, params.seed)
        self.rounds = 1 + max(spec.round for spec in self.specs)
        limit = 1 if params.mode == "serial" else context.settings.in_flight
        self.flow = Flow(self.specs, StalenessManager(params.staleness_bound()), limit)
        self.learner: Learner | None = None
        self.history: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """All rounds. Returns the job's result. Raises PosttrainError or ValueError with a sentence for the user."""
        state = self._state()
        self.history = json.loads(state.get("history", "[]"))
        self.adapters, self.state_size, self.base_hash, self.layout = self._surroundings()
        data = Stage2Dataset(self.adapters, self.settings, self._encoder())
        collector = Collector(self.context, self.flow, self.adapters, self.settings, self.namespace)
        collector.version = len(self.history)
        collector.start()
        try:
            for number in range(len(self.history), self.rounds):
                collector.wait(number)
                self._train(number, data, collector, state.get("checkpoint"))
                collector.version = len(self.history)
            collector.wait(self.rounds - 1)
        finally:
            collector.close()
        return self._result(float(state["began"]), collector)

    def _state(self) -> dict[str, str]:
        """What earlier attempts finished; claims the namespace on the first."""
        key = state_key(self.context.id)
        client = self.context.client
        if not client.exists(key) and self.context.ledger.newest(self.namespace) is not None:
            raise ValueError(f"namespace: {self.namespace!r} has versions already; choose another or leave it out")
        client.hsetnx(key, "began", f"{time.time():.3f}")
        return cast("dict[str, str]", client.hgetall(key))

    def _surroundings(self) -> tuple[Adapters, int, str, ActionLayout]:
        """Adapters, S, the base policy's hash, the action layout; refuses weights that do not belong together."""
        path = self.context.settings.zoo / "adapters.safetensors"
        if not path.is_file():
            raise ValueError(f"adapters: {path} is missing; run Stage 1 first")
        adapters = Adapters.load(path)
        policy, simulator = describe.policy(self.context), describe.simulator(self.context)
        adapters.check_worldmodel(policy.worldmodel_hash or adapters.worldmodel_hash)
        if policy.adapters_hash not in ("", adapters.hash):
            raise ValueError(f"adapters: the policy server has {policy.adapters_hash[:12]}, {path} is {adapters.hash[:12]}")
        names, low, high = zip(*((axis.name, axis.low, axis.high) for axis in simulator.action), strict=True)
        known = {task.name for task in simulator.tasks}
        unknown = sorted(set(self.params.tasks) - known)
        if unknown:
            raise ValueError(f"tasks: {', '.join(unknown)} unknown; choose of {', '.join(sorted(known))}")
        return adapters, int(policy.state_size), str(policy.base_hash), ActionLayout(names, low, high)

    def _encoder(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The world model's encoder, only where targets bring no latents of the visited frames."""
        settings = self.settings
        if settings.vision != "latent" or (settings.target == "closed-loop" and settings.closed_loop_every == 1):
            return None
        from world2act.models.worldmodel import WorldModel  # diffusers takes seconds to import

        model = WorldModel.load(self.context.settings.zoo / "worldmodel.safetensors")
        self.adapters.check_worldmodel(model.hash)
        return model.encode

    def _train(self, number: int, data: Stage2Dataset, collector: Collector, checkpoint: str | None) -> None:
        """Round `number`: add what belongs to it, train, publish with a checkpoint."""
        started = time.time()
        for spec in self.specs:
            # What later rounds have collected already must not change this one.
            if spec.round <= number and (found := collector.take(spec)) is not None:
                data.add(spec, *found)
        if self.learner is None:
            self.learner = self._make_learner(data)
            if checkpoint:
                self._resume(self.learner, checkpoint)
        learner = self.learner
        before = learner.total_steps

        def on_step(values: dict[str, float]) -> None:
            self.context.check()
            metrics.UPDATES.inc()
            if learner.total_steps % self.context.settings.metrics_every == 0:
                self._metrics_event(number, learner.total_steps, values)

        steps = learner.train_round(data, steps_of(number, self.settings), on_step)
        last = steps[-max(1, len(steps) // 10) :]
        mean = {name: sum(s[name] for s in last) / len(last) for name in last[0]}
        self._publish(number, started, learner.total_steps - before, len(data), mean)

    def _make_learner(self, data: Stage2Dataset) -> Learner:
        visual = data.stack()[0].visual
        shape = cast("tuple[int, int, int]", tuple(visual.shape[2:]) if self.settings.vision == "latent" else (16, 8, 16))
        with _seeding:
            device = self.context.settings.trainer_device
            return Learner(self.adapters, self.settings, self.params.seed, self.state_size, shape, device)

    def _resume(self, learner: Learner, checkpoint: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.safetensors"
            path.write_bytes(self.context.artifacts.get(checkpoint))
            learner.resume(path)
        log.info("resumed", job=self.context.id, version=learner.version, updates=learner.total_steps)

    def _metrics_event(self, number: int, update: int, values: dict[str, float]) -> None:
        metrics.LOSS.set(values["loss"])
        metrics.COSINE.set(values["positive_cosine"])
        shown = {name: round(value, 6) for name, value in values.items()}
        shown["cosine"] = shown.pop("positive_cosine")
        self.context.event("metrics", f"update-{update}", {"round": number, "update": update, **shown})

    def _publish(self, number: int, started: float, updates: int, trajectories: int, mean: dict[str, float]) -> None:
        """Bundle, checkpoint and history, visible together or not at all."""
        assert self.learner is not None
        content, key = self.learner.bundle(self.base_hash, self.layout).to_bytes(), self.context.settings.signer()
        bundle = self.context.artifacts.put(content if key is None else sign(content, key), "safetensors")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.safetensors"
            self.learner.checkpoint(path)
            checkpoint = self.context.artifacts.put(path.read_bytes(), "safetensors")
        entry = {
            "round": number,
            "version": number + 1,
            "artifact": bundle,
            "loss": round(mean["loss"], 6),
            "cosine": round(mean["positive_cosine"], 6),
            "residual_norm": round(mean["residual_norm"], 6),
            "steps": updates,
            "updates": self.learner.total_steps,
            "trajectories": trajectories,
            "started": started,
            "finished": time.time(),
        }
        self.history.append(entry)
        state = {"checkpoint": checkpoint, "history": json.dumps(self.history)}
        self.context.ledger.publish_version(self.namespace, number + 1, bundle, (state_key(self.context.id), state))
        metrics.VERSION.set(number + 1)
        self.context.event("round", f"round-{number}", entry)

    def _result(self, began: float, collector: Collector) -> dict[str, Any]:
        """What GET /jobs/{id} shows in the end."""
        episodes = [p for p in self.flow.episodes.values() if p.result and p.imagination]
        executions = [(p.result.started, p.result.finished) for p in episodes if p.result]
        answers = {p.imagination.id: p.imagination for p in episodes if p.imagination}
        generations = [(a.started, a.finished) for a in answers.values() if not a.cache_hit]
        parts = {
            "generation": generations,
            "execution": executions,
            "optimisation": [(h["started"], h["finished"]) for h in self.history],
        }
        histogram: dict[str, int] = {}
        for p in episodes:
            staleness = str(p.spec.round - p.result.version) if p.result else ""
            histogram[staleness] = histogram.get(staleness, 0) + 1
        return {
            "namespace": self.namespace,
            "mode": self.params.mode,
            "eta": self.flow.staleness.eta,
            "preset": self.params.preset,
            "settings": self.params.settings,
            "tasks": sorted(self.params.tasks),
            "seed": self.params.seed,
            "version": len(self.history),
            "versions": [{"version": h["version"], "artifact": h["artifact"]} for h in self.history],
            "artifact": self.history[-1]["artifact"],
            "rounds": self.history,
            "losses": [h["loss"] for h in self.history],
            "cosines": [h["cosine"] for h in self.history],
            "episodes": len(collector.records),
            "planned": len(self.specs),
            "staleness": dict(sorted(histogram.items())),
            "cache_hits": sum(a.cache_hit for a in answers.values()),
            **timeline.summary(parts, time.time() - began),
        }


def run(context: JobContext, params: PosttrainParams) -> dict[str, Any]:
    """The job's entry."""
    return Posttrain(context, params).run()
