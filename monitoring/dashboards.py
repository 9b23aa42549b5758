"""The Grafana dashboards as code; `python -m monitoring.build` writes them to monitoring/grafana/dashboards/.

Built for Grafana 10.1, which later ones read. Nothing here is shown without data on a running system: a test runs every query.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
PER_SECOND, SECONDS, COUNT, RATIO, BYTES = "ops", "s", "short", "percentunit", "bytes"


@dataclass(frozen=True)
class Panel:
    """`queries`: (legend, PromQL). `span`: of 24 columns. `number`: show the newest value large instead of a curve."""

    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = COUNT
    span: int = 8
    number: bool = False
    about: str = ""

    def build(self) -> stat.Panel | timeseries.Panel:
        panel = stat.Panel() if self.number else timeseries.Panel()
        panel.title(self.title).description(self.about).unit(self.unit).datasource(SOURCE)
        panel.span(self.span).height(4 if self.number else 8)
        for letter, (legend, expression) in zip("ABCDEF", self.queries, strict=False):
            panel.with_target(prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(letter).datasource(SOURCE))
        return panel


def quantiles(metric: str) -> list[tuple[str, str]]:
    """Median and 95th percentile of a histogram without labels of its own."""
    rate = f"sum by (le) (rate({metric}_bucket[5m]))"
    return [("p50", f"histogram_quantile(0.5, {rate})"), ("p95", f"histogram_quantile(0.95, {rate})")]


OVERVIEW = (
    Panel("Jobs running", [("", "sum(w2a_trainer_jobs_running)")], span=4, number=True),
    Panel("Jobs not ended", [("", 'sum(w2a:queue_lag:max{queue="w2a:jobs/trainer"})')], span=4, number=True),
    Panel("Targets that answer", [("", "sum(up) / count(up)")], RATIO, 4, True),
    Panel("Dead letters", [("", "w2a:dead_letters:max")], span=4, number=True),
    Panel("Artifacts' disk free", [("", "min(w2a_artifacts_disk_free_bytes)")], BYTES, 4, True),
    Panel("Redis memory", [("", "max(w2a_redis_memory_bytes)")], BYTES, 4, True),
    Panel("Rollouts", [("episodes/s", "w2a:rollouts:rate5m")], PER_SECOND),
    Panel(
        "Imagined clips",
        [("clips/s", "w2a:clips:rate5m")],
        PER_SECOND,
        about="Computed; cache hits cost nothing.",
    ),
    Panel("Updates", [("updates/s", "w2a:updates:rate5m")], PER_SECOND),
    Panel("Queue lag", [("{{queue}}", "w2a:queue_lag:max")], about="Entries that are not finished: waiting and in work."),
    Panel("Jobs ended", [("{{status}}", "sum by (status) (increase(w2a_trainer_jobs_total[5m]))")], about="Within five minutes."),
    Panel(
        "Errors",
        [
            ("gateway, share of answers", "w2a:gateway_errors:ratio5m"),
            ("episodes/s", 'sum(rate(w2a_rollout_episodes_total{outcome="error"}[5m]))'),
            ("imaginations/s", 'sum(rate(w2a_imagine_requests_total{outcome="failed"}[5m]))'),
        ],
    ),
    Panel("Heartbeats", [("{{service}}", "w2a:heartbeat_age_seconds:min")], SECONDS, 12),
    Panel("Memory", [("{{job}} {{instance}}", "process_resident_memory_bytes")], BYTES, 12, about="Without child processes."),
)

POSTTRAINING = (
    Panel("Policy version", [("", "max(w2a_trainer_policy_version)")], span=6, number=True),
    Panel("Trajectories counted", [("", "sum(w2a_trainer_episodes_counted_total)")], span=6, number=True),
    Panel("Too stale, refused", [("", "sum(w2a_trainer_episodes_too_stale_total)")], span=6, number=True),
    Panel("Updates", [("", "sum(w2a_trainer_updates_total)")], span=6, number=True),
    Panel("Cosine of imagined and executed", [("cosine", "w2a_trainer_cosine")], span=12),
    Panel("Loss", [("loss", "w2a_trainer_loss")], span=12),
    Panel(
        "Staleness",
        [
            ("mean", "sum(rate(w2a_trainer_staleness_sum[5m])) / sum(rate(w2a_trainer_staleness_count[5m]))"),
            ("largest", "histogram_quantile(1, sum by (le) (rate(w2a_trainer_staleness_bucket[5m])))"),
        ],
        about="Rounds between the policy version that acted and the learner, per episode.",
    ),
    Panel(
        "Success, last hour",
        [("{{task}} ({{split}})", "w2a:success:ratio1h")],
        RATIO,
        about="For the reader: post-training never sees it. Its own episodes are perturbed.",
    ),
    Panel("Trajectories", [("trajectories/s", "w2a:trajectories:rate5m")], PER_SECOND),
)

WORLD_MODEL = (
    Panel("Triton queue time", [("{{model}}", "w2a:triton_queue_seconds:mean5m")], SECONDS, about="Mean of a request."),
    Panel("Triton compute time", [("{{model}}", "w2a:triton_compute_seconds:mean5m")], SECONDS, about="Mean of a batch."),
    Panel(
        "Batch",
        [("{{model}}", "sum by (model) (rate(nv_inference_count[5m])) / sum by (model) (rate(nv_inference_exec_count[5m]))")],
        about="Rows an execution.",
    ),
    Panel("Requests", [("{{outcome}}", "sum by (outcome) (rate(w2a_imagine_requests_total[5m]))")], PER_SECOND),
    Panel("Cache hits", [("hits", "sum(increase(w2a_imagine_cache_hits_total[5m]))")], about="Within five minutes."),
    Panel("From request to result", quantiles("w2a_imagine_seconds"), SECONDS),
    Panel("Chunks imagined", [("chunks/s", "sum(rate(w2a_imagine_chunks_total[5m]))")], PER_SECOND),
    Panel("Waiting in Triton", [("{{model}}", "sum by (model) (nv_inference_pending_request_count)")]),
    Panel("Failed in Triton", [("{{model}}", "sum by (model) (rate(nv_inference_request_failure[5m]))")], PER_SECOND),
)

SIMULATORS = (
    Panel("Environments leased", [("{{instance}}", "w2a_simulator_leased")]),
    Panel("Actions", [("actions/s", "sum(rate(w2a_simulator_actions_total[5m]))")], PER_SECOND),
    Panel("Time of a step call", quantiles("w2a_simulator_step_seconds"), SECONDS, about="A call executes a chunk of actions."),
    Panel("Episodes started", [("{{task}}", "sum by (task) (rate(w2a_simulator_resets_total[5m]))")], PER_SECOND),
    Panel("Time of an episode", quantiles("w2a_rollout_episode_seconds"), SECONDS),
    Panel("Policy, time of a request", quantiles("w2a_vla_latency_seconds"), SECONDS),
    Panel(
        "Left to the base",
        [("observations/s", "sum(rate(w2a_vla_unseen_rows_total[5m]))")],
        PER_SECOND,
        6,
        about="Their instruction is of no task that the residual was post-trained on.",
    ),
    Panel("Environment processes replaced", [("{{instance}}", "increase(w2a_simulator_restarts_total[5m])")], span=6),
    Panel("Leases expired", [("{{instance}}", "increase(w2a_simulator_leases_expired_total[5m])")], span=6),
    Panel("Episodes by outcome", [("{{outcome}}", "sum by (outcome) (rate(w2a_rollout_episodes_total[5m]))")], PER_SECOND, 6),
)

TRAJECTORIES = "sum(increase(w2a_trainer_episodes_counted_total[$__range]))"
CPU = "sum(increase(w2a_cpu_seconds_total[$__range]))"
MODELS = 'sum(increase(nv_inference_compute_infer_duration_us{model!="imagine"}[$__range])) / 1e6'
COST = (
    Panel(
        "CPU seconds a trajectory",
        [("", f"{CPU} / {TRAJECTORIES}")],
        SECONDS,
        8,
        True,
        "Of all services but Triton, at rest too.",
    ),
    Panel(
        "Model seconds a trajectory",
        [("", f"{MODELS} / {TRAJECTORIES}")],
        SECONDS,
        8,
        True,
        "Time that world model and adapter computed in Triton: GPU seconds where they are on a GPU, else seconds of one core.",
    ),
    Panel("Trajectories in this range", [("", TRAJECTORIES)], COUNT, 8, True),
    Panel("Cores in use", [("{{job}}", "w2a:cpu_seconds:rate5m")], span=12),
    Panel("Triton, instances in use", [("{{model}}", "w2a:model_seconds:rate5m")], span=12),
    Panel("GPUs in use (Triton's)", [("GPUs", "w2a:gpu_seconds:rate5m")], span=12, about="0 where Triton sees none."),
    Panel(
        "CPU seconds a trajectory, over time",
        [("{{job}}", "w2a:cpu_seconds:rate5m / ignoring (job) group_left w2a:trajectories:rate5m")],
        SECONDS,
        12,
    ),
)

DASHBOARDS = {
    "overview": ("World2Act: overview", OVERVIEW),
    "posttraining": ("World2Act: post-training", POSTTRAINING),
    "worldmodel": ("World2Act: world model", WORLD_MODEL),
    "simulators": ("World2Act: simulators", SIMULATORS),
    "cost": ("World2Act: cost", COST),
}
"""File name -> (title, panels)."""


def render(name: str) -> str:
    """The JSON of a dashboard as Grafana's provisioning reads it."""
    title, panels = DASHBOARDS[name]
    board = dashboard.Dashboard(title).uid(f"w2a-{name}").tags(["world2act"]).readonly().refresh("10s").time("now-30m", "now")
    board.timezone("browser")
    for number, panel in enumerate(panels, start=1):
        board.with_panel(panel.build().id(number))
    return json.dumps(board.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
