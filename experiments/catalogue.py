"""Which variants make each experiment, fixed before anything is measured: rows, what each is compared with, the paper's numbers.

Every comparison named here is made, and all of one experiment's are one family for Holm's adjustment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from experiments.regimes import Kind, Regime
from experiments.study import Variant
from world2act.presets import STAGE2, Rounds

Plot = Literal["dots", "curve", "rounds"]

RICH = Regime("video-rich", 4)
"""Few labels, plenty of video: where the method has something to offer. Methods are compared here."""
SHIPPED = Regime()
"""Ablations are made here: its parts, but for Base-WM, are in zoo/, so that a clone is enough to compute them (decision 043)."""
READ = replace(RICH, worldmodel="read")
"""Its world model has been trained on, so that the named actions can be read in what it imagines."""
LONGER = replace(RICH, worldmodel="longer")
"""Its world model has been trained on as long, without that."""
FILM = Regime("film-cloned", RICH.demonstrations)
"""What post-training adds where the video has been cloned already; a base of its own."""
STRENGTHS = (4, 10, 25, 60)
MEASURED_AT: dict[Kind, tuple[int, ...]] = {
    "video-rich": STRENGTHS,
    "matched": STRENGTHS,
    "pretrained": (4,),
    "practised": (4,),
    "film-cloned": (FILM.demonstrations,),
}
"""Base sizes of each kind of regime; own play at 25 was tried on tuning scenes (decision 045)."""
SCALES = (0.25, 0.5, 1.0, 2.0)
SEEN = ("door-open", "drawer-open", "pick-place", "reach")
"""Tasks of the cross-task split that are post-trained; chosen so that either side has hard and easy tasks."""
DISTORTIONS = ("noise", "light", "distractors", "textures")


@dataclass(frozen=True)
class Row:
    """One line of a table. against: labels of the rows it is compared with; paper: the paper's number, on RoboCasa; bound: it
    is no method, but says what one could reach; tasks: those that count, None for all; series, x: where a curve has it."""

    label: str
    variant: Variant
    against: tuple[str, ...] = ()
    paper: str = ""
    bound: bool = False
    tasks: tuple[str, ...] | None = None
    series: str = ""
    x: float | None = None


@dataclass(frozen=True)
class Experiment:
    """title: as a heading; about: what is measured, one or two sentences; rows: from the tasks that are evaluated; notes: of the
    cells, shown as means; axis: what x is."""

    title: str
    about: str
    rows: Callable[[Sequence[str]], list[Row]]
    plot: Plot = "dots"
    notes: tuple[str, ...] = ("seconds/training",)
    axis: str = ""


DECODE: dict[str, object] = {"decode_weight": 1.0, "cosine_weight": 0.0}
CONTRASTIVE: dict[str, object] = {"contrastive_weight": 1.0, "cosine_weight": 0.0}


def _base(regime: Regime, label: str = "base", distortion: str = "none", paper: str = "") -> Row:
    return Row(label, Variant("base", "base", regime, distortion=distortion), paper=paper)


def _ours(regime: Regime, distortion: str = "none") -> Variant:
    return Variant("world2act", regime=regime, distortion=distortion)


def _named(method: str, regime: Regime, distortion: str = "none") -> Variant:
    """A method that aims at actions, not at latents: where it uses the learner, with the decode term."""
    return Variant(method, method, regime, settings=DECODE, distortion=distortion)


def _with_film(distortion: str) -> Variant:
    return Variant("world2act-film", "world2act-film", RICH, distortion=distortion)


def _main(tasks: Sequence[str]) -> list[Row]:
    rows = []
    for regime in (RICH, SHIPPED):
        base = f"base, {regime.name}"
        rows += [_base(regime, base, paper="0.701"), Row(f"world2act, {regime.name}", _ours(regime), (base,), "0.726")]
        rows.append(Row(f"imagination, {regime.name}", _named("imagination", regime), bound=True))
    shipped, ours = rows[3], rows[4]
    rows.append(Row(f"{ours.label}, decode", Variant("decode", regime=SHIPPED, settings=DECODE), (shipped.label, ours.label)))
    more = _named("more-cloning", shipped.variant.regime)
    return [*rows, Row(f"more-cloning, {more.regime.name}", more, (shipped.label, ours.label))]


METHODS = (
    ("more-cloning", ""),
    ("named-cloning", ""),
    ("named-cloning-blind", ""),
    ("latent-cloning", ""),
    ("named-residual", ""),
    ("dreamgen", "0.705"),
    ("inverse-dynamics", ""),
    ("vla-rft", "0.710"),
    ("ctrl-world", "0.698"),
    ("lora-16", "0.714"),
    ("lora-32", "0.721"),
)
"""Baselines and the paper's numbers; those of LoRA are its Table 4."""
DISTORTED = ("named-cloning", "dreamgen", "inverse-dynamics")


