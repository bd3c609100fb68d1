"""OpenAI's dialect: /v1/images/generations, /v1/images/edits, /v1/models."""

import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from starlette.datastructures import UploadFile

from latentsmith.files.errors import BadInput
from latentsmith.image_request import OPTIONS

from .jobs import Job
from .service import FORMATS, Service, client_of, encoded, image_bytes, image_of, size_of

IGNORED = ("user", "quality", "style", "moderation", "background", "output_compression", "input_fidelity", "stream")
NO_EFFECT = {"quality": ("auto", "standard"), "background": ("auto", "opaque"), "moderation": ("auto",)}
ALIASES: dict[Any, str] = {alias: name for name, each in OPTIONS.items() for alias in each.aliases}


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in service.shelf.names]}

    @router.get("/models/{name}")
    def model(name: str) -> dict[str, Any]:
        service.shelf.check(name)
        return described(name)

    @router.post("/images/generations")
    async def generations(request: Request) -> dict[str, Any]:
        given = await json_object(request)
        return await answer(service, request, given, {})

    @router.post("/images/edits")
    async def edits(request: Request) -> dict[str, Any]:
        async with request.form(max_files=4, max_fields=64) as form:
            files = {name: await each.read() for name, each in form.multi_items() if isinstance(each, UploadFile)}
            given = {name: typed(name, each) for name, each in form.multi_items() if isinstance(each, str)}
        sent = files.get("image") or files.get("image[]")
        if sent is None:
            raise BadInput("image is missing: send the image to edit")
        image = image_of(sent, "image")
        mask = transparent_mask(image_of(files["mask"], "mask"), image) if "mask" in files else None
        return await answer(service, request, given, {"image": image, "mask_image": mask})

    return router


def described(model: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "latentsmith"}


async def json_object(request: Request) -> dict[str, Any]:
    """Return a request's JSON object. Raises BadInput."""
    try:
        found = await request.json()
    except (ValueError, RecursionError, UnicodeDecodeError):
        raise BadInput("the body is not JSON") from None
    if not isinstance(found, dict):
        raise BadInput("the body is no JSON object")
    return found


async def answer(
    service: Service, request: Request, given: Mapping[str, Any], images: Mapping[str, Any]
) -> dict[str, Any]:
    """Make the images that OpenAI's fields ask for; other fields are options of this server by their names."""
    fields = dict(given)
    format = fields.pop("output_format", None) or "png"
    if format not in FORMATS:
        raise BadInput(f"output_format {format!r} is not one of {', '.join(FORMATS)}")
    if fields.pop("response_format", None) == "url":
        raise BadInput("response_format url is off: images are answered as b64_json")
    width, height = size_of(fields.pop("size", None))
    count = fields.pop("n", None)
    for name in IGNORED:
        value = fields.pop(name, None)
        if name in NO_EFFECT and value is not None and value not in NO_EFFECT[name]:
            raise BadInput(f"{name} {value!r} is not offered; leave it out")
        if name == "stream" and value:
            raise BadInput("stream is not offered here; POST /v1/jobs has events")
    model, prompt = fields.pop("model", None), fields.pop("prompt", None)
    negative = fields.pop("negative_prompt", None)
    options = {ALIASES.get(name, name): value for name, value in fields.items()}
    options |= {"width": width, "height": height} if width is not None else {}
    options |= {"num_images_per_prompt": 1 if count is None else count, **images}
    job = service.job(model, prompt, negative, options, client=client_of(request))
    return response(await service.finish(job, request), format)


def response(job: Job, format: str) -> dict[str, Any]:
    data = []
    for image, metadata in zip(job.images, job.metadata, strict=True):
        if image is not None:
            data.append({"b64_json": encoded(image_bytes(image, metadata, format)), "seed": metadata["seed"]})
    return {"created": int(time.time()), "data": data, "output_format": format}


def typed(name: str, text: str) -> Any:
    """Return a form's field as the type that the option of this name has. Raises BadInput."""
    name = ALIASES.get(name, name)
    wanted = int if name == "n" else OPTIONS[name].type if name in OPTIONS else str
    try:
        return text.lower() == "true" if wanted is bool else wanted(text)
    except ValueError:
        raise BadInput(f"{name} is {text[:40]!r}; it must be a number") from None


def transparent_mask(mask: Image.Image, image: Image.Image) -> Image.Image:
    """Return a mask that is white where to repaint; OpenAI's is transparent there."""
    if mask.size != image.size:
        raise BadInput(f"the mask is {mask.width}x{mask.height}, the image {image.width}x{image.height}")
    if "A" not in mask.getbands():
        raise BadInput("the mask has no transparency; it must be transparent where the image is to be edited")
    return mask.getchannel("A").point(lambda alpha: 255 - alpha)
