"""Any endpoint that speaks the chat-completions protocol: hosted ones, vLLM, llama.cpp, Ollama, …"""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from saekit.catalog.explain.answers import Answer, Keep, Prompt, clean, number, places
from saekit.errors import InvalidInput, first_line

OPENAI = "https://api.openai.com/v1"
MAX_BYTES = 16 * 2**20  # of one answer
LONGEST_PAUSE = 60.0  # seconds before another try
# Fields that some models do not take: left out, or called otherwise, once one has said so.
OPTIONAL = {
    "max_tokens": "max_completion_tokens",
    "temperature": None,
    "top_logprobs": None,
    "logprobs": None,
}
HOPELESS = 3  # prompts refused, and none answered: the fault is not the prompts'


class Endpoint:
    """A model behind HTTP.

    base_url: up to and with the version, as `https://api.openai.com/v1` or `http://127.0.0.1:8000/v1`. key_env: name of the
    environment variable that holds the key; none is sent without it. workers: requests at once. timeout: seconds of silence
    before a request counts as lost. retries: of a request that was lost or met 408, 409, 429, 5xx or an answer that is no
    answer, after pauses that double from `pause` seconds, or last as long as the endpoint says.

    Raises `InvalidInput` for an address that is none, and for a variable that is not set.
    """

    def __init__(
        self,
        model: str,
        base_url: str = OPENAI,
        *,
        key_env: str | None = None,
        workers: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
        pause: float = 1.0,
    ) -> None:
        if not model or workers < 1 or retries < 0 or not timeout > 0:
            raise InvalidInput(
                f"endpoint: expected a model's name, workers from 1, retries from 0 and a timeout above 0, got "
                f"{model!r}, {workers}, {retries} and {timeout}"
            )
        self.model = model
        self._url, self.name = _address(base_url)
        self._key = _key(key_env)
        self._workers, self._timeout, self._retries, self._pause = workers, timeout, retries, pause
        self._dropped: set[str] = set()
        self._open = urllib.request.build_opener(_StayHere).open
        self._answered = 0

    def __repr__(self) -> str:
        return f"Endpoint({self.model!r}, {self.name!r})"

    def ask(self, prompts: Sequence[Prompt], keep: Keep) -> None:
        stop = threading.Event()
        refused = 0
        pool = ThreadPoolExecutor(self._workers, "endpoint")
        try:
            futures = [pool.submit(self._one, prompt, keep, stop) for prompt in prompts]
            for future in as_completed(futures):
                if not (error := future.result()):
                    self._answered += 1
                    continue
                refused += 1
                if not self._answered and refused >= min(HOPELESS, len(prompts)):
                    raise InvalidInput(f"{self.name}: refused {refused} of {refused} requests: {error}")
        finally:  # on Ctrl-C too: what is under way is waited for and kept, the rest is not begun
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, prompt: Prompt, keep: Keep, stop: threading.Event) -> str:
        """Ask one prompt until it is answered, refused, or hopeless; returns why it was refused."""
        for tries in range(self._retries + 1):
            try:
                answer = self._try(prompt)
                break
            except _Again as again:
                if tries == self._retries or stop.is_set():
                    if not again.lost:
                        answer = Answer("", error=str(again))
                        break
                    raise InvalidInput(
                        f"{self.name}: no answer after {tries + 1} tries: {again}. What was answered is kept; run it again "
                        "to go on from there"
                    ) from again
                pause = again.after or self._pause * 2**tries * (0.5 + random.random() / 2)
                stop.wait(min(pause, LONGEST_PAUSE))
        keep(prompt, answer)
        return answer.error

    def _try(self, prompt: Prompt) -> Answer:
        while True:
            without = frozenset(self._dropped)
            body = {}
            for field, value in prompt.body().items():
                name = OPTIONAL[field] if field in without else field
                if name is not None:
                    body[name] = value
            try:
                answer = read_completion(self._post(body), prompt)
                if answer is None:
                    raise _Again("the answer has no text at choices[0].message.content")
                return answer
            except _Refused as refused:
                named = _named(str(refused)) & body.keys()
                if not named:
                    return Answer("", error=str(refused))
                self._dropped |= named

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "saekit"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers, method="POST")
        try:
            with self._open(request, timeout=self._timeout) as response:
                data = response.read(MAX_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                self._refuse(error)
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
            reason = getattr(error, "reason", error)
            text = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)
            raise _Again(self._safe(text), lost=True) from None
        if len(data) > MAX_BYTES:
            raise _Again(f"an answer of more than {MAX_BYTES:,} bytes")
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise _Again(f"the answer is not JSON: {self._safe(repr(data[:80]))}") from None
        if isinstance(value, dict) and value.get("error"):
            raise _Again(self._safe(_message(value)))
        return value

    def _refuse(self, error: urllib.error.HTTPError) -> None:
        """Turn a status into what it means here; always raises."""
        try:
            said = _message(json.loads(error.read(MAX_BYTES)))
        except (ValueError, RecursionError, OSError, http.client.HTTPException):
            said = str(error.reason)
        text = self._safe(f"HTTP {error.code}: {said}")
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            raise _Again(text, after=_after(error.headers.get("Retry-After")), lost=error.code == 429)
        if error.code in (401, 403):
            key = "the key was not taken" if self._key else "it wants a key: name its variable with key_env"
            raise InvalidInput(f"{self.name}: {text} ({key})")
        if error.code in (404, 405) or error.code < 400:
            raise InvalidInput(
                f"{self.name}: {text}. Expected a base URL as {OPENAI} and a model that it has; asked for {self.model!r}"
            )
        raise _Refused(text)

    def _safe(self, text: str) -> str:
        """A message without the key, which some servers send back."""
        text = clean(text)
        return (text.replace(self._key, "[key]") if self._key else text)[:300]


