"""A catalog for Neuronpedia: the files that its importer reads, and the call by which an account uploads features.

    {model}/{layer}-{set}/release.jsonl model.jsonl sourceset.jsonl source.jsonl
                          features/batch-0.jsonl.gz …  activations/batch-0.jsonl.gz …  explanations/batch-0.jsonl.gz …

Keys are the columns of its database (`apps/webapp/prisma/schema.prisma`; `lib/db/import.ts` inserts them). What a catalog
does not measure stays empty: correlations, attributions of losses. Histograms go as centres and heights of bars, two
arrays of one length. Contexts of the strongest have binMin = binContains = −1; those of a band have its ends and the
share of evaluated tokens that fall into it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saekit.catalog.card import public
from saekit.errors import InvalidInput
from saekit.files import staged

if TYPE_CHECKING:
    from saekit.catalog.feature import Bin, Context, Feature
    from saekit.catalog.store import Catalog

BATCH = 512  # features per file
CREATOR = (
    "clkht01d40000jv08hvalcvly"  # the user that a fresh Neuronpedia has, whose activations it shows to all
)
ID = re.compile(r"[a-z0-9][a-z0-9_.-]{0,127}")
ADDRESS = re.compile(r"(https://[^/@?#\s]+|http://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?)(/[^@?#\s]*)?")
NEURONS = "mlp.hook_post"  # the site whose coordinates are neurons
NO_TEXT = "\u200b"  # for a token without text, which the upload refuses: a space without width
TOP_BIN = -1

# What one call of the upload takes
MOST_FEATURES, MOST_LOGITS, MOST_TOKENS, MOST_TEXT = 128, 20, 1024, 512
AGAIN = (429, 500, 502, 503, 504)
UNSURE = (None, 502, 504)  # the answer got lost: what was sent may have arrived
LONGEST_WAIT = 300.0  # seconds


def export(
    catalog: Catalog,
    folder: str | Path,
    *,
    model_id: str,
    source_set: str,
    layer: int | None = None,
    release: str | None = None,
    title: str | None = None,
    creator: str = "",
    creator_id: str = CREATOR,
    url: str | None = None,
    repository: str | None = None,
    vectors: bool = True,
) -> Path:
    """Write Neuronpedia's import layout below a folder; returns the folder of the source, `folder/{model}/{layer}-{set}`.

    model_id, source_set: the names there, in lower case (`gpt2-small`, `res-jb`); layer: by default the one of the site.
    release, title: id and text of the release, by default the set's name. creator, creator_id: who made it, by name and
    by the id of a user of that Neuronpedia. url: of a paper or a page. repository: of the SAE or the catalog on the hub.
    vectors: with the directions, from which it steers.

    Features stream through: memory is that of one. Times and ids depend on nothing but the catalog's content, so that
    importing twice adds nothing. Raises `InvalidInput` for a name that does not fit.
    """
    info = public(catalog.info)
    layer = _layer(info["site"]) if layer is None else layer
    release = release or source_set
    for what, value in (("model_id", model_id), ("source_set", source_set), ("release", release)):
        _check_id(what, value)
    source = f"{layer}-{source_set}"
    base = {"modelId": model_id, "layer": source, "creatorId": creator_id}
    place = Path(folder) / model_id / source
    with staged(place) as building:
        for name, row in _descriptions(
            info, base, source_set, release, title or release, creator, url, repository
        ):
            _write_lines(building / f"{name}.jsonl", [row])
        for number, start in enumerate(range(0, len(catalog), BATCH)):
            with (
                _batch_file(building / "features", number) as features,
                _batch_file(building / "activations", number) as activations,
                _batch_file(building / "explanations", number) as explanations,
            ):
                for index in range(start, min(start + BATCH, len(catalog))):
                    feature = catalog[index]
                    features([_feature(feature, base, source_set, vectors)])
                    activations(_activations(feature, base, str(info["corpus"]["label"])))
                    explanations(_explanations(feature, base))
    return place


# The rows of the import layout


def _descriptions(
    info: dict[str, Any],
    base: dict[str, str],
    source_set: str,
    release: str,
    title: str,
    creator: str,
    url: str | None,
    repository: str | None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    model, creator_id, corpus = base["modelId"], base["creatorId"], info["corpus"]
    urls = [url] if url else []
    yield (
        "release",
        {
            "name": release, "description": title, "descriptionShort": title, "urls": urls, "creatorName": creator,
            "creatorNameShort": creator, "creatorId": creator_id, "creatorEmail": None, "visibility": "PUBLIC",
            "isNewUi": False, "featured": False, "defaultSourceSetName": None, "defaultSourceId": None,
            "defaultUmapSourceIds": [],
        },
    )  # fmt: skip
    yield (
        "model",
        {
            "id": model, "displayNameShort": model, "displayName": model, "creatorId": creator_id, "tlensId": None,
            "dimension": info["sae"]["d_in"], "visibility": "PUBLIC", "defaultSourceSetName": None,
            "defaultSourceId": None, "inferenceEnabled": False, "instruct": model.endswith("-it"), "layers": 0,
            "neuronsPerLayer": 0, "owner": "", "website": None,
        },
    )  # fmt: skip
    yield (
        "sourceset",
        {
            "modelId": model, "name": source_set, "creatorId": creator_id, "hasDashboards": True, "visibility": "PUBLIC",
            "description": title, "type": "", "creatorName": creator, "urls": urls, "creatorEmail": None,
            "releaseName": release, "defaultOfModelId": None, "defaultRange": 1, "defaultShowBreaks": True,
            "showDfa": False, "showCorrelated": False, "showHeadAttribution": False, "showUmap": False,
        },
    )  # fmt: skip
    yield (
        "source",
        {
            "id": base["layer"], "modelId": model, "setName": source_set, "creatorId": creator_id, "hasDashboards": True,
            "inferenceEnabled": False, "saelensConfig": info["sae"], "saelensRelease": None, "saelensSaeId": None,
            "hfRepoId": repository, "hfFolderId": None, "visibility": "PUBLIC", "defaultOfModelId": None,
            "hasUmap": False, "hasUmapLogSparsity": False, "hasUmapClusters": False, "num_prompts": corpus["rows"],
            "num_tokens_in_prompt": corpus["context_size"], "dataset": str(corpus["label"]),
            "notes": f"saekit; excluded tokens: {', '.join(info['excluded']) or 'none'}",
        },
    )  # fmt: skip


def _feature(feature: Feature, base: dict[str, str], source_set: str, vectors: bool) -> dict[str, Any]:
    firing, effects = _bars(feature.histogram, even=False), _bars(feature.effects, even=True)
    direction = feature.direction.float()
    neurons = feature.neurons if feature.catalog.target_site.endswith(NEURONS) else []
    aligned = direction[[n.neuron for n in neurons]]
    return base | {
        "index": str(feature.index),
        "sourceSetName": source_set,
        "maxActApprox": _number(feature.max_activation),
        "hasVector": vectors,
        "vector": _short(direction.tolist()) if vectors else [],
        "vectorLabel": None,
        "vectorDefaultSteerStrength": _number(feature.max_activation),
        "hookName": feature.catalog.target_site,
        "topkCosSimIndices": [n.feature for n in feature.neighbours],
        "topkCosSimValues": _short(n.similarity for n in feature.neighbours),
        "neuron_alignment_indices": [n.neuron for n in neurons],
        "neuron_alignment_values": _short(aligned.tolist()),
        "neuron_alignment_l1": _short((aligned.abs() / direction.abs().sum()).tolist()),
        "correlated_neurons_indices": [],
        "correlated_neurons_pearson": [],
        "correlated_neurons_l1": [],
        "correlated_features_indices": [],
        "correlated_features_pearson": [],
        "correlated_features_l1": [],
        "neg_str": [_token(t.token) for t in feature.logits_bottom],
        "neg_values": _short(t.effect for t in feature.logits_bottom),
        "pos_str": [_token(t.token) for t in feature.logits_top],
        "pos_values": _short(t.effect for t in feature.logits_top),
        "frac_nonzero": _number(feature.density),
        "freq_hist_data_bar_heights": firing[1],
        "freq_hist_data_bar_values": firing[0],
        "logits_hist_data_bar_heights": effects[1],
        "logits_hist_data_bar_values": effects[0],
        "decoder_weights_dist": [],
    }


@dataclass(frozen=True)
class _Group:
    """Contexts of one kind: the strongest, or those of a band."""

    contexts: list[Context]
    low: float
    high: float
    share: float  # of evaluated tokens


def _groups(feature: Feature) -> list[_Group]:
    top = _Group(feature.contexts, TOP_BIN, feature.max_activation, TOP_BIN)
    bands = [_Group(b.contexts, b.low, b.high, b.share * feature.density) for b in feature.bands]
    return [top, *reversed(bands)]  # the strongest first, as Neuronpedia shows them


def _activations(feature: Feature, base: dict[str, str], label: str) -> Iterator[dict[str, Any]]:
    for number, group in enumerate(_groups(feature)):
        for rank, context in enumerate(group.contexts):
            values = _short(context.activations)
            yield base | {
                "id": _unique(base, feature.index, "activation", number, rank),
                "index": str(feature.index),
                "tokens": list(map(_token, context.tokens)),
                "values": values,
                "maxValue": max(values),
                "maxValueTokenIndex": values.index(max(values)),
                "minValue": min(values),
                "binMin": _number(group.low),
                "binMax": _number(group.high),
                "binContains": _number(group.share),
                "qualifyingTokenIndex": context.peak,
                "dataIndex": str(context.document),
                "dataSource": label,
                "dfaValues": [],
                "dfaTargetIndex": None,
                "dfaMaxValue": None,
                "lossValues": [],
                "logitContributions": None,
            }


def _explanations(feature: Feature, base: dict[str, str]) -> Iterator[dict[str, Any]]:
    """How an explanation was made goes into its notes: its types and models have to be known to the database before."""
    place = {"modelId": base["modelId"], "layer": base["layer"], "authorId": base["creatorId"]}
    for rank, said in enumerate(feature.explanations):
        if text := _token(said.text).strip():
            yield place | {
                "id": _unique(base, feature.index, "explanation", rank),
                "index": str(feature.index),
                "description": text,
                "notes": f"saekit: {said.method}{f' by {said.model}' if said.model else ''}",
                "typeName": None,
                "explanationModelName": None,
            }


def _bars(bins: Sequence[Bin], *, even: bool) -> tuple[list[float], list[int]]:
    """(centres, heights) of a histogram of which only bins that hold something are stored: gaps are filled with zeros."""
    if not bins:
        return [], []
    low, high = (np.array([getattr(b, end) for b in bins], np.float64) for end in ("low", "high"))
    if not even:
        low, high = np.log(low), np.log(high)
    step = float(np.median(high - low))
    at = np.rint((low - low[0]) / step).astype(int) if step > 0 else np.zeros(len(bins), int)
    heights = np.zeros(at[-1] + 1, np.int64)
    np.add.at(heights, at, [b.count for b in bins])
    edges = low[0] + step * np.arange(len(heights) + 1)
    if not even:
        edges = np.exp(edges)
    return _short(((edges[:-1] + edges[1:]) / 2).tolist()), heights.tolist()


# Upload


@dataclass(frozen=True)
class Uploaded:
    """What an upload sent."""

    features: int
    calls: int
    silent: int  # features without a context: the interface takes none of them


def upload(
    catalog: Catalog,
    *,
    model_id: str,
    source: str,
    base_url: str = "https://www.neuronpedia.org",
    key_env: str = "NEURONPEDIA_API_KEY",
    features: Iterable[int] | None = None,
    start: int = 0,
    batch: int = MOST_FEATURES,
    retries: int = 5,
    timeout: float = 120.0,
    progress: Callable[[int, int], None] | None = None,
) -> Uploaded:
    """Upload features to a source of one's own on Neuronpedia, where model, set and source (`6-res-jb`) have to be.

    key_env: the environment variable that holds the account's key. features: which ones, all by default; start: from this
    index on. batch: features a call, at most 128, halved where a call is too large. retries: of a call that fails for a
    passing reason, waiting in between (`Retry-After`, else 1, 2, 4 … seconds); where an answer got lost, a look at the
    source first tells whether the call had arrived, since nothing there keeps contexts from coming twice.
    progress: called with features sent and features in all.

    Raises `InvalidInput` that names the features which were refused, why, and from where to go on; `UnknownFeature`.
    """
    _check_id("model_id", model_id)
    _check_id("source", source)
    if not 1 <= batch <= MOST_FEATURES:
        raise InvalidInput(f"batch: 1 … {MOST_FEATURES} features a call, got {batch}")
    server = _Server(base_url, key_env, retries, timeout)
    wanted = [i for i in (range(len(catalog)) if features is None else sorted(set(features))) if i >= start]
    firing = set(catalog.table("contexts")["feature"].unique().to_pylist())
    chosen = [i for i in wanted if catalog[i].index in firing]
    sent = 0
    for at in range(0, len(chosen), batch):
        payload = [_payload(catalog[i]) for i in chosen[at : at + batch]]
        server.send({"modelId": model_id, "source": source}, payload)
        sent += len(payload)
        if progress:
            progress(sent, len(chosen))
    return Uploaded(sent, server.calls, len(wanted) - len(chosen))


def _payload(feature: Feature) -> dict[str, Any]:
    texts = dict.fromkeys(filter(None, [feature.explanation, *(said.text for said in feature.explanations)]))
    return {
        "index": feature.index,
        "density": feature.density,
        "topLogits": _logits(feature.logits_top),
        "bottomLogits": _logits(feature.logits_bottom),
        "explanations": [
            {"text": text if len(text) <= MOST_TEXT else text[: MOST_TEXT - 1] + "…"}
            for text in map(_token, texts)
        ],
        "activations": [_excerpt(context, group) for group in _groups(feature) for context in group.contexts],
    }


def _logits(effects: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"token": _token(t.token), "value": _number(t.effect)} for t in effects[:MOST_LOGITS]]


def _excerpt(context: Context, group: _Group) -> dict[str, Any]:
    """As many tokens as the call takes, the peak among them; no fraction below 0 is taken, so the strongest have none."""
    first = max(0, min(context.peak - MOST_TOKENS // 2, len(context.tokens) - MOST_TOKENS))
    shown = slice(first, first + MOST_TOKENS)
    bin_ends = (None, None, None) if group.low == TOP_BIN else (group.low, group.high, group.share)
    low, high, share = (None if end is None else _number(end) for end in bin_ends)
    return {
        "tokens": list(map(_token, context.tokens[shown])),
        "values": _short(context.activations[shown]),
        "quantileMin": low,
        "quantileMax": high,
        "quantileFraction": share,
    }


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the host that was named, and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Server:
    """Neuronpedia's interface, as far as an upload needs it."""

    def __init__(self, base_url: str, key_env: str, retries: int, timeout: float) -> None:
        if not ADDRESS.fullmatch(base_url):
            raise InvalidInput(
                f"base_url: expected https://… (http on this machine only: the key goes along), got {base_url!r}"
            )
        if not (key := os.environ.get(key_env, "").strip()):
            raise InvalidInput(
                f"{key_env}: the environment variable with the account's key is not set; it is on the account's page"
            )
        self._base, self._key = base_url.rstrip("/"), key
        self._retries, self._timeout = retries, timeout
        self._open = urllib.request.build_opener(_NoRedirect()).open
        self.calls = 0

    def send(self, source: dict[str, str], features: list[dict[str, Any]]) -> None:
        body = json.dumps(source | {"features": features}, ensure_ascii=False, allow_nan=False).encode()
        unsure, answer, wait = False, "", 0.0
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(wait)
            wait = min(LONGEST_WAIT, 2.0**attempt)
            if unsure and (there := self._arrived(source, features[-1]["index"])) is not False:
                if there:
                    return
                continue
            status, answer, after = self._ask("/api/feature/upload-batch", body)
            self.calls += 1
            if status is not None and 200 <= status < 300:
                return
            if status == 413 and len(features) > 1:
                half = len(features) // 2
                self.send(source, features[:half])
                self.send(source, features[half:])
                return
            if status is not None and status not in AGAIN:
                break
            unsure = status in UNSURE
            wait = wait if after is None else min(LONGEST_WAIT, after)
        first, last = features[0]["index"], features[-1]["index"]
        raise InvalidInput(
            f"neuronpedia: features {first} … {last} were not taken by {self._base}: {answer}. Those before are "
            f"uploaded; go on with start={first}"
        )

    def _arrived(self, source: dict[str, str], index: int) -> bool | None:
        """Whether a feature is there with contexts, and so its whole call, which is one transaction; None: no telling."""
        status, answer, _ = self._ask(f"/api/feature/{source['modelId']}/{source['source']}/{index}", None)
        if status in UNSURE or status in AGAIN:
            return None
        try:
            found = json.loads(answer)
        except ValueError:
            return False
        return (
            status == 200
            and isinstance(found, dict)
            and str(found.get("index")) == str(index)
            and bool(found.get("activations"))
        )

    def _ask(self, path: str, body: bytes | None) -> tuple[int | None, str, float | None]:
        """(status, None where there was no answer; what it says in a line, of a question all of it; seconds to wait)."""
        headers = {"X-Api-Key": self._key, "Content-Type": "application/json"}
        request = urllib.request.Request(self._base + path, body, headers)
        try:
            try:
                reply = self._open(request, timeout=self._timeout)
            except urllib.error.HTTPError as error:
                reply = error
            with reply:
                text = reply.read(16 * 2**20).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            return None, self._told(f"no answer ({error})"), None
        after = reply.headers.get("Retry-After", "")
        if 300 <= reply.status < 400:
            text = f"moved to {reply.headers.get('Location')}, which may be the base_url to give"
        if body is not None:
            text = self._told(f"{reply.status} {_reason(text)}")
        return reply.status, text, float(after) if after.isdigit() else None

    def _told(self, text: str) -> str:
        return text.replace(self._key, "…")


