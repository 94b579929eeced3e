"""A small catalog with its model, behind the application alone and behind a real server on a real socket."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import saekit
from saekit.catalog import Catalog

if TYPE_CHECKING:
    from starlette.testclient import TestClient
    from transformer_lens.model_bridge import TransformerBridge

PORT = 8321  # where the application believes to be when there is no socket
PATIENCE = 30  # seconds for anything, on a machine that has other work too


@pytest.fixture(scope="session")
def catalog(model: TransformerBridge, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """A random SAE over a few lines of text."""
    sae = saekit.SAE.new("topk", d_in=256, d_sae=64, k=8, site="blocks.3.hook_resid_pre", model="tiny")
    tokens = saekit.tokenize(
        [f"A small boat number {i} sailed past the harbour." for i in range(12)], model, 32
    )
    return Catalog.build(model, sae, tokens, tmp_path_factory.mktemp("server") / "catalog")


@pytest.fixture
def client(catalog: Catalog, model: TransformerBridge) -> Iterator[TestClient]:
    pytest.importorskip("starlette", reason="the extra saekit[server] is not installed")
    from starlette.testclient import TestClient

    from saekit.server.routes import application

    with TestClient(application(catalog, model, PORT), base_url=f"http://127.0.0.1:{PORT}") as client:
        yield client


@pytest.fixture
def question() -> Callable[..., dict[str, Any]]:
    """A good question, with changes."""

    def made(**changes: Any) -> dict[str, Any]:
        edits = [{"feature": 3, "kind": "add", "strength": 2.0, "unit": "norm"}]
        return {"prompt": "Once upon a time", "edits": edits, "max_new_tokens": 4, "seed": 1, **changes}

    return made


class Served:
    """A server in a thread, and ways to ask it."""

    def __init__(self, listening: socket.socket, app: Any, server: Any) -> None:
        self.port, self.app, self.server = listening.getsockname()[1], app, server
        self.thread = threading.Thread(target=server.run, args=([listening],), name="server")
        self.thread.start()

    def raw(self, data: bytes) -> socket.socket:
        """A connection on which some bytes have been sent."""
        made = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        made.sendall(data)
        return made

    def request(self, path: str, body: Any) -> bytes:
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    def post(self, path: str, body: Any) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def until(self, connection: socket.socket, word: bytes) -> bytes:
        """What comes on a connection, up to a word."""
        found = b""
        while word not in found:
            piece = connection.recv(65536)
            assert piece, found
            found += piece
        return found

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


def _descriptors() -> int:
    place = Path("/proc/self/fd")
    return len(os.listdir(place)) if place.is_dir() else 0  # noqa: PTH208


def eventually(true: Callable[[], bool]) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


@pytest.fixture
def served(catalog: Catalog, model: TransformerBridge, no_leaked_hooks: None) -> Callable[..., Any]:
    """`with served(…) as s`: a server of the catalog, after which threads and file descriptors are what they were."""
    pytest.importorskip("uvicorn", reason="the extra saekit[server] is not installed")
    from saekit.server.app import listen
    from saekit.server.routes import application
    from saekit.server.stopping import server_of

    @contextmanager
    def serving(**options: Any) -> Iterator[Served]:
        _ = (
            catalog.sae,
            [catalog[i].explanation for i in range(3)],
        )  # what is read once, before descriptors are counted
        threads, descriptors = set(threading.enumerate()), _descriptors()
        with listen(0) as listening:
            app = application(catalog, model, listening.getsockname()[1], **options)
            made = Served(listening, app, server_of(app))
            try:
                yield made
            finally:
                made.stop()
        eventually(lambda: set(threading.enumerate()) <= threads)
        eventually(lambda: _descriptors() <= descriptors)

    return serving


@pytest.fixture
def waits() -> Callable[[Callable[[], bool]], None]:
    return eventually
