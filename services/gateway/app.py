"""The REST routes. Long work answers 202 and a job; every error is problem details (services/gateway/problems.py)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import anyio
import structlog
from fastapi import Body, FastAPI, Header, Query, Request, Response
from fastapi import Path as InPath
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from pydantic import ValidationError
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from services.gateway import events, problems, uploads
from services.gateway.doors import Doors
from services.gateway.guard import Guard
from services.gateway.problems import ProblemDetails, ProblemError, from_validation, invalid
from services.gateway.requests import (
    EXAMPLES,
    NAMESPACE,
    EvaluateRequest,
    ImagineRequest,
    JobAccepted,
    PosttrainRequest,
    RolloutRequest,
    SegmentRequest,
    Stage1Request,
)
from services.gateway.settings import GatewaySettings
from services.runtime.artifacts import ArtifactError
from services.runtime.jobs import Job
from services.runtime.messages import POLICY_VERSIONS, PolicyVersion
from services.runtime.streams import read_all
from services.runtime.telemetry import run_checks
from world2act import __version__

log = structlog.get_logger()
HERE = Path(__file__).parent
TYPES = {
    "mp4": "video/mp4",
    "json": "application/json",
    "png": "image/png",
    "html": "text/html; charset=utf-8",
    "hdf5": "application/x-hdf5",
    "txt": "text/plain; charset=utf-8",
}
MOST_BUNDLE_BYTES = 256 * 1024 * 1024
BUNDLE_FORM = {"type": "object", "required": ["file"], "properties": {"file": {"type": "string", "format": "binary"}}}
RolloutBody = Annotated[RolloutRequest, Body(openapi_examples=EXAMPLES["rollout"])]
ImagineBody = Annotated[ImagineRequest, Body(openapi_examples=EXAMPLES["imagine"])]
PosttrainBody = Annotated[PosttrainRequest, Body(openapi_examples=EXAMPLES["posttrain"])]
EvaluateBody = Annotated[EvaluateRequest, Body(openapi_examples=EXAMPLES["evaluate"])]
Stage1Body = Annotated[Stage1Request, Body(openapi_examples=EXAMPLES["stage1"])]
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ProblemDetails, "description": problems.TITLES[code], "content": {problems.MEDIA_TYPE: {}}}
    for code in (400, 404, 413, 422, 503)
}


def create_app(settings: GatewaySettings) -> FastAPI:
    """The application. Connects to nothing yet."""
    app = FastAPI(
        title="World2Act",
        version=__version__,
        description="Reward-free post-training of robot policies in the latent space of a skill-compositional world model.",
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
    )
    doors = Doors(settings)
    app.state.doors = doors
    problems.install(app, settings.redis_url)
    add_pages(app, doors)
    add_segment(app, doors)
    add_jobs(app, doors)
    add_policies(app, doors)
    add_reading(app, doors)
    app.add_middleware(Guard, settings=settings)
    return app


# -- health and pages --------------------------------------------------------------------------------------------------


def add_pages(app: FastAPI, doors: Doors) -> None:
    """Health, the state of the whole, the viewer, the documentation."""

    @app.get("/healthz", tags=["state"])
    def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["state"])
    def readyz() -> JSONResponse:
        """503 without Redis or artifacts; else 200: `missing` names services that some requests need and that do not answer."""
        failed, missing = run_checks(doors.checks()), run_checks(doors.others()) | doors.silent()
        status = "not ready" if failed else "degraded" if missing else "ready"
        return JSONResponse({"status": status, "missing": failed | missing}, 503 if failed else 200)

    @app.get("/status", tags=["state"])
    def status() -> dict[str, Any]:
        """Seconds since each worker's heartbeat, unfinished entries of each queue, services that do not answer."""
        return {
            "missing": run_checks(doors.others()) | doors.silent(),
            "heartbeats": doors.heartbeats(),
            "backlogs": doors.backlogs(),
        }

    @app.get("/", include_in_schema=False)
    def viewer() -> HTMLResponse:
        return HTMLResponse((HERE / "viewer.html").read_text())

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse((HERE / "docs.html").read_text())


