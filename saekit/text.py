"""Documents out of whatever the user has: texts, files, folders, `datasets` objects, hub ids, token shards.

`documents(source)` gives a function that starts a fresh pass, so that a corpus can be read twice. A document
is a `str`, or an int32 array of ids where the source was tokenised already (a token shard).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saekit import embedded
from saekit.errors import FileMissing, InvalidInput, first_line
from saekit.files import existing, read_metadata, read_tensors, write_tensors

Ids = NDArray[np.int32]
Document = str | Ids
Documents = Callable[[], Iterator[Document]]

TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = (".jsonl", ".json", ".parquet")
SHARD_SUFFIX = ".tokens.safetensors"
WHOLE, END = 64 * 2**20, 8 * 2**20  # bytes: files up to here are hashed whole; of others, both ends
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def documents(source: Any, *, field: str = "text") -> Documents:
    """A function that yields the source's documents in order, from the start at each call.

    source: a text; a path (text, JSON lines, JSON, Parquet, `.gz` of these, token shards, or a folder of them);
        a list of texts or paths; a `datasets.Dataset`; a hub dataset id; `"tiny"`, the embedded shards.
    field: the column or key that holds the text.

    Raises `FileMissing` and `InvalidInput` naming file, line and field.
    """
    if isinstance(source, Path):
        return _from_path(source, field)
    if isinstance(source, str):
        if source == embedded.NAME:
            return _from_path(embedded.folder("tokens"), field)
        if _is_path(source):
            return _from_path(Path(source), field)
        if HUB_ID.fullmatch(source):
            return _from_hub(source, field)
        return lambda: iter([source])
    if isinstance(source, dict) and "train" in source:  # a DatasetDict
        source = source["train"]
    if hasattr(source, "column_names"):  # datasets.Dataset and IterableDataset
        return lambda: (_field(row, field, "dataset row") for row in source)
    if isinstance(source, Iterable):
        items = list(source)
        if bad := [item for item in items if not isinstance(item, (str, Path))]:
            raise InvalidInput(f"source: expected texts or paths, found {type(bad[0]).__name__}")
        parts = [
            _from_path(Path(item), field) if isinstance(item, Path) or _is_path(item) else None
            for item in items
        ]
        return lambda: _chain(items, parts)
    raise InvalidInput(
        f"source: expected texts, paths, a datasets.Dataset or a hub id, got {type(source).__name__}"
    )


def place(name: str) -> str | Path:
    """Where a text lies: a path, `"tiny"` or a hub dataset id. For recipes and the command line, where a text itself
    makes no sense. Raises `FileMissing` for what is none of these."""
    if name == embedded.NAME:
        return name
    if not _is_path(name) and HUB_ID.fullmatch(name) and not name.startswith("."):
        return name
    return existing(name, "text")


def fingerprint(names: str | Sequence[str]) -> str:
    """SHA-256 of what `place` finds under these names: equal as long as the texts are.

    Of files: names, sizes and content, of those beyond 64 MiB the first and the last 8 MiB only (an edit in the middle
    that keeps the size goes unseen). Of a hub dataset: the commit of its repository, or only its name where the hub
    does not answer.
    """
    digest = hashlib.sha256()
    for name in [names] if isinstance(names, str) else names:
        where = embedded.folder("tokens") if name == embedded.NAME else place(name)
        if isinstance(where, str):
            digest.update(f"{name}@{_commit(name)}\n".encode())
            continue
        for file in _files(where):
            size = file.stat().st_size
            relative = file.relative_to(where).as_posix() if where.is_dir() else file.name
            digest.update(f"{relative} {size} {_content(file, size)}\n".encode())
    return digest.hexdigest()


def _content(path: Path, size: int) -> str:
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(file.read(END))
        file.seek(size - END)
        digest.update(file.read(END))
        return digest.hexdigest()


def _commit(name: str) -> str | None:
    """The commit a hub dataset stands at, or None where nobody can say."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=10).sha
    except Exception:  # offline, or a hub that does not tell: the name has to do
        return None


def _chain(items: list[Any], parts: list[Documents | None]) -> Iterator[Document]:
    for item, part in zip(items, parts, strict=True):
        if part is None:
            yield item
        else:
            yield from part()


def _is_path(text: str) -> bool:
    """An existing path, or one line that ends like a file we could read (so that a typo is an error)."""
    if not text or "\n" in text or len(text) > 1000 or "\0" in text:
        return False
    if text.removesuffix(".gz").endswith((*TEXT_SUFFIXES, *TABLE_SUFFIXES, SHARD_SUFFIX)):
        return " " not in text or Path(text).exists()
    try:
        return Path(text).exists()
    except OSError:
        return False


def _from_path(path: Path, field: str) -> Documents:
    files = _files(path)
    return lambda: (document for file in files for document in _read(file, field))