def _bounds(regime: Regime) -> list[tuple[str, Variant]]:
    """They say which part loses a gain: the targets acting, the learner on the expert's actions, E_v on the expert's video."""
    video = Variant("oracle-video", "oracle-video", regime)
    return [
        ("imagination", _named("imagination", regime)),
        ("oracle-action", _named("oracle-action", regime)),
        ("oracle-video", video),
    ]


def _methods(tasks: Sequence[str]) -> list[Row]:
    rows = [_base(RICH, paper="0.701")]
    for name, paper in METHODS:  # LoRA: our loss and targets, another learner
        variant = Variant(name, name, RICH) if name.startswith("lora") else _named(name, RICH)
        rows.append(Row(name, variant, ("base", "named-cloning") if name == "latent-cloning" else ("base",), paper))
    for name in ("named-residual", "inverse-dynamics"):  # with our loss
        rows.append(Row(f"{name}, cosine", Variant(f"{name}-cosine", name, RICH), ("base", name)))
    rows.append(Row("world2act, decode", Variant("decode", regime=RICH, settings=DECODE), ("base", "inverse-dynamics")))
    others = [row.label for row in rows]
    rows.append(Row("world2act", _ours(RICH), tuple(others), "0.726"))
    rivals: tuple[str, ...] = ("base", "named-cloning", "named-residual", "named-residual, cosine", "world2act")
    rows.append(Row("world2act, film", _with_film("none"), rivals))
    rows.append(Row(reader := f"inverse-dynamics, {READ.name}", _named("inverse-dynamics", READ), ("base", "inverse-dynamics")))
    rivals = ("base", "named-cloning", "named-residual", "dreamgen", "world2act", reader)
    rows.append(Row(longer := f"world2act, {LONGER.name}", _ours(LONGER), ("base", "world2act")))
    rows.append(Row(f"world2act, {READ.name}", _ours(READ), (*rivals, longer)))
    rows += [Row(name, bound, ("base",), bound=True) for name, bound in _bounds(RICH)]
    targets = f"imagination, {LONGER.name}"
    rows.append(Row(targets, _named("imagination", LONGER), ("base", "imagination"), bound=True))
    rows.append(Row(f"imagination, {READ.name}", _named("imagination", READ), ("base", "imagination", targets), bound=True))
    for distortion in DISTORTIONS:
        base = f"base, {distortion}"
        rows.append(_base(RICH, base, distortion))
        rows += [Row(f"{m}, {distortion}", _named(m, RICH, distortion), (base,)) for m in DISTORTED]
        against = (base, *(f"{m}, {distortion}" for m in DISTORTED))
        rows.append(Row(f"world2act, {distortion}", _ours(RICH, distortion), against))
        if distortion == "distractors":  # what no film shows
            rows.append(Row(f"world2act, film, {distortion}", _with_film(distortion), (*against, f"world2act, {distortion}")))
        rows.append(_base(FILM, own := f"base, {FILM.name}, {distortion}", distortion))
        rows.append(Row(f"world2act, {FILM.name}, {distortion}", _ours(FILM, distortion), (own,)))
    return rows


