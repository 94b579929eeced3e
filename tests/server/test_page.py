"""docs/serve.md is true: its curl commands run against a real server and answer as it says, its tables are the code's."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

pytest.importorskip("starlette", reason="the extra saekit[server] is not installed")

from saekit.catalog import Catalog
from saekit.server.describe import description
from saekit.server.questions import StreamQuestion
from saekit.server.turns import WAITING

if TYPE_CHECKING:
    from starlette.testclient import TestClient

PAGE = (Path(__file__).resolve().parent.parent.parent / "docs" / "serve.md").read_text("utf-8")


class Example(NamedTuple):
    """A command of the page, and the answer printed below it."""

    command: str
    answer: list[dict[str, Any]]


def examples() -> list[Example]:
    found = re.findall(r"^```sh\n(curl .*?)^```\n+(?:```json\n(.*?)^```)?", PAGE, re.DOTALL | re.MULTILINE)
    return [Example(command, [json.loads(line) for line in answer.splitlines()]) for command, answer in found]


def cells(heading: str) -> list[list[str]]:
    """The rows of the first table after a line."""
    table = PAGE[PAGE.index(heading) :].partition("\n|---")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[1:]]


def shape(value: Any) -> Any:
    """Its keys, all the way down, and the kind of what is under them; numbers and nulls are one kind."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return str if isinstance(value, str) else float


@pytest.fixture
def catalog() -> Catalog:
    """The one that the page speaks of."""
    return Catalog.open("tiny")


def test_the_commands_of_the_page_answer_as_it_says(served: Any) -> None:
    if shutil.which("curl") is None or shutil.which("bash") is None:
        pytest.skip("no curl and bash here to run the page's commands with")
    found = examples()
    assert len(found) == 5
    with served() as s:
        for example in found:
            command = example.command.replace(":8321/", f":{s.port}/")
            assert command != example.command
            out = subprocess.check_output(["bash", "-c", command], text=True, timeout=60)
            answer = [json.loads(line) for line in out.splitlines()]
            if not example.answer:
                assert answer == [json.loads(json.dumps(description(WAITING)))]
            for told in example.answer:
                same = [one for one in answer if one.get("event") == told.get("event")]
                assert same, told
                if "features" in told:  # some tokens have none
                    assert set(same[0]) == set(told)
                    assert all(len(pair) == 2 for pairs in same[0]["features"] for pair in pairs)
                else:
                    assert shape(same[0]) == shape(told)
                for constant in ("sides", "edits", "prompt", "tokens"):
                    if constant in told and "features" not in told:
                        assert same[0][constant] == told[constant]


def test_the_tables_of_the_page_are_the_codes(client: TestClient) -> None:
    told = client.get("/api").json()
    paths = {row[0].strip("`"): row[1] for row in cells("## Asking it")}
    assert set(paths) == set(told["paths"])
    for path, answer in paths.items():
        assert ("NDJSON" in answer) == (told["paths"][path]["answer"] == "application/x-ndjson")
    limits = {row[0].strip("`"): int(row[1].split()[0]) for row in cells("## Bounds")}
    assert limits == told["limits"]
    assert {row[0] for row in cells("An error is")} == set(told["errors"])
    keys = {row[0].strip("`"): row[1].strip("`") for row in cells("| key | default")}
    fields = StreamQuestion.model_fields
    assert set(keys) == set(fields)
    for key, default in keys.items():
        assert (default == "") == fields[key].is_required(), key
        if default:
            assert json.loads(default) == fields[key].default, key
