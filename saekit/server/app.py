"""Serving: the address, the socket, and the loop that `saekit serve` sits in."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from saekit.errors import FileMissing, InvalidInput

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.catalog import Catalog

HOST = "127.0.0.1"  # never another: there is no password


def serve(
    catalog: Catalog,
    model: TransformerBridge,
    *,
    port: int = 8321,
    ready: Callable[[str], object] = print,
) -> None:
    """Serve the catalog's page, with steering, at http://127.0.0.1:<port> until interrupted.

    port: 0 takes any free one. ready: called with the address once requests are taken. Ctrl-C ends it within a token,
    whatever is being generated.
    Raises `InvalidInput` for a model that is not the catalog's or a port that is taken, `FileMissing` where the
    extra is not installed.
    """
    try:
        from saekit.server.routes import application
        from saekit.server.stopping import server_of
    except ModuleNotFoundError as error:
        raise FileMissing(f"serve: {error.name} is not installed; pip install 'saekit[server]'") from error
    catalog.check_fits(model)
    with listen(port) as listening, contextlib.suppress(KeyboardInterrupt):  # the way to end it
        port = listening.getsockname()[1]
        ready(f"http://{HOST}:{port}")
        server_of(application(catalog, model, port)).run(sockets=[listening])


def listen(port: int) -> socket.socket:
    """A socket on this machine's own address that queues whoever connects. Raises `InvalidInput` for a port taken."""
    if not 0 <= port < 2**16:
        raise InvalidInput(f"serve: port {port} is not one; expected 0 (any free one) to 65535")
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        why = (
            "is in use"
            if error.errno == errno.EADDRINUSE
            else f"cannot be used ({os.strerror(error.errno or 0)})"
        )
        raise InvalidInput(
            f"serve: port {port} {why}; name another with --port, or 0 for any free one"
        ) from error
