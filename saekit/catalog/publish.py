"""A catalog to and from the Hugging Face Hub, where it is a dataset: its tables as they lie, and a card.

One commit carries everything, so the hub never shows half a catalog; only the catalog's own files go into it. What comes
back comes file by file, as it is asked for: the folder of a file is named after its commit, and asking for the others by
that commit keeps two catalogs from being mixed, whatever is published in between.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from saekit.catalog.card import card, public
from saekit.catalog.tables import CATALOG, DIRECTIONS, SCHEMAS, read_table
from saekit.errors import FileMissing, InvalidInput, first_line
from saekit.files import MAX_JSON_BYTES, read_tensors

if TYPE_CHECKING:
    from saekit.catalog.store import Catalog

README = "README.md"
PART = r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
NAME = re.compile(f"{PART}/{PART}")  # as the hub has it, and with a user
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,99}")
FILES = [CATALOG, DIRECTIONS, *(f"{name}.parquet" for name in SCHEMAS)]

# What a stranger's dataset may make this machine download, per file
MAX_TABLE_BYTES, MAX_DIRECTIONS_BYTES = 4 * 2**30, 64 * 2**30
MAX_ROWS = 2**30  # a few bytes can say that a value is repeated a billion times


def publish(
    catalog: Catalog,
    repository: str,
    *,
    private: bool = False,
    wandb: bool = False,
    licence: str | None = None,
    metrics: Mapping[str, float] | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a catalog as the dataset `user/name`, making it where there is none; returns its address.

    private: only its owner sees it. wandb: send it to Weights & Biases, too, as `Catalog.artifact` does.
    licence: of the corpus, where the catalog does not know it. metrics: the SAE's evaluation (`saekit.evaluate`,
    `run.metrics`), for the card. endpoint, token: of another hub, of another account than the one that is logged in.

    Paths of this machine stay here: of a model from a local folder, the folder's name and the hash are published.
    Raises `InvalidInput` for a name the hub cannot have, a catalog with a broken table, a private catalog where the
    dataset is public already, or an upload that the hub refuses.
    """
    _check_name(repository)
    paths = {name: catalog._file(name) for name in FILES}
    _check_whole(paths)
    readme = card(catalog, repository, licence=licence, metrics=metrics)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=endpoint, token=token)
    additions = [CommitOperationAdd(name, path) for name, path in paths.items() if name != CATALOG]
    additions.append(CommitOperationAdd(CATALOG, described(catalog)))
    additions.append(CommitOperationAdd(README, readme.encode()))
    try:
        address = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        shown = private and not api.dataset_info(repository).private
        if not shown:
            api.create_commit(
                repository, additions, commit_message="Publish the catalog", repo_type="dataset"
            )
    except Exception as error:  # the hub's own errors, and those of whichever HTTP library it uses
        raise InvalidInput(
            f"publish: {api.endpoint} did not take {repository}: {first_line(error)}. Is the name yours, and are "
            "you logged in (hf auth login)?"
        ) from error
    if shown:
        raise InvalidInput(
            f"publish: {repository} is there already, and public; make it private on the hub first, or take another name"
        )
    if wandb:
        from saekit.catalog.artifact import artifact

        try:
            artifact(catalog, name=repository.split("/")[1])
        except InvalidInput as error:
            raise InvalidInput(f"published as {address}, but {error}") from error
    return str(address)


def described(catalog: Catalog) -> bytes:
    """`catalog.json` as it may leave this machine; byte for byte the same where there was nothing to keep back."""
    info = public(catalog.info)
    if info == catalog.info:
        return catalog._file(CATALOG).read_bytes()
    return (json.dumps(info, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def fetch(
    repository: str,
    name: str | None = None,
    revision: str | None = None,
    *,
    endpoint: str | None = None,
    token: str | None = None,
) -> Path:
    """One file of a published catalog in the hub's cache, downloaded where it is not there yet; without a name, the
    folder of all of them.

    revision: a branch, a tag or a commit; by default what is newest. The folder that the file lies in has the commit's
    name: pass it on to get more files of the same catalog. Without a network, what the cache holds is found.

    Raises `InvalidInput` for a name that the hub or a catalog cannot have and for a file out of proportion,
    `FileMissing` for a file that cannot be had.
    """
    _check_name(repository)
    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
        raise InvalidInput(f"revision: expected a branch, a tag or a commit, got {str(revision)[:200]!r}")
    if name is None:
        folder = fetch(repository, CATALOG, revision, endpoint=endpoint, token=token).parent
        for other in FILES:
            fetch(repository, other, folder.name, endpoint=endpoint, token=token)
        return folder
    if name not in FILES:
        raise InvalidInput(f"file {name[:200]!r} is not one of a catalog's: {', '.join(FILES)}")
    from huggingface_hub import hf_hub_download

    at: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "endpoint": endpoint, "token": token}
    try:
        size = hf_hub_download(repository, name, dry_run=True, **at).file_size or 0
        if size <= _most(name):
            path = Path(hf_hub_download(repository, name, **at))
    except Exception as error:
        raise FileMissing(
            f"catalog {repository!r} is neither a folder here nor a dataset that gives out {name}: {first_line(error)}"
        ) from error
    if size > _most(name):
        raise InvalidInput(
            f"catalog {repository!r}: {name} has {size:,} bytes; at most {_most(name):,} are fetched. Download it yourself "
            "if you trust it, and open the folder"
        )
    if name.endswith(".parquet"):
        _check_rows(path)
    return path


def _check_rows(path: Path) -> None:
    try:
        rows = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(f"{path}: not a readable Parquet file ({first_line(error)})") from error
    if rows > MAX_ROWS:
        raise InvalidInput(f"{path}: {rows:,} rows; at most {MAX_ROWS:,} are read")


def _most(name: str) -> int:
    return {CATALOG: MAX_JSON_BYTES, DIRECTIONS: MAX_DIRECTIONS_BYTES}.get(name, MAX_TABLE_BYTES)


def _check_name(repository: str) -> None:
    fits = isinstance(repository, str) and len(repository) <= 96 and NAME.fullmatch(repository)
    if not fits or "--" in repository or ".." in repository:
        raise InvalidInput(
            f"repository: expected user/name of ASCII letters, digits, '-', '_' and '.', at most 96 characters, "
            f"got {str(repository)[:200]!r}"
        )


def _check_whole(paths: Mapping[str, Path]) -> None:
    """Every file is there and is what its name says: nothing else is ever uploaded under these names."""
    for name in SCHEMAS:
        read_table(paths[f"{name}.parquet"].parent, name)
    read_tensors(paths[DIRECTIONS])
