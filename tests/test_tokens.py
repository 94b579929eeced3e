from __future__ import annotations

import gzip
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.errors import FileMissing, InvalidInput, SaekitError
from saekit.lm import tokenizer_hash
from saekit.text import documents, write_shard
from saekit.tokens import PADDING, cut, is_held_out, token_batches, tokenize

TEXTS = sentences(40)


def ids_of(model, texts):
    return [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def flat(rows, bos=0):
    return [i for row in rows for i in row.tolist() if i != bos]


# Sources


def test_every_kind_of_source_gives_the_same_documents(tmp_path) -> None:
    import datasets

    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": t}) + "\n\n" for t in TEXTS)
    (tmp_path / "c.json").write_text(json.dumps(TEXTS))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "d.parquet")
    sources = [
        TEXTS,
        iter(TEXTS),
        *(tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.parquet")),
        str(tmp_path / "a.jsonl"),
        datasets.Dataset.from_dict({"text": TEXTS}),
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}),
        datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
    ]
    for source in sources:
        read = documents(source)
        assert list(read()) == TEXTS, source
        assert list(read()) == TEXTS, "a second pass starts at the beginning"
    assert list(documents(tmp_path)()) == TEXTS * 4  # a folder, files in order


def test_a_text_is_not_taken_for_a_path() -> None:
    assert list(documents("Once there was a text.")()) == ["Once there was a text."]
    assert list(documents(["one", "two"])()) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "fine"}\n{"txt": "x"}\n',
            r"a\.jsonl, line 2: expected a text under 'text', found keys txt",
        ),
        ("a.jsonl", b"{broken\n", r"a\.jsonl, line 1: not valid JSON"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: expected a text"),
        ("a.json", b'{"text": "x"}', r"expected a JSON list"),
        ("a.txt", b"\xff\xfe\xfa", r"a\.txt: not UTF-8"),
        ("a.txt.gz", b"not gzip", r"broken gzip"),
        ("a.parquet", b"PAR1", r"not a readable Parquet"),
        ("a.exe", b"x", r"of no kind that can be read"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        list(documents(tmp_path / name)())


def test_missing_and_empty_sources(tmp_path, model) -> None:
    with pytest.raises(FileMissing, match="does not exist"):
        documents("nowhere/corpus.jsonl")
    with pytest.raises(FileMissing, match="no .txt"):
        documents(tmp_path)
    with pytest.raises(InvalidInput, match="expected texts"):
        documents(3)
    (tmp_path / "empty.jsonl").write_text("")
    for source in ([], [""], ["", ""], tmp_path / "empty.jsonl"):
        with pytest.raises(InvalidInput, match="corpus is empty"):
            tokenize(source, model)


def test_links_that_leave_a_folder_are_refused(tmp_path) -> None:
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InvalidInput, match="leaves"):
        documents(tmp_path / "in")


# Packing


@pytest.mark.parametrize("context_size", [2, 7, 32, 256])
def test_every_documents_tokens_come_in_order(model, context_size) -> None:
    rows = list(tokenize(TEXTS, model, context_size))
    assert all(row.shape == (context_size,) and row.dtype == torch.int64 for row in rows)
    assert all(row[0] == 0 for row in rows), "every context starts with BOS"
    assert flat(rows) == [i for ids in ids_of(model, TEXTS) for i in ids]


def test_documents_are_numbered_and_padding_is_marked(model) -> None:
    for batch in tokenize(TEXTS, model, 32).batches(5):
        for ids, numbers in zip(batch.ids, batch.documents, strict=True):
            for number in numbers.unique().tolist():
                if number != PADDING:
                    part = [i for i in ids[numbers == number].tolist() if i]
                    whole = ids_of(model, [TEXTS[number]])[0]
                    assert any(whole[k : k + len(part)] == part for k in range(len(whole)))
                else:
                    assert set(ids[numbers == number].tolist()) == {0}


def test_iterating_is_lazy_and_repeatable(model) -> None:
    def endless():
        raise AssertionError("read too far")
        yield

    tokens = tokenize(TEXTS * 100, model, 16)
    read = tokens.source
    first = list(
        itertools.islice(
            tokens.with_(source=lambda: itertools.chain(itertools.islice(read(), 600), endless())), 3
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(first, tokens, strict=False))
    assert tokens.shape == (len(list(tokens)), 16)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_position_resumes_exactly(model, data) -> None:
    tokens = tokenize(
        TEXTS, model, data.draw(st.integers(2, 40)), shuffle=3, epochs=2, split="train", held_out=0.3
    )
    rows = list(itertools.chain.from_iterable(batch.ids for batch in tokens.batches(4)))
    batches = list(tokens.batches(data.draw(st.integers(1, 9))))
    at = data.draw(st.integers(0, len(batches) - 1))
    done = sum(len(batch.ids) for batch in batches[: at + 1])
    rest = [row for batch in tokens.batches(6, batches[at].position) for row in batch.ids]
    assert len(rest) == len(rows) - done
    assert all(torch.equal(a, b) for a, b in zip(rest, rows[done:], strict=True))


def test_shuffling_changes_the_order_per_epoch_and_nothing_else(model) -> None:
    one = flat(tokenize(TEXTS, model, 64, shuffle=1))
    assert sorted(one) == sorted(flat(tokenize(TEXTS, model, 64)))
    assert one == flat(tokenize(TEXTS, model, 64, shuffle=1))
    assert one != flat(tokenize(TEXTS, model, 64, shuffle=2))
    twice = flat(tokenize(TEXTS, model, 64, shuffle=1, epochs=2))
    assert sorted(twice) == sorted(one * 2)
    assert twice != one * 2


# The held-out split


def test_the_split_is_disjoint_complete_and_independent_of_order(model) -> None:
    base = tokenize(TEXTS, model, 32, held_out=0.3)
    train, held = (flat(base.with_(split=split)) for split in ("train", "held_out"))
    assert sorted(train + held) == sorted(flat(base))
    assert 0.1 < len(held) / len(train + held) < 0.6
    assert flat(tokenize(TEXTS[::-1], model, 32, split="held_out", held_out=0.3)) != held  # other order …
    assert sorted(flat(tokenize(TEXTS[::-1], model, 32, split="held_out", held_out=0.3))) == sorted(
        held
    )  # … same texts


def test_copies_of_a_document_fall_on_one_side() -> None:
    sides = {is_held_out(text, 0.5) for text in [TEXTS[0]] * 5}
    assert len(sides) == 1


def test_one_long_document_can_be_split(model) -> None:
    book = " ".join(sentences(3000))
    base = tokenize([book], model, 128, held_out=0.2)
    train, held = (flat(base.with_(split=split)) for split in ("train", "held_out"))
    assert held
    assert train
    assert len(train) + len(held) == len(flat(base))


def test_a_split_that_got_nothing_says_what_to_do(model) -> None:
    with pytest.raises(InvalidInput, match=r"held-out split .*held_out_text"):
        next(iter(tokenize(["one single text"], model, 8, split="held_out", held_out=1e-9)))
    with pytest.raises(InvalidInput, match="share is 0"):
        tokenize(TEXTS, model, 8, split="held_out")


@pytest.mark.parametrize("size", [0, 1, -5, 257, 2.5, True])
def test_context_sizes_that_cannot_be(model, size) -> None:
    with pytest.raises(InvalidInput, match=r"context_size: .*2 … 256"):
        tokenize(TEXTS, model, size)


@given(st.text(alphabet=st.sampled_from("ab \n"), max_size=200), st.integers(1, 30))
def test_cutting_loses_nothing(text, longest) -> None:
    pieces = cut(text, longest)
    assert "".join(pieces) == text
    assert all(len(piece) <= longest for piece in pieces)


# Token shards and plain ids


def test_shards_round_trip_and_know_their_tokenizer(model, llama, tmp_path) -> None:
    docs = [np.array(ids, np.int32) for ids in ids_of(model, TEXTS)]
    path = tmp_path / "x.tokens.safetensors"
    write_shard(path, docs, separator=0, tokenizer=tokenizer_hash(model.tokenizer), note="test")
    assert flat(tokenize(path, model, 48)) == flat(tokenize(TEXTS, model, 48))
    with pytest.raises(InvalidInput, match="another tokenizer"):
        tokenize(path, llama)


def test_plain_ids_make_batches(model) -> None:
    ids = torch.randint(1, 100, (5, 8))
    batches = list(token_batches(ids, 2))
    assert torch.equal(torch.cat([b.ids for b in batches]), ids)
    assert torch.cat([b.documents for b in batches])[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_llama_packing(llama) -> None:
    rows = list(tokenize(TEXTS, llama, 64))
    assert all(row[0] == llama.tokenizer.bos_token_id for row in rows)


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([".jsonl", ".json", ".txt", ".parquet", ".jsonl.gz", ".tokens.safetensors"]),
)
def test_arbitrary_bytes_are_text_or_one_clear_error(tmp_path_factory, content, suffix) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"x{suffix}"
    path.write_bytes(content)
    try:
        assert all(isinstance(d, (str, np.ndarray)) for d in documents(path)())
    except SaekitError as error:
        assert str(path) in str(error)
