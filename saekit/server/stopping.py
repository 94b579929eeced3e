"""A server that stops at once: uvicorn would wait for the longest text that is being generated."""

from __future__ import annotations

import socket

import uvicorn
from starlette.applications import Starlette

PATIENCE = 5  # seconds that a connection has to end in once the server stops


class Server(uvicorn.Server):
    """Sends away all who wait for the model before it waits for their connections."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app: Starlette = self.config.app  # type: ignore[assignment]
        app.state.turns.stop()
        await super().shutdown(sockets)


def server_of(app: Starlette) -> Server:
    """The server of an `application`."""
    return Server(
        uvicorn.Config(
            app,
            log_level="warning",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=PATIENCE,
        )
    )
