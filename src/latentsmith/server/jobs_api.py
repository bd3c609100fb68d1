"""Jobs of this server's own: submit, look, follow by server-sent events, cancel, fetch the images."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from PIL import Image
from starlette.concurrency import run_in_threadpool

from .jobs import Job
from .openai_api import ALIASES, json_object
from .service import Service, client_of, decoded_image, image_bytes, option_table

HEARTBEAT_SECONDS = 15.0  # a proxy that hears nothing closes the connection


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")

    def found(id: str) -> Job:
        if (job := service.runner.get(id)) is None:
            raise HTTPException(404, "no such job: it never was, or its images are no longer kept")
        return job

    @router.get("/options")
    def options() -> list[dict[str, Any]]:
        return option_table()

    @router.post("/jobs", status_code=202)
    async def submit(request: Request) -> dict[str, Any]:
        given = {ALIASES.get(name, name): value for name, value in (await json_object(request)).items()}
        previews = bool(given.pop("previews", False))
        for name in ("image", "mask_image"):
            if given.get(name) is not None:
                given[name] = await run_in_threadpool(decoded_image, given[name], name)
        model, prompt, negative = (given.pop(name, None) for name in ("model", "prompt", "negative_prompt"))
        job = service.job(model, prompt, negative, given, client=client_of(request), wants_previews=previews)
        await run_in_threadpool(service.runner.submit, job)
        return described(service, job)

    @router.get("/jobs/{id}")
    def look(id: str) -> dict[str, Any]:
        return described(service, found(id))

    @router.delete("/jobs/{id}")
    def cancel(id: str) -> dict[str, Any]:
        job = found(id)
        job.cancel()
        return described(service, job)

    @router.get("/jobs/{id}/images/{index}")
    def image(id: str, index: int) -> Response:
        job = found(id)
        made = job.images[index] if 0 <= index < len(job.images) else None
        if made is None:
            raise HTTPException(404, "no such image yet")
        return Response(image_bytes(made, job.metadata[index]), media_type="image/png")

    @router.get("/jobs/{id}/events")
    async def events(id: str) -> StreamingResponse:
        job = found(id)
        return StreamingResponse(
            followed(service, job), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )

    return router


def described(service: Service, job: Job) -> dict[str, Any]:
    """Return what a client may know of a job."""
    left = job.seconds_left
    return {
        "id": job.id,
        "status": job.status,
        "model": job.model,
        "position": service.runner.position(job),
        "step": job.steps_done,
        "steps": job.steps,
        "seconds_left": None if left is None else round(left, 1),
        "seeds": [request.seed for request in job.requests],
        "images": [f"/v1/jobs/{job.id}/images/{index}" for index, made in enumerate(job.images) if made is not None],
        "error": str(job.error) if job.error else None,
    }


async def followed(service: Service, job: Job) -> AsyncIterator[str]:
    """Yield an event at each step, with a preview where there is a new one, and at the end."""
    changed, loop, shown = asyncio.Event(), asyncio.get_running_loop(), None
    listener = partial(loop.call_soon_threadsafe, changed.set)
    job.on_change.append(listener)
    try:
        while True:
            changed.clear()
            state = described(service, job)
            if job.preview is not None and job.preview is not shown:
                shown = job.preview
                state["preview"] = data_url(shown)
            yield f"event: {'end' if job.is_over else 'step'}\ndata: {json.dumps(state)}\n\n"
            if state["status"] in ("done", "failed", "cancelled"):
                return
            try:
                await asyncio.wait_for(changed.wait(), HEARTBEAT_SECONDS)
            except TimeoutError:
                yield ": waiting\n\n"
    finally:
        job.on_change.remove(listener)


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
