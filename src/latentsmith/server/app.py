"""The server: routes of every dialect, the page, health, metrics, and errors as one JSON form."""

import logging
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from latentsmith.files.errors import BadInput

from . import huggingface_api, jobs_api, openai_api, webui_api
from .guard import LOCAL_HOSTS, Guard, Refused, error_body
from .jobs import JobRunner, QueueFull
from .limits import Limits
from .models import Busy, ModelShelf, UnknownModel
from .service import Service
from .worker import DeviceWorker

log = logging.getLogger("latentsmith.server")

PAGE = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


class Metrics:
    """Counters for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.rows = Histogram(
            "latentsmith_batch_rows",
            "Rows of a batch of the U-Net.",
            registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32),
        )
        self.requests = Counter("latentsmith_requests", "Answers by status.", ["status"], registry=self.registry)
        self.queued = Gauge("latentsmith_queued_images", "Images that wait.", registry=self.registry)
        self.running = Gauge("latentsmith_running_jobs", "Jobs whose images are being made.", registry=self.registry)


class Server:
    """A device's worker, its models and its queue. close: see JobRunner.close."""

    def __init__(
        self,
        models: Sequence[str],
        *,
        limits: Limits | None = None,
        at_once: int = 8,
        device: str = "auto",
        dtype: str = "fp32",
        weights: str = "ema",
        memory_limit: int | None = None,
    ):
        self.limits, self.metrics = limits or Limits(), Metrics()
        self.worker = DeviceWorker(2 * at_once, self.metrics.rows.observe)
        self.shelf = ModelShelf(
            models, self.worker, device=device, dtype=dtype, weights=weights, limit_bytes=memory_limit
        )
        self.runner = JobRunner(self.shelf, self.worker, self.limits, at_once)
        self.metrics.queued.set_function(lambda: len(self.runner.queue))
        self.metrics.running.set_function(lambda: len(self.runner.running))

    def load(self) -> None:
        """Load the default model. Raises BadInput."""
        self.shelf.give_back(self.shelf.take())

    def close(self, *, finish: bool = False) -> None:
        self.runner.close(finish=finish)
        self.worker.close()
        self.shelf.close()


def build_app(server: Server, *, api_key: str | None = None, hosts: Iterable[str] | None = LOCAL_HOSTS) -> Any:
    """Return the ASGI app of a server. hosts: names it may be called by; None: any. api_key: None asks for none."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: log.warning("%s", message)
            yield
        await run_in_threadpool(server.close)

    app = FastAPI(title="latentsmith", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    service = Service(server.shelf, server.runner)
    for dialect in (openai_api, jobs_api, webui_api, huggingface_api):
        app.include_router(dialect.routes(service))
    add_page(app)
    add_health(app, server)
    add_errors(app, server)
    return Guard(app, hosts, api_key, server.limits.body_bytes)


def add_page(app: FastAPI) -> None:
    """Serve the page's files, read once: no path of a request reaches the file system."""
    folder = resources.files("latentsmith.server") / "page"
    for route, name in PAGE.items():
        app.add_api_route(route, sender((folder / name).read_bytes(), MEDIA_TYPES[Path(name).suffix]), methods=["GET"])


def sender(content: bytes, media_type: str) -> Callable[[], Response]:
    return lambda: Response(content, media_type=media_type, headers={"cache-control": "no-cache"})


def add_health(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    def ready() -> JSONResponse:
        loaded = [*server.shelf.loaded]
        return JSONResponse({"loaded": loaded}, 200 if loaded else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return PlainTextResponse(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def add_errors(app: FastAPI, server: Server) -> None:
    """Answer every error in one form, with the status of its class. What our own faults say is for the log alone."""

    def answer(request: Request, status: int, message: str, **headers: str) -> JSONResponse:
        server.metrics.requests.labels(str(status)).inc()
        return JSONResponse(error_body(status, message), status, headers)

    def bad_value(request: Request, error: Exception) -> JSONResponse:
        return answer(request, 400 if request.url.path.startswith("/v1/") else 422, str(error))

    @app.exception_handler(QueueFull)
    def full(request: Request, error: QueueFull) -> JSONResponse:
        return answer(request, 503, str(error), **{"retry-after": str(error.seconds)})

    @app.exception_handler(StarletteHTTPException)
    def http(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return answer(request, error.status_code, str(error.detail), **(error.headers or {}))

    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> JSONResponse:
        return answer(request, error.status, error.message)

    @app.exception_handler(Exception)
    def fault(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return answer(request, 500, "the server failed; its log says why")

    for kind in (BadInput, TypeError, RequestValidationError):
        app.add_exception_handler(kind, bad_value)
    app.add_exception_handler(UnknownModel, lambda request, error: answer(request, 404, str(error)))
    app.add_exception_handler(Busy, lambda request, error: answer(request, 409, str(error)))
