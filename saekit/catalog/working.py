"""Where a catalog is made: `<folder>.building`, beside its place, for one process at a time.

    folder.building/
        .lock            held while somebody works here
        build.json       what is being made of what: only the same is gone on with
        state/           what the pass has seen up to some unit, whole
        done/            the catalog, whole, about to take its place
        replaced…        what was in that place, while the two change

A kill at any moment leaves `folder` as it was or as it is to be; or, between two renames, gone, and whole in here: whoever
comes next puts it back.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saekit.errors import InvalidInput
from saekit.files import clear_leftovers, fsync, read_json, remove, replace_text
from saekit.locks import LOCK, exclusive

BUILD, STATE, DONE, REPLACED = "build.json", "state", "done", "replaced"


@contextlib.contextmanager
def working(folder: Path) -> Iterator[Path]:
    """The working folder of the catalog (or of the catalogs) at `folder`, tidied, with nobody else in it.

    Raises `InvalidInput` where another process is building there. On the way out it is removed if nothing is left in it.
    """
    place = _place(folder)
    try:
        with exclusive(place, what="catalog"):
            _tidy(place, folder)
            yield place
    finally:
        with contextlib.suppress(OSError):  # there is something to go on from
            place.rmdir()


def unfinished(folder: Path) -> bool:
    """Whether a build of the catalog (or of the catalogs) at `folder` was stopped and has left something to go on from."""
    return (_place(folder) / STATE).exists()


def _place(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.building")


def _tidy(place: Path, folder: Path) -> None:
    """Undo what a kill left half done; a finished catalog that has not taken its place is made again from the state."""
    clear_leftovers(place)
    for replaced in place.glob(f"{REPLACED}*"):
        target = _of(folder, replaced.name.removeprefix(REPLACED).removeprefix("-"))
        if target.exists():
            remove(replaced)
        else:
            replaced.rename(target)
    shutil.rmtree(place / DONE, ignore_errors=True)


def put(place: Path, done: Path, folder: Path, name: str = "") -> Path:
    """`done`, which is durable, becomes `folder`, or `folder/name`; what was there goes."""
    target, replaced = _of(folder, name), place / (f"{REPLACED}-{name}" if name else REPLACED)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if target.exists():
            target.rename(replaced)
        done.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    fsync(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    return target


def _of(folder: Path, name: str) -> Path:
    return folder / name if name else folder


def clear(place: Path) -> None:
    """Everything goes but the lock."""
    for path in list(place.iterdir()):
        if path.name != LOCK:
            remove(path)


def check_free(folder: Path, marker: str, what: str) -> None:
    """Raises `InvalidInput` where something else than `what`, told by its file `marker`, would be overwritten."""
    other = folder.exists() and (
        not folder.is_dir() or (any(folder.iterdir()) and not (folder / marker).exists())
    )
    if other:
        raise InvalidInput(f"catalog: {folder} exists and is no {what}; choose another folder")


def begin(place: Path, origin: Mapping[str, Any]) -> None:
    """Note what is being made here. Raises `InvalidInput` where something else is, with what differs."""
    path = place / BUILD
    if not path.exists():
        clear(place)
        replace_text(path, json.dumps(origin, indent=2) + "\n")
        return
    wrong = differences(read_json(path), json.loads(json.dumps(origin)))
    if wrong:
        raise InvalidInput(
            f"catalog: {place} holds a build that was begun otherwise: {'; '.join(wrong)}. Give it what it was begun with, "
            "or start anew with resume=False"
        )


def differences(then: Mapping[str, Any], now: Mapping[str, Any], shown: int = 5) -> list[str]:
    """`"contexts was 20, is 10"` for each entry that differs, however deep; so many of them are spelled out."""
    old, new = _flat(then), _flat(now)
    keys = [*old, *(key for key in new if key not in old)]
    found = [
        f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}"
        for key in keys
        if old.get(key) != new.get(key)
    ]
    return found if len(found) <= shown else [*found[:shown], f"and {len(found) - shown} more"]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """What lies in nested dicts and lists, by its path: `"sae.0.metadata.sha256"`."""
    if not isinstance(value, (dict, list)) or not value:
        return {path: value}
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        key: leaf
        for name, inner in entries
        for key, leaf in _flat(inner, f"{path}.{name}" if path else str(name)).items()
    }


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}…" if len(text) > 40 else text
