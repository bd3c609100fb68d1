"""`latentsmith serve`."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from latentsmith.files.errors import BadInput
from latentsmith.precision import Dtype

from .convert import Weights
from .generate import option

LOCAL = ("127.0.0.1", "localhost", "::1")
GIB = 2**30


def serve(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="As --from of generate; the first is the default.")
    ],
    port: Annotated[int, option("Of the server. [7860]", "--port", min=0, max=65535)] = 7860,
    host: Annotated[str, option("Address to listen at. [127.0.0.1: this machine alone]")] = "127.0.0.1",
    api_key: Annotated[str | None, option("What clients must send; also LATENTSMITH_API_KEY.", "--api-key")] = None,
    no_api_key: Annotated[bool, option("Listen beyond this machine without a key.", "--no-api-key")] = False,
    allow_host: Annotated[list[str] | None, option("A name that clients call the server by; * for any.")] = None,
    at_once: Annotated[int, option("Images sampled together. [8]", min=1, max=256)] = 8,
    queue: Annotated[int, option("Images that may wait; more are refused. [64]", min=1)] = 64,
    max_pixels: Annotated[int, option("Of one image. [4194304]", min=64)] = 2048 * 2048,
    max_steps: Annotated[int, option("Of one image. [150]", min=1)] = 150,
    max_images: Annotated[int, option("Of one request. [16]", min=1)] = 16,
    max_seconds: Annotated[float, option("For one image. [3600]", min=1)] = 3600.0,
    memory: Annotated[float | None, option("GiB of models to keep loaded. [all]", min=0)] = None,
    device: Annotated[str, option("auto, cuda, mps or cpu. [auto]")] = "auto",
    dtype: Annotated[Dtype | None, option("Of the weights. [fp32]")] = None,
    weights: Annotated[Weights | None, option("The average or the trained weights. [ema]")] = None,
    access_log: Annotated[bool, option("Log each request, without its prompt, as JSON.", "--access-log")] = False,
) -> int:
    """Serve models over HTTP: a page at the address printed, and the APIs of OpenAI, web UIs and the hub.

    \b
    Examples:
      latentsmith serve runs/sd1
      latentsmith serve runs/sd1 v1-5.safetensors --port 8000 --memory 6
      LATENTSMITH_API_KEY=... latentsmith serve runs/sd1 --host 0.0.0.0 --allow-host images.example.org
    """
    key = api_key or os.environ.get("LATENTSMITH_API_KEY") or None
    if host not in LOCAL and key is None and not no_api_key:
        raise BadInput(
            f"--host {host} lets other machines in: give --api-key (or LATENTSMITH_API_KEY), or --no-api-key"
        )
    try:
        from latentsmith.server.app import Server, build_app
        from latentsmith.server.limits import Limits
        from latentsmith.server.listen import listen
    except ImportError as error:
        raise BadInput(f"serve needs {error.name}: pip install latentsmith[serve]") from None
    limits = Limits(
        pixels=max_pixels, steps=max_steps, count=max_images, seconds_per_image=max_seconds, queued_images=queue
    )
    limit = None if memory is None else int(memory * GIB)
    more: dict[str, Any] = {"dtype": dtype.value if dtype else "fp32", "weights": weights.value if weights else "ema"}
    server = Server(models, limits=limits, at_once=at_once, device=device, memory_limit=limit, **more)
    try:
        server.load()
        listen(build_app(server, api_key=key, hosts=hosts_of(host, allow_host)), host, port, access_log=access_log)
    finally:
        server.close()
    return 0


def hosts_of(host: str, allowed: list[str] | None) -> list[str] | None:
    """Return the names that Host headers may have; None: any."""
    named = [*(allowed or [])]
    if "*" in named:
        return None
    return [*LOCAL, "[::1]", *([] if host in ("0.0.0.0", "::") else [host]), *named]
