"""The server: what it answers, and what it refuses."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch

import saekit
from saekit.catalog import Catalog
from saekit.catalog.page import assets
from saekit.errors import FileMissing, InvalidInput
from saekit.server.app import serve
from saekit.server.questions import LIMITS, Turn
from saekit.steering.kinds import KINDS

if TYPE_CHECKING:
    from starlette.testclient import TestClient
    from transformer_lens.model_bridge import TransformerBridge

pytest.importorskip("starlette", reason="the extra saekit[server] is not installed")

PORT = 8321  # as `client` has it
HOME = f"http://127.0.0.1:{PORT}"
Asked = Callable[..., dict[str, Any]]


def refusal(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    return answer.json()["error"]


def test_the_page_knows_that_it_is_live(client: TestClient, catalog: Catalog) -> None:
    home = client.get("/")
    assert home.headers["content-type"].startswith("text/html")
    assert "unsafe" not in home.headers["content-security-policy"]
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
    for asset in assets():
        found = client.get(f"/{asset.name}")
        assert found.content == asset.read_bytes()
        assert found.headers["content-type"].startswith(types[asset.suffix])
    assert client.get("/favicon.ico").status_code == 204
    overview = client.get("/data/overview.js")
    assert overview.headers["content-type"].startswith("text/javascript")
    assert overview.headers["cache-control"] == "no-store"
    told = json.loads(overview.text.removeprefix('receive("overview", ').removesuffix(");\n"))
    assert told["live"] is True
    assert told["limits"] == LIMITS
    assert client.get("/data/shard-0.js").text.startswith('receive("shard-0"')


@pytest.mark.parametrize(
    "path",
    [
        "/data/shard-99.js",
        "/data/..%2foverview.js",
        "/..%2fpage.py",
        "/../page.py",
        "/nothing",
        "/api/nothing",
    ],
)
def test_what_is_not_there(client: TestClient, path: str) -> None:
    told = refusal(client.get(path), 404)
    assert told.endswith("; GET /api lists what can be asked") or path.startswith("/data/shard")


def test_steering_is_compare(
    question: Asked, client: TestClient, catalog: Catalog, model: TransformerBridge, no_leaked_hooks: None
) -> None:
    answer = client.post("/api/steer", json=question()).json()
    edit = catalog[3].add(2.0, unit="norm")
    side = saekit.compare(model, "Once upon a time", edit, max_new_tokens=4, seed=1)
    assert set(answer) == {"prompt", "plain", "steered", "kl", "top_tokens"}
    assert [answer[key] for key in ("prompt", "plain", "steered")] == [side.prompt, side.plain, side.steered]
    assert answer["kl"] == pytest.approx(side.kl, rel=1e-4)
    assert [token for token, *_ in answer["top_tokens"]] == [row[0] for row in side.top_tokens]
    for row, expected in zip(answer["top_tokens"], side.top_tokens, strict=True):
        assert row[1:] == pytest.approx(expected[1:], rel=1e-4)
    assert side.kl > 0
    still = client.post("/api/steer", json=question(edits=[])).json()
    assert still["plain"] == still["steered"] == side.plain
    assert still["kl"] == 0


def test_activations_are_the_saes(client: TestClient, catalog: Catalog, model: TransformerBridge) -> None:
    text = "A small boat </script>"
    answer = client.post("/api/activations", json={"text": text}).json()
    assert "".join(answer["tokens"][1:]) == text
    _, cache = model.run_with_cache(text, names_filter=catalog.site)
    f = catalog.sae.encode(cache[catalog.site][0].float()).detach()
    for row, fired in zip(f, answer["features"], strict=True):
        assert {i for i, _ in fired} == set(torch.nonzero(row).flatten().tolist())
        assert [a for _, a in fired] == pytest.approx(row[[i for i, _ in fired]].tolist())
        assert [a for _, a in fired] == sorted((a for _, a in fired), reverse=True)


@pytest.mark.parametrize("host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:80", ""])
def test_another_host_is_refused(client: TestClient, host: str) -> None:
    headers = {"Host": host}
    assert "Host" in refusal(client.get("/", headers=headers), 403)
    assert "Host" in refusal(client.post("/api/steer", headers=headers), 403)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost", f"https://127.0.0.1:{PORT}"]
)
def test_another_origin_is_refused(question: Asked, client: TestClient, origin: str) -> None:
    assert "Origin" in refusal(client.post("/api/steer", json=question(), headers={"Origin": origin}), 403)


def test_ones_own_origin_is_not(client: TestClient) -> None:
    headers = {"Host": f"localhost:{PORT}", "Origin": f"http://localhost:{PORT}"}
    assert client.post("/api/activations", json={"text": "boat"}, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 10_000, "body"),
        (b"[]", "body"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "word " * 2_000}, "prompt"),
        ({"prompt": "word " * 10_000}, "prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 10**9}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"positions": "everywhere"}, "positions"),
        ({"positions": [-1]}, "positions"),
        ({"more": 1}, "more"),
        ({"edits": [{"feature": 3, "strength": 1e300}]}, "strength"),
        ({"edits": [{"feature": 3, "strength": float("inf")}]}, "strength"),
        ({"edits": [{"feature": "3"}]}, "feature"),
        ({"edits": [{"feature": 3, "kind": "explode"}]}, "kind"),
        ({"edits": [{"feature": 3, "kind": "clamp", "unit": "norm"}]}, "unit"),
        ({"edits": [{"feature": 3}] * 17}, "edits"),
    ],
)  # fmt: skip
def test_a_bad_question_is_named(
    question: Asked, client: TestClient, body: dict[str, Any] | bytes, named: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(question(**body))
    answer = client.post("/api/steer", content=content, headers={"Content-Type": "application/json"})
    message = refusal(answer, 400)
    assert named in message
    assert len(message) < 2_000


@pytest.mark.parametrize("feature", [-1, 64, 10**12])
def test_an_unknown_feature(question: Asked, client: TestClient, feature: int) -> None:
    answer = client.post("/api/steer", json=question(edits=[{"feature": feature}]))
    assert f"feature {feature}" in refusal(answer, 404)


def test_other_methods_kinds_and_sizes(question: Asked, client: TestClient) -> None:
    assert "/api/steer does not take GET; GET /api lists" in refusal(client.get("/api/steer"), 405)
    as_a_form = client.post("/api/steer", content=json.dumps(question()))  # what any page's form could send
    refusal(as_a_form, 415)
    text = "x" * 100_000
    assert "bytes" in refusal(client.post("/api/activations", json={"text": text}), 413)
    assert "tokens" in refusal(client.post("/api/activations", json={"text": "boat " * 3_000}), 400)
    assert "text" in refusal(client.post("/api/activations", json={}), 400)


def test_every_kind_is_offered_but_the_one_that_needs_another_text() -> None:
    assert set(get_args(Turn)) == set(KINDS) - {"swap"}


def test_questions_at_once_do_not_mix(question: Asked, client: TestClient, no_leaked_hooks: None) -> None:
    def ask(feature: int) -> Any:
        edits = [{"feature": feature, "strength": 3.0, "unit": "norm"}]
        return client.post("/api/steer", json=question(edits=edits)).json()

    alone = [ask(feature) for feature in range(5)]
    assert len({answer["steered"] for answer in alone}) > 1
    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(ask, range(5))) == alone


def test_a_defect_is_json_too(
    question: Asked, catalog: Catalog, model: TransformerBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    from starlette.testclient import TestClient

    from saekit.server import live, routes

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the sampler broke")

    monkeypatch.setattr(live, "stream_rows", fail)
    client = TestClient(
        routes.application(catalog, model, PORT), base_url=HOME, raise_server_exceptions=False
    )
    assert "sampler" in refusal(client.post("/api/steer", json=question()), 500)


def test_serve_listens_on_this_machine_only(
    catalog: Catalog,
    model: TransformerBridge,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import uvicorn

    bound = list[tuple[str, int]]()
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda self, sockets: bound.extend(s.getsockname() for s in sockets)
    )
    serve(catalog, model, port=0)
    [(host, port)] = bound
    assert host == "127.0.0.1"
    assert capsys.readouterr().out == f"http://127.0.0.1:{port}\n"


def test_serve_says_what_is_wrong(
    catalog: Catalog, model: TransformerBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InvalidInput, match="is in use"):
        serve(catalog, model, port=taken.getsockname()[1])
    with pytest.raises(InvalidInput, match="port 70000"):
        serve(catalog, model, port=70_000)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "saekit.server.stopping", raising=False)
    with pytest.raises(FileMissing, match=r"pip install 'saekit\[server\]'"):
        serve(catalog, model)
