from __future__ import annotations

import json
import threading
import time

import pytest
from catalog.explain.server import Reply, completion, serving
from hypothesis import given
from hypothesis import strategies as st

from saekit.catalog.explain.answers import Answer, Prompt
from saekit.catalog.explain.endpoint import Endpoint, read_completion
from saekit.errors import InvalidInput

KEY = "sk-very-secret-0123456789"


def prompts(n: int, *, chances: bool = False) -> list[Prompt]:
    return [Prompt("m", "say", f"number {i}", 50, chances) for i in range(n)]


def asked(endpoint: Endpoint, questions: list[Prompt]) -> dict[str, Answer]:
    kept: dict[str, Answer] = {}
    endpoint.ask(questions, lambda prompt, answer: kept.update({prompt.material: answer}))
    return kept


def endpoint(url: str, **options) -> Endpoint:
    return Endpoint("m", url, **{"pause": 0.01, "retries": 3, "timeout": 10.0, "workers": 4} | options)


def echo(body: dict, number: int) -> dict:
    return completion(body["messages"][0]["content"].split("\n\n")[1])


def test_it_speaks_the_protocol(monkeypatch) -> None:
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    with serving(echo) as served:
        kept = asked(endpoint(served.url, key_env="SOME_KEY"), prompts(9))
        assert {name: answer.text for name, answer in kept.items()} == {
            f"number {i}": f"number {i}" for i in range(9)
        }
        request = next(r for r in served.requests if "number 3" in r["messages"][0]["content"])
        assert request == {
            "model": "m", "messages": [{"role": "user", "content": "say\n\nnumber 3"}], "max_tokens": 50, "temperature": 0,
        }  # fmt: skip
        assert served.headers[0]["path"] == "/v1/chat/completions"
        assert served.headers[0]["Authorization"] == f"Bearer {KEY}"
        asked(endpoint(f"{served.url}/chat/completions"), prompts(1))
        assert served.headers[-1]["path"] == "/v1/chat/completions"
        assert "Authorization" not in served.headers[-1]


@pytest.mark.parametrize("spell", [True, False])
def test_chances_where_the_endpoint_gives_them(spell) -> None:
    tokens = [
        (" é", {" é": 1.0}),
        ("\t", {"\t": 1.0}),
        ("7", {"7": 0.5, " 7": 0.1, "8": 0.2, "x": 0.2}),
        ("<end>", {}),
    ]

    def answer(body: dict, number: int) -> dict:
        assert (body["logprobs"], body["top_logprobs"]) == (True, 20)
        return completion(" é\t7", tokens, spell=spell)

    with serving(answer) as served:
        kept = asked(endpoint(served.url), prompts(1, chances=True))["number 0"]
    found = kept.chances(3, 10)
    assert found is not None
    assert found[7] == pytest.approx(0.75)
    assert found[8] == pytest.approx(0.25)


def test_an_endpoint_that_has_no_such_field_is_asked_without_it() -> None:
    def answer(body: dict, number: int) -> Reply | dict:
        for field in ("logprobs", "temperature"):
            if field in body:
                return Reply(
                    {"error": {"message": f"Unsupported parameter: '{field}' is not supported"}}, 400
                )
        if "max_tokens" in body:
            return Reply(
                {"error": {"message": "'max_tokens' is too old, use 'max_completion_tokens' instead."}}, 400
            )
        return completion("1")

    with serving(answer) as served:
        client = endpoint(served.url, workers=1)
        kept = asked(client, prompts(3, chances=True))
        assert [a.text for a in kept.values()] == ["1"] * 3
        assert all(a.places is None for a in kept.values())
        assert len(served.requests) == 6  # three to learn it, and none later
        assert set(served.requests[-1]) == {"model", "messages", "max_completion_tokens"}


@pytest.mark.parametrize(
    "bad",
    [
        Reply({"error": {"message": "slow down"}}, 429, Retry_After="0.01"),
        Reply({"error": "busy"}, 503),
        Reply(b"<html>gateway", 502),
        Reply(b"{not json"),
        Reply(b"[" * 100_000),
        Reply({"error": {"message": "upstream"}}),
        Reply({"choices": []}),
        Reply({"choices": [{"message": {"content": 3}}]}),
        Reply([1, 2]),
        Reply(b'{"choi', 200, Content_Length="100"),
    ],
    ids=lambda reply: f"{reply.status}-{reply.data[:12]!r}",
)
def test_what_passes_is_tried_again(bad) -> None:
    with serving(lambda body, number: bad if number < 2 else completion("at last")) as served:
        kept = asked(endpoint(served.url), prompts(1))
        assert kept["number 0"] == Answer("at last")
        assert len(served.requests) == 3


def test_an_answer_that_is_late_is_asked_for_again() -> None:
    def answer(body: dict, number: int) -> dict:
        if number == 0:
            time.sleep(1.0)
        return completion("here")

    with serving(answer) as served:
        assert asked(endpoint(served.url, timeout=0.2), prompts(1))["number 0"].text == "here"
        assert len(served.requests) == 2


