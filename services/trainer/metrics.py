"""Prometheus metrics of both trainer processes."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

EPISODES = Counter("w2a_rollout_episodes_total", "Episodes executed", ["task", "split", "outcome"])
OUTCOMES = ("success", "no success", "error")
EPISODE_SECONDS = Histogram(
    "w2a_rollout_episode_seconds", "Wall time of one episode", buckets=(0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
)
CHUNKS = Counter("w2a_rollout_chunks_total", "Action chunks executed")
RETRIES = Counter("w2a_rollout_retries_total", "Episodes started again because a door was away", ["code"])
ROLLOUT_QUEUE = Gauge("w2a_rollout_queue_depth", "Episodes requested and not finished")

JOBS = Counter("w2a_trainer_jobs_total", "Jobs ended", ["kind", "status"])
JOBS_RUNNING = Gauge("w2a_trainer_jobs_running", "Jobs that run now")
JOB_QUEUE = Gauge("w2a_trainer_job_queue_depth", "Jobs accepted and not ended")
UPDATES = Counter("w2a_trainer_updates_total", "Stage 2 updates")
LOSS = Gauge("w2a_trainer_loss", "Stage 2 loss of the newest update")
COSINE = Gauge("w2a_trainer_cosine", "Mean cosine of imagined and executed chunk embeddings")
VERSION = Gauge("w2a_trainer_policy_version", "Newest residual version published by this process")
STALENESS = Histogram(
    "w2a_trainer_staleness", "Rounds between acting policy and learner, per episode", buckets=(0, 1, 2, 3, 4, 8)
)
TOO_STALE = Counter("w2a_trainer_episodes_too_stale_total", "Episodes refused: their policy version was older than the bound")
COUNTED = Counter("w2a_trainer_episodes_counted_total", "Episodes that joined with their targets and count once")
