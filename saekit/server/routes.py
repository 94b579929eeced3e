"""The routes: the page, its data, and what can be asked of the model.

    GET  /                  the page; /data/<name>.js is made when asked for
    GET  /api               the description of what follows (`describe`)
    POST /api/stream        plain, steered and control text while they come, as NDJSON
    POST /api/sweep         what an edit does at each of several strengths, as NDJSON
    POST /api/steer         plain and steered text in one JSON object
    POST /api/activations   what fires on each token of a text, in one JSON object

Errors are {"error": "…"}, with status 400 (wrong), 403 (from elsewhere), 404 (unknown), 408 (too slow), 413 (too long),
415 (not JSON), 429 (too many wait), 503 (the server stops).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from saekit.catalog.page import INDEX, assets
from saekit.catalog.page.data import PageData
from saekit.errors import SaekitError
from saekit.server.answers import Lines, Whole, error_answer, refused
from saekit.server.describe import description
from saekit.server.guard import BodyTooLarge, BodyTooSlow, Guard
from saekit.server.live import Live
from saekit.server.questions import LIMITS, ActivationsQuestion, SteerQuestion, StreamQuestion, SweepQuestion
from saekit.server.turns import WAITING, Crowded, Stopping, Turns

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.catalog import Catalog

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}  # whatever the system believes


def _no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    said = (
        f"{path} does not take {request.method}"
        if error.status_code == 405
        else f"there is nothing at {path}"
    )
    return error_answer(error.status_code, f"{said}; GET /api lists what can be asked")


def application(
    catalog: Catalog, model: TransformerBridge, port: int, *, waiting: int = WAITING
) -> Starlette:
    """The ASGI application, for requests that come to 127.0.0.1:<port>; `app.state.turns` is its line.

    waiting: how many questions may wait for the model behind the one that is being answered.
    """
    turns, live = Turns(waiting), Live(catalog, model)
    data = PageData(catalog, live=LIMITS)
    files = {path.name: path for path in assets()}

    async def page(request: Request) -> Response:
        path = files.get(request.path_params.get("name", INDEX))
        if path is None:
            raise HTTPException(404)
        return FileResponse(path, media_type=TYPES[path.suffix])

    async def script(request: Request) -> Response:
        text = await run_in_threadpool(data.script, request.path_params["name"])
        return Response(text, media_type="text/javascript")

    async def icon(request: Request) -> Response:
        return Response(status_code=204)  # there is none, and no browser need complain of that

    async def api(request: Request) -> Response:
        return JSONResponse(description(waiting))

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        yield
        turns.stop()

    post = ["POST"]
    app = Starlette(
        routes=[
            Route("/data/{name}.js", script),
            Route("/api", api),
            Route("/api/stream", Lines(turns, StreamQuestion, live.stream), methods=post),
            Route("/api/sweep", Lines(turns, SweepQuestion, live.sweep), methods=post),
            Route("/api/steer", Whole(turns, SteerQuestion, live.steer), methods=post),
            Route("/api/activations", Whole(turns, ActivationsQuestion, live.activations), methods=post),
            Route("/favicon.ico", icon),
            Route("/{name}", page),
            Route("/", page),
        ],
        middleware=[Middleware(Guard, port=port)],
        exception_handlers={
            **dict.fromkeys((SaekitError, BodyTooLarge, BodyTooSlow, Crowded, Stopping, Exception), refused),
            HTTPException: _no_such_path,
        },
        lifespan=life,
    )
    app.state.turns = turns
    return app
