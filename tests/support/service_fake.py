"""A small service that keeps to the page's contract with canned answers: for the browser test, and to work on the page.

``python tests/support/service_fake.py [--port 8000] [--run RUN_FOLDER] [--key KEY] [--duration_s 20]`` serves it
by hand; with a run folder, its pictures, films and meshes are shown instead of the balls that are made here.
"""

import argparse
import asyncio
import io
import json
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import imageio.v2 as imageio
import numpy as np
import trimesh
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image

STATIC = Path(__file__).parents[2] / "serve" / "static"
WORDS = ["chair", "table", "car", "tree", "red", "blue", "green", "wooden", "round", "tall"]
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self' blob:; "
    "style-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)
NUM_STEPS, PREVIEW_EVERY, SIZE_PX, QUEUE_S, MAX_N = 40, 10, 96, 0.3, 16
FILES = {"preview.png": "image/png", "turntable.mp4": "video/mp4", "mesh.glb": "model/gltf-binary"}

# --- pictures, films and meshes -------------------------------------------------------------------------------------


def ball(index: int, angle_rad: float, sharpness: float) -> np.ndarray:
    """uint8 [h, w, 3]: a lit ball in the particle's colour, foggy while ``sharpness`` in [0, 1] is low."""
    y, x = np.mgrid[1 : -1 : SIZE_PX * 1j, -1 : 1 : SIZE_PX * 1j]
    inside = x**2 + y**2 < 0.6
    height = np.sqrt(np.clip(0.6 - x**2 - y**2, 0, None))
    light = np.clip(0.3 + np.cos(angle_rad) * x + 0.6 * y + np.sin(angle_rad) * height, 0.15, 1)
    colour = 0.35 + 0.6 * np.abs(np.sin(np.array([1.0, 2.0, 3.0]) * (index + 1)))
    shaded = np.where(inside[..., None], light[..., None] * colour, 1.0)
    return (255 * (sharpness * shaded + (1 - sharpness) * 0.85)).astype(np.uint8)


def make_run(folder: Path, num_particles: int) -> None:
    """The files of a finished run, as far as the page looks at them."""
    for index in range(num_particles):
        place = folder / "particles" / f"{index:03d}"
        place.mkdir(parents=True)
        Image.fromarray(ball(index, 0.5, 1.0)).save(place / "preview.png")
        frames: list[Any] = [ball(index, angle, 1.0) for angle in np.linspace(0, 2 * np.pi, 12, endpoint=False)]
        imageio.mimwrite(place / "turntable.mp4", frames, fps=12, macro_block_size=8)
        mesh = trimesh.creation.icosphere(subdivisions=2 + index % 2)
        mesh.visual.vertex_colors = np.tile(np.append(ball(index, 0.5, 1.0)[48, 48], 255), (len(mesh.vertices), 1))
        mesh.export(place / "mesh.glb")
    (folder / "report.html").write_text("<!doctype html><title>report</title><h1>Report</h1>", encoding="utf-8")


# --- the service ----------------------------------------------------------------------------------------------------


@dataclass
class Order:
    """What was asked for, and when; everything else follows from the clock."""

    id: str
    body: dict[str, Any]
    created_s: float
    cancelled_s: float | None = None


