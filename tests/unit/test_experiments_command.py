"""`world2act experiment`: what it refuses, that it goes on where it stopped, and that its catalogue is whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from experiments import __main__ as command
from experiments import catalogue, study, tables
from experiments.__main__ import Name, Options
from experiments.catalogue import EXPERIMENTS
from experiments.methods import METHODS
from experiments.regimes import Regime
from experiments.study import TASKS, Sizes, Variant
from services.cli.main import COMMANDS, MODULES
from tests.experiments_fakes import FakeMethods as Fake
from world2act.console import no_progress
from world2act.presets import STAGE2
from world2act.splits import LeakageError, Split

HASHES = {"base": "b", "worldmodel": "w", "adapters": "a"}


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    monkeypatch.setattr(study, "prepare_all", lambda *arguments: lambda regime: HASHES)
    return Options("methods", seeds=1, trials=6, tasks=("push", "reach"), workers=2, out=tmp_path)


def test_catalogue_is_whole() -> None:
    assert set(EXPERIMENTS) == set(get_args(Name))
    for name in EXPERIMENTS:
        rows = catalogue.rows_of(name, TASKS)
        labels = [row.label for row in rows]
        assert len(set(labels)) == len(labels)
        for row in rows:
            assert set(row.against) <= set(labels) - {row.label}
            for other in (rows[labels.index(against)] for against in row.against):
                assert other.tasks == row.tasks and other.variant.distortion == row.variant.distortion
                assert other.variant.regime.demonstrations == row.variant.regime.demonstrations
        assert catalogue.problems(rows, list(METHODS)) == []
    assert {
        "experiment": "experiments",
        "results": "experiments.results",
        "diagnose": "experiments.diagnose",
    }.items() <= MODULES.items() and set(MODULES) <= set(COMMANDS)


def test_experiments_share_their_base_and_ours() -> None:
    sizes = Sizes(1, 2)
    names = {
        name: {c.name for c in study.cells(name, [row.variant for row in EXPERIMENTS[name].rows(TASKS)], sizes, lambda r: HASHES)}
        for name in EXPERIMENTS
    }
    for group in (("main", "methods", "regimes"), ("main", "worldmodel", "objectives", "adapters", "scaling", "cross-task")):
        shared = set.intersection(*(names[name] for name in group))
        assert {"base", "world2act"} <= {name.rsplit("-", 2)[0] for name in shared}


def test_variants_say_what_differs() -> None:
    rows = {row.label: row for row in catalogue.rows_of("objectives", TASKS)}
    assert rows["InfoNCE, global similarity"].variant.stage2().contrastive.similarity == "global"
    assert rows["paper preset, both stages"].variant.stage2() == STAGE2["paper"]
    assert rows["paper preset, both stages"].variant.regime == Regime(stage1="paper")
    half = catalogue.rows_of("scaling", TASKS)[2].variant.stage2().plan
    assert half.base == STAGE2["default"].plan.base // 2 and half.steps == STAGE2["default"].plan.steps
    seen, unseen = (catalogue.rows_of("cross-task", TASKS)[i] for i in (1, 4))
    assert seen.tasks == seen.variant.train_tasks == unseen.variant.train_tasks
    assert set(seen.tasks or ()) | set(unseen.tasks or ()) == set(TASKS)
    what = study.cells("x", [seen.variant], Sizes(1, 1), lambda r: HASHES)[0].what
    assert what["train_tasks"] == list(catalogue.SEEN) and not {"every_round", "other_words"} & set(what)
    told, heard = catalogue.rows_of("cross-task", TASKS)[-2:]
    own, other = study.cells("x", [replace(heard.variant, other_words=False), heard.variant], Sizes(1, 1), lambda r: HASHES)
    assert other.what == own.what | {"other_words": True} and told.label in heard.against
    with pytest.raises(ValueError, match="cross-task needs some of"):
        catalogue.rows_of("cross-task", ("push",))


def test_settings_are_never_changed_on_evaluation_scenes(options: Options) -> None:
    with pytest.raises(LeakageError, match=r"tuned on tuning scenes .--split tuning., never on those of split evaluation"):
        command.run(replace(options, settings=("bound=0.4",)), no_progress, Fake())
    assert not list(options.places().out.iterdir()), "nothing was written"
    found = command.overrides(("bound=0.4", "plan.rounds=2", "target=open-loop"), Split.TUNING)
    assert found == {"bound": 0.4, "plan.rounds": 2, "target": "open-loop"}
    rows = command.tuned(catalogue.rows_of("main", TASKS), found)
    assert rows[1].variant.stage2().bound == 0.4 and rows[1].variant.stage2().plan.rounds == 2
    with pytest.raises(ValueError, match="must be KEY=VALUE, got 'bound'"):
        command.overrides(("bound",), Split.TUNING)


def test_tuning_results_lie_apart() -> None:
    assert Options("main").places().out == Path("docs/results")
    assert Options("main", split="tuning").places().out == Path("data/experiments/tuning")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"only": ("nobody",)}, "only: nobody is no row of methods; rows: base; more-cloning"),
        ({"tasks": ("push", "fly")}, "tasks: fly: unknown; choose out of"),
        ({"tasks": ("push", "push")}, "tasks: each once, got push, push"),
        ({"workers": -3}, "workers: must be >= 0, got -3"),
        ({"seeds": 99}, "seeds: at most 98, for"),
        ({"seeds": 0}, "seeds, trials, tasks: need at least one each"),
        ({"split": "tuning", "settings": ("nothing=1",)}, "more-cloning: nothing: no such setting"),
    ],
)
def test_bad_requests_are_named(options: Options, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        command.run(replace(options, **changes), no_progress, Fake())


def test_a_method_that_is_not_there_is_named(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(METHODS, "dreamgen")
    with pytest.raises(ValueError, match="methods: dreamgen: there is no method 'dreamgen'"):
        command.run(options, no_progress, Fake())
    assert command.run(replace(options, only=("base",)), no_progress, Fake())[1] == []


def test_it_goes_on_where_it_stopped(options: Options) -> None:
    out = options.places().out
    first = replace(options, only=("base", "world2act", "inverse-dynamics"))
    plan, failures = command.run(first, no_progress, Fake())
    assert len(failures) == 1 and failures[0].startswith("inverse-dynamics-0-") and failures[0].endswith("RuntimeError: broken")
    table = tables.measure(plan, catalogue.rows_of("methods", options.tasks), out)
    contrast = table.contrasts[0]
    assert (contrast.label, contrast.against, contrast.gained, contrast.lost) == ("world2act", "base", 12, 0)
    assert {line.label for line in table.lines if line.missing} >= {"inverse-dynamics", "dreamgen"}
    assert len(list(out.glob("*.ran"))) == 3
    plan, _ = command.run(replace(options, only=("world2act", "more-cloning")), no_progress, Fake())
    ran = [path.name for path in out.glob("*.ran")]
    assert len(ran) == 4 and sum(name.startswith("more-cloning-0") for name in ran) == 1
    assert plan.cells["base"] and plan.cells["inverse-dynamics"] and not plan.cells["dreamgen"]
    assert tables.Plan.load(out, "methods") == plan
    assert plan.command == "world2act experiment methods --seeds 1 --trials 6 --tasks push reach"


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["main", "--settings", "bound=1", "--out", str(tmp_path / "out"), "--cache", str(tmp_path)]
    assert command.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: settings: hyperparameters are tuned on tuning scenes")
    assert command.main(["main", "--out", str(tmp_path / "out"), "--zoo", str(tmp_path), "--demos", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "worldmodel.safetensors: not there" in error and "make zoo" in error


def test_a_cell_is_a_function_of_its_variant() -> None:
    cells = study.cells("main", [Variant("world2act", settings={"bound": 0.25})], Sizes(2, 3, ("push",)), lambda r: HASHES)
    assert [cell.seed for cell in cells] == [0, 1] and cells[0].what["stage2"]["bound"] == 0.25
    assert study.stage2_of(json.loads(json.dumps(cells[0].what["stage2"]))) == Variant("x", settings={"bound": 0.25}).stage2()
