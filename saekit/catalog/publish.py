"""A catalog to and from the Hugging Face Hub, where it is a dataset: its tables as they lie, and a card.

One commit carries everything, so the hub never shows half a catalog; only the catalog's own files go into it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from saekit.catalog.card import card
from saekit.catalog.tables import CATALOG, DIRECTIONS, SCHEMAS, read_table
from saekit.errors import FileMissing, InvalidInput, first_line
from saekit.files import existing, read_tensors

if TYPE_CHECKING:
    from saekit.catalog.store import Catalog

README = "README.md"
PART = r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
NAME = re.compile(f"{PART}/{PART}")  # as the hub has it, and with a user
FILES = [CATALOG, DIRECTIONS, *(f"{name}.parquet" for name in SCHEMAS)]


def publish(
    catalog: Catalog,
    repository: str,
    *,
    private: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a catalog as the dataset `user/name`, making it where there is none; returns its address.

    endpoint, token: of another hub, of another account than the one that is logged in.
    Raises `InvalidInput` for a name the hub cannot have, a catalog with a broken table, or an upload that the hub
    refuses.
    """
    _check_name(repository)
    _check_whole(catalog.path)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=endpoint, token=token)
    additions = [CommitOperationAdd(name, catalog.path / name) for name in FILES]
    additions.append(CommitOperationAdd(README, card(catalog, repository).encode()))
    try:
        address = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        api.create_commit(repository, additions, commit_message="Publish the catalog", repo_type="dataset")
    except Exception as error:  # the hub's own errors, and those of whichever HTTP library it uses
        raise InvalidInput(
            f"publish: {api.endpoint} did not take {repository}: {first_line(error)}. Is the name yours, and are "
            "you logged in (hf auth login)?"
        ) from error
    return str(address)


def fetch(repository: str, *, endpoint: str | None = None, token: str | None = None) -> Path:
    """The folder of a published catalog in the hub's cache, downloaded where it is not there yet.

    Raises `InvalidInput` for a name the hub cannot have, `FileMissing` for a dataset that cannot be had.
    """
    _check_name(repository)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository, repo_type="dataset", allow_patterns=FILES, endpoint=endpoint, token=token
            )
        )
    except Exception as error:
        raise FileMissing(
            f"catalog {repository!r} is neither a folder here nor a dataset that the hub gives out: "
            f"{first_line(error)}"
        ) from error


def _check_name(repository: str) -> None:
    fits = isinstance(repository, str) and len(repository) <= 96 and NAME.fullmatch(repository)
    if not fits or "--" in repository or ".." in repository:
        raise InvalidInput(
            f"repository: expected user/name of ASCII letters, digits, '-', '_' and '.', at most 96 characters, "
            f"got {str(repository)[:200]!r}"
        )


def _check_whole(folder: Path) -> None:
    """Every file is there and is what its name says: nothing else is ever uploaded under these names."""
    for name in SCHEMAS:
        read_table(folder, name)
    read_tensors(existing(folder / DIRECTIONS, "directions"))