def _reason(text: str) -> str:
    """What an answer says went wrong: its `error`, else its first line."""
    with contextlib.suppress(ValueError):
        answer = json.loads(text)
        if isinstance(answer, dict) and (said := answer.get("error") or answer.get("message")):
            text = str(said)
    return " ".join(text.split())[:300]


# Values as they are written


def _check_id(what: str, value: str) -> None:
    if not isinstance(value, str) or not ID.fullmatch(value):
        raise InvalidInput(
            f"{what}: expected lower-case letters, digits, '-', '_' and '.', as in an address, got {str(value)[:200]!r}"
        )


def _layer(site: str) -> int:
    found = re.match(r"blocks\.([0-9]+)\.", site)
    if not found:
        raise InvalidInput(f"layer: the site {site} has none; give one")
    return int(found[1])


def _token(text: str) -> str:
    """A text that its database takes: no NUL, never empty."""
    return text.replace("\0", " ") or NO_TEXT


def _short(values: Iterable[float]) -> list[float]:
    """Six digits each: what float32 says, without the tail that float64 adds. Raises `InvalidInput` for what is no number."""
    found = [float(f"{value:.6g}") if value else 0.0 for value in values]
    if not math.isfinite(sum(found)):
        raise InvalidInput("neuronpedia: a figure is not finite; `saekit catalog check` tells which")
    return found


def _number(value: float) -> float:
    return _short([value])[0]


def _unique(base: dict[str, str], *numbers: Any) -> str:
    """An id of 25 characters that is the same in every export of the same catalog."""
    named = json.dumps([base["modelId"], base["layer"], *numbers])
    return "c" + hashlib.sha256(named.encode()).hexdigest()[:24]


# Files


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(_line(row))


@contextlib.contextmanager
def _batch_file(folder: Path, number: int) -> Iterator[Callable[[Iterable[dict[str, Any]]], None]]:
    """A compressed file to which rows are written; none where there are no rows, which the importer cannot read."""
    path = folder / f"batch-{number}.jsonl.gz"
    folder.mkdir(exist_ok=True)
    written = 0
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 5, raw, mtime=0) as file:

        def write(rows: Iterable[dict[str, Any]]) -> None:
            nonlocal written
            for row in rows:
                file.write(_line(row).encode())
                written += 1

        yield write
    if not written:
        path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"
