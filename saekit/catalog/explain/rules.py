"""Explanations without a language model: a feature's tokens, and one rule, each tried as a prediction of its activations.

    tokens       the token table (evidence.parquet): on a token, what the feature was on it in the documents that explain
    peak_token   its strongest contexts peak on one token:                 it fires on X
    next_token   else, the token after the peak is the same in them:       it fires before X ("say X")
    logits       else, that token is among those its direction raises:     it fires before one of them

Tokens are named as they are, in quotes: " for" and "for" are different ones. A rule holds where more than half of at least
three contexts of explaining documents agree; it predicts 1 where it applies and 0 elsewhere. All four are tried on the
other documents: on top contexts and as many random windows, by Pearson r and AUC over their tokens. The control is the
figure that another feature's table or rule of the same kind reaches there: what a prediction gets for being about words.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saekit.catalog.accumulate import rank_in_group
from saekit.catalog.draws import draw, explains
from saekit.catalog.explain.excerpts import Excerpts, Ints, Windows, folder_of
from saekit.catalog.explain.measures import auc, pearson
from saekit.catalog.explain.saying import Row, merge
from saekit.catalog.tables import TOP, read_table

TOKENS = "tokens"
RULES = ("peak_token", "next_token", "logits")  # in this order; the first that holds is the feature's
AT_LEAST, SHARED = 3, 0.5  # contexts that a rule takes, and the share of them that has to be exceeded
SHOWN, SLIGHT = (
    5,
    0.1,
)  # tokens named in an explanation; a smaller part of the first one's expected activation is left out
OTHER = 0xC0  # the draw that gives each feature the table of another one
BLOCK = 512  # features at a time

# windows [n, W], feature whose table or rule predicts [n] → [n, W]
Prediction = Callable[[Windows, Ints], NDArray[Any]]


@dataclass(frozen=True)
class Tally:
    """What `without_llm` found over all features."""

    features: int
    explained: dict[str, int]  # method → features
    scored: int  # features whose token table has a defined Pearson r
    above_half: int  # of these, with r > 0.5
    control_above_half: int  # of these, whose control has r > 0.5

    def __str__(self) -> str:
        methods = ", ".join(f"{n:,} by {name}" for name, n in self.explained.items())
        return (
            f"{self.features:,} features: {methods}; the token table predicts {self.above_half:,} of {self.scored:,} "
            f"with r > 0.5, another feature's {self.control_above_half:,}"
        )


def without_llm(catalog: Any, *, held_out: int = 10) -> Tally:
    """Explain every feature from the tables alone and score it; rows of an earlier run give way.

    catalog: a `Catalog` or its folder. held_out: top contexts per feature on which it is tried, with as many random windows.
    A score that is undefined (nothing held out, nothing that varies) is null.
    """
    folder = folder_of(catalog)
    excerpts = Excerpts(folder)
    S = excerpts.d_sae
    table = _Table(folder, excerpts)
    rules = _Rules(folder, excerpts)
    explanations: list[Row] = []
    for method, texts in ((TOKENS, table.texts(excerpts)), *rules.texts()):
        explanations += [_explanation(s, method, text) for s, text in enumerate(texts) if text]
    held = {TOKENS: np.flatnonzero(table.known)}
    held |= {name: np.flatnonzero(rules.rule == i) for i, name in enumerate(RULES)}
    predictions: dict[str, Prediction] = {TOKENS: lambda w, s: table.predict(excerpts.ids_of(w), s)}
    predictions |= {
        "peak_token": lambda w, s: rules.on_peak(excerpts.ids_of(w), s),
        "next_token": lambda w, s: rules.on_next(excerpts.ids_of(w, 1), s),
        "logits": lambda w, s: rules.on_raised(excerpts.ids_of(w, 1), s),
    }
    figures = {method: _Figures(S) for method in held}
    others = {method: _others(features, S) for method, features in held.items()}
    for first in range(0, S, BLOCK):
        last = min(S, first + BLOCK)
        windows = held_out_windows(excerpts, first, last, held_out)
        for method, features in held.items():
            here = features[(features >= first) & (features < last)]
            if len(here):
                _score(figures[method], windows, here, predictions[method], others[method])
    scores = [row for method, features in held.items() for row in figures[method].rows(method, features)]
    merge(folder, explanations, scores, without=(TOKENS, *RULES))
    with np.errstate(invalid="ignore"):
        r, control = figures[TOKENS].pearson, figures[TOKENS].control_pearson
        return Tally(
            S,
            {method: len(features) for method, features in held.items()},
            int((~np.isnan(r)).sum()),
            int((r > 0.5).sum()),
            int((control > 0.5).sum()),
        )


def held_out_windows(excerpts: Excerpts, first: int, last: int, n: int) -> Windows:
    """Up to n top contexts of documents that do not explain, and as many random windows, for each feature."""
    contexts = excerpts.contexts(first, last)
    tops = contexts.take((contexts.band == TOP) & ~explains(contexts.document))
    tops = tops.take(rank_in_group(tops.feature) < n)
    F = last - first
    random = excerpts.random(first, last, np.bincount(tops.feature - first, minlength=F), tops)
    given = np.bincount(random.feature - first, minlength=F)
    tops = tops.take(
        rank_in_group(tops.feature) < given[tops.feature - first]
    )  # one to one, whatever there is
    both = join(tops, random)
    return both.take(np.argsort(both.feature, kind="stable"))


def join(a: Windows, b: Windows) -> Windows:
    """Both, one after the other."""
    W = max(a.activations.shape[1], b.activations.shape[1])
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(a, name), getattr(b, name)]) for name in Windows._fields[:-1]
    }
    wide = [np.pad(w.activations, ((0, 0), (0, W - w.activations.shape[1]))) for w in (a, b)]
    return Windows(**columns, activations=np.concatenate(wide))


def _explanation(feature: int, method: str, text: str) -> Row:
    return {"feature": feature, "method": method, "model": "", "prompt": "", "text": text}


def _others(features: Ints, S: int) -> Ints:
    """[S] for each of the features another one of them, drawn; −1 where there is none."""
    other = np.full(S, -1)
    if len(features) > 1:
        order = features[np.argsort(draw(OTHER, features), kind="stable")]
        other[order] = np.roll(order, 1)
    return other


class _Figures:
    """Scores of one method, [S] each; NaN: undefined."""

    def __init__(self, S: int) -> None:
        self.pearson, self.auc, self.control_pearson, self.control_auc = np.full((4, S), np.nan)
        self.n = np.zeros(S, np.int64)

    def rows(self, method: str, features: Ints) -> list[Row]:
        found = []
        for scorer, score, control in (
            ("pearson", self.pearson, self.control_pearson),
            ("auc", self.auc, self.control_auc),
        ):
            found += [
                {
                    "feature": s, "method": method, "model": "", "prompt": "", "scorer": scorer, "judge": "",
                    "judge_prompt": "", "score": defined(x), "control": defined(y), "n": n, "failures": 0,
                }
                for s, x, y, n in zip(
                    features.tolist(), score[features].tolist(), control[features].tolist(),
                    self.n[features].tolist(), strict=True,
                )
            ]  # fmt: skip
        return found


def defined(x: float) -> float | None:
    """A figure, or None where it is not one."""
    return None if np.isnan(x) else float(x)


def _score(figures: _Figures, windows: Windows, features: Ints, predict: Prediction, other: Ints) -> None:
    """Fill in the figures of these features from their windows."""
    number = np.full(len(other), -1)
    number[features] = np.arange(len(features))
    windows = windows.take(number[windows.feature] >= 0)
    inside = windows.inside
    group = np.repeat(number[windows.feature], windows.length)
    true = windows.activations[inside]
    figures.n[features] = np.bincount(number[windows.feature], minlength=len(features))
    G = len(features)
    own = predict(windows, windows.feature)[inside]
    figures.pearson[features] = pearson(group, own, true, G)
    figures.auc[features] = auc(group, own, true > 0, G)
    if other[features[0]] >= 0:
        theirs = predict(windows, other[windows.feature])[inside]
        figures.control_pearson[features] = pearson(group, theirs, true, G)
        figures.control_auc[features] = auc(group, theirs, true > 0, G)


class _Table:
    """The token tables of all features."""

    def __init__(self, folder: Path, excerpts: Excerpts) -> None:
        table = read_table(folder, "evidence")
        self._feature, self._rank, self._token, self._expected = (
            table[name].to_numpy() for name in ("feature", "rank", "token_id", "expected")
        )
        self._V = len(excerpts.tokens)
        key = self._feature.astype(np.int64) * self._V + self._token
        order = np.argsort(key)
        self._key, self._by_key = key[order], self._expected[order]
        self.known = np.bincount(self._feature, minlength=excerpts.d_sae) > 0  # [S]

    def predict(self, ids: Ints, feature: Ints) -> NDArray[np.float32]:
        """[n, W] the activation that the table of `feature` [n] expects on tokens [n, W]: 0 on those it does not know."""
        key = np.where(ids >= 0, feature[:, None] * self._V + ids, -1)
        if not len(self._key):
            return np.zeros(ids.shape, np.float32)
        at = np.searchsorted(self._key, key).clip(max=len(self._key) - 1)
        return np.where(self._key[at] == key, self._by_key[at], np.float32(0))

    def texts(self, excerpts: Excerpts) -> list[str]:
        """[S] the first tokens of each table, by summed activation."""
        named: list[list[str]] = [[] for _ in range(excerpts.d_sae)]
        strongest = np.zeros(excerpts.d_sae, np.float32)
        strongest[self._feature[self._rank == 0]] = self._expected[self._rank == 0]
        telling = self._expected >= SLIGHT * strongest[self._feature]
        order = np.lexsort((self._rank, self._feature))
        order = order[telling[order]]
        for s, t in zip(self._feature[order].tolist(), self._token[order].tolist(), strict=True):
            if len(named[s]) < SHOWN:
                named[s].append(_shown(excerpts.tokens[t]))
        return [", ".join(names) for names in named]


class _Rules:
    """The rule of each feature."""

    def __init__(self, folder: Path, excerpts: Excerpts) -> None:
        self._tokens = excerpts.tokens
        S, self._V = excerpts.d_sae, len(excerpts.tokens)
        self._raised, self._raised_names = self._read_raised(folder, S)
        parts = [self._of(excerpts, first, min(S, first + BLOCK)) for first in range(0, S, BLOCK)]
        found = {name: [part[i] for part in parts] for i, name in enumerate(RULES)}
        none = np.zeros(0, np.int64)
        # [S] the token that peaks share, that follows them, or one of the raised ones that does; −1: none
        self._peak, self._next, raised = (np.concatenate([none, *found[name]]) for name in RULES)
        holds = [self._peak >= 0, self._next >= 0, raised >= 0]
        self.rule = np.select(holds, range(len(RULES)), -1)  # [S] index into RULES; −1: none

    def _read_raised(self, folder: Path, S: int) -> tuple[Ints, list[list[str]]]:
        """(sorted feature · V + id of the raised tokens, per feature what its raised tokens are, the first first)."""
        table = read_table(folder, "logits")
        feature, token, raised = (table[name].to_numpy() for name in ("feature", "token_id", "raised"))
        order = np.lexsort((table["rank"].to_numpy(), feature))
        order = order[raised[order]]
        feature, token = feature[order].astype(np.int64), token[order]
        names: list[list[str]] = [[] for _ in range(S)]
        for s, t in zip(feature.tolist(), token.tolist(), strict=True):
            names[s].append(_shown(self._tokens[t]))
        return np.unique(feature * self._V + token), names

    def _of(self, excerpts: Excerpts, first: int, last: int) -> tuple[Ints, Ints, Ints]:
        """What the explaining contexts of these features share: their peak, the token after it, a raised one after it."""
        contexts = excerpts.contexts(first, last)
        contexts = contexts.take((contexts.band == TOP) & explains(contexts.document))
        feature, rows = contexts.feature, np.arange(len(contexts.feature))
        peak = excerpts.ids_of(contexts)[rows, contexts.peak]
        after = excerpts.ids_of(contexts, 1)[rows, contexts.peak]
        is_raised = self.on_raised(after[:, None], feature)[:, 0]
        return (
            self._shared(peak, peak, feature - first, last - first),
            self._shared(after, after, feature - first, last - first),
            self._shared(np.where(is_raised, after, -1), np.zeros_like(after), feature - first, last - first),
        )

    def _shared(self, token: Ints, kind: Ints, feature: Ints, F: int) -> Ints:
        """For each feature the kind of token that more than half of its contexts have, and the strongest such token; −1: none."""
        n = np.bincount(feature, minlength=F)
        there = token >= 0
        keys, at, counts = np.unique(
            feature[there] * self._V + kind[there], return_index=True, return_counts=True
        )
        of = keys // self._V
        enough = (counts > SHARED * n[of]) & (n[of] >= AT_LEAST)  # at most one kind of each feature
        found = np.full(F, -1)
        found[of[enough]] = token[there][at[enough]]
        return found

    def on_peak(self, ids: Ints, feature: Ints) -> NDArray[np.bool_]:
        return (ids >= 0) & (ids == self._peak[feature][:, None])

    def on_next(self, after: Ints, feature: Ints) -> NDArray[np.bool_]:
        return (after >= 0) & (after == self._next[feature][:, None])

    def on_raised(self, after: Ints, feature: Ints) -> NDArray[np.bool_]:
        if not len(self._raised):
            return np.zeros(after.shape, bool)
        key = feature[:, None] * self._V + after
        at = np.searchsorted(self._raised, key).clip(max=len(self._raised) - 1)
        return (after >= 0) & (self._raised[at] == key)

    def texts(self) -> list[tuple[str, list[str]]]:
        """For each kind of rule, [S] what it says; an empty text where it is not the feature's."""
        names = [
            [_shown(self._tokens[t]) for t in self._peak.tolist()],
            [f"say {_shown(self._tokens[t])}" for t in self._next.tolist()],
            [f"say one of {', '.join(names[:SHOWN])}" for names in self._raised_names],
        ]
        rules = self.rule.tolist()
        return [
            (name, [text if rule == i else "" for text, rule in zip(names[i], rules, strict=True)])
            for i, name in enumerate(RULES)
        ]


def _shown(token: str) -> str:
    return json.dumps(token, ensure_ascii=False)