@dataclass
class FakeService:
    """``duration_s`` is how long a generation takes; ``key`` is asked for where it is not empty.

    While ``hold_step`` is set, nothing goes beyond that step: a test can look at what runs for as long as it likes.
    """

    run: Path
    num_files: int
    duration_s: float = 3.0
    key: str = ""
    hold_step: int | None = None
    paused: str = ""
    orders: dict[str, Order] = field(default_factory=dict)
    num_orders: int = 0
    by_idempotency_key: dict[str, str] = field(default_factory=dict)

    def create(self, body: dict[str, Any], idempotency_key: str) -> Order:
        order_id = self.by_idempotency_key.get(idempotency_key) or f"g{self.num_orders:04d}"
        if order_id not in self.orders:
            self.orders[order_id] = Order(order_id, body, time.time())
            self.num_orders += 1
        if idempotency_key:
            self.by_idempotency_key[idempotency_key] = order_id
        return self.orders[order_id]

    def step_of(self, order: Order) -> int:
        end_s = time.time() if order.cancelled_s is None else order.cancelled_s
        if self.paused and order.cancelled_s is None:
            return 0
        step = int(np.clip((end_s - order.created_s - QUEUE_S) / self.duration_s, 0, 1) * NUM_STEPS)
        return step if self.hold_step is None else min(step, self.hold_step)

    def state_of(self, order: Order) -> str:
        if order.cancelled_s is not None:
            return "cancelled"
        if self.step_of(order) == NUM_STEPS:
            return "finished"
        return "queued" if self.paused or time.time() < order.created_s + QUEUE_S else "running"

    def generation(self, order: Order) -> dict[str, Any]:
        step, state = self.step_of(order), self.state_of(order)
        at = f"/v1/generations/{order.id}"
        preview_step = step // PREVIEW_EVERY * PREVIEW_EVERY or None
        done, started = state == "finished", state != "queued"
        end_s = order.created_s + QUEUE_S + self.duration_s if order.cancelled_s is None else order.cancelled_s
        eta_s = (1 - step / NUM_STEPS) * self.duration_s if state == "running" and step else None
        losses = loss_row(step)
        return {
            "id": order.id,
            **order.body,
            "steps": order.body.get("steps"),
            "state": state,
            "queue_position": None if started else 1,
            "created_at": rfc3339(order.created_s),
            "started_at": rfc3339(order.created_s + QUEUE_S) if started else None,
            "ended_at": rfc3339(end_s) if state in ("finished", "cancelled") else None,
            "progress": {
                "step": step,
                "num_steps": NUM_STEPS,
                "eta_s": eta_s,
                "phase": "distil" if state == "running" else self.paused or "waiting" if state == "queued" else state,
                "losses": {name: value for name, value in losses.items() if name != "step"} if step else {},
            },
            "error": None,
            "preview_step": preview_step,
            "particles": [
                {
                    "index": index,
                    "preview": f"{at}/particles/{index}/preview.png" if preview_step else None,
                    "turntable": f"{at}/particles/{index}/turntable.mp4" if done else None,
                    "mesh": f"{at}/particles/{index}/mesh.glb" if done else None,
                }
                for index in range(order.body["n"])
            ],
            "links": {"self": at}
            | {name: f"{at}/{name}" for name in ("events", "metrics")}
            | {"archive": f"{at}/archive.zip" if done else None, "report": f"{at}/report.html" if done else None},
        }


def loss_row(step: int) -> dict[str, float]:
    noise = np.sin(12.9 * step) * 0.1
    return {"step": step, "loss/rgb": 3 * np.exp(-step / 15) + noise + 1, "loss/fit": 0.2 + 0.8 / (1 + step / 5)}


