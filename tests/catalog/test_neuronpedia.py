"""Neuronpedia: the files its importer reads, key by key, and the upload against a server that checks what the real one does."""

from __future__ import annotations

import gzip
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from catalog.brute import Options, made

import saekit
from saekit.catalog.feature import Bin
from saekit.catalog.neuronpedia import _bars, export, upload
from saekit.catalog.tables import CATALOG, write_table
from saekit.errors import InvalidInput, UnknownFeature

KEY = "sk-np-onlyforthetest"
MODEL, SET = "made-up", "res-x"

# The columns of its database that an export may fill (`schema.prisma`), those without a default in the second half.
FEATURE = set(
    "modelId layer index sourceSetName creatorId maxActApprox hasVector vector vectorLabel vectorDefaultSteerStrength "
    "hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices neuron_alignment_values neuron_alignment_l1 "
    "correlated_neurons_indices correlated_neurons_pearson correlated_neurons_l1 correlated_features_indices "
    "correlated_features_pearson correlated_features_l1 neg_str neg_values pos_str pos_values frac_nonzero "
    "freq_hist_data_bar_heights freq_hist_data_bar_values logits_hist_data_bar_heights logits_hist_data_bar_values "
    "decoder_weights_dist".split()
)
ACTIVATION = set(
    "id tokens dataIndex index layer modelId dataSource maxValue maxValueTokenIndex minValue values dfaValues "
    "dfaTargetIndex dfaMaxValue creatorId lossValues logitContributions binMin binMax binContains "
    "qualifyingTokenIndex".split()
)
EXPLANATION = set("id modelId layer index authorId description notes typeName explanationModelName".split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made up, with neurons, explanations, and a token without text."""
    folder = made(tmp_path_factory.mktemp("neuronpedia") / "catalog", options=Options(per_band=2))
    write_table(
        folder,
        "explanations",
        {
            "feature": [0, 0, 1, 3], "method": ["tokens", "llm", "note", "tokens"], "model": ["", "gpt-x", "ann", ""],
            "prompt": ["", "abc", "", ""], "text": ["the", "articles", "n" * 600, "\0 "],
        },
    )  # fmt: skip
    write_table(
        folder, "neurons",
        {"feature": [0, 0, 5], "rank": [0, 1, 0], "neuron": [7, 2, 1], "cosine": [-0.9, 0.3, 0.5]},
    )  # fmt: skip
    words = saekit.Catalog.open(folder).vocabulary
    write_table(
        folder, "vocabulary",
        {"token_id": np.arange(len(words)), "token": [words[0], "", "a\0b", *words[3:]]},
    )  # fmt: skip
    return folder


@pytest.fixture
def catalog(folder: Path) -> saekit.Catalog:
    return saekit.Catalog.open(folder)


def lines(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def near(values: Any) -> Any:
    return pytest.approx(values, rel=1e-5, abs=1e-12)


# Export


def test_the_import_layout(catalog: saekit.Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saekit.catalog.neuronpedia.BATCH", 10)
    place = export(
        catalog, tmp_path, model_id=MODEL, source_set=SET, release="r-1", title="A title", creator="Ann",
        creator_id="user1", url="https://example.org", repository="ann/sae",
    )  # fmt: skip
    assert place == tmp_path / MODEL / f"2-{SET}"
    assert sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()) == sorted(
        ["release.jsonl", "model.jsonl", "sourceset.jsonl", "source.jsonl", "explanations/batch-0.jsonl.gz"]
        + [f"{part}/batch-{n}.jsonl.gz" for part in ("features", "activations") for n in range(3)]
    )
    (release,), (model,), (source_set,), (source,) = (
        lines(place / f"{name}.jsonl") for name in ("release", "model", "sourceset", "source")
    )
    assert (release["name"], release["description"], release["creatorName"]) == ("r-1", "A title", "Ann")
    assert release["urls"] == source_set["urls"] == ["https://example.org"]
    assert model["id"] == source_set["modelId"] == source["modelId"] == MODEL
    assert source_set["name"] == source["setName"] == SET
    assert source_set["releaseName"] == "r-1"
    assert source["id"] == f"2-{SET}"
    assert source["hfRepoId"] == "ann/sae"
    assert (source["num_prompts"], source["num_tokens_in_prompt"]) == (40, 24)
    assert source["saelensConfig"] == catalog.info["sae"]
    assert {row["creatorId"] for row in (release, model, source_set, source)} == {"user1"}
    features = [row for n in range(3) for row in lines(place / f"features/batch-{n}.jsonl.gz")]
    assert [row["index"] for row in features] == [str(i) for i in range(24)]
    assert [len(lines(place / f"features/batch-{n}.jsonl.gz")) for n in range(3)] == [10, 10, 4]


def test_a_features_keys(catalog: saekit.Catalog, tmp_path: Path) -> None:
    rows = lines(
        export(catalog, tmp_path, model_id=MODEL, source_set=SET, layer=9) / "features/batch-0.jsonl.gz"
    )
    for row, feature in zip(rows, catalog, strict=True):
        assert set(row) == FEATURE
        assert (row["modelId"], row["layer"], row["sourceSetName"]) == (MODEL, f"9-{SET}", SET)
        assert row["maxActApprox"] == row["vectorDefaultSteerStrength"] == near(feature.max_activation)
        assert row["frac_nonzero"] == near(feature.density)
        assert row["hasVector"]
        assert row["vector"] == near(feature.direction.tolist())
        assert row["hookName"] == catalog.site
        assert row["topkCosSimIndices"] == [n.feature for n in feature.neighbours]
        assert row["topkCosSimValues"] == near([n.similarity for n in feature.neighbours])
        assert row["pos_values"] == near([t.effect for t in feature.logits_top])
        assert row["neg_values"] == near([t.effect for t in feature.logits_bottom])
        assert [t.token for t in feature.logits_top if t.token.startswith(" ")] == [
            t for t in row["pos_str"] if t.startswith(" ")
        ]
        assert all(row["pos_str"] + row["neg_str"])
        assert sum(row["freq_hist_data_bar_heights"]) == sum(b.count for b in feature.histogram)
        assert sum(row["logits_hist_data_bar_heights"]) == len(catalog.vocabulary)
        for kind in ("freq", "logits"):
            values, heights = (row[f"{kind}_hist_data_bar_{what}"] for what in ("values", "heights"))
            assert len(values) == len(heights)
            assert values == sorted(values)
        assert row["neuron_alignment_indices"] == []  # of no MLP's site
    assert not rows[23]["freq_hist_data_bar_values"]  # it never fired
    without = export(catalog, tmp_path / "b", model_id=MODEL, source_set=SET, vectors=False)
    (row, *_) = lines(without / "features/batch-0.jsonl.gz")
    assert row["vector"] == []
    assert not row["hasVector"]


def test_neurons_of_an_mlps_site(catalog: saekit.Catalog, tmp_path: Path) -> None:
    catalog.target_site = "blocks.2.mlp.hook_post"
    rows = lines(export(catalog, tmp_path, model_id=MODEL, source_set=SET) / "features/batch-0.jsonl.gz")
    direction = catalog[0].direction
    assert rows[0]["neuron_alignment_indices"] == [7, 2]
    assert rows[0]["neuron_alignment_values"] == near([float(direction[7]), float(direction[2])])
    total = float(direction.abs().sum())
    assert rows[0]["neuron_alignment_l1"] == near([abs(float(direction[n])) / total for n in (7, 2)])


def test_an_activations_keys(catalog: saekit.Catalog, tmp_path: Path) -> None:
    rows = lines(export(catalog, tmp_path, model_id=MODEL, source_set=SET) / "activations/batch-0.jsonl.gz")
    assert len({row["id"] for row in rows}) == len(rows) == catalog.table("contexts").num_rows
    for feature in catalog:
        own = [row for row in rows if row["index"] == str(feature.index)]
        top = [row for row in own if row["binMin"] == -1]
        assert len(top) == len(feature.contexts)
        for row, context in zip(top, feature.contexts, strict=True):
            assert set(row) == ACTIVATION
            assert row["binContains"] == -1
            assert row["binMax"] == near(feature.max_activation)
            assert row["values"] == near(context.activations)
            assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
            assert row["minValue"] == min(row["values"])
            assert row["qualifyingTokenIndex"] == context.peak
            assert row["dataIndex"] == str(context.document)
            assert len(row["tokens"]) == len(row["values"])
            assert all(token and "\0" not in token for token in row["tokens"])
            assert (row["modelId"], row["layer"]) == (MODEL, f"2-{SET}")
        for band in feature.bands:
            here = [row for row in own if row["binMax"] == near(band.high) and row["binMin"] >= 0]
            assert len(here) == len(band.contexts)
            for row, context in zip(here, band.contexts, strict=True):
                assert row["binMin"] == near(band.low)
                assert row["binContains"] == near(band.share * feature.density)
                assert band.low < row["values"][row["qualifyingTokenIndex"]] <= band.high * 1.00001
                assert row["values"] == near(context.activations)


def test_explanations_go_along_with_how_they_were_made(catalog: saekit.Catalog, tmp_path: Path) -> None:
    rows = lines(export(catalog, tmp_path, model_id=MODEL, source_set=SET) / "explanations/batch-0.jsonl.gz")
    assert all(set(row) == EXPLANATION for row in rows)
    said = [(row["index"], row["description"], row["notes"]) for row in rows]
    assert said == [
        ("0", "the", "saekit: tokens"),
        ("0", "articles", "saekit: llm by gpt-x"),
        ("1", "n" * 600, "saekit: note by ann"),
    ]


def test_the_same_catalog_gives_the_same_bytes(catalog: saekit.Catalog, tmp_path: Path) -> None:
    first, second = (export(catalog, tmp_path / name, model_id=MODEL, source_set=SET) for name in ("a", "b"))
    again = export(catalog, tmp_path / "a", model_id=MODEL, source_set=SET)  # in place of the first
    assert again == first
    for path in first.rglob("*.*"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path
        assert path.suffix != ".gz" or path.read_bytes()[4:8] == bytes(4), f"{path}: holds the time"


def test_a_batch_without_rows_makes_no_file(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in ("explanations", "contexts", "activations"):
        table = saekit.Catalog.open(folder).table(name).slice(0, 0)
        write_table(copy, name, {column: table[column].to_pylist() for column in table.column_names})
    place = export(saekit.Catalog.open(copy), tmp_path / "out", model_id=MODEL, source_set=SET)
    assert {path.name for path in place.iterdir() if path.is_dir()} == {"features"}


def test_a_figure_that_is_none_is_named(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    table = saekit.Catalog.open(folder).table("logits")
    columns = {name: table[name].to_pylist() for name in table.column_names}
    columns["effect"][0] = float("nan")
    write_table(copy, "logits", columns)
    with pytest.raises(InvalidInput, match="not finite"):
        export(saekit.Catalog.open(copy), tmp_path / "out", model_id=MODEL, source_set=SET)


def test_nothing_half_is_left(
    catalog: saekit.Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saekit.catalog.neuronpedia._explanations", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(catalog, tmp_path, model_id=MODEL, source_set=SET)
    assert not list((tmp_path / MODEL).iterdir())


@pytest.mark.parametrize("name", ["../x", "A", "a/b", "", ".", "-x", "a b", "x" * 200])
def test_names_that_are_no_addresses(catalog: saekit.Catalog, tmp_path: Path, name: str) -> None:
    good = {"model_id": MODEL, "source_set": SET, "release": "r"}
    for what in good:
        if (what, name) != ("release", ""):  # without one, the set's name is taken
            with pytest.raises(InvalidInput, match=what):
                export(catalog, tmp_path / "out", **good | {what: name})
    assert not (tmp_path / "out").exists()


def test_a_site_without_a_layer_needs_one(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    info = json.loads((copy / CATALOG).read_text("utf-8"))
    (copy / CATALOG).write_text(json.dumps(info | {"site": "hook_embed"}), "utf-8")
    catalog = saekit.Catalog.open(copy)
    with pytest.raises(InvalidInput, match="layer: the site hook_embed has none"):
        export(catalog, tmp_path / "out", model_id=MODEL, source_set=SET)
    assert export(catalog, tmp_path / "out", model_id=MODEL, source_set=SET, layer=0).name == f"0-{SET}"


def test_gaps_in_a_histogram_are_bars_of_height_zero() -> None:
    even = np.float32(np.linspace(-1, 3, 41))
    bins = [Bin(float(even[i]), float(even[i + 1]), n) for i, n in ((0, 2), (3, 5), (39, 1))]
    values, heights = _bars(bins, even=True)
    assert values == pytest.approx(((even[:-1] + even[1:]) / 2).tolist(), abs=1e-5)
    assert [(i, n) for i, n in enumerate(heights) if n] == [(0, 2), (3, 5), (39, 1)]
    log = np.float32(10 ** (np.arange(9) / 8))
    bins = [Bin(float(log[i]), float(log[i + 1]), n) for i, n in ((1, 4), (6, 3))]
    values, heights = _bars(bins, even=False)
    assert values == pytest.approx(((log[1:7] + log[2:8]) / 2).tolist(), rel=1e-5)
    assert heights == [4, 0, 0, 0, 0, 3]
    assert _bars([], even=True) == ([], [])
    assert _bars([Bin(0.0, 0.0, 7)], even=True) == ([0.0], [7])


# Upload


class Server:
    """Neuronpedia's upload and its look at one feature; `failures` come first: a status, or what to do instead."""

    def __init__(self) -> None:
        self.features: dict[int, dict[str, Any]] = {}
        self.batches: list[list[int]] = []
        self.failures: list[Any] = []
        self.headers: dict[str, str] = {}
        self.most_bytes = 10**9
        self.uploads = self.looks = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.uploads += 1
                assert self.path == "/api/feature/upload-batch"
                failure = server.failures.pop(0) if server.failures else None
                if self.headers["X-Api-Key"] != KEY:
                    self.reply(401, {"error": "Unauthorized"})
                elif len(body) > server.most_bytes:
                    self.reply(413, "Payload too large")
                elif failure == "lost":  # it arrives, and the answer does not
                    server.take(json.loads(body))
                    self.close_connection = True
                elif failure == "dropped":  # it does not arrive either
                    self.close_connection = True
                elif failure:
                    self.reply(*failure)
                else:
                    self.reply(*server.take(json.loads(body)))

            def do_GET(self) -> None:
                server.looks += 1
                index = int(self.path.removeprefix(f"/api/feature/{MODEL}/2-{SET}/"))
                self.reply(200, server.features.get(index))

            def reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def take(self, body: Any) -> tuple[int, Any]:
        """What `upload-batch/route.tsx` checks, and then the rows."""
        try:
            assert set(body) == {"modelId", "source", "features"}
            assert (body["modelId"], body["source"]) == (MODEL, f"2-{SET}")
            assert 1 <= len(body["features"]) <= 128
            assert len({f["index"] for f in body["features"]}) == len(body["features"])
            for f in body["features"]:
                assert set(f) == {
                    "index",
                    "density",
                    "topLogits",
                    "bottomLogits",
                    "explanations",
                    "activations",
                }
                assert 0 <= f["density"] <= 1
                for logits in (f["topLogits"], f["bottomLogits"]):
                    assert len(logits) <= 20
                    assert all(set(t) == {"token", "value"} and t["token"] for t in logits)
                assert all(set(e) == {"text"} and 1 <= len(e["text"]) <= 512 for e in f["explanations"])
                assert f["activations"]
                for a in f["activations"]:
                    assert 1 <= len(a["tokens"]) == len(a["values"]) <= 1024
                    assert all(token and "\0" not in token for token in a["tokens"])
                    share = a["quantileFraction"]
                    assert share is None or 0 <= share <= 1
                    assert (share is None) == (a["quantileMin"] is None) == (a["quantileMax"] is None)
        except AssertionError as error:
            return 400, {"error": f"invalid: {error}"}
        self.batches.append([f["index"] for f in body["features"]])
        for f in body["features"]:
            kept = self.features.setdefault(f["index"], f | {"activations": []})
            kept["activations"] = (
                kept["activations"] + f["activations"]
            )  # nothing keeps them from coming twice
        return 200, {"message": f"{len(body['features'])} features created."}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("saekit.catalog.neuronpedia.time.sleep", waited.append)
    return waited


@pytest.fixture
def send(server: Server, catalog: saekit.Catalog, waits: list[float]) -> Callable[..., Any]:
    def send(**options: Any) -> Any:
        given = {"model_id": MODEL, "source": f"2-{SET}", "base_url": server.address, **options}
        return upload(catalog, **given)

    return send


def test_all_that_fires_is_uploaded(
    server: Server, catalog: saekit.Catalog, send: Callable[..., Any]
) -> None:
    steps: list[tuple[int, int]] = []
    done = send(batch=10, progress=lambda *step: steps.append(step))
    assert (done.features, done.calls, done.silent) == (23, 3, 1)
    assert steps == [(10, 23), (20, 23), (23, 23)]
    assert server.batches == [list(range(10)), list(range(10, 20)), [20, 21, 22]]
    for feature in list(catalog)[:23]:
        got = server.features[feature.index]
        assert got["density"] == near(feature.density)
        assert [t["value"] for t in got["topLogits"]] == near([t.effect for t in feature.logits_top])
        assert [t["value"] for t in got["bottomLogits"]] == near([t.effect for t in feature.logits_bottom])
        top = [a for a in got["activations"] if a["quantileMin"] is None]
        assert [a["values"] for a in top] == [near(c.activations) for c in feature.contexts]
        banded = [a for a in got["activations"] if a["quantileMin"] is not None]
        assert len(banded) == sum(len(band.contexts) for band in feature.bands)
    said = [e["text"] for e in server.features[0]["explanations"]]
    assert set(said) == {"the", "articles"}
    assert said[0] == catalog[0].explanation
    assert server.features[1]["explanations"] == [{"text": "n" * 511 + "…"}]


def test_chosen_features_and_where_to_go_on(server: Server, send: Callable[..., Any]) -> None:
    send(features=[7, 3, 3, 23, 12], start=5)
    assert server.batches == [[7, 12]]
    with pytest.raises(UnknownFeature):
        send(features=[99])


def test_passing_failures_are_tried_again(
    server: Server, send: Callable[..., Any], waits: list[float]
) -> None:
    server.failures = [(500, {"error": "Failed"}), (429, {"error": "slow"}, {"Retry-After": "7"}), (503, "")]
    assert send(batch=12).calls == 5
    assert waits == [1.0, 7.0, 4.0]
    assert server.batches == [list(range(12)), list(range(12, 23))]


@pytest.mark.parametrize("failure", ["lost", "dropped", (504, "gateway")])
def test_no_context_comes_twice_where_an_answer_is_lost(
    server: Server, catalog: saekit.Catalog, send: Callable[..., Any], failure: Any
) -> None:
    server.failures = [failure]
    send(batch=23)
    assert server.uploads == (1 if failure == "lost" else 2)
    contexts = catalog.table("contexts")["feature"].to_numpy()
    assert {i: len(f["activations"]) for i, f in server.features.items()} == {
        i: int((contexts == i).sum()) for i in range(23)
    }


def test_a_call_that_is_too_large_is_halved(server: Server, send: Callable[..., Any]) -> None:
    server.most_bytes = 60_000
    send()
    assert [i for batch in server.batches for i in batch] == list(range(23))
    assert max(map(len, server.batches)) < 23


def test_a_refusal_says_which_features_and_how_to_go_on(
    server: Server, send: Callable[..., Any], waits: list[float]
) -> None:
    server.failures = [None, (400, {"error": f"no such source\n set, key {KEY}", "path": "x"})]
    with pytest.raises(
        InvalidInput, match="features 10 … 19 were not taken.*400 no such source set, key …"
    ) as raised:
        send(batch=10)
    assert "go on with start=10" in str(raised.value)
    assert KEY not in str(raised.value)
    assert not waits
    assert send(batch=10, start=10).features == 13
    assert sorted(server.features) == list(range(23))


def test_it_gives_up_in_the_end(server: Server, send: Callable[..., Any], waits: list[float]) -> None:
    server.failures = [(503, {"error": "down"})] * 9
    with pytest.raises(InvalidInput, match="features 0 … 22 .*503 down"):
        send(retries=2)
    assert server.uploads == 3
    with pytest.raises(InvalidInput, match="no answer"):
        send(base_url="http://127.0.0.1:9", retries=1)


@pytest.mark.parametrize("status", [302, 308])
def test_the_key_stays_with_the_host_that_was_named(
    server: Server, send: Callable[..., Any], status: int
) -> None:
    elsewhere = f"{server.address}/api/feature/{MODEL}/2-{SET}/99"
    server.failures = [(status, "", {"Location": elsewhere})]
    with pytest.raises(InvalidInput, match=f"{status} moved to {elsewhere}"):
        send()
    assert not server.looks


@pytest.mark.parametrize(
    "url", ["http://neuronpedia.org", "ftp://x", "neuronpedia.org", "https://", "http://localhost.evil.org", "https://a@b", ""]
)  # fmt: skip
def test_the_key_never_goes_in_the_clear(send: Callable[..., Any], url: str) -> None:
    with pytest.raises(InvalidInput, match="base_url"):
        send(base_url=url)


def test_what_is_missing_is_named(send: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, what in (({"batch": 129}, "batch"), ({"batch": 0}, "batch"), ({"source": "2/x"}, "source")):
        with pytest.raises(InvalidInput, match=what):
            send(**wrong)
    monkeypatch.setenv("OTHER", " ")
    with pytest.raises(InvalidInput, match="OTHER: the environment variable"):
        send(key_env="OTHER")


def test_a_wrong_key_is_refused_without_being_shown(
    send: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "sk-wrong")
    with pytest.raises(InvalidInput, match="401 Unauthorized") as raised:
        send()
    assert "sk-wrong" not in str(raised.value)


def test_long_windows_are_cut_around_the_peak(
    server: Server, send: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, catalog: saekit.Catalog
) -> None:
    monkeypatch.setattr("saekit.catalog.neuronpedia.MOST_TOKENS", 6)
    send(features=[4])
    top = [a for a in server.features[4]["activations"] if a["quantileMin"] is None]
    for got, context in zip(top, catalog[4].contexts, strict=True):
        assert len(got["values"]) == min(6, len(context.tokens))
        assert max(got["values"]) == near(context.max_activation)
