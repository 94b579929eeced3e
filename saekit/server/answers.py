"""From a request to its answer: one JSON object, or a line of JSON for each event as it comes.

    body ──▶ question ──▶ job ──▶ a place in line ──▶ its turn ──▶ answer
     415 413 408   400      400 404     429 503                  200, or 400 … 500

What is wrong with a question is told before it waits, so a stream that has begun was a good question; what goes wrong
later is its last line, {"event": "error", "error": "…"}. All the while the connection is watched: a client that closes it
ends what is done for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Generic

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from saekit.errors import SaekitError, UnknownName
from saekit.server.guard import MAX_BODY, SLOWEST, BodyTooLarge, BodyTooSlow, body_of
from saekit.server.questions import Question, parsed
from saekit.server.turns import Crowded, Event, Job, Stopping, Turn, Turns

log = logging.getLogger("uvicorn.error")  # where the server says what went wrong

Asked = Callable[[Question], Job]  # raises what is wrong with the question


class _Endpoint(Generic[Question]):
    """An ASGI application that takes one kind of question to the model and answers it in its turn."""

    def __init__(self, turns: Turns, kind: type[Question], asked: Asked[Question]) -> None:
        self.turns, self.kind, self.asked = turns, kind, asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            await error_answer(415, "expected Content-Type: application/json")(scope, receive, send)
            return
        try:
            question = parsed(self.kind, await body_of(request))
        except ClientDisconnect:
            return
        job = await run_in_threadpool(self.asked, question)
        async with self.turns.join() as turn:
            await _while_there(receive, self.answer(turn, job, scope, receive, send))

    async def answer(self, turn: Turn, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class Whole(_Endpoint[Question]):
    """Answers with one JSON object: the job's only event."""

    async def answer(self, turn: Turn, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        while turn.ahead:
            await turn.moved()
        turn.start(job)
        [found] = await turn.events()
        await JSONResponse(found)(scope, receive, send)


class Lines(_Endpoint[Question]):
    """Answers with NDJSON: the places in line, then the job's events, a line each."""

    async def answer(self, turn: Turn, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/x-ndjson")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with contextlib.aclosing(_events(turn, job)) as found:
            async for events in found:
                lines = b"".join(json.dumps(event, allow_nan=False).encode() + b"\n" for event in events)
                await send({"type": "http.response.body", "body": lines, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(turn: Turn, job: Job) -> AsyncGenerator[list[Event], None]:
    """What a stream tells, in the order in which it becomes known; an error is the last of it."""
    try:
        while ahead := turn.ahead:
            yield [{"event": "waiting", "ahead": ahead}]
            await turn.moved()
        turn.start(job)
        while events := await turn.events():
            yield events
    except Exception as error:
        if status_of(error) == 500:
            log.error("a stream failed", exc_info=error)
        yield [{"event": "error", "error": message_of(error)}]


async def _while_there(receive: Receive, answer: Coroutine[Any, Any, None]) -> None:
    """Run the answer to its end, or cancel it once the client has gone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answering, watching = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        if not answering.done():
            answering.cancel()
        await asyncio.gather(answering, watching, return_exceptions=True)
    if not answering.cancelled():
        answering.result()


def status_of(error: Exception) -> int:
    statuses = {
        UnknownName: 404,
        SaekitError: 400,
        BodyTooLarge: 413,
        BodyTooSlow: 408,
        Crowded: 429,
        Stopping: 503,
    }
    return next((status for kind, status in statuses.items() if isinstance(error, kind)), 500)


def message_of(error: Exception) -> str:
    """What a person reads who asked."""
    match error:
        case SaekitError():
            return str(error)
        case BodyTooLarge():
            return f"the body has more than {MAX_BODY:,} bytes"
        case BodyTooSlow():
            return f"the body was not here within {SLOWEST:g} seconds"
        case Crowded():
            return "too many questions are waiting for the model; ask again in a second"
        case Stopping():
            return "the server is stopping"
    return f"{type(error).__name__}: {error}"


def error_answer(status: int, message: str) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse({"error": message}, status_code=status, headers=headers)


def refused(request: Request, error: Exception) -> JSONResponse:
    return error_answer(status_of(error), message_of(error))
