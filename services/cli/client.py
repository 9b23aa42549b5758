"""The gateway as the command line uses it, and progress bars from its event streams."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from services.cli.settings import CliSettings

PATIENCE_S = 30.0
"""How long a broken event stream is tried again before the command gives up (the job goes on)."""


class CliError(Exception):
    """One line for the user; exit code 2."""


class Gateway:
    """REST calls; every failure is a CliError with the gateway's own sentence."""

    def __init__(self, settings: CliSettings) -> None:
        token = settings.token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.url = settings.gateway()
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(60.0, connect=5.0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.http.close()

    def call(self, method: str, path: str, **options: Any) -> Any:
        """The JSON of the answer. Raises CliError."""
        try:
            reply = self.http.request(method, path, **options)
        except httpx.TransportError as error:
            raise CliError(f"gateway at {self.url} does not answer ({type(error).__name__}); start it: world2act up") from None
        return _checked(reply)

    def submit(self, path: str, body: dict[str, Any]) -> str:
        """POST a job; its id."""
        return str(self.call("POST", path, json={k: v for k, v in body.items() if v is not None})["id"])

    def events(self, job: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, data) until `end`. Goes on after the last event when the connection breaks."""
        last, deadline = "", time.monotonic() + PATIENCE_S
        while True:
            headers = {"Last-Event-ID": last} if last else {}
            try:
                with self.http.stream("GET", f"/jobs/{job}/events", headers=headers) as r:
                    if r.status_code == 503:
                        raise httpx.TransportError("redis is away")
                    if r.status_code != 200:
                        r.read()
                        _checked(r)
                    for entry, name, data in parse_events(r.iter_lines()):
                        last = entry
                        deadline = time.monotonic() + PATIENCE_S
                        yield name, data
                        if name == "end":
                            return
            except httpx.TransportError:
                pass
            if time.monotonic() > deadline:
                raise CliError(f"gateway at {self.url} went away; job {job} goes on: world2act watch {job}")
            time.sleep(0.5)

    def follow(
        self, job: str, console: Console, label: str, heard: Callable[[str, dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        """A progress bar until the job ends; the ended job. Raises CliError when it failed or was cancelled."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        ended: dict[str, Any] = {}
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=1.0, note="")
            try:
                for name, data in self.events(job):
                    if name == "status":
                        bar.update(task, completed=float(data.get("progress") or 0), note=str(data.get("message") or "")[:60])
                    elif name == "end":
                        ended = data
                    if heard is not None:
                        heard(name, data)
            except KeyboardInterrupt:
                raise CliError(f"job {job} goes on: world2act watch {job}, or world2act cancel {job}") from None
            if ended.get("status") == "succeeded":
                bar.update(task, completed=1.0, note=str(ended.get("message") or "")[:60])
        if ended.get("status") != "succeeded":
            raise CliError(f"job {job} {ended.get('status') or 'vanished'}: {ended.get('error') or ended.get('message') or ''}")
        return ended

    def download(self, name: str, out: Path, change: Callable[[bytes], bytes] | None = None) -> int:
        """Artifact `name` to `out`, whole or not at all, through `change` if given; the file's size.

        The name is the content's sha256 and is checked.
        """
        import hashlib

        temporary, digest, size = out.with_name(out.name + ".tmp"), hashlib.sha256(), 0
        try:
            with self.http.stream("GET", f"/artifacts/{name}") as reply, temporary.open("wb") as f:
                if reply.status_code != 200:
                    reply.read()
                    _checked(reply)
                for piece in reply.iter_bytes():
                    digest.update(piece)
                    size += f.write(piece)
            if not name.startswith(f"sha256-{digest.hexdigest()}."):
                raise CliError(f"artifact {name}: what came does not match its name")
            if change is not None:
                size = temporary.write_bytes(change(temporary.read_bytes()))
            temporary.replace(out)
        except httpx.TransportError as error:
            raise CliError(f"gateway at {self.url} does not answer ({type(error).__name__})") from None
        except OSError as error:
            raise CliError(f"{out}: {error.strerror}") from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return size


def _checked(reply: httpx.Response) -> Any:
    try:
        body = reply.json()
    except ValueError:
        raise CliError(f"{reply.request.url}: answer {reply.status_code} is not JSON; is that the gateway?") from None
    if reply.status_code >= 400:
        raise CliError(str(body.get("detail", reply.status_code)) if isinstance(body, dict) else str(reply.status_code))
    return body


def parse_events(lines: Iterator[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(last id, name, data) of a server-sent event stream."""
    last, name, data = "", "message", ""
    for line in lines:
        if not line:
            if data:
                yield last, name, json.loads(data)
            name, data = "message", ""
        elif line.startswith("id:"):
            last = line[3:].strip()
        elif line.startswith("event:"):
            name = line[6:].strip()
        elif line.startswith("data:"):
            data += line[5:].strip()