def _worldmodel(tasks: Sequence[str]) -> list[Row]:
    whole, longer, read, again = (replace(SHIPPED, worldmodel=kind) for kind in ("base", "longer", "read", "read-again"))
    targets = "imagination"
    return [
        _base(SHIPPED, paper="0.701"),
        Row("Base-WM", _ours(whole), ("base",), "0.715"),
        Row("Skill-WM", _ours(SHIPPED), ("base", "Base-WM"), "0.726"),
        Row("Skill-WM, longer", _ours(longer), ("base", "Skill-WM")),
        Row("Skill-WM, read", _ours(read), ("base", "Skill-WM", "Skill-WM, longer")),
        Row("Skill-WM, read again", _ours(again), ("base", "Skill-WM", "Skill-WM, longer")),
        Row(targets, _named("imagination", SHIPPED), ("base",), bound=True),
        Row(f"{targets}, longer", _named("imagination", longer), ("base", targets), bound=True),
        Row(f"{targets}, read", _named("imagination", read), ("base", targets, f"{targets}, longer"), bound=True),
        Row(f"{targets}, read again", _named("imagination", again), ("base", targets, f"{targets}, longer"), bound=True),
    ]


OBJECTIVES: tuple[tuple[str, dict[str, object], str], ...] = (
    ("decode", DECODE, ""),
    ("cosine + decode", {"decode_weight": 1.0}, ""),
    ("decode + 0.1 InfoNCE", DECODE | {"contrastive_weight": 0.1}, ""),
    ("cosine + 0.1 InfoNCE", {"contrastive_weight": 0.1}, ""),
    ("InfoNCE", CONTRASTIVE, "0.726"),
    ("InfoNCE, single", CONTRASTIVE | {"contrastive.form": "single"}, "0.720"),
    ("InfoNCE, marginal", CONTRASTIVE | {"contrastive.form": "marginal"}, "0.707"),
    ("InfoNCE, margin", CONTRASTIVE | {"contrastive.form": "margin"}, ""),
    ("InfoNCE, global similarity", CONTRASTIVE | {"contrastive.similarity": "global"}, "0.693"),
    ("cosine, bound 1", {"bound": 1.0}, ""),
    ("InfoNCE, bound 1", CONTRASTIVE | {"bound": 1.0}, ""),
    ("closed loop every 2", {"closed_loop_every": 2}, ""),
    ("closed loop every 4", {"closed_loop_every": 4}, ""),
    ("open loop", {"target": "open-loop"}, ""),
    ("open loop, monotone", {"target": "open-loop", "alignment": "monotone"}, ""),
)
"""One change each from `default`: the cosine to latents that are imagined again at every chunk."""


def _objectives(tasks: Sequence[str]) -> list[Row]:
    rows = [_base(SHIPPED, paper="0.701"), Row("default (cosine, closed loop)", _ours(SHIPPED), ("base",))]
    for label, settings, paper in OBJECTIVES:
        name = label.replace(",", "").replace(" + ", "-").replace(" ", "-").lower()
        rows.append(Row(label, Variant(name, regime=SHIPPED, settings=settings), ("base", rows[1].label), paper))
    paper_variant = Variant("paper", regime=replace(SHIPPED, stage1="paper"), preset="paper")
    return [*rows, Row("paper preset, both stages", paper_variant, ("base", rows[1].label), "0.726")]


def _adapters(tasks: Sequence[str]) -> list[Row]:
    rows = [_base(SHIPPED, paper="0.701")]
    rows += [
        Row(name, Variant(name, name, SHIPPED), ("base",), paper)
        for name, paper in (("lora-16", "0.714, 14.6 h"), ("lora-32", "0.721, 15.3 h"))
    ]
    return [*rows, Row("residual", _ours(SHIPPED), ("base", "lora-16", "lora-32"), "0.726, 6.8 h")]


def scaled(plan: Rounds, factor: float) -> dict[str, object]:
    """Overrides that execute `factor` times as many episodes, with the same number of updates."""
    counts = {name: max(1, round(getattr(plan, name) * factor)) for name in ("base", "perturbed", "on_policy")}
    return {f"plan.{name}": count for name, count in counts.items()}


