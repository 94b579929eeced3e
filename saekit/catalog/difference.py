"""Which features of two catalogs match: across seeds, widths, layers, even models.

    decoder   cosine of the decoder rows; for SAEs that write widths alike into one model
    firing    Pearson correlation of the activations over the tokens of corpus rows that both catalogs sampled (`sample`);
              for any two catalogs of one corpus

S, Z features of the two catalogs; n tokens in the shared rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from saekit.errors import InvalidInput

if TYPE_CHECKING:
    from saekit.catalog.relations import By
    from saekit.catalog.store import Catalog

AT_LEAST = 5  # firings on the shared rows; from fewer no correlation is taken
AT_ONCE = 256  # features of the first catalog that are compared at once

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Difference:
    """The best match of every feature, both ways. A feature is measured where it has a direction that was ever used
    (decoder: it fired) or fires often enough on the shared rows (firing)."""

    by: By
    threshold: float
    names: tuple[str, str]
    match: Ints = field(repr=False)  # [S] in the other catalog, −1: none
    similarity: Floats = field(repr=False)  # [S] NaN: not measured
    match_back: Ints = field(repr=False)  # [Z]
    similarity_back: Floats = field(repr=False)  # [Z]

    @property
    def share(self) -> float:
        """Share of the first catalog's measured features that reach the threshold; NaN where none is measured."""
        return _share(self.similarity, self.threshold)

    @property
    def share_back(self) -> float:
        """The same of the second catalog."""
        return _share(self.similarity_back, self.threshold)

    @property
    def mutual(self) -> NDArray[np.bool_]:
        """[S] whether a feature's match has it for its own match."""
        back = self.match_back[self.match] if len(self.match_back) else np.full(len(self.match), -1)
        return (self.match >= 0) & (back == np.arange(len(self.match)))

    @property
    def only_here(self) -> list[int]:
        """Measured features of the first catalog whose best match stays below the threshold."""
        return np.flatnonzero(self.similarity < self.threshold).tolist()

    @property
    def only_there(self) -> list[int]:
        """The same of the second catalog."""
        return np.flatnonzero(self.similarity_back < self.threshold).tolist()

    def table(self) -> pa.Table:
        """feature, match, similarity (null: not measured), mutual: one row per feature of the first catalog."""
        return pa.table(
            {
                "feature": pa.array(np.arange(len(self.match)), pa.int32()),
                "match": pa.array(self.match, pa.int32(), mask=self.match < 0),
                "similarity": pa.array(self.similarity, pa.float32(), from_pandas=True),
                "mutual": pa.array(self.mutual),
            }
        )

    def __str__(self) -> str:
        measure = "cosine of decoder rows" if self.by == "decoder" else "correlation of activations"
        both = (self.mutual & (self.similarity >= self.threshold)).sum()
        sides = zip(
            self.names, (self.similarity, self.similarity_back), (self.share, self.share_back), strict=True
        )
        return "\n".join(
            [
                f"by {measure}, matched from {self.threshold:g}; {both:,} pairs are each other's best match",
                *(
                    f"  {name}: {share:.1%} of {np.isfinite(found).sum():,} measured features matched, "
                    f"median {np.nanmedian(found) if np.isfinite(found).any() else np.nan:.3f}"
                    for name, found, share in sides
                ),
            ]
        )


def _share(similarity: Floats, threshold: float) -> float:
    measured = np.isfinite(similarity)
    return float((similarity >= threshold).sum() / measured.sum()) if measured.any() else float("nan")


def difference(one: Catalog, other: Catalog, by: By | None = None, *, threshold: float = 0.7) -> Difference:
    """The best match of every feature of either catalog in the other one, and how similar they are.

    by: `"decoder"` or `"firing"`; by decoder where both SAEs write the same width into the same model, else by firing.
    threshold: similarity from which a feature counts as matched.
    Raises `InvalidInput` for directions that cannot be compared, and for catalogs that sampled no row in common.
    """
    comparable = _directions_differ(one, other) is None
    by = by or ("decoder" if comparable else "firing")
    if by not in ("decoder", "firing"):
        raise InvalidInput(f"difference: by {by!r} is neither 'decoder' nor 'firing'")
    found = _by_decoder(one, other) if by == "decoder" else _by_firing(one, other)
    names = tuple(f"{c.path.name} ({c.d_sae:,} at {c.site})" for c in (one, other))
    return Difference(by, threshold, (names[0], names[1]), *found)


def _directions_differ(one: Catalog, other: Catalog) -> str | None:
    """Why directions of the two cannot be compared; None where they can."""
    widths = [c.info["sae"].get("d_out") or c.info["sae"].get("d_in") for c in (one, other)]
    if widths[0] != widths[1]:
        return f"their directions have widths {widths[0]} and {widths[1]}"
    if one.info["model"]["hash"] != other.info["model"]["hash"]:
        return f"their models, {one.model_name} and {other.model_name}, have other weights"
    return None


