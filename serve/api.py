"""The HTTP interface: a FastAPI application that knows the record and the run folders, but nothing of Ray."""

import asyncio
import base64
import binascii
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request
from fastapi import Path as InPath
from fastapi.responses import FileResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles

from raydream import __version__
from raydream.store.run_folder import MESH, PREVIEW, REPORT, TURNTABLE, particle_file
from serve import plan
from serve.artefacts import Artefacts, has_already, send_file
from serve.guard import PAGE_POLICY, REPORT_POLICY, Guard, owner_of
from serve.keys import Keys
from serve.live import Live, Representation, path_of
from serve.metrics import Meter, Metered
from serve.problems import HANDLERS
from serve.pulse import Pulse
from serve.records import Quota, Records, RecordsAway
from serve.schema import Generation, GenerationPage, GenerationRequest, Health, MetricRows, Priors, problem_responses
from serve.settings import Settings
from serve.supervisor import SupervisorHealth

_log = logging.getLogger(__name__)
_STATIC = Path(__file__).parent / "static"
_LOOK_AFTER_EVERY_S = 2.0
_PULSE_EVERY_S = 1.0
_SILENCE_S = 60.0
_ID = re.compile("[0-9a-f]{32}")

LookAfter = Callable[[], SupervisorHealth]


@dataclass
class Service:
    """What the routes share. ``ticked_at``: when the supervisor last came round; ``gone``: what of Ray is no longer
    there; ``refused``: why nothing that is accepted here would be run.
    """

    settings: Settings
    records: Records
    live: Live
    artefacts: Artefacts
    meter: Meter
    ticked_at: float = field(default=float("-inf"))
    gone: str = ""
    refused: str = ""

    def trouble(self) -> str:
        """Why the service is not ready; empty where it is."""
        is_silent = time.monotonic() - self.ticked_at >= _SILENCE_S
        return self.gone or self.refused or ("the supervisor is silent" if is_silent else "")

    def check_accepts(self) -> None:
        """503 where what is accepted would not be run. While it starts all is accepted: it will be."""
        trouble = self.trouble() if self.ticked_at > float("-inf") else self.gone or self.refused
        if trouble:
            raise HTTPException(503, f"nothing can be accepted now: {trouble}", {"Retry-After": "10"})


async def service_of(request: Request) -> Service:
    """The service that a request came to."""
    return request.app.state.service


Shared = Annotated[Service, Depends(service_of)]
Owner = Annotated[str, Depends(owner_of)]
Id = Annotated[str, InPath(alias="id", pattern=f"^{_ID.pattern}$")]
Index = Annotated[int, InPath(ge=0, le=1023)]
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=200, pattern=r"^[\x21-\x7e]+$")]

_NOT_OWN = problem_responses(401, 403, 404, 421, 422, 503)
_REFUSED = problem_responses(401, 403, 421, 422, 503)
router = APIRouter(prefix="/v1")
plain = APIRouter()


async def _own_generation(generation_id: Id, owner: Owner, service: Shared) -> Representation:
    """The generation of a path, for its owner; for everybody else there is none."""
    generation = await service.live.get(generation_id)
    if generation is None or generation.record.owner != owner:
        raise HTTPException(404, "there is no such generation")
    return generation


OwnGeneration = Annotated[Representation, Depends(_own_generation)]


@router.post(
    "/generations",
    status_code=202,
    response_model=Generation,
    responses=_REFUSED | problem_responses(400, 409, 413, 429),
)
def create(body: GenerationRequest, owner: Owner, service: Shared, idempotency_key: IdempotencyKey = None) -> Response:
    """Accepts a prompt. What is accepted is on the disk, and will be run whatever happens to this process."""
    service.check_accepts()
    request = plan.checked_request(body, service.settings)
    record, is_new = service.records.add(owner, request, idempotency_key, _quota(service.settings))
    if is_new:
        _log.info("generation %s: %s asks for %r", record.id, owner, record.prompt)
    return _response(service.live.represent(record), 202, {"Location": path_of(record.id)})


