"""What every dialect does with a request: read its options, queue a job, wait for it, and encode its images."""

import asyncio
import base64
import binascii
import io
import random
from collections.abc import Mapping
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from latentsmith.files.errors import BadInput
from latentsmith.files.images import open_image
from latentsmith.image_request import OPTIONS, unknown_keyword
from latentsmith.inference.png import png_info
from latentsmith.inference.requests import parse_call

from .jobs import Job, JobRunner
from .models import ModelShelf

POLL_SECONDS = 0.2  # how often a waiting request looks whether its client is still there
FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
RANDOM_SEED = -1
KEYWORDS = {**OPTIONS, "image": None, "mask_image": None, "num_images_per_prompt": None}  # that a request may have


class Service:
    """The models, the queue and the counters that all routes share."""

    def __init__(self, shelf: ModelShelf, runner: JobRunner):
        self.shelf, self.runner = shelf, runner

    def job(self, model: str | None, prompt: Any, negative_prompt: Any, options: Mapping[str, Any], **more: Any) -> Job:
        """Return a job that is not queued yet. options: keywords of Pipeline.stream. Raises BadInput."""
        keywords = {name: value for name, value in options.items() if value is not None}
        if other := [name for name in keywords if name not in KEYWORDS]:
            raise BadInput(unknown_keyword(other[0][:60], KEYWORDS))
        self.runner.limits.check_count(keywords.get("num_images_per_prompt", 1))
        seed = keywords.get("seed", RANDOM_SEED)
        if seed == RANDOM_SEED:
            keywords["seed"] = random.SystemRandom().randrange(2**32)
        for name, text in {"prompt": prompt, "negative_prompt": negative_prompt or "", "model": model or ""}.items():
            if not isinstance(text, str) or not is_unicode(text):
                raise BadInput(f"{name} is missing or no text")
        for name in ("image", "mask_image"):
            if name in keywords and not isinstance(keywords[name], Image.Image):
                raise BadInput(f"{name} is not read here; send it to /v1/images/edits or /v1/jobs")
        requests, shared, _ = parse_call(prompt, negative_prompt or None, keywords)
        return Job(model or self.shelf.default, requests, shared, **more)

    async def finish(self, job: Job, request: Request) -> Job:
        """Queue a job and wait for its end; a client that leaves cancels it. Raises what stopped it."""
        await run_in_threadpool(self.runner.submit, job)
        changed, loop = asyncio.Event(), asyncio.get_running_loop()
        job.on_change.append(lambda: loop.call_soon_threadsafe(changed.set))
        try:
            while not job.is_over:
                changed.clear()
                try:
                    await asyncio.wait_for(changed.wait(), POLL_SECONDS)
                except TimeoutError:
                    if await request.is_disconnected():
                        job.cancel()
        except asyncio.CancelledError:
            job.cancel()
            raise
        if job.error:
            raise job.error
        return job


def is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8; JSON can hold half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def client_of(request: Request) -> str:
    """Return whose turn a request counts as: its key, else its address."""
    return request.headers.get("authorization") or (request.client.host if request.client else "")


def image_bytes(image: Image.Image, metadata: Mapping[str, Any], format: str = "png") -> bytes:
    """Return an image file; a PNG records how it was made."""
    file = io.BytesIO()
    more: dict[str, Any] = {"pnginfo": png_info(metadata, image.size)} if format == "png" else {"quality": 95}
    image.save(file, format=format.upper(), **more)
    return file.getvalue()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def decoded_image(text: Any, name: str) -> Image.Image:
    """Return the image in base64, or in a data URL of it. Raises BadInput; nothing is fetched."""
    if not isinstance(text, str):
        raise BadInput(f"{name} is no text; send the image in base64")
    if text.startswith(("http:", "https:", "file:", "ftp:")):
        raise BadInput(f"{name} is an address; this server fetches nothing, send the image in base64")
    content = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return image_of(base64.b64decode(content, validate=True), name)
    except (binascii.Error, ValueError):
        raise BadInput(f"{name} is not base64") from None


def image_of(data: bytes, name: str) -> Image.Image:
    """Return the image in the bytes of a file, decoded. Raises BadInput."""
    try:
        image = open_image(data)
        image.load()
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from None
    except Exception:  # decoders raise OSError, SyntaxError, struct.error and more for a damaged file
        raise BadInput(f"{name}: the image is damaged") from None
    return image


def size_of(text: Any) -> tuple[int | None, int | None]:
    """Return (width, height) of "512x768"; "auto" and None leave them to the model. Raises BadInput."""
    if text in (None, "auto"):
        return None, None
    width, _, height = str(text).partition("x")
    if not (width.isascii() and width.isdecimal() and height.isascii() and height.isdecimal() and len(str(text)) < 20):
        raise BadInput(f"size {str(text)[:40]!r}: give WIDTHxHEIGHT, such as 512x512")
    return int(width), int(height)


def option_table() -> list[dict[str, Any]]:
    """Return the sampling options, for the page."""
    return [
        {
            "name": name,
            "type": each.type.__name__,
            "default": each.default,
            "help": each.help,
            "low": each.low,
            "high": each.high,
            "choices": list(each.choices),
        }
        for name, each in OPTIONS.items()
    ]
