"""Serving: the address, the socket, and the loop that `saekit serve` sits in."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from saekit.errors import FileMissing, InvalidInput

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.catalog import Catalog

HOST = "127.0.0.1"  # never another: there is no password


def serve(catalog: Catalog, model: TransformerBridge, *, port: int = 8321) -> None:
    """Serve the catalog's page, with steering, at http://127.0.0.1:<port> until interrupted.

    Raises `InvalidInput` for a model that is not the catalog's or a port that is taken, `FileMissing` where the
    extra is not installed.
    """
    try:
        import uvicorn

        from saekit.server.routes import application
    except ModuleNotFoundError as error:
        raise FileMissing(f"serve: {error.name} is not installed; pip install 'saekit[server]'") from error
    catalog.check_fits(model)
    with _listen(port) as listening:
        port = listening.getsockname()[1]  # 0 asks for any free one
        config = uvicorn.Config(application(catalog, model, port), log_level="warning", proxy_headers=False)
        print(f"http://{HOST}:{port}   (Ctrl-C stops)", flush=True)
        uvicorn.Server(config).run(sockets=[listening])


def _listen(port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise InvalidInput(f"serve: port {port} is not one; expected 0 (any free one) to 65535")
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise InvalidInput(
            f"serve: port {port} cannot be used ({error}); name another with --port"
        ) from error
