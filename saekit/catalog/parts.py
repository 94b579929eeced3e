"""A build in parts: several processes, on as many machines, each look at every n-th unit of the corpus; `merge` makes one
catalog of what they saw, the bytes of a build by one.

    part/catalog-part.json    of what it is a part, how the corpus ended, SHA-256 of the other files
    part/sae-0/state/         what it saw, for each SAE
    part/sae-0/weights/       in part 1: what the weights say (logit effects, neighbours …), so that a merge needs no model
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saekit.catalog.accumulate import State
from saekit.catalog.stream import Position
from saekit.catalog.tables import CATALOG, SCHEMA_VERSION
from saekit.catalog.weights import Weights
from saekit.catalog.working import DONE, check_free, clear, differences, put, working
from saekit.catalog.writing import write_catalog
from saekit.errors import FileMissing, InvalidInput
from saekit.files import existing, read_json, sha256_of_file, staged, write_json

PART = "catalog-part.json"
NOTHING = "catalog: no token to look at; the corpus is empty or holds special tokens only"


def folder_of(parent: Path, k: int) -> Path:
    """The folder of the k-th SAE."""
    return parent / f"sae-{k}"


def write_part(
    folder: Path,
    states: Sequence[State],
    weights: Sequence[Weights],
    origin: Mapping[str, Any],
    end: Position,
) -> None:
    """weights: of each SAE, or of none."""
    for k, state in enumerate(states):
        place = folder_of(folder, k) / "state"
        place.mkdir(parents=True)
        state.save(place)
    for k, one in enumerate(weights):
        place = folder_of(folder, k) / "weights"
        place.mkdir(parents=True)
        one.save(place)
    sums = {
        str(path.relative_to(folder)): sha256_of_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / PART, {"origin": origin, "end": asdict(end), "files": sums})


def merge(parts: Iterable[str | Path], folder: str | Path) -> Path | list[Path]:
    """Make the catalog, or of several SAEs the catalogs, of which these folders are the parts, in any order.

    Needs neither the model nor the SAE. Returns the folder, or one for each SAE. Raises `FileMissing` for a folder that is no
    part, `InvalidInput` for parts that are damaged, of different builds, of different texts, missing, or there twice.
    """
    found = [_read(Path(part)) for part in parts]
    if not found:
        raise InvalidInput("catalog: no part to merge")
    paths = [path for path, _ in sorted(found, key=lambda one: one[1]["origin"]["part"])]
    about = [one for _, one in sorted(found, key=lambda one: one[1]["origin"]["part"])]
    _check_alike(paths, about)
    origin, end = about[0]["origin"], Position(**about[0]["end"])
    if end.tokens == 0:
        raise InvalidInput(NOTHING)
    names, folder = origin["names"], Path(folder).resolve()
    for name in names:
        check_free(folder / name, CATALOG, "catalog")
    made = []
    with working(folder) as place:
        clear(place)
        for k, name in enumerate(names):
            state = State.load(folder_of(paths[0], k) / "state", folder_of(place / "spilled", k))
            for j, path in enumerate(paths[1:], 1):
                state.merge(State.load(folder_of(path, k) / "state", folder_of(place / f"spilled-{j}", k)))
            weights = Weights.load(folder_of(paths[0], k) / "weights")
            with staged(place / DONE) as done:
                write_catalog(done, state, weights, origin, end)
            made.append(put(place, place / DONE, folder, name))
        clear(place)
    return made[0] if names == [""] else made


def _read(path: Path) -> tuple[Path, dict[str, Any]]:
    """A part and what it says of itself, its files checked."""
    existing(path, "part of a catalog")
    if not (path / PART).exists():
        raise FileMissing(f"{path}: no {PART} in it; `saekit catalog build --part i/n` makes a part")
    about = read_json(path / PART)
    try:
        (number, _), schema, files = about["origin"]["part"], about["origin"]["schema"], dict(about["files"])
        Position(**about["end"])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{path / PART}: field {error} is missing or wrong") from error
    if schema != SCHEMA_VERSION:
        raise InvalidInput(f"{path}: a part of schema {schema!r}; this saekit merges {SCHEMA_VERSION}")
    for name, expected in files.items():
        file = path / name
        if (
            not file.resolve().is_relative_to(path.resolve())
            or not file.is_file()
            or sha256_of_file(file) != expected
        ):
            raise InvalidInput(f"{path}: {name} is missing or damaged; build part {number} again")
    return path, about


def _check_alike(paths: Sequence[Path], parts: Sequence[Mapping[str, Any]]) -> None:
    """Raises `InvalidInput` unless these are all the parts of one build."""
    first = parts[0]
    for path, part in zip(paths[1:], parts[1:], strict=True):
        then, now = dict(first["origin"]), dict(part["origin"])
        then["part"], now["part"] = then["part"][1], now["part"][1]
        if wrong := differences(then, now):
            raise InvalidInput(
                f"catalog: {paths[0]} and {path} are parts of different builds: {'; '.join(wrong)}"
            )
        if part["end"] != first["end"]:
            raise InvalidInput(
                f"catalog: {paths[0]} and {path} have read different texts, of {first['end']['rows']:,} and "
                f"{part['end']['rows']:,} rows; build them from the same one"
            )
    n = first["origin"]["part"][1]
    numbers = [part["origin"]["part"][0] for part in parts]
    missing = sorted({*range(1, n + 1)} - {*numbers})
    twice = sorted({i for i in numbers if numbers.count(i) > 1})
    if missing or twice:
        raise InvalidInput(
            f"catalog: a build in {n} parts; "
            + "; ".join(
                f"{what} {', '.join(map(str, which))}"
                for what, which in (("missing:", missing), ("there twice:", twice))
                if which
            )
        )