def _files(path: Path) -> list[Path]:
    """The readable files of a folder in order, or the file. Raises `FileMissing` and `InvalidInput`."""
    path = existing(path, "text")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _reader(p) is not None)
        if not files:
            raise FileMissing(
                f"text: no {', '.join((*TEXT_SUFFIXES, *TABLE_SUFFIXES, SHARD_SUFFIX))} file in {path}"
            )
        root = path.resolve()
        for file in files:
            if file.is_symlink() and not file.resolve().is_relative_to(root):
                raise InvalidInput(f"text: {file} is a link that leaves {path}; name its target instead")
        return files
    if _reader(path) is None:
        raise InvalidInput(
            f"text: {path} is of no kind that can be read "
            f"({', '.join((*TEXT_SUFFIXES, *TABLE_SUFFIXES, SHARD_SUFFIX))}, also with .gz)"
        )
    return [path]


def _reader(path: Path) -> Callable[[Path, str], Iterator[Document]] | None:
    name = path.name.removesuffix(".gz")
    if name.endswith(SHARD_SUFFIX):
        return _read_shard
    if name.endswith(TEXT_SUFFIXES):
        return _read_text
    if name.endswith(".jsonl"):
        return _read_json_lines
    if name.endswith(".json"):
        return _read_json
    return _read_parquet if name.endswith(".parquet") else None


def _read(path: Path, field: str) -> Iterator[Document]:
    reader = _reader(path)
    assert reader is not None
    try:
        yield from reader(path, field)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: not UTF-8 ({error}); convert it, e.g. with iconv") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise InvalidInput(f"{path}: broken gzip file ({error})") from error


def _open(path: Path) -> Any:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8")


def _read_text(path: Path, field: str) -> Iterator[str]:
    with _open(path) as file:
        yield file.read()


def _read_json_lines(path: Path, field: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InvalidInput(f"{path}, line {number}: not valid JSON ({error})") from error
                yield _field(row, field, f"{path}, line {number}")


def _read_json(path: Path, field: str) -> Iterator[str]:
    with _open(path) as file:
        try:
            rows = json.load(file)
        except (ValueError, RecursionError) as error:
            if isinstance(error, UnicodeDecodeError):
                raise
            raise InvalidInput(f"{path}: not valid JSON ({error})") from error
    if not isinstance(rows, list):
        raise InvalidInput(f"{path}: expected a JSON list of texts or objects with {field!r}")
    for number, row in enumerate(rows):
        yield row if isinstance(row, str) else _field(row, field, f"{path}, item {number}")


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise InvalidInput(f"{path}: no column {field!r}, only {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(columns=[field]):
            for text in batch.column(0).to_pylist():
                yield _field({field: text}, field, str(path))
    except pa.ArrowInvalid as error:
        raise InvalidInput(f"{path}: not a readable Parquet file ({error})") from error


def _field(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = f"keys {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        raise InvalidInput(f"{where}: expected a text under {field!r}, found {found}")
    return text


def _from_hub(name: str, field: str) -> Documents:
    """A hub dataset's train split, streamed. Each pass opens the stream again."""

    def read() -> Iterator[Document]:
        import datasets

        try:
            stream = datasets.load_dataset(name, split="train", streaming=True)
        except Exception as error:  # datasets raises a dozen kinds; all mean that it is not to be had
            raise FileMissing(
                f"text: {name!r} is neither a path nor a dataset that the hub gives us "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        return (_field(row, field, f"dataset {name}") for row in stream)

    return lambda: read()


def _read_shard(path: Path, field: str) -> Iterator[Document]:
    """Documents of a token shard: a flat array of ids, a separator id before each document."""
    separator = int(read_metadata(path)["separator"])
    tensors = read_tensors(path)
    if "ids" not in tensors or tensors["ids"].ndim != 1:
        raise InvalidInput(f"{path}: expected one tensor 'ids' [n], found {sorted(tensors)}")
    ids = tensors["ids"].numpy().astype(np.int32)
    starts = np.flatnonzero(ids == separator)
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        yield ids[start + 1 : end]


def shard_tokenizer(source: Any) -> str | None:
    """The hash of the tokenizer that a token shard's ids belong to, or None for text."""
    path = embedded.folder("tokens") if source == embedded.NAME else source
    if not isinstance(path, (str, Path)) or not (isinstance(path, Path) or _is_path(path)):
        return None
    path = Path(path)
    shards = sorted(path.rglob(f"*{SHARD_SUFFIX}")) if path.is_dir() else [path]
    if not shards or not shards[0].name.endswith(SHARD_SUFFIX):
        return None
    return read_metadata(shards[0]).get("tokenizer")


def write_shard(path: Path, docs: list[Ids], *, separator: int, tokenizer: str, note: str) -> None:
    """Save documents of ids as a token shard; uint16 where the vocabulary allows it."""
    import torch

    flat = np.concatenate([np.concatenate([[separator], ids]) for ids in docs])
    dtype = np.uint16 if flat.max() < 2**16 else np.int32
    metadata = {"separator": str(separator), "tokenizer": tokenizer, "note": note}
    write_tensors(path, {"ids": torch.from_numpy(flat.astype(dtype))}, metadata)
