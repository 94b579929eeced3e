"""A catalog computed the slow way, feature by feature, from dense activations: what the one-pass build is held against.

`brute_tables` takes everything that fired and says what each table that comes from the text must hold. `made` writes a small whole
catalog with it, from made-up activations and weights, for tests that need a folder and no language model:
`from catalog.brute import made`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saekit.catalog.draws import draw, explains
from saekit.catalog.tables import CATALOG, DIRECTIONS, SCHEMA_VERSION, SCHEMAS, write_table
from saekit.files import sha256_of_file, write_json, write_tensors
from saekit.sae import SAE
from saekit.sae.files import to_cfg, to_tensors


@dataclass(frozen=True)
class Seen:
    """What a pass over R rows of T tokens saw: f [R, T, S] of the SAE, ‖x‖ [R, T]."""

    ids: np.ndarray
    documents: np.ndarray
    norms: np.ndarray
    f: np.ndarray
    special: tuple[int, ...]

    @property
    def evaluated(self) -> np.ndarray:
        return ~np.isin(self.ids, self.special)


@dataclass(frozen=True)
class Options:
    contexts: int = 20
    window: int = 64
    bands: int = 5
    per_band: int = 4
    sample_rows: int = 128
    sketch: int = 256
    tokens: int = 20
    evidence: int = 32
    neighbours: int = 10


Rows = list[dict[str, Any]]


def brute_tables(seen: Seen, options: Options = Options()) -> tuple[dict[str, Rows], dict[str, Any]]:
    """(table → rows, figures of catalog.json): features without what the weights say, contexts, activations, corpus, sample,
    tokens, evidence, histograms of activations, neighbours by firing; median_norm, tokens, sinks."""
    evaluated = seen.evaluated
    S = seen.f.shape[2]
    places = list(zip(*np.nonzero(evaluated), strict=True))
    lowest = sorted(places, key=lambda at: int(draw(*at)))[:65_536]
    median = float(np.median([seen.norms[at] for at in lowest]))
    sample_rows = sorted(sorted(range(len(seen.ids)), key=lambda r: int(draw(r)))[: options.sample_rows])
    tables: dict[str, Rows] = {name: [] for name in SCHEMAS}
    occurrences: dict[int, int] = defaultdict(int)
    for at in places:
        if explains(seen.documents[at]):
            occurrences[int(seen.ids[at])] += 1
    chosen_rows = set(sample_rows)
    contexts: list[tuple[int, int, int, tuple[int, int]]] = []
    for s in range(S):
        firing = [at for at in places if seen.f[at][s] > 0]
        value = {at: np.float32(seen.f[at][s]) for at in firing}
        by_token: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for at in firing:
            by_token[int(seen.ids[at])].append(at)
        total = sum(float(v) for v in value.values())
        figures = np.array([float(v) for v in value.values()])
        tables["features"].append(
            {
                "feature": s,
                "density": len(firing) / len(places),
                "count": len(firing),
                "max_activation": max(value.values(), default=0.0),
                "mean_activation": figures.mean() if firing else 0.0,
                "std_activation": figures.std() if firing else 0.0,
            }
        )
        means = {
            t: (len(here), sum(float(value[at]) for at in here))
            for t, here in by_token.items()
            if len(here) >= 2
        }
        best = sorted(means, key=lambda t: (-means[t][1] / means[t][0], t))[: options.tokens]
        tables["tokens"] += [
            {
                "feature": s, "rank": rank, "token_id": t, "count": means[t][0],
                "mean_activation": means[t][1] / means[t][0], "share": means[t][1] / total,
            }
            for rank, t in enumerate(best)
        ]  # fmt: skip
        known = {
            t: (len(own), sum(float(value[at]) for at in own))
            for t, here in by_token.items()
            if (own := [at for at in here if explains(seen.documents[at])])
        }
        strongest = sorted(known, key=lambda t: (-known[t][1], t))[: options.evidence]
        tables["evidence"] += [
            {"feature": s, "rank": rank, "token_id": t, "count": known[t][0], "expected": known[t][1] / occurrences[t]}
            for rank, t in enumerate(strongest)
        ]  # fmt: skip
        bins: dict[int, int] = defaultdict(int)
        for v in value.values():
            bins[min(63, max(0, int((math.log10(float(v)) + 4) * 8)))] += 1
        tables["histograms"] += [
            {"feature": s, "of": "activation", "low": 10 ** (b / 8 - 4), "high": 10 ** ((b + 1) / 8 - 4), "count": bins[b]}
            for b in sorted(bins)
        ]  # fmt: skip
        top = _one_per_document(seen, sorted(firing, key=lambda at: (-value[at], at)))[: options.contexts]
        contexts += [(s, 0, rank, at) for rank, at in enumerate(top)]
        for band, here in _bands(seen, firing, value, options).items():
            contexts += [(s, band, rank, at) for rank, at in enumerate(here)]
    chosen_rows |= {int(at[0]) for *_, at in contexts}
    numbers = {row: i for i, row in enumerate(sorted(chosen_rows))}
    for s, band, rank, at in contexts:
        row, position = int(at[0]), int(at[1])
        start, length = _window(seen, row, position, options.window)
        tables["contexts"].append(
            {
                "feature": s, "band": band, "rank": rank, "document": int(seen.documents[at]), "row": numbers[row],
                "start": start, "length": length, "peak": position - start, "max_activation": seen.f[at][s],
                "norm": seen.norms[at] / median,
            }
        )  # fmt: skip
        tables["activations"] += [
            {"feature": s, "band": band, "rank": rank, "offset": i, "activation": seen.f[row, start + i, s]}
            for i in range(length)
            if seen.f[row, start + i, s] > 0
        ]
    for row, number in numbers.items():
        tables["corpus"] += [
            {"row": number, "position": t, "token_id": int(i), "document": int(d)}
            for t, (i, d) in enumerate(zip(seen.ids[row], seen.documents[row], strict=True))
        ]
    tables["sample"] = [
        {"feature": s, "row": numbers[row], "position": int(t), "activation": seen.f[row, t, s]}
        for s in range(S)
        for row in sample_rows
        for t in np.flatnonzero(evaluated[row] & (seen.f[row, :, s] > 0))
    ]
    tables["neighbours"] = _firing_neighbours(seen, places, options)
    about = {
        "median_norm": median,
        "tokens": len(places),
        "sinks": sum(bool(seen.norms[at] > 10 * median) for at in places),
        "sample": [numbers[row] for row in sample_rows],
    }
    return tables, about


def _one_per_document(seen: Seen, places: list[Any]) -> list[Any]:
    met: set[int] = set()
    kept = []
    for at in places:
        if (document := int(seen.documents[at])) not in met:
            met.add(document)
            kept.append(at)
    return kept


def _bands(seen: Seen, firing: list[Any], value: dict[Any, Any], options: Options) -> dict[int, list[Any]]:
    if not firing:
        return {}
    log = {at: math.floor(16 * math.log10(float(value[at]))) for at in firing}
    least = max(log.values()) - 16
    in_bin: dict[int, list[Any]] = defaultdict(list)
    for at in sorted(firing, key=lambda at: int(draw(*at))):
        in_bin[max(log[at], least - 1)].append(at)
    candidates = [at for here in in_bin.values() for at in _one_per_document(seen, here)[: options.per_band]]
    highest = float(max(value.values()))
    bands: dict[int, list[Any]] = {b: [] for b in range(1, options.bands + 1)}
    for at in sorted(candidates, key=lambda at: int(draw(*at))):
        bands[max(1, math.ceil(float(value[at]) / highest * options.bands))].append(at)
    return {b: _one_per_document(seen, here)[: options.per_band] for b, here in bands.items()}


def _window(seen: Seen, row: int, position: int, window: int) -> tuple[int, int]:
    def apart(a: int, b: int) -> bool:
        return bool(seen.documents[row, a] != seen.documents[row, b] or not seen.evaluated[row, b])

    start = position
    while start > 0 and start > position - window * 5 // 8 and not apart(position, start - 1):
        start -= 1
    end = position + 1
    while end < seen.ids.shape[1] and end < start + window and not apart(position, end):
        end += 1
    return start, end - start


def _firing_neighbours(seen: Seen, places: list[Any], options: Options) -> Rows:
    S, m = seen.f.shape[2], options.sketch
    draws = [sorted(int(draw(*at)) for at in places if seen.f[at][s] > 0) for s in range(S)]
    sketch = [set(here[:m]) for here in draws]
    limit = [here[m - 1] if len(here) > m else 2**64 for here in draws]
    found: Rows = []
    for s in range(S):
        similar = []
        for o in range(S):
            both = len(sketch[s] & sketch[o])
            if o == s or both == 0:
                continue
            t = min(limit[s], limit[o])
            a, b = (sum(d <= t for d in sketch[i]) for i in (s, o))
            similar.append((-both / (a + b - both), o))
        found += [
            {"feature": s, "by": "firing", "rank": rank, "neighbour": o, "similarity": -j}
            for rank, (j, o) in enumerate(sorted(similar)[: options.neighbours])
        ]
    return found


# A small whole catalog

WORDS = "the a Jedi lightsaber Master night king ship Star Wars said to of and river stone Court Knight moon rain".split()


def made_up(S: int = 24, rows: int = 40, T: int = 24, seed: int = 0) -> Seen:
    """Rows of words; latent s fires on word s % len(WORDS) strongly, weakly after it, and here and there at random."""
    random = np.random.default_rng(seed)
    V = len(WORDS) + 1
    ids = random.integers(1, V, (rows, T))
    ids[:, 0] = 0  # BOS
    documents = np.repeat(np.arange(rows)[:, None] // 2, T, 1)
    f = np.zeros((rows, T, S), np.float32)
    for s in range(S - 1):  # the last one never fires
        word = ids == 1 + s % len(WORDS)
        after = np.zeros_like(word)
        after[:, 1:] = word[:, :-1]
        strength = random.gamma(4.0, 1.0, ids.shape)
        f[..., s] = np.where(word, strength, np.where(after, 0.3 * strength * (s % 3), 0))
        f[..., s] += np.where(random.random(ids.shape) < 0.01, 0.1 * strength, 0)
    f[ids == 0] = 0
    norms = random.gamma(50.0, 0.2, ids.shape).astype(np.float32)
    norms[3, 5] = 500.0
    return Seen(ids, documents, norms, f, special=(0,))


def made(folder: Path, S: int = 24, d_in: int = 8, seed: int = 0, options: Options = Options()) -> Path:
    """Write a whole catalog of made-up features to a new folder; the vocabulary is BOS and `WORDS`, spaces before them."""
    seen = made_up(S, seed=seed)
    tables, about = brute_tables(seen, options)
    sae = SAE.new("topk", d_in=d_in, d_sae=S, k=4, site="blocks.2.hook_resid_pre", model="made-up", seed=seed)
    rows = sae.directions().float()
    vocabulary = ["<|bos|>", *(f" {word}" for word in WORDS)]
    W_U = torch.randn(d_in, len(vocabulary), generator=torch.Generator().manual_seed(seed))
    unit = torch.nn.functional.normalize(rows, dim=1)
    cosine, effects = unit @ unit.t(), rows @ W_U
    shares: dict[int, Rows] = defaultdict(list)
    for row in tables["tokens"]:
        shares[row["feature"]].append(row)
    for row in tables["features"]:
        s = row["feature"]
        named = sorted(shares[s], key=lambda r: -r["share"])[:3]
        row["decoder_norm"] = float(rows[s].norm())
        row["encoder_cosine"] = float(
            torch.cosine_similarity(sae.W_enc[:, s].detach(), sae.W_dec[s].detach(), dim=0)
        )
        row["label"] = ", ".join(vocabulary[r["token_id"]].strip() for r in named)
        order = effects[s].argsort(descending=True).tolist()
        for raised, ranked in ((True, order[:5]), (False, order[::-1][:5])):
            tables["logits"] += [
                {"feature": s, "rank": i, "raised": raised, "token_id": t, "effect": float(effects[s, t])}
                for i, t in enumerate(ranked)
            ]
        counts, edges = np.histogram(effects[s].detach().numpy(), 40)
        tables["histograms"] += [
            {"feature": s, "of": "effect", "low": a, "high": b, "count": n}
            for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
            if n
        ]
        near = [i for i in cosine[s].argsort(descending=True).tolist() if i != s][:10]
        tables["neighbours"] += [
            {"feature": s, "by": "decoder", "rank": i, "neighbour": o, "similarity": float(cosine[s, o])}
            for i, o in enumerate(near)
        ]
    for name in ("histograms", "neighbours"):
        tables[name].sort(key=lambda row: row["feature"])
    tables["vocabulary"] = [{"token_id": i, "token": token} for i, token in enumerate(vocabulary)]
    folder.mkdir(parents=True)
    for name, schema in SCHEMAS.items():
        write_table(folder, name, {column: [row[column] for row in tables[name]] for column in schema.names})
    tensors = to_tensors(sae)
    write_tensors(folder / DIRECTIONS, tensors)
    info = {
        "schema": SCHEMA_VERSION,
        "model": {"name": "made-up", "hash": "0" * 64, "tokenizer_hash": "0" * 64, "dtype": "float32"},
        "sae": to_cfg(sae, tensors),
        "site": sae.site,
        "target_site": sae.site,
        "corpus": {"label": "made-up", "tokens": about["tokens"], "rows": len(seen.ids), "context_size": seen.ids.shape[1], "licence": None},
        "excluded": {"<|bos|>": 0},
        "median_norm": about["median_norm"],
        "sinks": {"norm_above": 10, "tokens": about["sinks"]},
        "contexts": {
            "per_feature": options.contexts, "window": options.window, "bands": options.bands, "per_band": options.per_band
        },
        "sample": {"rows": about["sample"]},
        "seeds": {"draws": 0},
        "definitions": {"density": "share of evaluated tokens on which the feature is active"},
        "files": {
            path.name: sha256_of_file(path)
            for path in sorted(folder.iterdir())
            if path.stem not in ("explanations", "scores")
        },
    }  # fmt: skip
    write_json(folder / CATALOG, json.loads(json.dumps(info)))
    return folder
