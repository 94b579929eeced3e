"""The routes: the page, its data, and two questions to the model.

    GET  /                  the page, /data/<name>.js made when asked for
    POST /api/steer         {prompt, edits: [{feature, kind, strength, unit}], max_new_tokens, seed, temperature,
                             positions} → {prompt, plain, steered, kl, top_tokens: [[token, p plain, p steered], …]}
    POST /api/activations   {text} → {tokens: [T strings], features: [T lists of [feature, activation]]}

Errors are {"error": "…"}, with status 400, or 403 (from elsewhere), 404 (unknown), 413 (too long), 415 (not JSON).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from saekit.catalog.firing import firing
from saekit.catalog.page import ASSETS
from saekit.catalog.page_data import PageData
from saekit.errors import SaekitError, UnknownName
from saekit.server.guard import MAX_BODY, BodyTooLarge, Guard, body_of
from saekit.server.questions import ActivationsQuestion, Question, SteerQuestion, parsed
from saekit.steering.compare import compare

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.catalog import Catalog


def application(catalog: Catalog, model: TransformerBridge, port: int) -> Starlette:
    """The ASGI application, for requests that come to 127.0.0.1:<port>."""
    lives = _Live(catalog, model)
    data = PageData(catalog, live=True)

    async def script(request: Request) -> Response:
        text = await run_in_threadpool(data.script, request.path_params["name"])
        return Response(text, media_type="text/javascript")

    routes = [
        Route("/data/{name}.js", script),
        Route("/api/steer", _answering(SteerQuestion, lives.steer), methods=["POST"]),
        Route("/api/activations", _answering(ActivationsQuestion, lives.activations), methods=["POST"]),
        Mount("/", StaticFiles(directory=ASSETS, html=True)),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, port=port)],
        exception_handlers={
            SaekitError: _refused,
            BodyTooLarge: lambda request, error: _error(413, f"the body has more than {MAX_BODY:,} bytes"),
            HTTPException: lambda request, error: _error(error.status_code, error.detail),
            Exception: lambda request, error: _error(500, f"{type(error).__name__}: {error}"),
        },
    )


class _Live:
    """The model behind the page. Hooks belong to the model, so one question is answered at a time."""

    def __init__(self, catalog: Catalog, model: TransformerBridge) -> None:
        self.catalog, self.model = catalog, model
        self._lock = threading.Lock()

    def steer(self, question: SteerQuestion) -> dict[str, Any]:
        edits = [edit.edit(self.catalog) for edit in question.edits]
        with self._lock:
            side = compare(
                self.model,
                question.prompt,
                edits,
                max_new_tokens=question.max_new_tokens,
                seed=question.seed,
                temperature=question.temperature,
                positions=question.positions,
            )
        return {
            "prompt": side.prompt,
            "plain": side.plain,
            "steered": side.steered,
            "kl": side.kl,
            "top_tokens": side.top_tokens,
        }

    def activations(self, question: ActivationsQuestion) -> dict[str, Any]:
        with self._lock:
            found = firing(self.model, self.catalog.sae, question.text)
        return {"tokens": found.tokens, "features": found.features}


def _answering(kind: type[Question], answer: Callable[[Question], dict[str, Any]]) -> Callable[..., Any]:
    """An endpoint that parses one kind of question and answers it off the event loop."""

    async def endpoint(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _error(415, "expected Content-Type: application/json")
        question = parsed(kind, await body_of(request))
        return JSONResponse(await run_in_threadpool(answer, question))

    return endpoint


def _refused(request: Request, error: Exception) -> Response:
    return _error(404 if isinstance(error, UnknownName) else 400, str(error))


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status)
