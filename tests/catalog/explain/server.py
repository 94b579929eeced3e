"""A small local server that speaks the chat-completions protocol, as well or as badly as a test wants it to."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Reply:
    """What comes back: a status, a body (bytes as they are, else JSON), headers."""

    def __init__(self, body: Any, status: int = 200, **headers: str) -> None:
        self.data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status, self.headers = status, headers


def completion(
    text: str | None, tokens: list[tuple[str, dict[str, float]]] | None = None, *, spell: bool = True
) -> dict:
    """A chat completion; tokens: each with the chances of what could have stood there."""
    logprobs = None
    if tokens is not None:
        logprobs = {
            "content": [
                {
                    "token": token,
                    **({"bytes": list(token.encode())} if spell else {}),
                    "logprob": -0.1,
                    "top_logprobs": [
                        {"token": t, "logprob": math.log(p) if p else -9999.0} for t, p in chances.items()
                    ],
                }
                for token, chances in tokens
            ]
        }
    message = {"role": "assistant", "content": text}
    return {
        "id": "c",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": logprobs}],
    }


class Served:
    """The server's address, and what it was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Reply | dict]) -> Iterator[Served]:
    """answer: (request body, number of the request) → what comes back."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                number = len(served.requests)
                served.requests.append(body)
                served.headers.append(dict(self.headers) | {"path": self.path})
            reply = answer(body, number)
            reply = reply if isinstance(reply, Reply) else Reply(reply)
            try:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name.replace("_", "-"), value)
                if "Content_Length" not in reply.headers:
                    self.send_header("Content-Length", str(len(reply.data)))
                self.end_headers()
                self.wfile.write(reply.data)
            except OSError:
                pass  # the client has gone

        def do_GET(self) -> None:  # what a redirected request turns into
            with served.lock:
                served.requests.append({})
            self.send_error(405)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = Served(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
