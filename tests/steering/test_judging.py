from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit.errors import InvalidInput
from saekit.steering import judging
from saekit.steering.judging import (
    distinct,
    keyword_rate,
    kl_parts,
    perplexity,
    reactivation,
    repetition,
    token_log_probs,
    word_ids,
)

TOKENS = st.lists(st.integers(0, 4), max_size=20)


@given(TOKENS, st.integers(1, 4))
def test_repetition_counts_what_was_there_before(tokens, n) -> None:
    seen, again, total = set(), 0, 0
    for i in range(len(tokens) - n + 1):
        gram = tuple(tokens[i : i + n])
        again += gram in seen
        seen.add(gram)
        total += 1
    assert repetition(tokens, n) == pytest.approx(again / total if total else 0)


@given(st.lists(TOKENS, max_size=5))
def test_distinct_is_over_all_texts(texts) -> None:
    grams = [(a, b) for tokens in texts for a, b in itertools.pairwise(tokens)]
    assert distinct(texts) == pytest.approx(len(set(grams)) / len(grams) if grams else 1)


def test_kl_parts_add_up() -> None:
    p, q = torch.rand(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert float(kl_parts(p, q).sum()) == pytest.approx(
        float(torch.nn.functional.kl_div(q.log(), p, reduction="sum"))
    )
    assert float(kl_parts(p, p).abs().sum()) == 0
    certain = torch.tensor([1.0, 0.0])
    assert float(kl_parts(certain, torch.tensor([0.5, 0.5])).sum()) == pytest.approx(math.log(2))


def test_keywords_stand_alone() -> None:
    texts = ["The Jedi came.", "A jedi!", "Jedis everywhere", ""]
    assert keyword_rate(texts, [" Jedi"]) == 0.25  # as it is written
    assert keyword_rate(texts, ["jedi"]) == 0.5  # in whatever case
    assert keyword_rate([], ["Jedi"]) == 0
    for words in ([], [" "]):
        with pytest.raises(InvalidInput, match="at least one word"):
            keyword_rate(texts, words)


def test_log_probabilities_and_perplexity_are_the_models(model) -> None:
    ids = model.to_tokens("The king sees a river near the stone")[0]
    with torch.no_grad():
        log_p = model(ids[None])[0].float().log_softmax(-1)
    wanted = [float(log_p[i - 1, ids[i]]) for i in range(1, len(ids))]
    assert token_log_probs(model, ids).tolist() == pytest.approx(wanted, abs=1e-5)
    assert perplexity(model, ids, 4) == pytest.approx(math.exp(-sum(wanted[3:]) / len(wanted[3:])), rel=1e-5)
    assert perplexity(model, ids, len(ids)) == 1.0


def test_words_of_one_token(model) -> None:
    ids = word_ids(model, ["king", " river", "incomprehensibilities"])
    assert [model.tokenizer.decode([i]) for i in ids] == sorted(
        [" king", " river"], key=lambda w: model.tokenizer(w, add_special_tokens=False)["input_ids"][0]
    )


def test_reactivation_reads_the_text_again(model, sae) -> None:
    ids = model.to_tokens("The king sees a river near the stone")[0]
    x = judging.capture(model, [sae.site], ids[None])[sae.site][0]
    with torch.no_grad():
        f = sae.encode(x)
    latent = int(f[4:].max(0).values.argmax())
    assert reactivation(model, sae, latent, ids, 4) == pytest.approx(float(f[4:, latent].max()), rel=1e-5)
    assert reactivation(model, sae, latent, ids, len(ids)) == 0.0
    silent = int((f.max(0).values == 0).nonzero()[0])
    assert reactivation(model, sae, silent, ids, 1) == 0.0
