"""A real server under load: many at once, the malformed, the killed, the too long. Each gets its answer or a clear 4xx, and
afterwards threads, hooks and file descriptors are what they were (`served` sees to it)."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LONG = 240  # new tokens, nearly all that the context holds


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


class Gate:
    """Stands before the model: at its fifth forward it closes, and says so."""

    def __init__(self) -> None:
        self.forwards = 0
        self._reached, self._open = threading.Event(), threading.Event()

    def __call__(self, *_: Any) -> None:
        self.forwards += 1
        if self.forwards == 5:
            self._reached.set()
            assert self._open.wait(30)

    def reached(self) -> None:
        """Return once the model waits."""
        assert self._reached.wait(30)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(model: TransformerBridge) -> Iterator[Gate]:
    gate = Gate()
    handle = model.original_model.register_forward_pre_hook(gate)
    yield gate
    gate.open()
    handle.remove()


def test_twenty_at_once_get_their_own_answers(served: Any, question: Any) -> None:
    """And a malformed one, a killed one and one beyond the context among them."""

    def asked(i: int) -> dict[str, Any]:
        edits = [{"feature": i, "strength": 1.0 + i / 10, "unit": "norm"}]
        return question(edits=edits, control=i % 4 == 0, max_new_tokens=3, seed=i)

    with served() as s:

        def stream(i: int) -> list[dict[str, Any]]:
            while True:
                status, text = s.post("/api/stream", asked(i))
                if status == 200:
                    return [e for e in events(text) if e["event"] != "waiting"]
                assert status == 429, text  # as told: again in a while
                time.sleep(0.1)

        def disturb() -> None:
            s.raw(s.request("/api/stream", question(max_new_tokens=LONG))).close()
            assert s.post("/api/stream", b'{"prompt": ')[0] == 400
            with s.raw(b"NONSENSE\r\n\r\n") as connection:
                assert b" 400 " in s.until(connection, b"\r\n")
            s.raw(s.request("/api/stream", question())[:-5]).close()  # a body that never ends
            status, text = s.post("/api/stream", question(prompt="word " * 300))
            assert status == 400
            assert "303 tokens" in text
            assert "context of 256" in text

        alone = [_told(stream(i)) for i in range(20)]
        with ThreadPoolExecutor(21) as pool:
            disturbing = pool.submit(disturb)
            together = list(pool.map(lambda i: _told(stream(i)), range(20)))
            disturbing.result()
        assert together == alone
        assert len({json.dumps(each) for each in alone}) == 20


def _told(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events without the clock."""
    return [{key: value for key, value in event.items() if key != "seconds"} for event in found]


@pytest.mark.parametrize("path", ["/api/stream", "/api/steer", "/api/sweep"])
def test_a_killed_client_ends_its_generation(
    served: Any, question: Any, gate: Gate, path: str, waits: Callable[..., None]
) -> None:
    more = {"strengths": [1.0, 2.0]} if path == "/api/sweep" else {}
    with served() as s:
        with s.raw(s.request(path, question(max_new_tokens=LONG, **more))) as connection:
            if path == "/api/stream":
                s.until(connection, b'"text"')
            gate.reached()
            [turn] = s.app.state.turns.line
        waits(turn.left.is_set)
        assert s.app.state.turns.line == [turn]  # nobody else may have the model yet
        gate.open()
        waits(lambda: not s.app.state.turns.line)
        assert gate.forwards == 5
        assert events(s.post("/api/stream", question())[1])[-1]["event"] == "done"


def test_who_leaves_the_line_frees_the_place(
    served: Any, question: Any, gate: Gate, waits: Callable[..., None]
) -> None:
    with served(waiting=2) as s:
        turns, long = s.app.state.turns, s.request("/api/stream", question(max_new_tokens=LONG))
        with s.raw(long) as first:
            gate.reached()
            with s.raw(long) as second:
                s.until(second, b'"ahead": 1')
                with s.raw(s.request("/api/stream", question())) as third:
                    s.until(third, b'"ahead": 2')
                    status, text = s.post("/api/steer", question())
                    assert status == 429
                    assert "ask again" in json.loads(text)["error"]
                    second.close()
                    s.until(third, b'"ahead": 1')
                    first.close()
                    waits(turns.line[0].left.is_set)
                    gate.open()
                    s.until(third, b'"done"')


def test_stopping_ends_what_is_generated(
    served: Any, question: Any, gate: Gate, waits: Callable[..., None]
) -> None:
    with served() as s:
        long = s.request("/api/stream", question(max_new_tokens=LONG))
        with s.raw(long) as first, s.raw(long) as second:  # whichever comes first
            gate.reached()
            waits(lambda: len(s.app.state.turns.line) == 2)
            [turn, _] = s.app.state.turns.line
            s.server.should_exit = True
            waits(turn.left.is_set)
            gate.open()
            s.thread.join(4)  # less than the server's patience with connections: they ended by themselves
            assert not s.thread.is_alive()
            assert gate.forwards == 5
            for connection in (first, second):
                assert b"the server is stopping" in s.until(connection, b"stopping")


def test_a_defect_ends_one_answer_only(
    served: Any, question: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from saekit.server import live

    real, calls = live.strangeness, list[int]()

    def fails_once(*given: Any) -> float:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("the judge broke")
        return real(*given)

    monkeypatch.setattr(live, "strangeness", fails_once)
    with served() as s:
        first = events(s.post("/api/stream", question())[1])
        assert first[-1] == {"event": "error", "error": "RuntimeError: the judge broke"}
        assert first[0]["event"] == "start"
        assert events(s.post("/api/stream", question())[1])[-1]["event"] == "done"


def test_a_body_that_never_ends_is_not_waited_for(
    served: Any, question: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saekit.server.guard.SLOWEST", 0.1)
    with served() as s, s.raw(s.request("/api/stream", question())[:-5]) as connection:
        found = s.until(connection, b"seconds")
        assert b" 408 " in found.splitlines()[0]
