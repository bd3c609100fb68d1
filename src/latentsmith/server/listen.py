"""Listen for HTTP with uvicorn, until the process is asked to stop."""

import logging
import socket
import sys
from typing import Any

import uvicorn

from latentsmith.files.errors import BadInput

SHUTDOWN_SECONDS = 30  # that requests under way have to end
CONNECTIONS = 512


def listen(app: Any, host: str, port: int, *, access_log: bool) -> None:
    """Serve an app; print its address once it can be called. Raises BadInput for an address that is taken."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    if access_log:
        logging.getLogger("latentsmith.access").setLevel(logging.INFO)
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", access_log=False, server_header=False, ws="none",
        limit_concurrency=CONNECTIONS, timeout_keep_alive=5, timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        h11_max_incomplete_event_size=64 * 1024, http="h11",
    )  # fmt: skip
    with bound(host, port) as listener:
        address = f"[{host}]" if ":" in host else host
        print(f"http://{address}:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(config).run(sockets=[listener])


def bound(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=256
        )
    except OSError as error:
        raise BadInput(f"--host {host} --port {port}: {error.strerror or error}") from None