def _scaling(tasks: Sequence[str]) -> list[Row]:
    plan = STAGE2["default"].plan
    rows = [replace(_base(SHIPPED), series="base", x=0.0)]
    for factor in SCALES:
        variant = _ours(SHIPPED) if factor == 1 else Variant(f"scale-{factor:g}", regime=SHIPPED, settings=scaled(plan, factor))
        found = variant.stage2().plan
        episodes = found.base + found.perturbed + found.rounds * found.on_policy
        rows.append(Row(f"{episodes} episodes a task", variant, ("base",), series="world2act", x=float(episodes)))
    return rows


def _cross_task(tasks: Sequence[str]) -> list[Row]:
    seen = tuple(task for task in tasks if task in SEEN)
    unseen = tuple(task for task in tasks if task not in SEEN)
    if not seen or not unseen:
        raise ValueError(f"tasks: cross-task needs some of {', '.join(SEEN)} and some others, got {', '.join(tasks)}")
    part = Variant("cross-task", regime=SHIPPED, train_tasks=seen)
    rows = []
    for name, group in (("seen", seen), ("unseen", unseen)):
        base = replace(_base(SHIPPED, f"base, {name}"), tasks=group)
        rows += [
            base,
            Row(f"post-trained on {len(seen)} tasks, {name}", part, (base.label,), tasks=group),
            Row(f"post-trained on all, {name}", _ours(SHIPPED), (base.label,), tasks=group),
        ]
    base, ours = _base(SHIPPED), Row("post-trained on all", _ours(SHIPPED), ("base",))
    told = replace(base, label="base, other words", variant=replace(base.variant, other_words=True), against=("base",))
    heard = Row("post-trained on all, other words", replace(ours.variant, other_words=True), (told.label, ours.label, base.label))
    return [*rows, base, ours, told, heard]


def _regimes(tasks: Sequence[str]) -> list[Row]:
    rows = []
    for count in STRENGTHS:
        shared = RICH if count == RICH.demonstrations else Regime("matched", count)  # base and labels are the same in all
        base, more = f"base, {count} demonstrations", f"more-cloning, {count} demonstrations"
        rows += [
            replace(_base(shared, base), series="base", x=count),
            Row(more, _named("more-cloning", shared), (base,), series="more-cloning", x=count),
        ]
        for kind in (kind for kind, counts in MEASURED_AT.items() if count in counts):
            regime = Regime(kind, count)
            against: tuple[str, ...] = (base, more)
            x: int | None = count
            if regime == FILM:  # no point of the curve, which is over the shared base
                against, x = (f"base, {regime.name}",), None
                rows.append(_base(regime, *against))
            rows.append(Row(f"world2act, {regime.name}", _ours(regime), against, series=f"world2act, {kind}", x=x))
            rows.append(Row(f"imagination, {regime.name}", _named("imagination", regime), against[:1], bound=True))
    for name, bound in _bounds(Regime("matched", 25))[1:]:
        rows.append(Row(f"{name}, matched-25", bound, ("base, 25 demonstrations",), bound=True))
    return rows


def _similarity(tasks: Sequence[str]) -> list[Row]:
    rounds = replace(_ours(SHIPPED), name="world2act-rounds", every_round=True)
    contrastive = Variant("infonce-rounds", regime=SHIPPED, settings=CONTRASTIVE, every_round=True)
    return [_base(SHIPPED), Row("default", rounds, ("base",)), Row("InfoNCE", contrastive, ("base",))]


