"""Statistics against published and hand-computed values; matched scenes; no leakage."""

import json

import pytest
from rich.console import Console

from world2act import evaluation
from world2act.evaluation import Outcome
from world2act.splits import LeakageError, Split


def outcomes(results: dict[tuple[str, int], bool], split: str = "evaluation") -> list[Outcome]:
    return [Outcome(task, split, index, success) for (task, index), success in results.items()]


BASE = {("push", 0): True, ("push", 1): False, ("reach", 0): False, ("reach", 1): True}
POST = {("push", 0): True, ("push", 1): True, ("reach", 0): True, ("reach", 1): False}


def test_wilson_interval_of_known_values():
    rate = evaluation.wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (round(rate.low, 4), round(rate.high, 4)) == (0.2553, 0.3662)
    assert evaluation.wilson(0, 10).low == 0.0 and evaluation.wilson(10, 10).high == pytest.approx(1.0)


def test_mcnemar_is_the_exact_sign_test():
    assert evaluation.mcnemar(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert evaluation.mcnemar(0, 0) == 1.0
    assert evaluation.mcnemar(3, 3) == 1.0


def row(both: int, gained: int, lost: int, neither: int) -> evaluation.Comparison:
    n = both + gained + lost + neither
    before, after = evaluation.wilson(both + lost, n), evaluation.wilson(both + gained, n)
    return evaluation.Comparison("x", before, after, gained, lost, evaluation.mcnemar(gained, lost))


def test_paired_difference_of_known_values():
    published = evaluation.paired_difference(row(1, 1, 7, 12))  # Bentur 2009 in Fagerland, Lydersen, Laake 2014: -0.507, -0.026
    assert (round(published.low, 3), round(published.high, 3)) == (-0.507, -0.026)
    same = evaluation.paired_difference(row(50, 0, 0, 0))
    assert same.value == 0 and same.low == pytest.approx(-same.high) and 0.05 < same.high < 0.1
    forth, back = evaluation.paired_difference(row(30, 12, 5, 3)), evaluation.paired_difference(row(30, 5, 12, 3))
    assert (forth.value, forth.low, forth.high) == pytest.approx((-back.value, -back.high, -back.low))
    independent = evaluation.paired_difference(row(25, 25, 25, 25))
    assert forth.high - forth.low < 0.4 and independent.value == 0


def test_holm_is_that_of_statsmodels_and_of_the_book():
    from statsmodels.stats.multitest import multipletests

    p = [0.04, 0.01, 0.03, 0.5]
    assert evaluation.holm(p) == pytest.approx(list(multipletests(p, method="holm")[1]))
    assert evaluation.holm(p) == pytest.approx([0.09, 0.04, 0.09, 0.5])  # 4 x .01, 3 x .03, not below it: .09, .5
    assert evaluation.holm([]) == [] and evaluation.holm([0.2]) == [0.2]


def test_spread_needs_two_seeds():
    assert evaluation.spread([0.5]) is None
    assert evaluation.spread([0.4, 0.6]) == pytest.approx(0.1 * 2**0.5)


def test_compare_counts_matched_scenes_per_task_and_overall():
    rows = evaluation.compare(outcomes(BASE), outcomes(POST) + outcomes(POST))  # a second delivery counts once
    assert [row.name for row in rows] == ["push", "reach", "all"]
    assert [(row.gained, row.lost) for row in rows] == [(1, 0), (1, 1), (2, 1)]
    assert (rows[-1].base.successes, rows[-1].post.successes, rows[-1].base.n) == (2, 3, 4)


def test_unmatched_and_contradicting_scenes_are_errors():
    with pytest.raises(ValueError, match="1 scenes were run by one policy only, such as reach 1"):
        evaluation.compare(outcomes(BASE), outcomes({k: v for k, v in POST.items() if k != ("reach", 1)}))
    with pytest.raises(ValueError, match="has both a success and a failure"):
        evaluation.compare(outcomes(BASE) + outcomes({("push", 0): False}), outcomes(POST))
    with pytest.raises(ValueError, match="no episodes"):
        evaluation.compare([], [])


def test_only_the_named_split_is_evaluated():
    with pytest.raises(LeakageError, match="evaluation of base: takes episodes of split evaluation only, got posttrain"):
        evaluation.compare(outcomes(BASE, "posttrain"), outcomes(POST))
    with pytest.raises(LeakageError, match="takes episodes of split tuning only, got evaluation"):
        evaluation.compare(outcomes(BASE), outcomes(POST), Split.TUNING)
    assert evaluation.compare(outcomes(BASE, "tuning"), outcomes(POST, "tuning"), Split.TUNING)
    with pytest.raises(ValueError, match="must be evaluation or tuning, got posttrain"):
        evaluation.compare(outcomes(BASE, "posttrain"), outcomes(POST, "posttrain"), Split.POSTTRAIN)


def test_tables_carry_the_interval_and_json_round_trips():
    rows = evaluation.compare(outcomes(BASE), outcomes(POST))
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(evaluation.rich_table(rows))
    for text in (console.export_text(), evaluation.plain_table(rows)):
        assert "0.500 [0.150, 0.850]" in text and "McNemar p" in text and str(evaluation.paired_difference(rows[-1])) in text
    assert evaluation.from_json(json.loads(json.dumps(evaluation.to_json(rows)))) == rows


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_errors(successes, n):
    with pytest.raises(ValueError, match="successes"):
        evaluation.wilson(successes, n)