# -- segmentation ------------------------------------------------------------------------------------------------------


def add_segment(app: FastAPI, doors: Doors) -> None:
    """POST /segment."""
    schema = SegmentRequest.model_json_schema()
    file, text = {"type": "string", "format": "binary"}, {"type": "string"}
    upload = {
        "type": "object",
        "required": ["file"],
        "properties": {"file": file, "demo": text, "embodiment": text, "planner": text},
    }
    content = {
        "application/json": {"schema": schema, "examples": EXAMPLES["segment"]},
        "multipart/form-data": {"schema": upload},
    }

    @app.post(
        "/segment",
        tags=["work"],
        openapi_extra={"requestBody": {"required": True, "content": content}},
        responses={200: {"description": "skills"}, 202: {"model": JobAccepted, "description": "slower than W2A_SEGMENT_WAIT_S"}},
    )
    async def segment(request: Request) -> Response:
        """Cut demonstrations into skills: an uploaded HDF5 file (multipart field `file`; ours, LIBERO's or RoboCasa's), a file or
        data set of the data folder (`episode`; also LeRobot's and the authors' clips), gripper widths with an instruction, or an
        instruction alone (skills only)."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            task = await _from_upload(request, doors)
        elif kind == "application/json":
            task = await _from_json(await request.body())
        else:
            raise ProblemError(415, "Content-Type: must be application/json or multipart/form-data")
        celery_id = await run_in_threadpool(doors.send_segment, task)
        deadline = time.monotonic() + doors.settings.segment_wait_s
        pause = 0.02
        while time.monotonic() < deadline:
            result = await run_in_threadpool(doors.segment_result, celery_id)
            if result is not None:
                return JSONResponse(result)
            await anyio.sleep(pause)
            pause = min(pause * 1.5, 0.25)
        job = await run_in_threadpool(
            lambda: doors.jobs.create(
                "segment", {"celery_id": celery_id, "episode": task.get("episode_uri") or task.get("episode_path")}, queue=False
            )
        )
        return JSONResponse(JobAccepted.of(job).model_dump(), 202, {"Location": f"/jobs/{job.id}"})

    async def _from_json(body: bytes) -> dict[str, Any]:
        try:
            asked = SegmentRequest.model_validate_json(body)
        except ValidationError as error:
            raise from_validation(error.errors(include_url=False)) from None
        task = asked.model_dump(exclude_none=True, exclude={"episode", "frames"})
        if asked.episode is None:
            return task
        stamp = await run_in_threadpool(uploads.stamp, doors.settings, asked.episode)
        return task | {"episode_path": asked.episode, "episode_stamp": stamp, "demo": asked.demo}


async def _from_upload(request: Request, doors: Doors) -> dict[str, Any]:
    """The request of an uploaded file. Starlette spools it to disk while it comes in; the guard has counted its size."""
    async with request.form(max_files=1, max_fields=8) as form:
        unknown = set(form) - {"file", "demo", "embodiment", "planner"}
        file = form.get("file")
        if unknown:
            raise invalid(sorted(unknown)[0][:80], "is not a field of this form: file, demo, embodiment, planner")
        if not isinstance(file, UploadFile):
            raise invalid("file", "is missing: the HDF5 episode as a file field of the form")
        if (file.size or 0) > doors.settings.upload_limit_bytes:
            raise uploads.too_large("file", doors.settings)
        extra = {name: str(form[name]) for name in ("demo", "embodiment", "planner") if form.get(name)}
        try:
            asked = SegmentRequest.model_validate({"episode": "upload", **extra})
        except ValidationError as error:
            raise from_validation(error.errors(include_url=False)) from None

        def store() -> str:
            uploads.check_episode(file.file, asked.demo)
            file.file.seek(0)
            return doors.artifacts.put_file(file.file, "hdf5")

        name = await run_in_threadpool(store)
    task = asked.model_dump(exclude_none=True, exclude={"episode"})
    return task | {"episode_uri": name, "demo": asked.demo}


# -- jobs --------------------------------------------------------------------------------------------------------------


def add_jobs(app: FastAPI, doors: Doors) -> None:
    """POST /rollout, /imagine, /posttrain, /evaluate, /stage1. Redis is asked first: without it nothing can be accepted."""

    def accept(kind: str, params: dict[str, Any], response: Response) -> JobAccepted:
        job = doors.jobs.create(kind, params)
        log.info("job accepted", job=job.id, kind=kind)
        response.headers["Location"] = f"/jobs/{job.id}"
        return JobAccepted.of(job)

    @app.post("/rollout", status_code=202, tags=["work"])
    def rollout(asked: RolloutBody, response: Response) -> JobAccepted:
        """Imagine a task from initial states, execute it in the simulator, or both."""
        doors.redis.ping()
        doors.check_tasks([asked.task], "task")
        doors.need(*(["triton"] if asked.mode != "execute" else []), *(["vla"] if asked.mode != "imagine" else []))
        return accept("rollout", asked.params(), response)

    @app.post("/imagine", status_code=202, tags=["work"])
    def imagine(asked: ImagineBody, response: Response) -> JobAccepted:
        """Imagine skills from one initial state: given, planned from an instruction, or the task's own."""
        doors.redis.ping()
        doors.check_tasks([asked.task], "task")
        doors.need("triton")
        return accept("imagine", asked.params(), response)

    @app.post("/posttrain", status_code=202, tags=["work"])
    def posttrain(asked: PosttrainBody, response: Response) -> JobAccepted:
        """Post-train the base policy without rewards: generation, execution and optimisation, in one of three modes."""
        doors.redis.ping()
        doors.check_tasks(asked.tasks, "tasks")
        doors.need("triton", "vla")
        return accept("posttrain", asked.params(), response)

    @app.post("/evaluate", status_code=202, tags=["work"])
    def evaluate(asked: EvaluateBody, response: Response) -> JobAccepted:
        """Success of the base and of a residual version on the same held-out initial states."""
        doors.redis.ping()
        doors.check_tasks(asked.tasks, "tasks")
        doors.need("vla")
        return accept("evaluate", asked.params(), response)

    @app.post("/stage1", status_code=202, tags=["work"])
    def stage1(asked: Stage1Body, response: Response) -> JobAccepted:
        """Train the adapters that tie video dynamics to actions (Stage 1)."""
        uploads.inside(doors.settings, asked.demos, "demos")
        doors.redis.ping()
        return accept("stage1", asked.params(), response)