@router.get("/generations", response_model=GenerationPage, responses=_REFUSED)
def newest(
    owner: Owner,
    service: Shared,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> GenerationPage:
    """The newest generations first."""
    records = service.records.newest(owner, limit + 1, _read_cursor(cursor) if cursor is not None else None)
    last = records[limit - 1] if len(records) > limit else None
    next_cursor = base64.urlsafe_b64encode(f"{last.created_at!r} {last.id}".encode()).decode() if last else None
    items = [service.live.represent(record).generation for record in records[:limit]]
    return GenerationPage(items=items, next_cursor=next_cursor)


@router.get("/generations/{id}", response_model=Generation, responses=_NOT_OWN | {304: {}})
async def one(request: Request, generation: OwnGeneration) -> Response:
    """A generation as it stands."""
    if has_already(request, generation.tag):
        return Response(status_code=304, headers={"ETag": generation.tag})
    return _response(generation, 200, {"ETag": generation.tag})


@router.delete(
    "/generations/{id}",
    status_code=202,
    response_model=Generation,
    responses=_NOT_OWN | {204: {"description": "Deleted"}},
)
def cancel_or_delete(generation: OwnGeneration, service: Shared) -> Response:
    """Cancels what has not ended (202); deletes what has, with all its files (204)."""
    records, generation_id = service.records, generation.record.id
    is_cancelled = records.cancel(generation_id)
    is_deleted = not is_cancelled and records.delete(generation_id)
    service.live.forget(generation_id)
    if is_deleted or (now := service.live.read(generation_id)) is None:
        return Response(status_code=204)
    return _response(now, 202)


@router.post("/generations/{id}/cancel", status_code=202, response_model=Generation, responses=_NOT_OWN)
def cancel(generation: OwnGeneration, service: Shared) -> Response:
    """Cancels what has not ended; what has stays as it is. For who might come a moment too late to cancel."""
    service.records.cancel(generation.record.id)
    service.live.forget(generation.record.id)
    return _response(service.live.read(generation.record.id) or generation, 202)


@router.post(
    "/generations/{id}/retry",
    status_code=202,
    response_model=Generation,
    responses=_NOT_OWN | problem_responses(409, 429),
)
def retry(generation: OwnGeneration, service: Shared) -> Response:
    """Has one that failed or was cancelled wait again; it goes on from its last checkpoint, where it has one."""
    service.check_accepts()
    generation_id = generation.record.id
    service.records.retry(generation_id, _quota(service.settings))
    service.live.forget(generation_id)
    _log.info("generation %s: %s tries it again", generation_id, generation.record.owner)
    return _response(service.live.read(generation_id) or generation, 202, {"Location": path_of(generation_id)})


@router.get(
    "/generations/{id}/events",
    response_class=StreamingResponse,
    responses=_NOT_OWN | {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def events(
    generation: OwnGeneration, service: Shared, last_event_id: Annotated[str | None, Header(max_length=20)] = None
) -> StreamingResponse:
    """Server-sent events `generation`, one for each change, until the last."""
    last = int(last_event_id) if last_event_id and last_event_id.isdecimal() and last_event_id.isascii() else 0
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(service.live.events(generation.record.id, last), 200, headers, "text/event-stream")


@router.get("/generations/{id}/metrics", response_model=MetricRows, responses=_NOT_OWN)
def metric_rows(
    generation: OwnGeneration, service: Shared, after: Annotated[int, Query(ge=-1, le=10**9)] = -1
) -> MetricRows:
    """The losses of the steps after one, at most 500 rows."""
    return service.artefacts.metrics(generation.record, after)


def _artefact(suffix: str, media_type: str) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    """A route below a generation that answers with a file."""
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    file = {200: {"content": content}, 206: {"content": content, "description": "A part"}, 304: {}}
    responses = _NOT_OWN | problem_responses(416) | file
    return router.get(f"/generations/{{id}}/{suffix}", response_class=FileResponse, responses=responses)  # type: ignore[arg-type]


@_artefact("particles/{index}/preview.png", "image/png")
def preview(request: Request, generation: OwnGeneration, service: Shared, index: Index) -> Response:
    """A particle's latest picture."""
    return send_file(request, service.artefacts.file(generation.record, particle_file(index, PREVIEW)), None)


@_artefact("particles/{index}/turntable.mp4", "video/mp4")
def turntable(request: Request, generation: OwnGeneration, service: Shared, index: Index) -> Response:
    """A particle's film."""
    return send_file(request, service.artefacts.file(generation.record, particle_file(index, TURNTABLE)), None)


@_artefact("particles/{index}/mesh.glb", "model/gltf-binary")
def mesh(request: Request, generation: OwnGeneration, service: Shared, index: Index) -> Response:
    """A particle's textured model."""
    path = service.artefacts.file(generation.record, particle_file(index, MESH))
    return send_file(request, path, f"raydream-{generation.record.id[:8]}-{index}.glb")


@_artefact("archive.zip", "application/zip")
def archive(request: Request, generation: OwnGeneration, service: Shared) -> Response:
    """The whole run, without its checkpoints, once it has ended."""
    path = service.artefacts.archive(generation.record)
    return send_file(request, path, f"raydream-{generation.record.id[:8]}.zip")


@_artefact("report.html", "text/html")
def report(request: Request, generation: OwnGeneration, service: Shared) -> Response:
    """The run's report, one self-contained page."""
    return send_file(request, service.artefacts.file(generation.record, REPORT), None, REPORT_POLICY)


@router.get("/priors", responses=_REFUSED)
@router.get("/presets", responses=_REFUSED)
def priors(_owner: Owner, service: Shared) -> Priors:
    """What this service offers."""
    return plan.offered(service.settings)


@plain.get("/healthz", response_model=Health)
def healthy() -> Health:
    """This process answers."""
    return Health(status="ok")


@plain.get("/readyz", response_model=Health, responses={503: {"model": Health}})
def ready(service: Shared) -> Response:
    """What is accepted will be run; ``detail`` says where it has to wait, as for room on the disk."""
    try:
        service.records.counts()
        trouble = service.trouble()
    except RecordsAway:
        trouble = "the database does not answer"
    health = Health(status="unavailable" if trouble else "ok", detail=trouble or service.live.paused)
    return Response(health.model_dump_json(), 503 if trouble else 200, media_type="application/json")


@plain.get("/metrics", responses=_REFUSED | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
def metrics(_owner: Owner, service: Shared) -> Response:
    """Figures for Prometheus."""
    return Response(service.meter.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@plain.get("/", include_in_schema=False)
def page() -> Response:
    """The web page."""
    if not (_STATIC / "index.html").is_file():
        raise HTTPException(404, "the page is not built; serve/page says how")
    return FileResponse(_STATIC / "index.html", headers={"Content-Security-Policy": PAGE_POLICY})


def build_api(
    settings: Settings, look_after: LookAfter | None = None, pulse: Pulse | None = None, is_closed: bool = False
) -> FastAPI:
    """The application. ``look_after`` starts the supervisor where it is missing and says how it is; it is called every
    two seconds. Without it nothing runs what is accepted. ``pulse`` says whether Ray is still there; ``is_closed`` that
    keys are needed even where their file is gone.
    """
    Path(settings.data).mkdir(parents=True, exist_ok=True)
    records, keys = Records(settings.database_url), Keys(settings.keys_file, is_closed)
    service = Service(settings, records, Live(records), Artefacts(settings), Meter(records))

    @contextlib.asynccontextmanager
    async def lifespan(_api: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(_look_after(service, look_after))] if look_after else []
        tasks += [asyncio.create_task(_watch_pulse(service, pulse))] if pulse else []
        await asyncio.to_thread(plan.offered, settings)  # imports what the first request would wait for
        yield
        for task in tasks:
            task.cancel()
        records.close()

    api = FastAPI(title="raydream", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    api.exception_handlers |= HANDLERS
    api.state.service, api.state.keys = service, keys
    api.include_router(router)
    api.include_router(plain)
    api.mount("/static", StaticFiles(directory=_STATIC, check_dir=False), name="static")
    api.add_middleware(Guard, keys=keys)
    api.add_middleware(Metered, meter=service.meter)
    return api


async def _look_after(service: Service, look_after: LookAfter) -> None:
    while True:
        try:
            health = await asyncio.to_thread(look_after)
            service.ticked_at = time.monotonic() - health.silent_s
            service.refused, service.live.paused = health.refused, health.paused
        except Exception as error:  # the cluster may be away for a moment; /readyz tells if it stays so
            _log.warning("cannot look after the supervisor: %r", error)
        await asyncio.sleep(_LOOK_AFTER_EVERY_S)


async def _watch_pulse(service: Service, pulse: Pulse) -> None:
    """In a task of its own: who looks after a supervisor of a Ray that is gone waits for a minute."""
    while True:
        gone = await asyncio.to_thread(pulse)
        if gone and not service.gone:
            _log.error("not ready: %s", gone)
        service.gone = gone
        await asyncio.sleep(_PULSE_EVERY_S)


def _quota(settings: Settings) -> Quota:
    return Quota(settings.max_queued, settings.unfinished_per_key, settings.daily_per_key)


def _response(generation: Representation, status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(generation.body, status, headers, "application/json")


def _read_cursor(cursor: str) -> tuple[float, str]:
    try:
        created_at, _, last_id = base64.urlsafe_b64decode(cursor.encode("ascii")).decode("ascii").partition(" ")
        if not _ID.fullmatch(last_id):
            raise ValueError("no id of ours")
        return float(created_at), last_id
    except (binascii.Error, ValueError) as error:
        raise ValueError("cursor: must be a next_cursor that this service gave") from error
