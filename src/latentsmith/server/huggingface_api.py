"""Hugging Face's dialect: POST / with {"inputs": prompt, "parameters": {...}} is answered with an image file."""

from typing import Any

from fastapi import APIRouter, Request, Response

from latentsmith.files.errors import BadInput

from .openai_api import ALIASES, json_object
from .service import Service, client_of, image_bytes


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/")
    @router.post("/models/{model}")
    async def text_to_image(request: Request, model: str | None = None) -> Response:
        given = await json_object(request)
        parameters: Any = given.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise BadInput("parameters is no JSON object")
        if other := [name for name in given if name not in ("inputs", "parameters", "options")]:
            raise BadInput(f"{other[0][:40]!r} is not read here; give inputs and parameters")
        options: dict[str, Any] = {str(ALIASES.get(key, key)): value for key, value in parameters.items()}
        negative = options.pop("negative_prompt", None)
        job = service.job(model, given.get("inputs"), negative, options, client=client_of(request))
        job = await service.finish(job, request)
        image, metadata = job.images[0], job.metadata[0]
        assert image is not None
        return Response(image_bytes(image, metadata), media_type="image/png", headers={"x-seed": str(metadata["seed"])})

    return router
