"""The results page: synthetic cells give known tables, gaps are said, rows that do not match are refused, the page is current."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from experiments import diagnose, plots, results, study, tables
from experiments.catalogue import EXPERIMENTS, Row
from experiments.cells import Cell, write_whole
from experiments.study import Sizes, Variant
from experiments.tables import Plan
from world2act.splits import LeakageError, Split

ROOT = Path(__file__).parents[2]
SIZES = Sizes(2, 4, ("push", "reach"))
WEIGHTS = {"base": "b" * 64, "worldmodel": "c" * 64, "adapters": "d" * 64}
RICH = {"kind": "video-rich", "demonstrations": 4, "worldmodel": "skill", "stage1": "default"}


def put(out: Path, variant: str, seed: int, push: str, reach: str, base: str = "b" * 64, split: str = "evaluation") -> str:
    """One cell's file; returns its name. 0 and 1: outcomes in scene order."""
    weights = WEIGHTS | {"base": base}
    what = {"regime": RICH, "weights": weights, "trials": len(push), "tasks": ["push", "reach"], "split": split}
    cell = Cell("methods", variant, seed, what)
    rounds = [{"push": "0000", "reach": "0000"}, {"push": push, "reach": reach}]
    notes = {"seconds/training": 10.0 + seed, "round_0/positive_cosine": 0.5, "round_1/positive_cosine": 0.75}
    content = {"cell": cell.__dict__, "wall_seconds": 30.0, "outcomes": {"push": push, "reach": reach}, "notes": notes}
    path = cell.path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | ({"rounds": rounds} if variant == "rounds" else {})))
    return cell.name


ANY = Variant("any")
ROWS = [
    Row("base", ANY, paper="0.701"),
    Row("world2act", ANY, ("base",), "0.726"),
    Row("oracle", ANY, ("base", "later"), bound=True),
    Row("later", ANY, ("base",)),
]


def catalogue(monkeypatch: pytest.MonkeyPatch, rows: list[Row], name: str = "methods") -> None:
    """From here on `rows` are those of experiment `name`."""
    monkeypatch.setitem(EXPERIMENTS, name, replace(EXPERIMENTS[name], rows=lambda _: rows))


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    base = (put(tmp_path, "base", 0, "0000", "1100"), put(tmp_path, "base", 1, "0001", "1100"))
    ours = (put(tmp_path, "world2act", 0, "1111", "1110"), put(tmp_path, "world2act", 1, "1111", "0100"))
    oracle = (put(tmp_path, "oracle", 0, "1111", "1111"), "oracle-1-absent")
    catalogue(monkeypatch, ROWS)
    cells = {"base": base, "world2act": ours, "oracle": oracle, "later": ()}
    return Plan("methods", "world2act experiment methods --seeds 2 --trials 4", SIZES, cells)


def test_rates_by_seed_and_paired_differences(plan: Plan, tmp_path: Path) -> None:
    table = tables.measure(plan, ROWS, tmp_path)
    base, ours, oracle, later = table.lines
    assert base.rate is not None and ours.rate is not None
    assert (base.rate.successes, ours.rate.successes, ours.rate.n) == (5, 12, 16)
    assert base.seeds == {0: 0.25, 1: 0.375} and ours.seeds == {0: 7 / 8, 1: 5 / 8}
    assert ours.spread == pytest.approx(0.25 / 2**0.5)
    assert (ours.tasks["push"].successes, ours.tasks["reach"].successes) == (8, 4)
    assert ours.notes["seconds/training"] == 10.5
    assert (oracle.missing, later.missing, later.rate) == ("seeds 1", "all seeds", None)
    first, second = table.contrasts  # nothing is compared with a row that has no cells
    assert (first.label, first.against, first.n, first.gained, first.lost) == ("world2act", "base", 16, 8, 1)
    assert first.difference.value == pytest.approx(7 / 16) and first.seeds == {0: 0.625, 1: 0.25}
    assert (first.tasks["push"].gained, first.tasks["push"].lost, first.tasks["push"].n) == (7, 0, 8)
    assert (second.label, second.n, second.gained, list(second.seeds)) == ("oracle", 8, 6, [0])  # the seed that both have
    assert first.p == pytest.approx(20 / 512) and second.p == pytest.approx(2 / 64)
    assert [first.holm, second.holm] == [pytest.approx(2 / 32), pytest.approx(2 / 32)]  # twice the smaller, kept monotone
    task_p = [t.p for c in table.contrasts for t in c.tasks.values()]
    assert first.tasks["push"].holm == pytest.approx(min(task_p) * len(task_p))
    assert (table.cells, table.wanted, table.seconds) == (5, 8, 150.0)


