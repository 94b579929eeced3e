"""`saekit serve`: what it prints, what it opens, how it ends."""

from __future__ import annotations

import json
import webbrowser
from typing import TYPE_CHECKING, Any

import pytest

from saekit.cli import main

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

uvicorn: Any = pytest.importorskip("uvicorn", reason="the extra saekit[server] is not installed")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, model: TransformerBridge) -> list[str]:
    """The addresses that a browser is given; the model is there already, and the server is interrupted at once."""
    addresses = list[str]()

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("saekit.load_model", lambda name: model, raising=False)
    monkeypatch.setattr(uvicorn.Server, "run", interrupted)
    monkeypatch.setattr(webbrowser, "open", addresses.append)
    return addresses


def test_it_prints_the_address_and_ctrl_c_is_its_end(
    opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "tiny", "--port", "0"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("http://127.0.0.1:")
    assert told.endswith("   (Ctrl-C stops)\n")
    assert opened == []


def test_it_opens_a_browser_where_asked_to(opened: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "tiny", "--port", "0", "--open", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"address": opened[0]}


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_a_wrong_port_is_a_wrong_call(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "tiny", f"--port={port}"])
    assert ended.value.code == 2
    assert "is not a port" in capsys.readouterr().err
