"""What stands between a request and the model: who asks, and how much may be sent.

Any web page that the user visits can send requests to 127.0.0.1. The browser then names that page in Origin, and
a name that was re-bound to 127.0.0.1 in Host; so both have to be ours.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 64 * 2**10  # bytes
SLOWEST = 30.0  # seconds in which a body has to be here

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class BodyTooLarge(Exception):
    """A request sent more than `MAX_BODY` bytes."""


class BodyTooSlow(Exception):
    """A request did not send its body within `SLOWEST` seconds."""


class Guard:
    """Refuses requests from elsewhere (403) and puts the security headers on every answer."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self.app = app
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        self.origins = {f"http://{host}" for host in self.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        refusal = self._refusal(Headers(scope=scope))
        answer = self.app if refusal is None else JSONResponse({"error": refusal}, status_code=403)
        await answer(scope, receive, send_with_headers)

    def _refusal(self, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if host not in self.hosts:
            return f"Host {host[:100]!r} is not this server; open http://{min(self.hosts)}"
        if origin is not None and origin not in self.origins:
            return f"Origin {origin[:100]!r} may not ask this server"
        return None


async def body_of(request: Request) -> bytes:
    """The body, read no further than `MAX_BODY`. Raises `BodyTooLarge`, `BodyTooSlow`, or `ClientDisconnect`."""
    body = bytearray()
    try:
        async with asyncio.timeout(SLOWEST):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise BodyTooLarge
    except TimeoutError as error:
        raise BodyTooSlow from error
    return bytes(body)
