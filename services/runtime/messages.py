"""What travels on the streams: JSON validated by pydantic. Tensors are artifacts, named here by their store name.

Streams and who writes -> reads them:
  w2a:jobs              gateway -> trainer                 JobRequest
  w2a:rollout:requests  trainer -> rollout coordinator     RolloutRequest
  w2a:trajectories      rollout coordinator -> trainer     RolloutResult   (one stream a job: w2a:trajectories:<job>)
  w2a:imagine:requests  coordinator, trainer -> worldmodel ImagineRequest
  w2a:imagined:<reply>  worldmodel -> who asked            ImagineResult
  w2a:policy:versions   trainer -> anyone                  PolicyVersion
  w2a:dead              any consumer                       DeadLetter
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

JOBS = "w2a:jobs"
ROLLOUT_REQUESTS = "w2a:rollout:requests"
IMAGINE_REQUESTS = "w2a:imagine:requests"
POLICY_VERSIONS = "w2a:policy:versions"
DEAD = "w2a:dead"


def trajectories(job: str) -> str:
    """Stream of a job's finished rollouts."""
    return f"w2a:trajectories:{job}"


def imagined(reply: str) -> str:
    """Stream of the imaginations asked for with this `reply` name (a job's id)."""
    return f"w2a:imagined:{reply}"


class Message(BaseModel):
    """Base: unknown fields are an error, so that a wrong producer is noticed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SkillPrompt(Message):
    """One skill to imagine: its prompt and how many action chunks long."""

    prompt: str = Field(min_length=1, max_length=500)
    chunks: int = Field(ge=1, le=32)


class ImagineRequest(Message):
    """Imagine each row's skills one after the other, from its start frame.

    `starts` names an artifact whose tensor `frames` is uint8 (N, H, W, 3), the camera grid; `skills` has N rows. A row's
    embeddings have sum(chunks) entries. A closed-loop target is a row with one skill of one chunk, per visited state.
    """

    id: str = Field(description="content key of the request: equal requests have equal ids")
    reply: str = Field(max_length=80, description="the result goes to the stream imagined(reply)")
    starts: str
    skills: list[list[SkillPrompt]] = Field(min_length=1, max_length=1024)
    seed: int = 0
    steps: int = Field(0, ge=0, le=100)
    guidance: float = Field(0.0, ge=0.0, le=20.0)
    latents: bool = Field(False, description="also store the latents")
    video: bool = Field(False, description="also store decoded frames as mp4, one per row")


class ImagineResult(Message):
    """`artifact`: tensors `embeddings` float32 (N, K, D), `mask` bool (N, K), and with latents=True `latents` (N, 1+K, C, h, w);
    K = the longest row's chunks. `videos`: mp4 artifacts, one per row, if asked."""

    id: str
    reply: str
    artifact: str = ""
    videos: list[str] = []
    worldmodel_hash: str = ""
    adapters_hash: str = ""
    cache_hit: bool = False
    started: float = 0.0
    finished: float = 0.0
    error: str = ""


class RolloutRequest(Message):
    """Execute one episode and, if `imagine`, ask for its closed-loop targets."""

    id: str = Field(description="unique within the job: the episode's key")
    job: str = Field(max_length=80)
    task: str
    split: str
    index: int = Field(ge=0)
    namespace: str = Field("default", description="policy namespace, a post-training job's id")
    version: int = Field(-1, ge=-1, description="-1: the newest version in the namespace; 0: the base alone")
    noise: float = Field(0.0, ge=0.0, le=3.0, description="std of the chunk-wise xyz perturbation, in units of the action's std")
    seed: int = 0
    round: int = 0
    imagine: bool = False
    horizon: int = Field(1, ge=1, le=16, description="closed loop: one clip of this many chunks from every `horizon`-th state")
    video: bool = Field(False, description="record every frame and store an mp4")
    max_chunks: int = Field(0, ge=0, le=64, description="0: the task's customary limit")
    stop_at_success: bool = Field(True, description="False where something learns: the length would tell it of success")


class RolloutResult(Message):
    """`trajectory`: artifact with `frames` uint8 (n,H,W,3), `states` (n,S), `base`, `executed` (n,M,A), metadata task, split,
    index, version, prompts (JSON list), instruction, key. `unseen`: the version was not post-trained on this task and left it to
    the base. `success` is for reports and evaluation: the learner never reads it."""

    id: str
    job: str
    task: str
    split: str
    index: int
    round: int = 0
    version: int = 0
    trajectory: str = ""
    imagine_id: str = ""
    unseen: bool = False
    success: bool = False
    chunks: int = 0
    video: str = ""
    started: float = 0.0
    finished: float = 0.0
    error: str = ""


class PolicyVersion(Message):
    """The trainer published residual `version` of `namespace` as the bundle `artifact`."""

    namespace: str
    version: int
    artifact: str
    published: float


class JobRequest(Message):
    """A job as the gateway accepted it; `params` is validated again by who runs it."""

    id: str
    kind: Literal["rollout", "posttrain", "evaluate", "imagine", "stage1"]
    params: dict[str, Any]


class DeadLetter(Message):
    """A message that could not be handled: where it came from, what it held (first 2,000 characters), and why."""

    stream: str
    entry: str
    payload: str
    error: str