class _Again(Exception):
    """Worth another try. lost: when tries run out, the endpoint is at fault rather than this prompt."""

    def __init__(self, message: str, *, after: float | None = None, lost: bool = False) -> None:
        super().__init__(message)
        self.after, self.lost = after, lost


class _Refused(Exception):
    """The endpoint does not take this request."""


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key is for the host that was named."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _address(base_url: str) -> tuple[str, str]:
    """(where to post to, the endpoint's name in messages). Raises `InvalidInput`."""
    try:
        parts = urllib.parse.urlsplit(base_url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname)
        secret = parts.username is not None or parts.password is not None
    except ValueError:
        fits, secret = False, False
    if secret:
        raise InvalidInput(
            "base_url: holds a password; put the key into an environment variable and name it with key_env"
        )
    if not fits or parts.query or parts.fragment or not base_url.isprintable() or " " in base_url:
        raise InvalidInput(f"base_url: expected an address such as {OPENAI}, got {base_url[:200]!r}")
    root = base_url.rstrip("/").removesuffix("/chat/completions")
    return f"{root}/chat/completions", root


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise InvalidInput(
            f"key_env: the environment variable {name} is not set; export it with the endpoint's key"
        )
    if not (key.isascii() and key.isprintable()):
        raise InvalidInput(f"key_env: what the environment variable {name} holds cannot be sent as a key")
    return key


def _after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(seconds, LONGEST_PAUSE) if math.isfinite(seconds) and seconds > 0 else None


def _named(message: str) -> set[str]:
    """The optional fields that a refusal is about."""
    named = {field for field in ("temperature", "logprobs") if field in message}
    if "logprobs" in named:
        named.add("top_logprobs")  # one is nothing without the other
    return named | ({"max_tokens"} if "max_completion_tokens" in message else set())


def _message(value: Any) -> str:
    """The sentence in an error's body, in one line."""
    error = value.get("error", value) if isinstance(value, dict) else value
    said = error.get("message", error) if isinstance(error, dict) else error
    return first_line(ValueError(said if isinstance(said, str) else json.dumps(said)))


def read_completion(value: Any, prompt: Prompt) -> Answer | None:
    """What a chat completion says; None where it is none."""
    try:
        choice = value["choices"][0]
        text = choice["message"]["content"]
        reason = choice.get("finish_reason")
    except (TypeError, KeyError, IndexError, AttributeError):
        return None
    if text is None or text == "":
        return Answer("", error=f"an empty answer (finish_reason {clean(str(reason))[:40]!r})")
    if not isinstance(text, str):
        return None
    text = clean(text)
    return Answer(text, _places(text, choice.get("logprobs")) if prompt.chances else None)


def _places(text: str, logprobs: Any) -> Any:
    """Chances of numbers at the answer's tokens, or None where they are missing or do not spell the answer."""
    try:
        tokens = [
            (
                bytes(entry["bytes"]) if isinstance(entry.get("bytes"), list) else entry["token"].encode(),
                [(top["token"], float(top["logprob"])) for top in entry["top_logprobs"]],
            )
            for entry in logprobs["content"]
        ]
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    spelled = b"".join(piece for piece, _ in tokens)
    skipped = spelled.find(
        text.encode()
    )  # some endpoints strip the text, or end it with a token that is not shown
    if skipped < 0:
        return None
    pieces, before = [], -skipped
    for piece, top in tokens:
        start, end = (
            len(text.encode()[: max(0, at)].decode("utf-8", "ignore")) for at in (before, before + len(piece))
        )
        chances: dict[int, float] = {}
        for token, logprob in top:
            if isinstance(token, str) and (n := number(token)) is not None and not math.isnan(logprob):
                chances[n] = chances.get(n, 0.0) + math.exp(min(0.0, logprob))
        pieces.append((start, end, chances))
        before += len(piece)
    return places(text, pieces)
