"""The shipped schemas know every task of RoboCasa (the paper's 24) and LIBERO; the validator sees what they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.cli.main import main
from world2act.segmentation import RuleBasedPlanner, check_suites, load_schemas, parse_schemas

TABLE = load_schemas()
PLANNER = RuleBasedPlanner(TABLE)
SUITES = {s.name: s for s in TABLE.suites}

SEEN = [
    "CoffeeSetupMug",
    "CoffeeServeMug",
    "CoffeePressButton",
    "OpenSingleDoor",
    "OpenDoubleDoor",
    "CloseSingleDoor",
    "CloseDoubleDoor",
    "OpenDrawer",
    "CloseDrawer",
    "TurnOnMicrowave",
    "TurnOffMicrowave",
    "TurnOffStove",
]
UNSEEN = [
    "PnPCounterToCab",
    "PnPCabToCounter",
    "PnPCounterToSink",
    "PnPSinkToCounter",
    "PnPCounterToMicrowave",
    "PnPMicrowaveToCounter",
    "PnPCounterToStove",
    "PnPStoveToCounter",
    "TurnOnSinkFaucet",
    "TurnOffSinkFaucet",
    "TurnSinkSpout",
    "TurnOnStove",
]


def endings(instruction: str, task: str | None = None) -> list[str]:
    return [s.ends for s in PLANNER.plan(instruction, task).schema.steps if not s.optional]


def test_every_task_of_every_suite_is_known() -> None:
    assert check_suites(TABLE) == []
    assert set(SUITES["robocasa"].instructions) == {*SEEN, *UNSEEN}
    sizes = {name: len(SUITES[name].instructions) for name in ("libero_spatial", "libero_object", "libero_goal", "libero_10")}
    assert sizes == dict.fromkeys(sizes, 10)
    assert {s.embodiment for s in TABLE.suites} == {"panda"}


def test_pick_and_place_has_exactly_two_steps() -> None:
    for task in (t for t in [*SEEN, *UNSEEN] if t.startswith(("PnP", "CoffeeS"))):
        plan = PLANNER.plan(SUITES["robocasa"].instructions[task], task)
        assert [s.ends for s in plan.schema.steps] == ["contact_on", "end"] and plan.task == task
        assert plan.prompts[0].startswith("pick up the ") and plan.prompts[1].startswith("place the ")


@pytest.mark.parametrize(
    ("instruction", "prompts"),
    [
        (
            "Pick the fish from the sink and place it on the bowl located on the counter.",
            ("pick up the fish from the sink", "place the fish on the bowl located on the counter"),
        ),
        (
            "pick up the black bowl between the plate and the ramekin and place it on the plate",
            ("pick up the black bowl between the plate and the ramekin", "place the black bowl on the plate"),
        ),
        ("put the red mug on the left plate", ("pick up the red mug", "place the red mug on the left plate")),
        (
            "put the black bowl at the back on the plate",
            ("pick up the black bowl at the back", "place the black bowl on the plate"),
        ),
        (
            "open the top drawer and put the bowl inside",
            ("open the top drawer", "pick up the bowl", "place the bowl inside"),
        ),
        (
            "put the yellow and white mug in the microwave and close it",
            ("pick up the yellow and white mug", "place the yellow and white mug in the microwave", "close the microwave"),
        ),
        (
            "turn on the stove and put the moka pot on it",
            ("turn on the stove", "pick up the moka pot", "place the moka pot on the stove"),
        ),
        (
            "put both the alphabet soup and the tomato sauce in the basket",
            (
                "pick up the alphabet soup",
                "place the alphabet soup in the basket",
                "pick up the tomato sauce",
                "place the tomato sauce in the basket",
            ),
        ),
        ("Press the button on the coffee machine to serve coffee.", ("press the button on the coffee machine",)),
        ("Turn off the front left burner of the stove.", ("turn off the front left burner of the stove",)),
        ("Turn the sink spout to the right.", ("turn the sink spout to the right",)),
        ("Fully slide the top dishwasher rack in.", ("slide the top dishwasher rack in",)),
    ],
)
def test_wordings(instruction: str, prompts: tuple[str, ...]) -> None:
    assert PLANNER.plan(instruction).prompts == prompts


def test_a_step_with_something_after_it_ends_with_its_contact() -> None:
    assert endings("open the top drawer and put the bowl inside") == ["contact_off", "contact_on", "end"]
    assert endings("put both moka pots on the stove") == ["contact_on", "contact_off", "contact_on", "end"]


def test_the_benchmarks_name_stands_in_for_an_unclear_wording() -> None:
    for task in ("PnPCounterToCab", "PickPlaceCounterToCabinet"):
        assert PLANNER.plan("do the usual", task).prompts == (
            "pick up the apple from the counter",
            "place the apple in the cabinet",
        )
    name = "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it"
    plan = PLANNER.plan("make coffee", name)
    assert plan.task == name and plan.prompts[-1] == "place the moka pot on the stove"
    # The wording fills the slots where it agrees with the name.
    assert (
        PLANNER.plan("pick the pear from the counter and place it in the cabinet", "PnPCounterToCab")
        .prompts[0]
        .endswith("the pear from the counter")
    )


def content(**suite: Any) -> dict[str, Any]:
    hand = {"open_width_m": 0.08, "delta_on_m": 0.02, "delta_off_m": 0.01}
    row = {
        "task": "open",
        "patterns": ["open <object>"],
        "slots": {"object": "it"},
        "steps": [{"prompt": "open {object}", "ends": "end"}],
    }
    tasks = {"embodiment": "hand", "tasks": ["open the jar"], **suite}
    return {"tasks": [row], "calibrations": {"hand": hand}, "suites": {"mine": tasks}}


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ({"embodiment": "claw"}, r"schemas.suites.mine.embodiment: 'claw' has no calibration; there are hand"),
        ({"tasks": []}, "schemas.suites.mine.tasks: must be instructions"),
        ({"tasks": [7]}, "schemas.suites.mine.tasks: must be instructions"),
        ({"tasks": {"a": 7}}, "schemas.suites.mine.tasks: must be instructions"),
        ({"tasks": [""]}, "instruction: is empty"),
        ({"colour": 1}, "schemas.suites.mine: must be an object with embodiment and tasks"),
    ],
)
def test_bad_suites(suite: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_schemas(content(**suite))


def test_the_command_names_what_no_row_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schemas"]) == 0
    assert "robocasa 24" in capsys.readouterr().out
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content(tasks={"Juggle": "juggle three balls", "Open": "open the jar"})))
    assert main(["schemas", "--file", str(path)]) == 2
    said = capsys.readouterr()
    assert "schemas.suites.mine.Juggle" in said.out.replace("\n", "") and "suites.mine.Open" not in said.out
    path.write_text(json.dumps({"tasks": [{"task": "open"}]}))
    assert main(["schemas", "--file", str(path)]) == 2
    assert "schemas.tasks[0].steps: 1 to 32 steps are needed" in capsys.readouterr().err
