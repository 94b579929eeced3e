"""Sampling documents: the model's own distribution, the same again for the same seed, readable as a corpus."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import saekit
from saekit import embedded
from saekit.errors import FileMissing, InvalidInput
from saekit.files import read_metadata, read_tensors
from saekit.lm import tokenizer_hash
from saekit.text import documents
from saekit.training import sample
from saekit.training.sample import sample_documents

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@pytest.fixture(scope="module")
def toy() -> GPT2LMHeadModel:
    """A GPT-2 with random weights, large enough ones that its predictions differ."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A model with the embedded one's tokenizer and room for 64 ids: each of them is a call."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=8192, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded.folder("model") / name, tmp_path / "small" / name)
    return tmp_path / "small"


def test_samples_are_a_corpus_and_the_seed_decides_them(
    model: TransformerBridge, small: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    first = sample_documents(small, 300, 0, tmp_path / "a", rows=4, report=lines.append)
    again = sample_documents(small, 300, 0, tmp_path / "b", rows=4)
    other = sample_documents(small, 300, 1, tmp_path / "c", rows=4)
    assert [path.name for path in first] == ["sample-0.tokens.safetensors"]
    ids, same, different = (read_tensors(path)["ids"] for (path,) in (first, again, other))
    assert torch.equal(ids, same)
    assert not torch.equal(ids[:200], different[:200])
    assert lines[-1].split(" tokens")[0].endswith("of 300")

    docs = [np.asarray(document) for document in documents(tmp_path / "a")()]
    assert 300 <= sum(map(len, docs)) < 300 + 64
    assert all(16 <= len(document) < 64 and document.min() > 0 for document in docs)
    metadata = read_metadata(first[0])
    assert metadata["tokenizer"] == tokenizer_hash(model.tokenizer)
    assert metadata["note"] == "sampled from small, seed 0, temperature 1"
    contexts = next(saekit.tokenize(tmp_path / "a", model, 32).batches(4))
    assert torch.equal(contexts.ids[0, 1:], torch.from_numpy(docs[0][:31].astype(np.int64)))


def test_rows_end_on_their_own_and_stay_themselves_as_others_end(
    toy: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the first id chosen per row and greedy after it, each row is what the model says without any cache."""
    n, specials = 40, list(range(5))
    calls = 0

    def greedy(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.arange(10, 10 + n)[:, None] if calls == 1 else logits.argmax(-1, keepdim=True)

    def alone(first: int) -> list[int]:
        ids = [0, first]
        while len(ids) < 24 and ids[-1] not in specials:
            ids.append(int(toy(torch.tensor([ids])).logits[0, -1].argmax()))
        return [i for i in ids[1:] if i not in specials]

    monkeypatch.setattr(sample, "_draw", greedy)
    docs = sample._sample(toy, n, 0, specials, 1.0, torch.Generator())
    expected = [alone(first) for first in range(10, 10 + n)]
    assert [document.tolist() for document in docs] == expected
    lengths = [len(document) for document in docs]
    assert max(lengths) == 23  # some rows fill the context
    # so many end before it that the cache was cut down
    assert sum(length < 23 for length in lengths) > n // 2


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ids_are_drawn_from_the_models_distribution(temperature: float) -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0, float("-inf")]])
    drawn = sample._draw(logits.expand(100_000, -1), temperature, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn[:, 0], minlength=5) / 100_000
    torch.testing.assert_close(shares, (logits[0] / temperature).softmax(-1), atol=5e-3, rtol=0)


def test_shards_stay_below_their_size_and_keep_documents_whole() -> None:
    docs = [np.full(n, n, np.int32) for n in (5, 3, 9, 20, 1, 1)]
    groups = sample._by_size(docs, 10)
    assert [[len(ids) for ids in group] for group in groups] == [[5, 3], [9], [20], [1, 1]]


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidInput, match="temperature: 0"):
        sample_documents("tiny", 10, 0, tmp_path, 0.0)
    with pytest.raises(InvalidInput, match="tokens and rows: expected 1 or more, got 0 and 256"):
        sample_documents("tiny", 0, 0, tmp_path)
    with pytest.raises(FileMissing, match="does not exist"):
        sample_documents(tmp_path / "gone", 10, 0, tmp_path)
    (tmp_path / "old.tokens.safetensors").touch()
    with pytest.raises(InvalidInput, match="holds token shards already"):
        sample_documents("tiny", 10, 0, tmp_path)
    assert sample.main(["tiny", "--tokens", "10", "--out", str(tmp_path)]) == 1
    assert "holds token shards already" in capsys.readouterr().err


def test_a_model_that_ends_at_once_is_not_asked_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "_draw", lambda logits, *_: torch.zeros(len(logits), 1, dtype=torch.long))
    with pytest.raises(InvalidInput, match="none of 4 documents has 16 tokens"):
        sample_documents("tiny", 10, 0, tmp_path, rows=4)