COST = ("updates_per_second", "parameters", "memory_mb", "seconds/training")
FIGURE_5B = "The paper's curve rises up to 1,000 trajectories (Fig. 5b)."
EXPERIMENTS: dict[str, Experiment] = {
    "main": Experiment(
        "Main result (paper Table 1)",
        "The base before and after post-training with preset `default`: new scenes, no reward, no expert action in Stage 2. In "
        "`imagination` its targets act themselves, which needs the world model at every chunk. more-cloning is the base trained "
        "on the labels that Stage 1 of the shipped weights has seen, 304 demonstrations a task.",
        _main,
    ),
    "methods": Experiment(
        "Methods (paper Table 1, Fig. 3)",
        "Baselines in small, on the same base, data, scenes and budget, named after what they imitate. Bounds are not "
        "methods: in `imagination` the targets act themselves, oracles use the simulator's expert. named-cloning is the base "
        "cloned from the regime's video too, its actions named as for the others; blind: without proprioception; "
        "latent-cloning: by an imitator of the latent and prompt that the world model is asked with; named-residual: the "
        "residual fitted to the same, without imagination or rollouts; film: ours, with what named-residual learns from in the "
        "same data from the first round on; film-cloned-4: post-trained on top of named-cloning "
        "(seed 0), with its own play and Stage 1; read-wm: with a world model that was trained on so that the named "
        "actions can be read in what it imagines, and a Stage 1 of its own; longer-wm: trained on as long without that, "
        "likewise. Distorted cameras and new textures are met in post-training and evaluation; base, world model, Stage 1 and "
        "film have not.",
        _methods,
    ),
    "worldmodel": Experiment(
        "World model (paper Table 3)",
        "Skill-WM against Base-WM: the same video and VAE, whole episodes with their instruction instead of skills. read: "
        "Skill-WM, trained on so that actions can be read in what it imagines; read again: with another seed; longer: trained "
        "on as long without that, the control. imagination: Skill-WM's targets act themselves.",
        _worldmodel,
    ),
    "objectives": Experiment(
        "Objectives and targets (the paper's loss ablation)",
        "One change each from preset `default`, in Stage 2 alone; the paper preset differs in both stages. Seed 1 of all rows "
        "but default, decode and InfoNCE at bound 1, and seed 2 of those with two terms, were trained on a GPU, whose seconds "
        "they have (decision 055).",
        _objectives,
    ),
    "adapters": Experiment(
        "Residual against LoRA (paper Table 4)",
        "The same loss, targets and scenes; the paper's hours are of its own machines. Updates per second with all workers busy, "
        "memory is the peak of a cell's whole process, simulators too. Rows and seeds are of different "
        "machines: rates are to be compared by bench/adapters.py, which measures both in one run.",
        _adapters,
        notes=COST,
    ),
    "scaling": Experiment(
        "Number of trajectories (paper Fig. 5b)",
        f"Episodes of post-training a task; the number of updates stays. {FIGURE_5B}",
        _scaling,
        "curve",
        axis="post-training episodes a task",
    ),
    "cross-task": Experiment(
        "Tasks and words that were not post-trained (paper Table S3)",
        f"Post-training on {', '.join(SEEN)} only. World model and adapters know all tasks, as in the paper. Other words: "
        "of three other instructions a task (`experiments/wording.py`) each scene tells one, which no part was trained on.",
        _cross_task,
    ),
    "regimes": Experiment(
        "Gain against the base's strength",
        "video-rich: few labelled demonstrations, plenty of action-free video; matched: every part sees the same demonstrations; "
        "pretrained: matched, and action-free video of 41 other tasks of Meta-World for world model and Stage 1; "
        "practised: matched, and world model and Stage 1 see the robot's own play too; film-cloned: video-rich on the base that "
        "named-cloning makes of it with training seed 0, which is at play too. "
        "more-cloning is the base trained anew, seed by seed, on every label that any part has seen, here the base's own: with "
        "training seed 0 it is the base itself.",
        _regimes,
        "curve",
        axis="labelled demonstrations a task",
    ),
    "similarity-vs-success": Experiment(
        "Cosine against success (paper Fig. 5a)",
        "After every round: cosine of actions and imagined targets on training data, and success in evaluation scenes. In the "
        "paper the cosine tends to 1. No round is chosen by its success.",
        _similarity,
        "rounds",
        notes=("seconds/train",),
    ),
}


def rows_of(name: str, tasks: Sequence[str]) -> list[Row]:
    """The rows of experiment `name`. Raises ValueError for an unknown name."""
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment: {name!r} is unknown; choose one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name].rows(tasks)


def problems(rows: Sequence[Row], methods: Sequence[str]) -> list[str]:
    """What stands in the way of computing `rows`, one line each: a method that is not there, a setting that does not exist."""
    found = []
    for row in rows:
        if row.variant.method not in methods:
            found.append(f"{row.label}: there is no method {row.variant.method!r}")
        try:
            row.variant.stage2()
        except (TypeError, ValueError) as error:
            found.append(f"{row.label}: {error}")
    return found