class _Best:
    """The best match so far, of each of n features."""

    def __init__(self, n: int) -> None:
        self.match, self.similarity = np.full(n, -1), np.full(n, -np.inf)

    def offer(self, features: Ints, matches: Ints, similarity: Floats) -> None:
        """Pairs that may be better than what there is; of equally good ones the lowest match wins."""
        order = np.lexsort((-matches, similarity, features))
        features, matches, similarity = features[order], matches[order], similarity[order]
        last = np.r_[features[1:] != features[:-1], np.ones(min(1, len(features)), bool)]
        features, matches, similarity = features[last], matches[last], similarity[last]
        better = similarity > self.similarity[features]
        self.match[features[better]] = matches[better]
        self.similarity[features[better]] = similarity[better]

    def result(self, measured: NDArray[np.bool_]) -> tuple[Ints, Floats]:
        none = self.match < 0
        similarity = np.where(none, 0.0, self.similarity)  # measured, and alike in nothing
        return np.where(measured, self.match, -1), np.where(measured, similarity, np.nan)


def _by_decoder(one: Catalog, other: Catalog) -> tuple[Ints, Floats, Ints, Floats]:
    if why := _directions_differ(one, other):
        raise InvalidInput(f"difference by decoder: {why}; by='firing' compares what they fire on")
    rows = [torch.nn.functional.normalize(c.sae.directions().float().cpu(), dim=1) for c in (one, other)]
    alive = [c.density > 0 for c in (one, other)]
    here, there = (np.flatnonzero(a) for a in alive)
    forward, back = _Best(len(one)), _Best(len(other))
    others = rows[1][torch.from_numpy(there)]
    for start in range(0, len(here) if len(there) else 0, AT_ONCE):
        chunk = here[start : start + AT_ONCE]
        cosine = rows[0][torch.from_numpy(chunk)] @ others.t()
        for best, features, matches, dim in ((forward, chunk, there, 1), (back, there, chunk, 0)):
            top = cosine.max(dim=dim)
            best.offer(features, matches[top.indices.numpy()], top.values.double().numpy())
    return *forward.result(alive[0]), *back.result(alive[1])


def _by_firing(one: Catalog, other: Catalog) -> tuple[Ints, Floats, Ints, Floats]:
    a, b, n = _activations(one, other)
    sums = [np.asarray(m.sum(axis=0), float).ravel() for m in (a, b)]
    spreads = [
        np.sqrt(np.maximum(0, np.asarray(m.multiply(m).sum(axis=0), float).ravel() - s * s / n))
        for m, s in zip((a, b), sums, strict=True)
    ]
    measured = [
        (np.diff(m.indptr) >= AT_LEAST) & (spread > 0) for m, spread in zip((a, b), spreads, strict=True)
    ]
    here, there = (np.flatnonzero(m) for m in measured)
    a, b = a[:, here], b[:, there].tocsr()
    forward, back = _Best(len(one)), _Best(len(other))
    for start in range(0, len(here), AT_ONCE):
        product = (a[:, start : start + AT_ONCE].T @ b).tocoo()
        i, j = here[start + product.row], there[product.col]
        covariance = product.data - sums[0][i] * sums[1][j] / n
        correlation = covariance / (spreads[0][i] * spreads[1][j])
        alike = correlation > 0
        forward.offer(i[alike], j[alike], correlation[alike])
        back.offer(j[alike], i[alike], correlation[alike])
    return *forward.result(measured[0]), *back.result(measured[1])


def _activations(one: Catalog, other: Catalog) -> tuple[Any, Any, int]:
    """([n, S], [n, Z] sparse activations on the tokens of the shared rows, n of them evaluated)."""
    from scipy.sparse import csc_array

    rows = [_sampled(c) for c in (one, other)]
    shared = sorted(rows[0].keys() & rows[1].keys())
    if not shared:
        raise InvalidInput(
            "difference by firing: the two catalogs sampled no row in common; build both over the same text, with the "
            "same context size"
        )
    made = []
    starts = np.cumsum([0, *(len(ids) // 4 for ids in shared)])
    for catalog, known in zip((one, other), rows, strict=True):
        sample = catalog.table("sample")
        row = sample["row"].to_numpy()
        place = np.full(max([*known.values(), int(row.max(initial=0))]) + 1, -1)
        place[[known[ids] for ids in shared]] = starts[:-1]
        here = place[row] >= 0
        tokens = place[row[here]] + sample["position"].to_numpy()[here]
        values = sample["activation"].to_numpy()[here].astype(float)
        features = sample["feature"].to_numpy()[here]
        made.append(csc_array((values, (tokens, features)), shape=(int(starts[-1]), len(catalog))))
    excluded = {i for c in (one, other) for i in c.info["excluded"].values()}
    ids = np.frombuffer(b"".join(shared), np.int32)
    evaluated = ~np.isin(ids, sorted(excluded))
    return made[0][evaluated], made[1][evaluated], int(evaluated.sum())


def _sampled(catalog: Catalog) -> dict[bytes, int]:
    """Token ids of each sampled row → its number in the catalog's corpus; the first of equal ones."""
    corpus = catalog.table("corpus")
    row, ids = corpus["row"].to_numpy(), corpus["token_id"].to_numpy().astype(np.int32)
    found: dict[bytes, int] = {}
    for number in catalog.info["sample"]["rows"]:
        start, end = np.searchsorted(row, [number, number + 1])
        found.setdefault(ids[start:end].tobytes(), number)
    return found
