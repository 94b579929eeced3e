"""The one-pass build against brute force: everything it says, computed again the slow way."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from conftest import SHARED, SITE, sentences

import saekit
from saekit.catalog import Catalog
from saekit.catalog.accumulate import bin_edges, rank_in_group
from saekit.errors import InvalidInput
from saekit.sae import SAE
from saekit.sites import capture
from saekit.tokens import tokenize

CONTEXTS, WINDOW = 4, 12


def brute_force(model, sae, tokens):
    """[(document, row, position, token, f [S])] for every ordinary token."""
    found, row = [], 0
    for batch in tokens.batches(64):
        x = capture(model, [sae.site], batch.ids)[sae.site]
        with torch.no_grad():
            f = sae.encode(x)
        for ids, documents, values in zip(batch.ids, batch.documents, f, strict=True):
            for position, (token, document) in enumerate(zip(ids.tolist(), documents.tolist(), strict=True)):
                if token not in tokens.special:
                    found.append((document, row, position, token, values[position].numpy()))
            row += 1
    return found


@pytest.fixture(scope="module", params=["model", "llama"])
def built(request, tmp_path_factory):
    model = request.getfixturevalue(request.param)
    width = model.cfg.d_model
    sae = SAE.new(
        "topk", d_in=width, d_sae=48, k=6, site="blocks.2.hook_resid_pre", model=request.param, seed=3
    )
    tokens = tokenize(sentences(25), model, 32)
    folder = tmp_path_factory.mktemp("catalog") / "c"
    return (
        model,
        sae,
        tokens,
        Catalog.build(model, sae, tokens, folder, contexts=CONTEXTS, window=WINDOW, batch=3),
    )


def test_densities_moments_and_histograms(built) -> None:
    model, sae, tokens, catalog = built
    truth = brute_force(model, sae, tokens)
    f = np.stack([values for *_, values in truth])
    assert catalog.info["corpus"]["tokens"] == len(truth)
    for feature in catalog:
        values = f[:, feature.index]
        values = values[values > 0]
        assert feature.density == pytest.approx(len(values) / len(truth))
        assert feature.max_activation == pytest.approx(values.max() if len(values) else 0, rel=1e-4)
        assert feature.mean_activation == pytest.approx(values.mean() if len(values) else 0, rel=1e-4)
        assert sum(b.count for b in feature.histogram) == len(values)
        for b in feature.histogram:
            expected = ((values >= b.low * 0.9999) & (values < b.high * 1.0001)).sum()
            assert abs(b.count - expected) <= 1


def test_contexts(built) -> None:
    model, sae, tokens, catalog = built
    truth = brute_force(model, sae, tokens)
    texts = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in sentences(25)]
    by_place = {(row, position): values for _, row, position, _, values in truth}
    places = {(document, row): [] for document, row, *_ in truth}
    for document, row, position, token, _ in truth:
        places[document, row].append((position, token))
    for feature in catalog:
        i = feature.index
        best: dict[int, float] = {}
        for document, _, _, _, values in truth:
            if values[i] > 0:
                best[document] = max(best.get(document, 0), float(values[i]))
        expected = sorted(best.values(), reverse=True)[:CONTEXTS]
        assert [c.max_activation for c in feature.contexts] == pytest.approx(expected, rel=1e-4)
        assert len({c.document for c in feature.contexts}) == len(feature.contexts), "one per document"
        for context in feature.contexts:
            assert best[context.document] == pytest.approx(context.max_activation, rel=1e-4)
            assert context.peak == int(np.argmax(context.activations))
            assert 1 <= len(context.tokens) <= WINDOW
            whole = texts[context.document]
            starts = [
                k for k in range(len(whole)) if whole[k : k + len(context.token_ids)] == context.token_ids
            ]
            assert starts, "a context is a stretch of its document, without special tokens"
            assert "".join(context.tokens).strip() in "".join(saekit.lm.token_strings(model.tokenizer, whole))
            rows = [row for (document, row) in places if document == context.document]
            matches = []
            for row in rows:
                positions = [p for p, _ in places[context.document, row]]
                ids = [t for _, t in places[context.document, row]]
                for k in range(len(ids) - len(context.token_ids) + 1):
                    if ids[k : k + len(context.token_ids)] == context.token_ids:
                        window = [by_place[row, p][i] for p in positions[k : k + len(context.token_ids)]]
                        matches.append(np.allclose(window, context.activations, rtol=1e-3, atol=1e-4))
            assert any(matches), "activations are those of the text"


def test_token_tables(built) -> None:
    model, sae, tokens, catalog = built
    table = defaultdict(list)
    for *_, token, values in brute_force(model, sae, tokens):
        for i in np.flatnonzero(values):
            table[int(i), token].append(float(values[i]))
    for feature in catalog:
        mine = {t: v for (i, t), v in table.items() if i == feature.index and len(v) >= 2}
        expected = sorted((np.mean(v) for v in mine.values()), reverse=True)[:20]
        assert [t.mean_activation for t in feature.top_tokens] == pytest.approx(expected, rel=1e-4)
        total = sum(sum(v) for (i, _), v in table.items() if i == feature.index)
        strings = {saekit.lm.token_strings(model.tokenizer, [t])[0]: v for t, v in mine.items()}
        for stat in feature.top_tokens:
            assert stat.count == len(strings[stat.token])
            assert stat.share == pytest.approx(sum(strings[stat.token]) / total, rel=1e-4)


def test_logit_effects_are_the_limit_of_a_small_push(built) -> None:
    """Direction through the final norm and the unembedding, against autograd through those very modules."""
    model, sae, _, catalog = built
    d = catalog[5].direction.requires_grad_(False)
    # At a point whose norm is large the norm's division is constant: the tangent is the stated effect, up to a factor.
    gain = model.ln_final.weight.detach()
    centred = d - d.mean() if model.cfg.normalization_type == "LN" else d
    effect = (centred * gain) @ model.W_U.detach()
    top = effect.topk(10)
    tokens = saekit.lm.token_strings(model.tokenizer, top.indices.tolist())
    assert [t.token for t in catalog[5].logits_top] == tokens
    assert [t.effect for t in catalog[5].logits_top] == pytest.approx(top.values.tolist(), rel=1e-4)
    low = effect.topk(10, largest=False)
    assert [t.effect for t in catalog[5].logits_bottom] == pytest.approx(low.values.tolist(), rel=1e-4)
    x = 1e3 * torch.randn(256 if d.shape[0] == 256 else 64, generator=torch.Generator().manual_seed(0))
    moved = (
        model.unembed(model.ln_final((x + d)[None, None])) - model.unembed(model.ln_final(x[None, None]))
    )[0, 0].detach()
    assert torch.corrcoef(torch.stack([moved, effect]))[0, 1] > 0.95


def test_neighbours(built) -> None:
    *_, sae, _, catalog = built
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosine = rows @ rows.t()
    cosine.fill_diagonal_(-2)
    for feature in (catalog[0], catalog[47]):
        top = cosine[feature.index].topk(10)
        assert [n.feature for n in feature.neighbours] == top.indices.tolist()
        assert [n.cosine for n in feature.neighbours] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_the_result_does_not_depend_on_the_batch_size(built, tmp_path) -> None:
    model, sae, tokens, catalog = built
    other = Catalog.build(model, sae, tokens, tmp_path / "c", contexts=CONTEXTS, window=WINDOW, batch=16)
    for a, b in zip(catalog, other, strict=True):
        assert a.density == b.density
        assert [(c.document, c.peak, c.token_ids) for c in a.contexts] == [
            (c.document, c.peak, c.token_ids) for c in b.contexts
        ]
        assert [t.token for t in a.top_tokens] == [t.token for t in b.top_tokens]


def test_the_same_build_gives_the_same_bytes(built, tmp_path) -> None:
    model, sae, tokens, catalog = built
    again = Catalog.build(model, sae, tokens, tmp_path / "c", contexts=CONTEXTS, window=WINDOW, batch=3)
    for path in catalog.path.iterdir():
        assert path.read_bytes() == (again.path / path.name).read_bytes(), path.name


def test_special_tokens_are_excluded_unless_told_otherwise(model, sae, tmp_path) -> None:
    tokens = tokenize(sentences(4), model, 32)
    plain = Catalog.build(model, sae, tokens, tmp_path / "a")
    told = Catalog.build(model, sae, tokens, tmp_path / "b", include_special=True)
    assert plain.info["excluded"] == {"<|endoftext|>": 0}
    assert told.info["excluded"] == {}
    n, t = tokens.shape
    assert told.info["corpus"]["tokens"] == n * t > plain.info["corpus"]["tokens"]
    assert not any("<|endoftext|>" in c.tokens for f in plain for c in f.contexts)


def test_wrong_builds(model, sae, tmp_path) -> None:
    tokens = tokenize(sentences(2), model, 32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InvalidInput, match="exists and is no catalog"):
        Catalog.build(model, sae, tokens, tmp_path / "mine")
    with pytest.raises(InvalidInput, match="has width 8"):
        Catalog.build(model, SAE.new("standard", d_in=8, d_sae=8, site=SITE), tokens, tmp_path / "x")
    for odd in (
        {"d_out": 256, "site": SITE, "target_site": "blocks.3.hook_mlp_out"},
        {"site": [SITE, "blocks.1.hook_resid_pre"]},
    ):
        with pytest.raises(InvalidInput, match="not for transcoders and crosscoders"):
            Catalog.build(model, SAE.new("standard", d_in=256, d_sae=8, **odd), tokens, tmp_path / "x")
    with pytest.raises(InvalidInput, match="no token to look at"):
        Catalog.build(model, sae, torch.zeros(2, 8, dtype=torch.long), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_build_that_fails_leaves_the_old_catalog(model, sae, tmp_path, monkeypatch) -> None:
    import saekit.catalog.build as build

    catalog = Catalog.build(model, sae, tokenize(sentences(3), model, 32), tmp_path / "c")
    before = {p.name: p.read_bytes() for p in catalog.path.iterdir()}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "nearest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Catalog.build(model, sae, tokenize(sentences(5), model, 32), tmp_path / "c")
    assert {p.name: p.read_bytes() for p in catalog.path.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_rank_in_group() -> None:
    assert rank_in_group(np.array([3, 3, 5, 9, 9, 9])).tolist() == [0, 1, 0, 0, 1, 2]
    assert rank_in_group(np.zeros(0, np.int64)).tolist() == []
    assert len(bin_edges()) == 65


def test_real_text_on_the_embedded_model(model, sae, tmp_path) -> None:
    corpus = SHARED / "corpora" / "wookieepedia.jsonl.gz"
    if not corpus.exists():
        pytest.skip("../shared/corpora is missing: the real texts are not part of the repository")
    catalog = Catalog.build(model, sae, tokenize(corpus, model), tmp_path / "c", max_tokens=30_000)
    best = catalog.search("Jedi")[0]
    assert sum("Jedi" in "".join(c.tokens) for c in best.contexts) >= len(best.contexts) / 2
