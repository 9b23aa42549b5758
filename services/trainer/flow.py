"""Which episodes of a post-training run may start, which are under way, and which have met their targets. No network here.

An episode goes: waiting -> requested -> executed -> joined. Results and targets come in any order, any number of times; each
episode is joined once. Limits alone make the mode: in flight 1 is serial, eta 0 synchronous, eta >= 1 asynchronous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.runtime.messages import ImagineResult, RolloutResult
from world2act.schedule import EpisodeSpec, StalenessManager

TRIES = 3
"""How often an episode or a target may fail before the run does."""


class PosttrainError(ValueError):
    """The run cannot go on: the message says which episode failed and why."""


@dataclass
class Progress:
    """Where one episode stands."""

    spec: EpisodeSpec
    state: str = "waiting"
    attempt: int = 0
    result: RolloutResult | None = None
    imagine_id: str = ""
    imagine_failures: int = 0
    imagination: ImagineResult | None = None

    @property
    def id(self) -> str:
        """The id of this attempt's request: the plan's key, and which attempt it is."""
        return self.spec.key if self.attempt == 0 else f"{self.spec.key}.{self.attempt}"


@dataclass
class Flow:
    """See the module's docstring. `limit`: episodes requested and not yet joined."""

    specs: Sequence[EpisodeSpec]
    staleness: StalenessManager
    limit: int
    episodes: dict[str, Progress] = field(init=False)

    def __post_init__(self) -> None:
        self.episodes = {spec.key: Progress(spec) for spec in sorted(self.specs)}
        self._early: dict[str, ImagineResult] = {}
        self._awaited: dict[str, list[Progress]] = {}

    def outstanding(self) -> int:
        """Episodes that are requested or executed, and not joined."""
        return sum(p.state in ("requested", "executed") for p in self.episodes.values())

    def admit(self, version: int) -> list[Progress]:
        """Episodes to request now that `version` is the newest published, in the plan's order."""
        admitted = []
        room = self.limit - self.outstanding()
        for progress in self.episodes.values():
            if room <= 0 or not self.staleness.may_start(progress.spec.round, version):
                break  # later episodes of the plan are of later rounds: they may not start either
            if progress.state == "waiting":
                progress.state = "requested"
                admitted.append(progress)
                room -= 1
        return admitted

    def executed(self, result: RolloutResult) -> Progress | None:
        """Take an executed episode. Returns it if this changed anything: then its state is executed, or waiting to be done again.

        Raises PosttrainError when the episode failed TRIES times.
        """
        progress = self.episodes.get(result.id.partition(".")[0])
        if progress is None or progress.id != result.id or progress.state not in ("waiting", "requested"):
            return None
        if result.error or not self.staleness.accept(progress.spec.round, result.version):
            reason = result.error or f"policy version {result.version} is too old for round {progress.spec.round}"
            progress.attempt += 1
            if progress.attempt >= TRIES:
                raise PosttrainError(f"episode {progress.spec.task} {progress.spec.index}: {reason}")
            progress.state = "waiting"
            return progress
        progress.result, progress.state = result, "executed"
        return progress

    def expect(self, progress: Progress, imagine_id: str) -> Progress | None:
        """`progress` waits for the imagination `imagine_id`; returns it if that has come already."""
        progress.imagine_id = imagine_id
        self._awaited.setdefault(imagine_id, []).append(progress)
        early = self._early.get(imagine_id)
        joined = self.imagined(early) if early is not None else []
        return progress if progress in joined else None

    def imagined(self, result: ImagineResult) -> list[Progress]:
        """Take an imagination. Returns the episodes that it completes. Raises PosttrainError when it failed TRIES times."""
        waiting = [p for p in self._awaited.get(result.id, []) if p.state == "executed"]
        if result.error:
            for progress in waiting:
                progress.imagine_failures += 1
                if progress.imagine_failures >= TRIES:
                    raise PosttrainError(f"targets of {progress.spec.task} {progress.spec.index}: {result.error}")
            return []
        if result.id not in self._awaited:
            self._early[result.id] = result
        for progress in waiting:
            progress.imagination, progress.state = result, "joined"
        return waiting

    def complete(self, round_: int) -> bool:
        """Whether every episode of the rounds up to `round_` has joined its targets."""
        return all(p.state == "joined" for p in self.episodes.values() if p.spec.round <= round_)
