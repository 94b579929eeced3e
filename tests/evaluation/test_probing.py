"""Sparse probing finds the latent that says a concept, and says honestly when none does."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import NOUNS, SHARED, SITE, VERBS

from saekit.errors import InvalidInput
from saekit.evaluation.labelled import Labelled, read_labelled
from saekit.evaluation.probing import KS, pool, probe, probe_figures
from saekit.sae import SAE
from saekit.sites import capture


def labelled(n: int = 40, kinds: tuple[str, ...] = ("asks", "tells")) -> Labelled:
    """Made-up sentences of which each kind has a word of its own."""
    draw = random.Random(0)
    texts, labels = [], []
    for i in range(n):
        kind = kinds[i % len(kinds)]
        texts.append(f"The {draw.choice(NOUNS)} {kind} and {draw.choice(VERBS)} a {draw.choice(NOUNS)}, {i}.")
        labels.append(kind)
    return Labelled(texts, labels)


@pytest.fixture(scope="module")
def axis_sae():
    """Latents 2i and 2i + 1 are max(x_i, 0) and max(−x_i, 0): what the activations say, they say."""
    sae = SAE.new("standard", d_in=256, d_sae=512, site=SITE)
    rows = torch.stack([torch.eye(256), -torch.eye(256)], 1).reshape(512, 256)
    with torch.no_grad():
        sae.W_enc.copy_(rows.T)
        sae.W_dec.copy_(rows)
    return sae


def test_pooling_is_the_mean_over_ordinary_tokens(model, sae) -> None:
    texts = [*labelled(5).texts, "", "One."]
    pooled = pool(model, sae, texts)
    assert pooled.kept.tolist() == [0, 1, 2, 3, 4, 6]  # an empty text has nothing to pool
    for row, i in enumerate(pooled.kept.tolist()):
        ids = torch.tensor([[0, *model.tokenizer(texts[i], add_special_tokens=False)["input_ids"]]])
        x = capture(model, [SITE], ids)[SITE][0, 1:]
        assert torch.allclose(pooled.activations[row], x.mean(0), atol=1e-4)
        with torch.no_grad():
            assert torch.allclose(pooled.latents[row], sae.encode(x).mean(0), atol=1e-3)


def test_long_texts_are_cut_to_the_context(model, sae) -> None:
    assert len(pool(model, sae, ["word " * 2000]).kept) == 1
    assert len(pool(model, sae, []).kept) == 0


def test_a_latent_that_is_the_concept_is_found(model, axis_sae) -> None:
    texts = labelled()
    vectors = pool(model, axis_sae, texts.texts).activations
    y = torch.tensor([label == "tells" for label in texts.labels])
    concept = vectors[y].mean(0) - vectors[~y].mean(0)
    with torch.no_grad():  # latent 7 reads the difference itself, strongly
        axis_sae.W_enc[:, 7] = 100 * concept / concept.norm()
        axis_sae.b_enc[7] = 1000
    (found,) = probe(model, axis_sae, texts)  # of two labels one says it all
    assert (found.concept, found.texts, found.majority) == ("tells", 40, 0.5)
    assert found.latents[0] == 7
    assert len(found.latents) == max(KS)
    assert found.by_k[1].accuracy >= 0.9
    assert found.activations.accuracy >= 0.9
    assert found == probe(model, axis_sae, texts)[0]


def test_labels_without_a_concept_are_a_coin(model, sae) -> None:
    texts = labelled(160).texts
    draw = random.Random(1)
    labels = draw.sample(["a", "b"] * 80, 160)
    (found,) = probe(model, sae, Labelled(texts, labels))
    for score in (*found.by_k.values(), found.activations):
        assert 0.3 < score.accuracy < 0.7  # 80 tosses: 0.5 ± 0.056
        assert 0.3 < score.auc < 0.7


def test_each_of_several_labels_against_as_many_others(model, sae) -> None:
    found = probe(model, sae, labelled(30, ("asks", "hears", "tells")), ks=(5, 1))
    assert [p.concept for p in found] == ["asks", "hears", "tells"]
    assert {(p.texts, p.majority, *p.by_k) for p in found} == {(20, 0.5, 1, 5)}
    figures = probe_figures(found)
    assert figures["k5_auc"] == pytest.approx(sum(p.by_k[5].auc for p in found) / 3)
    assert {"k1_accuracy", "activations_accuracy", "activations_auc", "majority_accuracy"} <= set(figures)


def test_few_positives_and_the_larger_class(model, sae) -> None:
    kinds = ("asks", "tells", "tells", "tells")  # a concept with fewer negatives than positives
    (found,) = probe(model, sae, labelled(48, kinds), ks=(1,))
    assert (found.texts, found.majority) == (48, 0.75)


def test_what_cannot_be_probed_is_an_error(model, sae) -> None:
    texts = labelled(12)
    with pytest.raises(InvalidInput, match="label 'odd' has 1 texts; expected 4 or more"):
        probe(model, sae, Labelled([*texts.texts, "One."], [*texts.labels, "odd"]))
    for ks in ((), (0,), (sae.d_sae + 1,)):
        with pytest.raises(InvalidInput, match="expected numbers of latents"):
            probe(model, sae, texts, ks=ks)


@pytest.mark.parametrize("place", ["emotions", "facts/facts_true_false.csv"])
def test_real_sets(model, sae, place) -> None:
    path = SHARED / "texts" / place
    if not path.exists():
        pytest.skip(f"../shared/texts/{place} is missing: labelled texts are not part of the repository")
    texts = read_labelled(path)
    some = Labelled(texts.texts[::4], texts.labels[::4])
    figures = probe_figures(probe(model, sae, some, ks=(1, 5)))
    assert 0.4 <= figures["k1_accuracy"] <= 1
    if place == "emotions":
        assert figures["activations_accuracy"] > 0.65