def rfc3339(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat().replace("+00:00", "Z")


def problem(status: int, title: str, detail: str, where: str | None = None) -> JSONResponse:
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return JSONResponse(body | ({"field": where} if where else {}), status, media_type="application/problem+json")


def fault_of(body: dict[str, Any]) -> JSONResponse | None:
    if not str(body.get("prompt", "")).strip():
        return problem(422, "Unprocessable", "prompt: must not be empty", "prompt")
    if not 1 <= body.get("n", 0) <= MAX_N:
        return problem(422, "Unprocessable", f"n: must be at most {MAX_N} here, got {body.get('n')}", "n")
    if body["preset"] == "sd21":
        return problem(422, "Unprocessable", "preset: sd21 needs a GPU", "preset")
    return None


def make_app(service: FakeService) -> FastAPI:
    """The contract, answered by ``service``."""
    app = FastAPI(title="raydream, canned")
    app.mount("/static", StaticFiles(directory=STATIC))

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        closed = service.key and request.url.path.startswith("/v1/")
        if closed and request.headers.get("authorization") != f"Bearer {service.key}":
            return problem(401, "Unauthorized", "this service asks for an API key")
        if request.url.path.startswith("/v1/generations/") and request.url.path.split("/")[3] not in service.orders:
            return problem(404, "Not found", "there is no such generation")
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.get("/")
    def index() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/v1/priors")
    def priors() -> dict[str, Any]:
        small = {"name": "exhibit", "description": "A small set of known objects; runs on a laptop.", "words": WORDS}
        large = {"name": "sd21", "description": "Stable Diffusion 2.1: nearly any object, on GPUs.", "words": None}
        limits = {"n": MAX_N, "steps": 1000, "prompt_characters": 500}
        items = [small | {"default": True, "default_steps": 40}, large | {"default": False, "default_steps": 900}]
        words = {"vsd": "Variational: different and detailed", "sds": "Distillation: fast and smooth"}
        methods = [{"name": name, "description": each} for name, each in words.items()]
        return {"items": items, "methods": methods, "limits": limits}

    add_generations(app, service)
    add_files(app, service)
    return app


def add_generations(app: FastAPI, service: FakeService) -> None:
    @app.post("/v1/generations")
    async def create(request: Request) -> Response:
        body = json.loads(await request.body())
        if fault := fault_of(body):
            return fault
        generation = service.generation(service.create(body, request.headers.get("idempotency-key", "")))
        return JSONResponse(generation, 202, {"Location": generation["links"]["self"]})

    @app.get("/v1/generations")
    def listed(limit: int = 20, cursor: str = "") -> dict[str, Any]:
        newest = list(reversed(service.orders.values()))
        start = next((i for i, order in enumerate(newest) if order.id == cursor), 0)
        rest = newest[start + limit :]
        items = [service.generation(order) for order in newest[start : start + limit]]
        return {"items": items, "next_cursor": rest[0].id if rest else None}

    @app.get("/v1/generations/{order_id}")
    def one(order_id: str) -> dict[str, Any]:
        return service.generation(service.orders[order_id])

    @app.delete("/v1/generations/{order_id}")
    def delete(order_id: str) -> Response:
        if service.state_of(service.orders[order_id]) in ("queued", "running"):
            return cancel(order_id)
        del service.orders[order_id]
        return Response(status_code=204)

    @app.post("/v1/generations/{order_id}/retry")
    def retry(order_id: str) -> Response:
        order = service.orders[order_id]
        if service.state_of(order) != "cancelled":
            return problem(409, "Conflict", "what failed or was cancelled can be tried again")
        order.created_s, order.cancelled_s = time.time(), None
        return JSONResponse(service.generation(order), 202)

    @app.post("/v1/generations/{order_id}/cancel")
    def cancel(order_id: str) -> JSONResponse:
        order = service.orders[order_id]
        if service.state_of(order) in ("queued", "running"):
            order.cancelled_s = time.time()
        return JSONResponse(service.generation(order), 202)

    @app.get("/v1/generations/{order_id}/events")
    async def events(order_id: str) -> StreamingResponse:
        async def changes() -> AsyncIterator[str]:
            last, number = "", 0
            while True:
                generation = service.generation(service.orders[order_id])
                if (now := json.dumps(generation)) != last:
                    last, number = now, number + 1
                    yield f"event: generation\nid: {number}\ndata: {now}\n\n: heartbeat\n\n"
                if generation["state"] not in ("queued", "running"):
                    return
                await asyncio.sleep(0.05)

        return StreamingResponse(changes(), media_type="text/event-stream")

    @app.get("/v1/generations/{order_id}/metrics")
    def metrics(order_id: str, after: int = -1) -> dict[str, Any]:
        step = service.generation(service.orders[order_id])["progress"]["step"]
        return {"rows": [loss_row(each) for each in range(max(1, after + 1), step + 1)]}


def add_files(app: FastAPI, service: FakeService) -> None:
    @app.get("/v1/generations/{order_id}/particles/{index}/{name}")
    def particle(order_id: str, index: int, name: str) -> Response:
        order = service.orders[order_id]
        step = service.step_of(order)
        if name == "preview.png" and step < NUM_STEPS:
            buffer = io.BytesIO()
            Image.fromarray(ball(index, 0.5, step / NUM_STEPS)).save(buffer, "PNG")
            return Response(buffer.getvalue(), media_type="image/png")
        place = service.run / "particles" / f"{index % service.num_files:03d}" / Path(name).name
        return FileResponse(place, media_type=FILES[name])

    @app.get("/v1/generations/{order_id}/archive.zip")
    def archive(order_id: str) -> Response:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as packed:
            for index in range(service.orders[order_id].body["n"]):
                name = f"particles/{index:03d}/mesh.glb"
                packed.write(service.run / "particles" / f"{index % service.num_files:03d}" / "mesh.glb", name)
        return Response(buffer.getvalue(), media_type="application/zip")

    @app.get("/v1/generations/{order_id}/report.html")
    def report(order_id: str) -> FileResponse:
        return FileResponse(service.run / "report.html", media_type="text/html")


@contextmanager
def serving(service: FakeService, port: int = 0) -> Iterator[str]:
    """Serves on loopback while the block runs; yields the address, without a slash at its end."""
    server = uvicorn.Server(uvicorn.Config(make_app(service), "127.0.0.1", port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)


def main() -> None:
    """Serves until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--key", default="")
    parser.add_argument("--duration_s", type=float, default=20.0)
    args = parser.parse_args()
    with TemporaryDirectory() as made:
        if args.run is None:
            make_run(Path(made), 4)
        run = args.run or Path(made)
        num_files = len(list((run / "particles").iterdir()))
        with serving(FakeService(run, num_files, args.duration_s, args.key), args.port) as address:
            print(address, flush=True)
            threading.Event().wait()


if __name__ == "__main__":
    main()
