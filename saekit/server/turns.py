"""Who may ask the model, and when: one question at a time, first come first served, and no more than a few in line.

    join ──▶ waiting: `ahead`, `moved` ──▶ `start` ──▶ events, as they come ──▶ gone

Hooks belong to the model, so two questions may never be answered at once. All of them are answered in one thread of
the server's own. A question whose client goes away leaves the line; one that is being answered is told so through its
`left`, and its turn ends when its thread has let go of the model, never before.

Everything here but the answers themselves happens in the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

Event = dict[str, Any]
Job = Callable[[threading.Event], Generator[Event]]  # told whether its client has left → what it finds out

WAITING = 16  # questions in line behind the one that is being answered


class Crowded(Exception):
    """As many questions are in line as there may be."""


class Stopping(Exception):
    """The server stops; nothing more is answered."""


class Left(Exception):
    """Nobody waits for the answer any more."""


class Turns:
    """The line of one model."""

    def __init__(self, waiting: int = WAITING) -> None:
        self.waiting = waiting
        self.stopping = False
        self.line: list[Turn] = []  # the first is being answered
        # Its share of the processor is fixed here: a thread takes what torch is set to when it first computes, for good,
        # and the page's map is made under a setting of its own.
        self._thread = ThreadPoolExecutor(
            1, "saekit-model", initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
        )

    def join(self) -> Turn:
        """A place at the end of the line. Raises `Crowded` where there is none, `Stopping` once the server stops."""
        if self.stopping:
            raise Stopping
        if len(self.line) > self.waiting:
            raise Crowded
        turn = Turn(self, self._thread)
        self.line.append(turn)
        return turn

    def ahead(self, turn: Turn) -> int:
        return self.line.index(turn)

    def leave(self, turn: Turn) -> None:
        if turn in self.line:
            self.line.remove(turn)
            for other in self.line:
                other.moves.set()

    def stop(self) -> None:
        """Send everybody away: those in line, and the one that is being answered, within a token."""
        self.stopping = True
        for turn in self.line:
            turn.left.set()
            turn.moves.set()
        self._thread.shutdown(wait=False)  # it ends with what it is doing


class Turn:
    """One question's place in line, then its answer. Left with `async with`, whatever happened."""

    def __init__(self, turns: Turns, thread: ThreadPoolExecutor) -> None:
        self.left = threading.Event()
        self.moves = asyncio.Event()
        self._turns, self._thread = turns, thread
        self._events: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
        self._answering: asyncio.Future[None] | None = None

    @property
    def ahead(self) -> int:
        """How many are served before it. Raises `Stopping` once the server stops."""
        if self._turns.stopping:
            raise Stopping
        return self._turns.ahead(self)

    async def moved(self) -> None:
        """Return once somebody ahead has left."""
        await self.moves.wait()
        self.moves.clear()

    def start(self, job: Job) -> None:
        """Begin to answer, as the first in line."""
        assert self.ahead == 0, "it is another one's turn"
        loop = asyncio.get_running_loop()

        def tell(event: Event | BaseException | None) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        def answer() -> None:
            try:
                with contextlib.closing(job(self.left)) as events:
                    for event in events:
                        tell(event)
                        if self.left.is_set():
                            raise Left
            except BaseException as error:  # told where the events are read
                tell(error)
            else:
                tell(None)

        self._answering = loop.run_in_executor(self._thread, answer)
        self._answering.add_done_callback(lambda _: self._turns.leave(self))

    async def events(self) -> list[Event]:
        """What has been found out since the last call, at least one thing; nothing once all is told.

        Raises what the answer raised, and `Stopping` where it was cut off because the server stops.
        """
        found: list[Event] = []
        while not found or not self._events.empty():
            event = await self._events.get()
            if event is None or isinstance(event, BaseException):
                if found:  # first what came before it
                    self._events.put_nowait(event)
                    return found
                if event is None:
                    return []
                raise Stopping if isinstance(event, Left) and self._turns.stopping else event
            found.append(event)
        return found

    async def __aenter__(self) -> Turn:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.left.set()
        cancelled = None
        while self._answering is not None and not self._answering.done():
            try:
                await asyncio.wait([self._answering])
            except asyncio.CancelledError as error:  # the thread has the model until it lets go of it
                cancelled = error
        self._turns.leave(self)
        if cancelled is not None:
            raise cancelled
