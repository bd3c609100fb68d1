"""Checks of every request before any of it is read: host, origin, key and size."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

access_log = logging.getLogger("latentsmith.access")

BODY_SECONDS = 60.0  # in which a body must have come
OPEN_PATHS = ("/health", "/ready")  # need no key: load balancers have none
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {  # the page loads nothing from elsewhere, and no other page may show it in a frame
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Refused(Exception):
    """A request that is answered with an error before it reaches a route."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


def error_body(status: int, message: str) -> dict[str, Any]:
    """Return the one form of errors: `error` as OpenAI's clients read it, `detail` as FastAPI's and web UIs' do."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}, "detail": message}


class Guard:
    """ASGI middleware. hosts: names that the server is called by; None: any. api_key: None asks for none.

    A page of another site cannot use the server: its Host is unknown (DNS rebinding) or its Origin differs.
    """

    def __init__(self, app: Any, hosts: Iterable[str] | None, api_key: str | None, body_bytes: int):
        self.app, self.api_key, self.body_bytes = app, api_key, body_bytes
        self.hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), [0]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, self._limited(receive), answer)
        except Refused as error:
            if not status[0]:
                await refuse(answer, error.status, error.message)
        except TimeoutError:
            if not status[0]:
                await refuse(answer, 408, f"the body did not come within {BODY_SECONDS:g} s")
        finally:
            record = {"method": scope["method"], "path": scope["path"][:200], "status": status[0]}
            access_log.info(json.dumps(record | {"seconds": round(time.monotonic() - started, 3)}))

    def _check(self, scope: Scope) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self.hosts is not None and host_name(host) not in self.hosts:
            raise Refused(421, "the Host header names another server; start with --allow-host NAME to be called so")
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc.lower() != host.lower():
            raise Refused(403, "requests of pages of other sites are not answered")
        if headers.get("content-length", "0").isdecimal() is False:
            raise Refused(400, "Content-Length is no number")
        if int(headers.get("content-length", "0")) > self.body_bytes:
            raise Refused(413, f"the body is larger than {self.body_bytes:,} bytes")
        if self.api_key is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            given = given if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            if not secrets.compare_digest(given.encode(), self.api_key.encode()):
                raise Refused(401, "the API key is missing or wrong: send Authorization: Bearer KEY")

    def _limited(self, receive: Receive) -> Receive:
        """Return `receive` for a body of at most body_bytes, in BODY_SECONDS."""
        read, done, deadline = 0, False, time.monotonic() + BODY_SECONDS

        async def limited() -> Message:
            nonlocal read, done
            if done:  # what follows is the client's leaving, for which no time is set
                return await receive()
            message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            read += len(message.get("body", b""))
            done = not message.get("more_body", False)
            if read > self.body_bytes:
                raise Refused(413, f"the body is larger than {self.body_bytes:,} bytes")
            return message

        return limited


def host_name(host: str) -> str:
    """Return a Host header without its port, in lower case."""
    name = host.lower().strip()
    return name[: name.rindex("]") + 1] if name.startswith("[") and "]" in name else name.partition(":")[0]


async def refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
