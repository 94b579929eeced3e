"""Publishing and fetching, against a small hub on 127.0.0.1 that answers what the real client asks."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import saekit
from saekit.catalog.card import TABLES, card
from saekit.catalog.publish import FILES, fetch, publish
from saekit.catalog.tables import CATALOG, SCHEMAS, read_table
from saekit.errors import FileMissing, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformer_lens.model_bridge import TransformerBridge

# huggingface_hub's own large-file upload calls httpx in a way that httpx deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SECRET = "hf_onlyforthetest"
REPOSITORY = "somebody/features"


class Hub:
    """The parts of the hub's HTTP interface that one upload and one download use; files are kept in memory."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.commits = 0
        self.tokens: set[str | None] = set()
        self.refuse = False
        self._large: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                hub.tokens.add(self.headers["Authorization"])
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                self.reply(*hub.post(urlsplit(self.path).path, body))

            def do_PUT(self) -> None:
                hub._large[self.path.rsplit("/", 1)[1]] = self.rfile.read(int(self.headers["Content-Length"]))
                self.reply(200, b"")

            def do_GET(self) -> None:
                self.reply(*hub.get(unquote(urlsplit(self.path).path)))

            def do_HEAD(self) -> None:
                self.reply(*hub.get(unquote(urlsplit(self.path).path)), head=True)

            def reply(self, status: int, content: Any, *, head: bool = False) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", hub.sha)
                self.end_headers()
                if not head:
                    self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.refuse:
            return 403, {"error": "this namespace is not yours"}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return 200, {"url": f"{self.endpoint}/datasets/{REPOSITORY}"}
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {name: "regular" if name.endswith((".json", ".md")) else "lfs" for name in names}
            return 200, {"files": [{"path": n, "uploadMode": mode[n], "shouldIgnore": False} for n in names]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [
                {**o, "actions": {"upload": {"href": f"{self.endpoint}/lfs/{o['oid']}"}}} for o in objects
            ]
            return 200, {"transfer": "basic", "objects": upload}
        assert "/commit/" in path, path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self._large[value["oid"]]
        self.commits += 1
        address = f"{self.endpoint}/datasets/{REPOSITORY}/commit/{self.sha}"
        return 200, {"commitUrl": address, "commitOid": self.sha, "pullRequestUrl": None}

    def get(self, path: str) -> tuple[int, Any]:
        if REPOSITORY not in path or self.refuse:
            return 404, {"error": "Repository not found"}
        if "/tree/" in path:
            return 200, [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
        if found := re.search(r"/resolve/[^/]+/(.+)", path):
            return 200, self.files[found[1]]
        return 200, {
            "id": REPOSITORY,
            "sha": self.sha,
            "siblings": [{"rfilename": name} for name in self.files],
        }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # 127.0.0.1 is all that is reached
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # plain large-file uploads
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    disable_progress_bars()
    hub = Hub()
    yield hub
    hub.close()
    enable_progress_bars()


@pytest.fixture(scope="module")
def folder(model: TransformerBridge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog of a random SAE over a few lines of text."""
    sae = saekit.SAE.new("topk", d_in=256, d_sae=64, k=8, site="blocks.3.hook_resid_pre", model="tiny")
    tokens = saekit.tokenize(
        [f"A small boat number {i} sailed past the old harbour." for i in range(12)], model, 32
    )
    folder = tmp_path_factory.mktemp("publish") / "catalog"
    saekit.Catalog.build(model, sae, tokens, folder)
    return folder


def test_what_is_published_is_the_folder_and_a_card(hub: Hub, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    address = publish(
        saekit.Catalog.open(folder), REPOSITORY, private=True, endpoint=hub.endpoint, token=SECRET
    )
    assert address == f"{hub.endpoint}/datasets/{REPOSITORY}"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    readme = hub.files.pop("README.md")
    assert hub.files == before
    assert hub.commits == 1
    assert hub.created[0]["type"] == "dataset"
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    assert hub.tokens == {f"Bearer {SECRET}"}
    assert all(SECRET.encode() not in data for data in [readme, *hub.files.values()])


def test_only_the_catalogs_own_files_leave(hub: Hub, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / ".env").write_text(f"HF_TOKEN={SECRET}")
    (copy / "notes.txt").write_text("private")
    publish(saekit.Catalog.open(copy), REPOSITORY, endpoint=hub.endpoint, token=SECRET)
    assert set(hub.files) == {*FILES, "README.md"}


def test_publish_again_then_fetch(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = saekit.Catalog.open(folder)
    for _ in range(2):
        publish(catalog, REPOSITORY, endpoint=hub.endpoint, token=SECRET)
    assert hub.commits == 2
    fetched = fetch(REPOSITORY, endpoint=hub.endpoint, token=SECRET)
    assert {path.name: path.read_bytes() for path in fetched.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    opened = saekit.Catalog.open(fetched)
    assert str(opened[3]) == str(catalog[3])
    monkeypatch.setattr("saekit.catalog.publish.fetch", lambda name: fetched if name == REPOSITORY else None)
    assert len(saekit.Catalog.open(REPOSITORY)) == len(catalog)


def test_a_broken_table_is_not_published(hub: Hub, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    catalog = saekit.Catalog.open(copy)
    (copy / "tokens.parquet").write_text(SECRET)
    with pytest.raises(InvalidInput, match=r"tokens\.parquet"):
        publish(catalog, REPOSITORY, endpoint=hub.endpoint, token=SECRET)
    assert not hub.created


def test_a_refusal_is_one_clear_line(hub: Hub, folder: Path) -> None:
    hub.refuse = True
    with pytest.raises(InvalidInput, match=r"did not take somebody/features.*403") as raised:
        publish(saekit.Catalog.open(folder), REPOSITORY, endpoint=hub.endpoint, token=SECRET)
    assert SECRET not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_had_is_missing(hub: Hub) -> None:
    with pytest.raises(FileMissing, match="somebody/nothing"):
        fetch("somebody/nothing", endpoint=hub.endpoint)
    with pytest.raises(FileMissing, match="somebody/nothing"):
        fetch("somebody/nothing", endpoint="http://127.0.0.1:9")  # nobody listens


@pytest.mark.parametrize(
    "name", ["alone", "a/b/c", "../a", "a/", "/a", "a b/c", "a--b/c", "x" * 200 + "/a", "a/b\0", ""]
)
def test_names_that_no_hub_has(folder: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="repository"):
        publish(saekit.Catalog.open(folder), name)
    with pytest.raises(InvalidInput, match="repository"):
        fetch(name)


def test_the_card_makes_the_tables_configurations(folder: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    catalog = saekit.Catalog.open(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text(card(catalog, REPOSITORY), "utf-8")
    for name in ("features", "logits"):
        rows = load_dataset(str(copy), name, split="train", cache_dir=str(tmp_path / "cache"))
        assert rows.column_names == SCHEMAS[name].names
        assert len(rows) == catalog.table(name).num_rows


def test_card(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    info = json.loads((copy / CATALOG).read_text("utf-8"))
    info["model"]["name"] = 'a: "b"\n---\n`# big`'  # must not end the front matter or start a heading
    (copy / CATALOG).write_text(json.dumps(info), "utf-8")
    text = card(saekit.Catalog.open(copy), REPOSITORY)
    _, front, body = text.split("---\n", 2)
    configs = yaml.safe_load(front)["configs"]
    assert [config["config_name"] for config in configs] == list(SCHEMAS) == list(TABLES)
    for config in configs:
        read_table(copy, Path(config["data_files"]).stem)
    assert "\n# big" not in body
    for part in (*info["definitions"].values(), "<|endoftext|>", "saekit.Catalog.open", "compare", "Limits"):
        assert part in body