def test_an_endpoint_that_stays_away_ends_the_work_and_keeps_what_came() -> None:
    kept: dict[str, Answer] = {}
    quota = Reply({"error": {"message": "quota"}}, 429)
    with (
        serving(lambda b, n: echo(b, n) if n < 3 else quota) as served,
        pytest.raises(InvalidInput, match=r"127\.0\.0\.1:\d+/v1: no answer after 4 tries: HTTP 429: quota"),
    ):
        endpoint(served.url, workers=1).ask(prompts(5), lambda p, a: kept.update({p.material: a}))
    assert len(kept) == 3
    with pytest.raises(InvalidInput, match=r"no answer after 4 tries: .*[Rr]efused"):
        asked(endpoint(served.url), prompts(1))


def test_a_refused_prompt_is_a_failure_and_all_refused_an_error() -> None:
    def answer(body: dict, number: int) -> Reply | dict:
        if "number 1" in body["messages"][0]["content"]:
            return Reply({"error": {"message": "content policy"}}, 400)
        return echo(body, number)

    with serving(answer) as served:
        kept = asked(endpoint(served.url, workers=1), prompts(3))
    assert kept["number 1"] == Answer("", error="HTTP 400: content policy")
    assert kept["number 2"].text == "number 2"
    with serving(lambda body, number: Reply({"detail": "no"}, 422)) as served:
        with pytest.raises(InvalidInput, match='refused 3 of 3 requests: HTTP 422: {"detail": "no"}'):
            asked(endpoint(served.url, workers=1), prompts(9))
        assert len(served.requests) < 9


@pytest.mark.parametrize("text", [None, ""])
def test_an_empty_answer_is_a_failure(text) -> None:
    with serving(lambda body, number: completion("x") if number == 0 else completion(text)) as served:
        kept = asked(endpoint(served.url, workers=1), prompts(2))
    assert kept["number 1"] == Answer("", error="an empty answer (finish_reason 'stop')")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "the key was not taken"),
        (403, "the key was not taken"),
        (404, "a model that it has; asked for 'm'"),
    ],
)
def test_the_key_is_in_no_message(status, message, monkeypatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    said = {"error": {"message": f"Incorrect API key provided: {KEY}."}}
    with serving(lambda body, number: Reply(said, status)) as served:
        client = endpoint(served.url, key_env="SOME_KEY")
        with pytest.raises(InvalidInput, match=message) as error:
            asked(client, prompts(1))
        assert len(served.requests) == 1
    assert KEY not in f"{error.value} {error.value.__cause__} {error.value.__context__} {client!r}"
    assert "[key]" in str(error.value)


@pytest.mark.parametrize("status", [302, 307])
def test_the_key_follows_no_redirect(status, monkeypatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    with (
        serving(echo) as elsewhere,
        serving(lambda b, n: Reply({}, status, Location=f"{elsewhere.url}/chat/completions")) as served,
    ):
        with pytest.raises(InvalidInput, match=f"HTTP {status}"):
            asked(endpoint(served.url, key_env="SOME_KEY"), prompts(1))
        assert not elsewhere.requests


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.openai.com/v1",
        "ftp://x/v1",
        "http://",
        "http://[::1",
        "http://x/v1?key=1",
        "http://x y/",
        "http://x/\n",
    ],
)
def test_addresses(url) -> None:
    with pytest.raises(InvalidInput, match="base_url: expected an address such as https://api.openai.com/v1"):
        Endpoint("m", url)


def test_secrets_are_named_not_shown(monkeypatch) -> None:
    with pytest.raises(InvalidInput, match="put the key into an environment variable") as error:
        Endpoint("m", f"https://me:{KEY}@host/v1")
    assert KEY not in str(error.value)
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(InvalidInput, match="the environment variable SOME_KEY is not set"):
        Endpoint("m", key_env="SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "a\nHost: b")
    with pytest.raises(InvalidInput, match="cannot be sent as a key"):
        Endpoint("m", key_env="SOME_KEY")


def test_ctrl_c_keeps_what_is_under_way() -> None:
    """The first two answers are slow to come; whoever takes the third is interrupted, and the two are kept all the same."""
    begun, kept = threading.Barrier(3), []

    def answer(body: dict, number: int) -> dict:
        if number < 3:
            begun.wait(10)
        if "number 2" not in body["messages"][0]["content"]:
            time.sleep(0.3)
        return completion("x")

    def keep(prompt: Prompt, answer: Answer) -> None:
        if prompt.material == "number 2":
            raise KeyboardInterrupt
        kept.append(prompt.material)

    with serving(answer) as served:
        with pytest.raises(KeyboardInterrupt):
            endpoint(served.url, workers=3).ask(prompts(30), keep)
        begun_with = {r["messages"][0]["content"].split("\n\n")[1] for r in served.requests}
        assert {"number 0", "number 1"} <= set(kept) == begun_with - {"number 2"}
        assert len(served.requests) < 10


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.integers(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["choices", "message", "content", "logprobs", "token", "bytes", "top_logprobs", "logprob", "finish_reason"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(JSON, JSON)
def test_any_body_is_an_answer_or_none(value, logprobs) -> None:
    prompt = prompts(1, chances=True)[0]
    for body in (value, {"choices": [{"message": {"content": "1\t7"}, "logprobs": {"content": logprobs}}]}):
        found = read_completion(json.loads(json.dumps(body)), prompt)
        assert found is None or found.text or found.error