def test_a_diagnosis_stands_beside_the_gain_of_the_same_weights(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue(monkeypatch, [ROWS[0], replace(ROWS[1], label="world2act, video-rich-4")])
    cells = {"base": plan.cells["base"], "world2act, video-rich-4": plan.cells["world2act"]}
    replace(plan, cells=cells).save(tmp_path)
    assert "Which part loses" not in results.page(tmp_path)
    rows_of = dict.fromkeys((diagnose.ALL, "push", "reach"), (0.5, 0.1, 0.25, 1.0, 1.0, 1.0, 0.6))
    for name, weights in (("video-rich-4", WEIGHTS), ("shipped", WEIGHTS), ("video-rich-10", WEIGHTS | {"base": "e" * 64})):
        kept = {"weights": weights, "episodes": 5, "columns": diagnose.COLUMNS, "rows": rows_of}
        write_whole(diagnose.kept_at(tmp_path, name), json.dumps(kept))
    on_demonstrations = {**rows_of, diagnose.ALL: (0.5, 0.1, 0.2, 1.0, 1.0, 1.0, 0.6)}
    for name, weights in (("video-rich-4", WEIGHTS), ("shipped", WEIGHTS | {"adapters": "e" * 64})):
        kept = {"weights": weights, "episodes": 5, "columns": diagnose.COLUMNS, "rows": on_demonstrations}
        write_whole(diagnose.kept_at(tmp_path, name, demos=True), json.dumps(kept))
    gains = {one.regime: one.gain for one in results.teachers(tmp_path, tables.tables(tmp_path))}
    assert list(gains) == ["shipped", "video-rich-4", "video-rich-10"] and gains["shipped"] is gains["video-rich-10"] is None
    found = gains["video-rich-4"]
    assert found is not None and (found.n, found.against) == (16, "base")
    text = results.publish(tmp_path).read_text()
    assert f"| video-rich-4 | 5 | 0.50 | 0.10 | 0.25 | 0.50 | 0.60 | 0.40 (5) | {found.difference} (n 16) |" in text
    assert "| shipped | 5 | 0.50 | 0.10 | 0.25 | 0.50 | 0.60 |  | not measured with these weights |" in text, "other weights"
    ranks = "visited too few (n 1); visited, by task too few (n 2); held out too few (n 1); held out, by task too few (n 2)."
    assert ranks in text
    assert "| video-rich-4 | 0.50: +0.88 | 0.50: +0.00 |" in text
    assert (tmp_path / "diagnosis.png").read_bytes()[:4] == b"\x89PNG"


def test_page_says_what_is_missing_and_what_belongs_to_nothing(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path)
    put(tmp_path, "stray", 0, "0", "0")
    text = results.page(tmp_path)
    assert "**Missing:** oracle (seeds 1); later (all seeds)." in text
    assert "5 of 8 cells" in text and f"Command: `{plan.command}`" in text
    assert "| world2act | base | +0.438 [" in text and "| 0.726 |" in text and "oracle (bound)" in text
    assert "| later | missing |" in text
    assert "1 more cells there belong to no row" in text
    assert "Not run: main, worldmodel, objectives" in text
    assert "video-rich-4: base `bbbbbbbbbbbb`, worldmodel `cccccccccccc`" in text
    assert text.count("- video-rich-4: base") == 1, "parts of one set of weights are named once"
    assert results.page(tmp_path) == text
    assert Plan.load(tmp_path, "methods") == plan


@pytest.mark.parametrize(
    "content", ['{"experiment": "main", "command": "", "sizes": {"seeds": 1}}', "[]", "{", '{"sizes": null}']
)
def test_a_plan_of_another_version_is_named(tmp_path: Path, content: str) -> None:
    Plan.path(tmp_path, "main").parent.mkdir()
    Plan.path(tmp_path, "main").write_text(content)
    with pytest.raises(ValueError, match=r"main\.json: not a plan of this version .* cells are kept"):
        Plan.load(tmp_path, "main")


def test_where_nothing_was_run_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none has no results; `world2act experiment NAME` computes some"):
        results.publish(tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_rows_that_do_not_match_are_refused(plan: Plan, tmp_path: Path) -> None:
    rows = [ROWS[0], Row("other", ANY, ("base",))]

    def against_base(*names: str) -> None:
        tables.measure(replace(plan, cells={"base": plan.cells["base"], "other": names}), rows, tmp_path)

    with pytest.raises(ValueError, match="other, base: stand on 2 different base policies"):
        against_base(put(tmp_path, "other", 0, "1111", "1111", base="e" * 64))
    with pytest.raises(ValueError, match="scenes were run by one policy only"):
        against_base(put(tmp_path, "short", 0, "111", "111"))
    with pytest.raises(LeakageError, match="split evaluation only, got tuning"):
        against_base(put(tmp_path, "tuning", 0, "1111", "1111", split="tuning"))


def test_a_row_may_count_some_tasks_only(plan: Plan, tmp_path: Path) -> None:
    table = tables.measure(plan, [replace(row, tasks=("reach",)) for row in ROWS[:2]], tmp_path)
    assert table.lines[1].rate is not None and (table.lines[1].rate.successes, table.lines[1].rate.n) == (4, 8)
    assert (table.contrasts[0].gained, table.contrasts[0].lost) == (1, 1)


def test_a_run_of_some_rows_keeps_what_the_others_have_measured(plan: Plan, tmp_path: Path) -> None:
    rows = EXPERIMENTS["main"].rows(SIZES.tasks)
    cells = {rows[0].label: [Cell("main", "base", 0)]}
    made = study.cells("main", [rows[1].variant], SIZES, lambda _: WEIGHTS)
    write_whole(made[0].path(tmp_path), json.dumps({"cell": asdict(made[0])}))
    names = {rows[0].label: ("old",), rows[1].label: (made[0].name, made[1].name), rows[2].label: ("failed",)}
    earlier = replace(plan, cells=names)

    def kept(rows: Sequence[Row], sizes: Sizes) -> tuple[str, ...]:
        found = tables.planned(rows, cells, earlier, sizes, tmp_path)
        assert found[rows[0].label] == (cells[rows[0].label][0].name,) and not any(found[row.label] for row in rows[3:])
        assert found[rows[2].label] == (("failed",) if sizes == SIZES else ()), "without results"
        return found[rows[1].label]

    assert kept(rows, SIZES) == (made[0].name, made[1].name)
    more = kept(rows, replace(SIZES, seeds=3))
    assert more[:2] == (made[0].name, made[1].name) and len(more) == 3, "of the same weights"
    assert kept(rows, replace(SIZES, seeds=1)) == (made[0].name,)
    assert kept(rows, replace(SIZES, trials=SIZES.trials + 1)) == ()
    changed = [replace(row, variant=replace(row.variant, settings={"bound": 0.25})) for row in rows]
    assert kept(changed, SIZES) == (), "means something else by now"


def test_tuning_scenes_are_named_as_such(plan: Plan, tmp_path: Path) -> None:
    sizes = replace(SIZES, split=Split.TUNING)
    replace(plan, sizes=sizes, cells={}).save(tmp_path)
    assert "**Tuning scenes: for choosing hyperparameters, not a result.**" in results.page(tmp_path)


def test_plots_and_terminal_tables(plan: Plan, tmp_path: Path) -> None:
    rounds = (put(tmp_path, "rounds", 0, "1100", "1111"),)
    cells = {**plan.cells, "default": rounds}
    cases = {
        "methods": ROWS,
        "regimes": [replace(row, series=row.label, x=float(x)) for x, row in enumerate(ROWS)],
        "similarity-vs-success": [ROWS[0], Row("default", ANY, ("base",))],
    }
    for name, rows in cases.items():
        table = tables.measure(replace(plan, experiment=name, cells=cells), rows, tmp_path)
        plots.draw(table, tmp_path / f"{name}.png")
        assert 2_000 < (tmp_path / f"{name}.png").stat().st_size < 80_000
        console = Console(file=io.StringIO(), width=200)
        results.show(table, console)
        assert "Wilson" in console.file.getvalue()  # type: ignore[attr-defined]
    assert table.lines[1].rounds == {0: [(0.5, 0.0), (0.75, 0.75)]}
    assert results.grids(table)[-1][1:] == (
        ["variant", "round 0", "round 1", "rank correlation by training seed"],
        [["default", "0.500 / 0.000", "0.750 / 0.750", "too few"]],
    )


def test_publish_writes_page_tables_and_plots(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path)
    page = results.publish(tmp_path)
    assert page == tmp_path.with_name(f"{tmp_path.name}.md") and page.read_text() == results.page(tmp_path)
    assert json.loads((tmp_path / "methods.json").read_text())["contrasts"][0]["gained"] == 8
    assert (tmp_path / "methods.png").exists()


def test_committed_page_is_current() -> None:
    assert (ROOT / "docs/results.md").read_text() == results.page(ROOT / "docs/results"), "run: world2act results"
