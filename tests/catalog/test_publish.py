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
from catalog.brute import made

import saekit
from saekit.catalog.card import TABLES, card, public, score_summary
from saekit.catalog.publish import FILES, fetch, publish
from saekit.catalog.tables import CATALOG, SCHEMAS, read_table, write_table
from saekit.errors import FileMissing, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator

# huggingface_hub's own large-file upload calls httpx in a way that httpx deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SECRET = "hf_onlyforthetest"
REPOSITORY = "somebody/features"


class Hub:
    """The parts of the hub's HTTP interface that uploads and downloads of single files use.

    Every commit is kept, in memory; `got` holds the names of files that were downloaded, in order.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.history: dict[str, dict[str, bytes]] = {}
        self.got: list[str] = []
        self.private = False
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
                path = unquote(urlsplit(self.path).path)
                hub.got += re.findall(r"/resolve/[^/]+/(.+)", path)
                self.reply(*hub.get(path), commit=hub.commit(path))

            def do_HEAD(self) -> None:
                path = unquote(urlsplit(self.path).path)
                self.reply(*hub.get(path), commit=hub.commit(path), head=True)

            def reply(
                self, status: int, content: Any, *, commit: str | None = None, head: bool = False
            ) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", commit or hub.sha)
                self.end_headers()
                if not head:
                    self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
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
        self.history[self.sha] = dict(self.files)
        address = f"{self.endpoint}/datasets/{REPOSITORY}/commit/{self.sha}"
        return 200, {"commitUrl": address, "commitOid": self.sha, "pullRequestUrl": None}

    def commit(self, path: str) -> str | None:
        """The commit that an address asks for."""
        asked = re.search(r"/resolve/([^/]+)/", path)
        return asked[1] if asked and asked[1] in self.history else None

    def get(self, path: str) -> tuple[int, Any]:
        if REPOSITORY not in path or self.refuse:
            return 404, {"error": "Repository not found"}
        if found := re.search(r"/resolve/([^/]+)/(.+)", path):
            files = self.history.get(found[1], self.files if found[1] == "main" else {})
            return (200, files[found[2]]) if found[2] in files else (404, {"error": "Entry not found"})
        return 200, {"id": REPOSITORY, "sha": self.sha, "private": self.private, "siblings": []}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # 127.0.0.1 is all that is reached
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # plain large-file uploads
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    disable_progress_bars()
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(
        "huggingface_hub.utils._http.time.sleep", lambda seconds: None
    )  # before it tries again
    yield hub
    hub.close()
    enable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("publish") / "catalog")


def other(folder: Path, place: Path, seed: int = 1) -> saekit.Catalog:
    """A catalog that differs in every table from the one in `folder`."""
    return saekit.Catalog.open(made(place, seed=seed))


def rewrite(folder: Path, place: Path, change: Any) -> saekit.Catalog:
    """A copy of a catalog with another description."""
    copy = shutil.copytree(folder, place)
    info = json.loads((copy / CATALOG).read_text("utf-8"))
    change(info)
    (copy / CATALOG).write_text(json.dumps(info), "utf-8")
    return saekit.Catalog.open(copy)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Up


def test_what_is_published_is_the_folder_and_a_card(hub: Hub, folder: Path) -> None:
    before = content(folder)
    hub.private = True
    address = publish(
        saekit.Catalog.open(folder), REPOSITORY, private=True, endpoint=hub.endpoint, token=SECRET
    )
    assert address == f"{hub.endpoint}/datasets/{REPOSITORY}"
    assert content(folder) == before
    readme = hub.files.pop("README.md")
    assert hub.files == before
    assert set(before) == set(FILES)
    assert hub.commits == 1
    assert hub.created[0]["type"] == "dataset"
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    assert hub.tokens == {f"Bearer {SECRET}"}
    assert all(SECRET.encode() not in data for data in [readme, *hub.files.values()])


def test_only_the_catalogs_own_files_leave(hub: Hub, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / ".env").write_text(f"HF_TOKEN={SECRET}")
    (copy / "notes.txt").write_text("private")
    publish(saekit.Catalog.open(copy), REPOSITORY, token=SECRET)
    assert set(hub.files) == {*FILES, "README.md"}


def test_nothing_private_goes_where_all_can_see_it(hub: Hub, folder: Path) -> None:
    with pytest.raises(InvalidInput, match="somebody/features is there already, and public"):
        publish(saekit.Catalog.open(folder), REPOSITORY, private=True, token=SECRET)
    assert not hub.commits


def test_a_broken_table_is_not_published(hub: Hub, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    catalog = saekit.Catalog.open(copy)
    (copy / "tokens.parquet").write_text(SECRET)
    with pytest.raises(InvalidInput, match=r"tokens\.parquet"):
        publish(catalog, REPOSITORY, token=SECRET)
    assert not hub.created


def test_a_refusal_is_one_clear_line(hub: Hub, folder: Path) -> None:
    hub.refuse = True
    with pytest.raises(InvalidInput, match=r"did not take somebody/features.*403") as raised:
        publish(saekit.Catalog.open(folder), REPOSITORY, endpoint=hub.endpoint, token=SECRET)
    assert SECRET not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_to_wandb_as_well(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr(
        "saekit.catalog.artifact.artifact", lambda catalog, name: sent.append((catalog.path, name))
    )
    catalog = saekit.Catalog.open(folder)
    publish(catalog, REPOSITORY, token=SECRET)
    assert not sent
    publish(catalog, REPOSITORY, wandb=True, token=SECRET)
    assert sent == [(folder, "features")]

    def refuse(*_: Any, **__: Any) -> None:
        raise InvalidInput("wandb did not take it")

    monkeypatch.setattr("saekit.catalog.artifact.artifact", refuse)
    with pytest.raises(InvalidInput, match=f"published as {hub.endpoint}.*, but wandb did not take it"):
        publish(catalog, REPOSITORY, wandb=True, token=SECRET)
    assert hub.commits == 3


@pytest.mark.parametrize(
    ("name", "shown", "local"),
    [
        ("/data/ann/models/her-gpt", "her-gpt", True),
        ("~/models/her-gpt/", "her-gpt", True),
        ("../ann/her-gpt", "her-gpt", True),
        ("C:\\Users\\ann\\her-gpt", "her-gpt", True),
        ("/data/ann/.cache/huggingface/hub/models--org--her-gpt/snapshots/0123abc", "org/her-gpt", False),
        ("org/her-gpt", "org/her-gpt", False),
        ("tiny", "tiny", False),
    ],
)
def test_paths_of_this_machine_stay_here(
    hub: Hub, folder: Path, tmp_path: Path, name: str, shown: str, local: bool
) -> None:
    def change(info: dict[str, Any]) -> None:
        info["model"]["name"] = info["sae"]["metadata"]["model_name"] = name
        info["sae"]["metadata"]["training"] = {"text": ["/data/ann/texts/diary.txt"], "of": f"model {name}"}
        info["corpus"]["label"] = "/data/ann/texts"

    publish(rewrite(folder, tmp_path / "copy", change), REPOSITORY, token=SECRET)
    assert not [file for file, data in hub.files.items() if re.search(rb"\bann\b", data)]
    info = json.loads(hub.files[CATALOG])
    assert info["model"] == {
        "name": shown, "hash": "0" * 64, "tokenizer_hash": "0" * 64, "dtype": "float32",
        **({"local": True} if local else {}),
    }  # fmt: skip
    assert info["sae"]["metadata"]["model_name"] == shown
    assert info["sae"]["metadata"]["training"] == {"text": ["diary.txt"], "of": f"model {shown}"}
    assert info["corpus"]["label"] == "texts"
    readme = hub.files["README.md"].decode()
    assert ("read from a local folder" in readme) == local == ("path/to/your/copy" in readme)
    assert saekit.Catalog.open(REPOSITORY).model_name == shown


def test_a_folder_beside_us_is_no_hub_id(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = json.loads((folder / CATALOG).read_text("utf-8"))
    info["model"]["name"] = "org/her-gpt"
    assert public(info) == info
    (tmp_path / "org" / "her-gpt").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public(info)["model"] == info["model"] | {"name": "her-gpt", "local": True}


# Down


def test_published_again_and_fetched_whole(hub: Hub, folder: Path) -> None:
    catalog = saekit.Catalog.open(folder)
    for _ in range(2):
        publish(catalog, REPOSITORY, token=SECRET)
    assert hub.commits == 2
    fetched = fetch(REPOSITORY, endpoint=hub.endpoint, token=SECRET)
    assert content(fetched) == content(folder)
    assert str(saekit.Catalog.open(fetched)[3]) == str(catalog[3])


def test_opening_pulls_only_what_is_asked_for(hub: Hub, folder: Path) -> None:
    catalog = saekit.Catalog.open(folder)
    publish(catalog, REPOSITORY, token=SECRET)
    opened = saekit.Catalog.open(REPOSITORY)
    assert hub.got == [CATALOG, "features.parquet"]
    assert opened[3].density == catalog[3].density
    assert opened[3].logits_top == catalog[3].logits_top
    assert hub.got == [CATALOG, "features.parquet", "logits.parquet", "vocabulary.parquet"]
    assert str(opened[3]) == str(catalog[3])
    assert "directions.safetensors" not in hub.got
    assert opened[3].direction.equal(catalog[3].direction)
    assert len(hub.got) == len(set(hub.got))  # nothing twice
    saekit.Catalog.open(REPOSITORY)
    assert len(hub.got) == len(set(hub.got))


def test_two_catalogs_are_never_mixed(hub: Hub, folder: Path, tmp_path: Path) -> None:
    first, second = saekit.Catalog.open(folder), other(folder, tmp_path / "second")
    publish(first, REPOSITORY, token=SECRET)
    opened = saekit.Catalog.open(REPOSITORY)
    publish(second, REPOSITORY, token=SECRET)
    assert not second.table("tokens").equals(first.table("tokens"))
    assert opened.table("tokens").equals(first.table("tokens"))
    assert saekit.Catalog.open(REPOSITORY).table("tokens").equals(second.table("tokens"))


def test_an_older_revision(hub: Hub, folder: Path, tmp_path: Path) -> None:
    publish(saekit.Catalog.open(folder), REPOSITORY, token=SECRET)
    then = hub.sha
    second = other(folder, tmp_path / "second")
    publish(second, REPOSITORY, token=SECRET)
    assert fetch(REPOSITORY, "tokens.parquet", then).read_bytes() == (folder / "tokens.parquet").read_bytes()
    assert fetch(REPOSITORY, "tokens.parquet", then).parent.name == then
    assert content(fetch(REPOSITORY, revision="main")) == content(second.path)
    with pytest.raises(FileMissing, match=r"tokens\.parquet"):
        fetch(REPOSITORY, "tokens.parquet", "never")
    for revision in ("", "../x", "a b", "x" * 200, "-x"):
        with pytest.raises(InvalidInput, match="revision"):
            fetch(REPOSITORY, CATALOG, revision)


def test_without_a_network_what_is_in_the_cache_opens(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    publish(saekit.Catalog.open(folder), REPOSITORY, token=SECRET)
    _ = saekit.Catalog.open(REPOSITORY)[3].top_tokens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    opened = saekit.Catalog.open(REPOSITORY)
    assert opened[3].top_tokens == saekit.Catalog.open(folder)[3].top_tokens
    with pytest.raises(FileMissing, match=r"contexts\.parquet") as raised:
        _ = opened[3].contexts
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["README.md", "../catalog.json", "/etc/passwd", "catalog.json/..", "x.pkl", ""]
)
def test_only_a_catalogs_files_are_fetched(hub: Hub, folder: Path, name: str) -> None:
    publish(saekit.Catalog.open(folder), REPOSITORY, token=SECRET)
    with pytest.raises(InvalidInput, match="not one of a catalog's"):
        fetch(REPOSITORY, name)
    assert not hub.got


def test_what_is_out_of_proportion_is_not_downloaded(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(saekit.Catalog.open(folder), REPOSITORY, token=SECRET)
    size = (folder / "contexts.parquet").stat().st_size
    monkeypatch.setattr("saekit.catalog.publish.MAX_TABLE_BYTES", size - 1)
    with pytest.raises(InvalidInput, match=rf"contexts\.parquet has {size:,} bytes"):
        fetch(REPOSITORY, "contexts.parquet")
    assert not hub.got
    monkeypatch.setattr("saekit.catalog.publish.MAX_TABLE_BYTES", size)
    fetch(REPOSITORY, "contexts.parquet")
    monkeypatch.setattr("saekit.catalog.publish.MAX_ROWS", 10)
    with pytest.raises(InvalidInput, match="at most 10 are read"):
        fetch(REPOSITORY, "contexts.parquet")


def test_a_broken_file_on_the_hub_is_named(hub: Hub, folder: Path) -> None:
    publish(saekit.Catalog.open(folder), REPOSITORY, token=SECRET)
    for files in (hub.files, hub.history[hub.sha]):
        files["tokens.parquet"] = b"junk" * 100
    with pytest.raises(InvalidInput, match=r"tokens\.parquet"):
        _ = saekit.Catalog.open(REPOSITORY)[3].top_tokens


def test_what_cannot_be_had_is_missing(hub: Hub) -> None:
    with pytest.raises(FileMissing, match="somebody/nothing"):
        saekit.Catalog.open("somebody/nothing")
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


# The card


def front_and_body(text: str) -> tuple[dict[str, Any], str]:
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_makes_the_tables_configurations(folder: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    catalog = saekit.Catalog.open(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    text = card(catalog, REPOSITORY)
    (copy / "README.md").write_text(text, "utf-8")
    names = [config["config_name"] for config in front_and_body(text)[0]["configs"]]
    assert names == [name for name in SCHEMAS if catalog.table(name).num_rows]
    for name in names:
        rows = load_dataset(str(copy), name, split="train", cache_dir=str(tmp_path / "cache"))
        assert rows.column_names == SCHEMAS[name].names
        assert len(rows) == catalog.table(name).num_rows


def test_what_the_card_says(folder: Path, tmp_path: Path) -> None:
    def change(info: dict[str, Any]) -> None:
        info["model"]["name"] = 'a: "b"\n---\n`# big`'  # must not end the front matter or start a heading

    catalog = rewrite(folder, tmp_path / "copy", change)
    front, body = front_and_body(card(catalog, REPOSITORY))
    assert set(SCHEMAS) == set(TABLES)
    for config in front["configs"]:
        read_table(catalog.path, Path(config["data_files"]).stem)
    assert [config["config_name"] for config in front["configs"] if config["default"]] == ["features"]
    assert front["size_categories"] == ["n<1K"]
    assert "\n# big" not in body
    info = catalog.info
    for part in (
        *info["definitions"].values(), *info["excluded"], "saekit.Catalog.open", "compare", "Limits", "duckdb.sql",
        "pandas.read_parquet", "polars.scan_parquet", "load_dataset", "does not know the licence", info["model"]["hash"],
        "above 10 times the median", "23 features fired",
    ):  # fmt: skip
        assert part in body, part


@pytest.mark.parametrize(
    ("licence", "keys", "said"),
    [
        (None, {}, "does not know the licence"),
        ("CC-BY-4.0", {"license": "cc-by-4.0"}, "`CC-BY-4.0`"),
        (
            "Project Gutenberg  License",
            {"license": "other", "license_name": "project-gutenberg-license"},
            "`Project Gutenberg License`",
        ),
    ],
)
def test_the_corpus_licence(
    folder: Path, tmp_path: Path, licence: str | None, keys: dict[str, str], said: str
) -> None:
    front, body = front_and_body(card(saekit.Catalog.open(folder), REPOSITORY, licence=licence))
    assert {key: value for key, value in front.items() if key.startswith("license")} == keys
    assert said in body
    known = rewrite(folder, tmp_path / "copy", lambda info: info["corpus"].update(licence=licence))
    assert card(known, REPOSITORY) == card(saekit.Catalog.open(folder), REPOSITORY, licence=licence)
    assert front_and_body(card(known, REPOSITORY, licence="mit"))[0]["license"] == "mit"


def test_metrics_and_how_well_features_are_explained(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    n = [0.9, 0.6, 0.5, None, 0.2]
    rows = {
        "feature": [*range(5), 0],
        "method": ["tokens"] * 6,
        "model": ["", "", "", "", "", "a|b"],
        "prompt": [""] * 6,
        "scorer": ["pearson"] * 6,
        "judge": [""] * 6,
        "judge_prompt": [""] * 6,
        "score": [*n, 0.7],
        "control": [0.1, 0.55, 0.0, None, None, None],
        "n": [20] * 6,
        "failures": [0] * 6,
    }
    write_table(copy, "scores", rows)
    catalog = saekit.Catalog.open(copy)
    assert score_summary(catalog) == [
        {"method": "tokens", "model": "", "scorer": "pearson", "judge": "", "features": 4, "above": 2,
         "control_above": 1, "median": "0.55", "undefined": 1},
        {"method": "tokens", "model": "a|b", "scorer": "pearson", "judge": "", "features": 1, "above": 1,
         "control_above": None, "median": "0.70", "undefined": 0},
    ]  # fmt: skip
    text = card(catalog, REPOSITORY, metrics={"l0": 31.5, "explained_variance": 0.87})
    assert "| `tokens` | `–` | `pearson` | `–` | 4 | 2 | 1 | 0.55 | 1 |" in text
    assert r"| `a\|b` | `pearson` | `–` | 1 | 1 | – | 0.70 | 0 |" in text
    assert "| `explained_variance` | 0.87 |" in text
    for wrong in ({"l0": float("nan")}, {"l0": "3"}, {"l0": True}, {"l0": {"mean": 3}}):
        with pytest.raises(InvalidInput, match="metrics: l0"):
            card(catalog, REPOSITORY, metrics=wrong)
    with pytest.raises(InvalidInput, match="licence"):
        card(catalog, REPOSITORY, licence="  ")
