"""The command line: settings and ports, its own arguments, the gateway's answers, event streams, tables. No process starts."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from rich.console import Console

from services.cli import demo, main, settings_table, work
from services.cli.client import CliError, Gateway, parse_events
from services.cli.processes import services_table
from services.cli.settings import CliSettings
from services.cli.specs import service_specs

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [n for n in os.environ if n.startswith("W2A_")]:
        monkeypatch.delenv(name)


def test_settings_page_is_current() -> None:
    assert (ROOT / "docs/settings.md").read_text() == settings_table.render(), "run: python -m services.cli.settings_table"


def test_offset_moves_every_port_that_was_not_set_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("W2A_PORT_OFFSET", "1000")
    monkeypatch.setenv("W2A_VLA_PORT", "4321")
    monkeypatch.setenv("W2A_RUN_DIR", str(tmp_path))
    settings = CliSettings.load()
    assert settings.gateway() == "http://127.0.0.1:9080"
    specs = {spec.name: spec for spec in service_specs(settings)}
    ports = [port for spec in specs.values() for port in spec.ports]
    assert len(ports) == len(set(ports))
    assert 7379 in specs["redis"].ports and {9000, 9001, 9002} <= set(specs["triton"].ports)
    assert set(specs["vla"].ports) == {4321, 10103}
    assert specs["vla"].env["W2A_VLA_PORT"] == "4321" and specs["vla"].env["W2A_METRICS_PORT"] == "10103"
    assert all(spec.env["W2A_REDIS_URL"] == "redis://127.0.0.1:7379/0" for name, spec in specs.items() if name != "redis")
    assert settings.shifted().gateway_port == 9080  # applied once


def test_every_service_is_started_by_its_own_command(tmp_path: Path) -> None:
    specs = {spec.name: spec for spec in service_specs(CliSettings(run_dir=tmp_path))}
    commands = {name: " ".join(spec.command[1:]) for name, spec in specs.items() if name != "redis"}
    assert commands == {
        "triton": "-m services.worldmodel triton",
        "simulator": "-m services.simulator",
        "vla": "-m services.vla",
        "segmenter": "-m services.segmenter",
        "worldmodel": "-m services.worldmodel",
        "rollout": "-m services.trainer rollout",
        "trainer": "-m services.trainer",
        "gateway": "-m services.gateway",
    }
    assert [n for n, s in specs.items() if s.stage == 0] == ["gateway"] and specs["redis"].stage == max(
        s.stage for s in specs.values()
    )


def test_redis_elsewhere_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W2A_REDIS_URL", "redis://redis.example:6379/0")
    assert "redis" not in [spec.name for spec in service_specs(CliSettings.load())]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["segment", "open the drawer"], ("gateway", "does not answer", "world2act up")),
        (["status"], ("gateway", "does not answer")),
        (["segment"], ("instruction", "--file")),
        (["posttrain"], ("tasks: name at least one",)),
        (["evaluate"], ("tasks: name at least one",)),
        (["segment", "--file", "/nowhere.hdf5"], ("/nowhere.hdf5", "No such file")),
        (["report", "--record", "/nowhere.json"], ("/nowhere.json",)),
    ],
)
def test_errors_are_one_line_and_status_2(
    arguments: list[str], words: tuple[str, ...], capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("W2A_GATEWAY_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("W2A_RUN_DIR", str(tmp_path))
    assert main.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words), error


def test_bad_setting_is_named(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W2A_PORT_OFFSET", "many")
    assert main.main(["status"]) == 2
    assert "W2A_PORT_OFFSET" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(main.COMMANDS))
def test_every_command_has_help(name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(main, "run_module", lambda module, arguments: started.append([module, *arguments]) or 0)
    if name in main.MODULES:
        assert main.main([name, "--help"]) == 0 and started == [[main.MODULES[name], "--help"]]
    else:
        with pytest.raises(SystemExit) as ended:
            main.main([name, "--help"])
        assert ended.value.code == 0 and f"world2act {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["demos", "train-worldmodel", "train-base", "stage1", "diagnose"])
def test_programs_are_called_as_world2act_calls_them(name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["program.py", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(main.MODULES[name]).main()
    told = capsys.readouterr().out
    assert f"usage: world2act {name}" in told
    assert (f"world2act {name} --backbone NAME --help" in told) == (name in ("train-worldmodel", "stage1"))
    assert ("ratio: imagined / base" in " ".join(told.split())) == (name == "diagnose")


class Answers:
    """A gateway in memory; `calls` keeps what was asked."""

    def __init__(self, **routes: Any) -> None:
        self.routes, self.calls = routes, []  # type: ignore[var-annotated]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.calls.append(request)
        answer = self.routes[f"{request.method} {request.url.path}"]
        return answer(request) if callable(answer) else answer


def gateway(answers: Answers) -> Gateway:
    found = Gateway(CliSettings(gateway_url="http://gateway", gateway_token="s3cret"))
    found.http = httpx.Client(transport=httpx.MockTransport(answers), base_url=found.url, headers=found.http.headers)
    return found


def stream(*events: tuple[str, str, dict[str, Any]]) -> httpx.Response:
    text = "".join(f"id: {i}\r\nevent: {name}\r\ndata: {json.dumps(data)}\r\n\r\n" for i, name, data in events)
    return httpx.Response(200, text=": ping\n\n" + text, headers={"content-type": "text/event-stream"})


def test_follow_goes_on_where_the_stream_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    parts = [
        stream(("1-0", "status", {"progress": 0.2}), ("2-0", "round", {"round": 0})),
        httpx.Response(503, json={"detail": "redis is away"}),
        stream(("3-0", "status", {"progress": 1.0}), ("3-0", "end", {"status": "succeeded", "result": {"x": 1}})),
    ]
    answers = Answers(**{"GET /jobs/j/events": lambda request: parts.pop(0)})
    heard: list[str] = []
    with gateway(answers) as g:
        ended = g.follow("j", Console(file=io.StringIO()), "job", lambda name, data: heard.append(name))
    assert ended["result"] == {"x": 1} and heard == ["status", "round", "status", "end"]
    assert [r.headers.get("last-event-id") for r in answers.calls] == [None, "2-0", "2-0"]
    assert all(r.headers["authorization"] == "Bearer s3cret" for r in answers.calls)


def test_failed_job_is_an_error_with_its_reason() -> None:
    answers = Answers(**{"GET /jobs/j/events": stream(("1-0", "end", {"status": "failed", "error": "task: 'fly' is unknown"}))})
    with gateway(answers) as g, pytest.raises(CliError, match="failed: task: 'fly' is unknown"):
        g.follow("j", Console(file=io.StringIO()), "job")


def test_problem_details_become_the_error() -> None:
    answers = Answers(**{"POST /rollout": httpx.Response(503, json={"detail": "triton at x does not answer"})})
    with gateway(answers) as g, pytest.raises(CliError, match="triton at x does not answer"):
        g.submit("/rollout", {"task": "reach"})


def test_parse_events_joins_lines_and_skips_comments() -> None:
    lines = [": ping", "", "id: 4", "event: metrics", 'data: {"a":', "data: 1}", "", "data: {}", ""]
    assert list(parse_events(iter(lines))) == [("4", "metrics", {"a": 1}), ("4", "message", {})]


def test_segment_names_the_hand_and_says_what_no_row_knows(tmp_path: Path) -> None:
    whole = {"prompt": "x", "start": 0, "end": 32}
    texts = {"dance the tango": [whole], "dance, then open the drawer": [whole, whole], "open the drawer": [whole]}
    cut = [{"demo": "d", "task": None, "instruction": t, "skills": s, "discarded": None} for t, s in texts.items()]
    (tmp_path / "a.hdf5").write_bytes(b"file")
    answers = [{"task": None, "skills": ["dance the tango"], "episodes": []}, {"task": None, "skills": None, "episodes": cut}]
    answer = Answers(**{"POST /segment": lambda request: httpx.Response(200, json=answers.pop(0))})
    out = io.StringIO()
    with gateway(answer) as g:
        for asked in ({"instruction": "dance the tango", "file": None}, {"instruction": None, "file": tmp_path / "a.hdf5"}):
            found = work.segment(g, Console(), demo=None, embodiment="panda", **cast(Any, asked))
            work.show_segments(found, Console(file=out, width=200))
    assert json.loads(answer.calls[0].content) == {"instruction": "dance the tango", "planner": "rule", "embodiment": "panda"}
    assert b'name="embodiment"\r\n\r\npanda' in answer.calls[1].content
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[1] == "no schema row knows the instruction (one skill)" and lines[3].endswith("kept; " + lines[1])
    assert lines[4].endswith("kept; no schema row knows the instruction (2 skills, by its verbs)") and lines[5].endswith(" kept")


def test_evaluate_takes_the_newest_run_and_prints_its_table() -> None:
    cell = {"rate": 0.5, "low": 0.2, "high": 0.8, "n": 4, "successes": 2}
    row = {
        "task": "reach",
        "episodes": 4,
        "base": cell,
        "post-trained": cell | {"rate": 1.0},
        "difference": {"value": 0.5, "low": 0.1, "high": 0.9},
        "mcnemar": {"gained": 2, "lost": 0, "p": 0.5},
    }
    result = {"split": "evaluation", "comparisons": [{"policy": "n/2", "reference": "base", "rows": [row]}]}
    result["policies"] = [{"name": "base", "unseen": []}, {"name": "n/2", "unseen": ["push", "reach"]}]
    jobs = [
        {"id": "c", "kind": "posttrain", "status": "running", "params": {}},
        {"id": "b", "kind": "posttrain", "status": "succeeded", "params": {"namespace": "n"}},
    ]
    answers = Answers(
        **{
            "GET /jobs": httpx.Response(200, json=jobs),
            "POST /evaluate": httpx.Response(202, json={"id": "e"}),
            "GET /jobs/e/events": stream(("1-0", "end", {"status": "succeeded", "result": result})),
        }
    )
    out = io.StringIO()
    with gateway(answers) as g:
        work.run_job(g, Console(file=out, width=120), "evaluate", {"tasks": ["reach"], "namespace": None}, wait=True)
    assert json.loads(answers.calls[1].content)["namespace"] == "n"
    left = "n/2: push, reach: not post-trained on, left to the base alone"
    for text in ("reach", "0.50 [0.20, 0.80]", "1.00", "+0.50 [+0.10, +0.90]", "+2 / -0", "n/2 against base", left):
        assert text in out.getvalue()


def test_links_of_videos_are_whole_in_a_narrow_terminal() -> None:
    name = f"sha256-{'a' * 64}.mp4"
    rollout = {"index": 3, "skills": ["reach it"], "success": True, "chunks": 9, "imagined_video": name, "executed_video": ""}
    answers = Answers(
        **{"GET /jobs/r/events": stream(("1-0", "end", {"status": "succeeded", "result": {"rollouts": [rollout]}}))}
    )
    out = io.StringIO()
    with gateway(answers) as g:
        work.finish(g, Console(file=out, width=80), "rollout", "r")
    videos = [line for line in out.getvalue().splitlines() if "video" in line]
    assert videos == [f"imagined video of initial state 3: http://gateway/artifacts/{name}"]


def test_export_writes_the_bundle_whole_or_not_at_all(tmp_path: Path) -> None:
    name = f"sha256-{hashlib.sha256(b'weights').hexdigest()}.safetensors"
    versions = [{"version": 1, "artifact": "sha256-x.safetensors"}, {"version": 2, "artifact": name}]
    answers = Answers(
        **{
            "GET /policies/n": httpx.Response(200, json=versions),
            f"GET /artifacts/{name}": httpx.Response(200, content=b"weights"),
            "GET /artifacts/sha256-x.safetensors": httpx.Response(200, content=b"other"),
            "GET /policies/none": httpx.Response(200, json=[]),
        }
    )
    console = Console(file=io.StringIO())
    with gateway(answers) as g:
        assert work.export(g, console, "n", -1, tmp_path / "new").read_bytes() == b"weights"
        for namespace, version, words in (("n", 1, "does not match"), ("n", 7, "7.*1, 2"), ("none", -1, "no published version")):
            with pytest.raises(CliError, match=words):
                work.export(g, console, namespace, version, tmp_path / "bad")
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_status_table_shows_heartbeats_and_reasons() -> None:
    row = {
        "name": "vla",
        "state": "restarting",
        "pid": None,
        "restarts": 2,
        "start_s": 3.0,
        "reason": "was ended by SIGKILL",
        "ports": [5],
    }
    out = io.StringIO()
    Console(file=out, width=120).print(services_table([row], heartbeats={"vla:0": 7.25}))
    for text in ("vla", "restarting (was ended by SIGKILL)", "2", "3.0 s", "7.2 s", "5"):
        assert text in out.getvalue()


def test_the_demos_tasks_may_be_names_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def collected(command: list[str], check: bool) -> SimpleNamespace:
        asked.append(command)
        folder = tmp_path / "demos" / "validation"
        assert not folder.exists(), "what an earlier run left is gone"
        folder.mkdir(parents=True)
        for task in ("drawer-close", "drawer-open", "reach"):
            (folder / f"{task}.hdf5").touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(demo.subprocess, "run", collected)
    (tmp_path / "demos" / "validation").mkdir(parents=True)
    settings: Any = SimpleNamespace(run_dir=tmp_path, simulator_name="metaworld")
    one = demo.Demo(settings, Console(), cast(Any, None), threading.Event(), ["reach", "drawer-*"], 2, {})
    demo.collect(one)
    assert one.tasks == ["reach", "drawer-close", "drawer-open"]
    assert asked[0][-3:] == ["--tasks", "reach", "drawer-*"] and "metaworld" in asked[0]