# -- policies ----------------------------------------------------------------------------------------------------------


def add_policies(app: FastAPI, doors: Doors) -> None:
    """Published versions, and the import of a bundle as one."""

    @app.get("/policies/{namespace}", tags=["jobs"])
    def policies(namespace: str) -> list[PolicyVersion]:
        """Published residual versions of a namespace (a post-training job's id), oldest first."""
        found: dict[int, PolicyVersion] = {}
        after = "0"
        while batch := list(read_all(doors.redis, POLICY_VERSIONS, PolicyVersion, after)):
            found |= {version.version: version for _, version in batch if version.namespace == namespace}
            after = batch[-1][0]
        return [found[v] for v in sorted(found)]

    @app.post(
        "/policies/{namespace}",
        status_code=201,
        tags=["work"],
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": BUNDLE_FORM}}}},
        responses={409: {"model": ProblemDetails, "description": problems.TITLES[409], "content": {problems.MEDIA_TYPE: {}}}},
    )
    async def import_policy(namespace: Annotated[str, InPath(pattern=NAMESPACE)], request: Request) -> PolicyVersion:
        """Import a residual bundle (multipart field `file`) as the namespace's next version; the same bundle is the same version.

        The policy server checks it: damage, base policy, world model, adapters, statistics, limits, bound, signature."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
            raise ProblemError(415, "Content-Type: must be multipart/form-data with the bundle as field file")
        await run_in_threadpool(doors.redis.ping)
        await run_in_threadpool(doors.need, "vla")
        async with request.form(max_files=1, max_fields=1) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile) or len(form) != 1:
                raise invalid("file", "must be the form's one field: the bundle, a safetensors file")
            if (file.size or 0) > MOST_BUNDLE_BYTES:
                raise ProblemError(413, f"file: a bundle has at most {MOST_BUNDLE_BYTES} bytes")
            content = await file.read()
        uploads.check_bundle(content)
        name = await run_in_threadpool(doors.artifacts.put, content, "safetensors")
        return await run_in_threadpool(doors.import_policy, namespace, name)


# -- reading -----------------------------------------------------------------------------------------------------------


def add_reading(app: FastAPI, doors: Doors) -> None:
    """Jobs, their events, artifacts."""

    def known(job: str) -> Job:
        found = doors.jobs.get(job)
        if found is None:
            raise ProblemError(404, f"job {job[:40]!r} is not known (jobs are kept 30 days)")
        return doors.settle(found)

    @app.get("/jobs", tags=["jobs"])
    def jobs(limit: Annotated[int, Query(ge=1, le=1000)] = 50) -> list[Job]:
        """The newest jobs, without their results."""
        return [doors.settle(job).model_copy(update={"result": {}}) for job in doors.jobs.recent(limit)]

    @app.get("/jobs/{job_id}", tags=["jobs"])
    def job(job_id: str) -> Job:
        """State, parameters and result of a job."""
        return known(job_id)

    @app.get("/jobs/{job_id}/events", tags=["jobs"], responses={200: {"content": {"text/event-stream": {}}}})
    async def job_events(job_id: str, last_event_id: Annotated[str | None, Header()] = None) -> EventSourceResponse:
        """Progress as server-sent events: `status` and what the job reports; after the last one `end` with the whole job.
        Send Last-Event-ID to go on where a connection broke."""
        after = events.start_after(last_event_id)
        await run_in_threadpool(known, job_id)
        return EventSourceResponse(events.stream(doors, job_id, after), ping=15)

    @app.delete("/jobs/{job_id}", tags=["jobs"])
    def cancel(job_id: str) -> Job:
        """Ask a job to stop: a queued one ends at once, a running one at its next step; an ended one stays as it is."""
        found = known(job_id)
        if found.status in ("succeeded", "failed", "cancelled"):
            return found
        if found.kind == "segment":
            doors.celery.backend.forget(str(found.params.get("celery_id", "")))
        return doors.jobs.cancel(job_id)

    @app.get("/artifacts/{name}", tags=["jobs"], responses={200: {"content": {"application/octet-stream": {}}}})
    def artifact(name: str) -> Response:
        """An artifact's bytes; byte ranges are served, so that videos can be sought."""
        try:
            path = doors.artifacts.path(name)
        except ArtifactError as error:
            raise ProblemError(400, str(error)) from None
        if not doors.artifacts.exists(name):
            raise ProblemError(404, f"artifact: {name} is not in the store")
        kind = TYPES.get(name.rsplit(".", 1)[1], "application/octet-stream")
        headers = {  # content-addressed: never changes; whatever it holds, it runs no script in this site's name
            "Cache-Control": "public, max-age=31536000, immutable",
            "Content-Security-Policy": "sandbox",
            "X-Content-Type-Options": "nosniff",
        }
        if "file" in doors.artifacts.fs.protocol:
            return FileResponse(path, media_type=kind, headers=headers)
        return Response(doors.artifacts.get(name), media_type=kind, headers=headers)
