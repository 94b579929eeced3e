"""Builds in parts: merged, they are the bytes of one build; and parts that do not belong together are not merged."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SITE, sentences

from saekit.catalog.accumulate import State
from saekit.catalog.build import build
from saekit.catalog.parts import PART, merge
from saekit.errors import FileMissing, InvalidInput
from saekit.sae import SAE
from saekit.tokens import tokenize

KEPT: dict[str, Any] = {"contexts": 3, "window": 12, "bands": 3, "per_band": 2, "sample_rows": 4}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def sae_here() -> SAE:
    return SAE.new("topk", d_in=256, d_sae=32, k=4, site="blocks.2.hook_resid_pre", seed=3)


@pytest.fixture(scope="module")
def whole(model, sae_here, tmp_path_factory):
    """(tokens, the catalog of one build)."""
    tokens = tokenize(sentences(40), model, 32)
    return tokens, build(model, sae_here, tokens, tmp_path_factory.mktemp("whole") / "c", **KEPT)


@pytest.fixture(scope="module")
def parts(model, sae_here, whole, tmp_path_factory) -> list[Path]:
    place = tmp_path_factory.mktemp("parts")
    made = [build(model, sae_here, whole[0], place / f"{i}", part=(i, 3), **KEPT) for i in (1, 2, 3)]
    assert all(isinstance(path, Path) for path in made)
    return made  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(3))
def test_parts_in_any_order_are_one_build(whole, parts, tmp_path, seed: int) -> None:
    before = [contents(part) for part in parts]
    order = random.Random(seed).sample(parts, 3)
    assert merge(order, tmp_path / "c") == tmp_path.resolve() / "c"
    assert contents(tmp_path / "c") == contents(whole[1])
    assert [contents(part) for part in parts] == before, "parts stay as they are"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_each_part_looked_at_its_own_units(whole, parts, tmp_path) -> None:
    units = -(-whole[0].shape[0] // 8)
    assert units > 6
    for i, part in enumerate(parts):
        state = State.load(part / "sae-0" / "state", tmp_path / str(i))
        assert state.units == {*range(i, units, 3)}
        assert (part / "sae-0" / "weights").exists() == (i == 0), "what the weights say is told once"


def test_parts_share_the_limit(model, sae_here, whole, tmp_path) -> None:
    """max_tokens counts what all parts look at."""
    limited = {**KEPT, "max_tokens": 600}
    once = build(model, sae_here, whole[0], tmp_path / "once", **limited)
    made = [build(model, sae_here, whole[0], tmp_path / f"{i}", part=(i, 2), **limited) for i in (1, 2)]
    merge(made, tmp_path / "c")
    assert contents(tmp_path / "c") == contents(once)
    assert contents(once) != contents(whole[1])


def test_more_parts_than_units_and_several_saes(model, sae_here, tmp_path) -> None:
    other = SAE.new("standard", d_in=256, d_sae=8, site=SITE)
    tokens = tokenize(sentences(4), model, 32)
    units = -(-tokens.shape[0] // 8)
    once = build(model, [sae_here, other], tokens, tmp_path / "once", **KEPT)
    made = [
        build(model, [sae_here, other], tokens, tmp_path / f"{i}", part=(i, units + 1), **KEPT)
        for i in range(1, units + 2)
    ]
    merged = merge(made, tmp_path / "c")
    assert isinstance(once, list)
    assert isinstance(merged, list)
    assert [path.name for path in merged] == ["blocks.2.hook_resid_pre", SITE]
    assert [contents(path) for path in merged] == [contents(path) for path in once]


def test_one_part_is_a_part_too(model, sae_here, whole, tmp_path) -> None:
    part = build(model, sae_here, whole[0], tmp_path / "p", part=(1, 1), **KEPT)
    assert isinstance(part, Path)
    assert (part / PART).exists()
    merge([part], tmp_path / "c")
    assert contents(tmp_path / "c") == contents(whole[1])


def test_a_part_goes_on_after_a_stop(model, sae_here, whole, parts, tmp_path) -> None:
    def stop(progress: Any) -> None:
        if progress.tokens > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(model, sae_here, whole[0], tmp_path / "p", part=(2, 3), progress=stop, **KEPT)
    assert [path.name for path in tmp_path.iterdir()] == ["p.building"]
    build(model, sae_here, whole[0], tmp_path / "p", part=(2, 3), **KEPT)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    merge([parts[0], tmp_path / "p", parts[2]], tmp_path / "c")
    assert contents(tmp_path / "c") == contents(whole[1])


def test_what_does_not_belong_together(model, sae_here, whole, parts, tmp_path) -> None:
    def refused(these: list[Path], match: str, kind: type[Exception] = InvalidInput) -> None:
        with pytest.raises(kind, match=match):
            merge(these, tmp_path / "c")
        assert not (tmp_path / "c").exists()
        assert not (tmp_path / "c.building").exists()

    refused([], "no part to merge")
    refused(parts[:2], "build in 3 parts; missing: 3")
    refused([*parts[:2], parts[1]], "missing: 3; there twice: 2")
    refused([tmp_path / "nothing"], "does not exist", FileMissing)
    refused([whole[1]], f"no {PART} in it", FileMissing)
    narrow = build(model, sae_here, whole[0], tmp_path / "narrow", part=(3, 3), **{**KEPT, "window": 8})
    refused([*parts[:2], narrow], "parts of different builds: window was 12, is 8")
    shorter = tokenize(sentences(39), model, 32)
    other = build(model, sae_here, shorter, tmp_path / "other", part=(3, 3), **KEPT)
    refused([*parts[:2], other], r"have read different texts, of \d+ and \d+ rows")
    empty = [
        build(model, sae_here, torch.zeros(2, 8, dtype=torch.long), tmp_path / f"e{i}", part=(i, 2))
        for i in (1, 2)
    ]
    refused(empty, "no token to look at")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InvalidInput, match="exists and is no catalog"):
        merge(parts, tmp_path / "mine")


@pytest.mark.parametrize("name", ["sae-0/state/state.safetensors", "sae-0/weights/about.json"])
def test_a_damaged_part(parts, tmp_path, name: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(parts[0], broken)
    content = (broken / name).read_bytes()
    (broken / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InvalidInput, match=f"{name} is missing or damaged"):
        merge([broken, *parts[1:]], tmp_path / "c")
    (broken / name).unlink()
    with pytest.raises(InvalidInput, match=f"{name} is missing or damaged"):
        merge([broken, *parts[1:]], tmp_path / "c")
    (broken / PART).write_text(json.dumps({"files": {}}))
    with pytest.raises(InvalidInput, match=rf"{PART}: field 'origin' is missing or wrong"):
        merge([broken, *parts[1:]], tmp_path / "c")


def test_a_merge_replaces_a_catalog_and_nothing_else(parts, whole, tmp_path) -> None:
    shutil.copytree(whole[1], tmp_path / "c")
    (tmp_path / "c" / "features.parquet").write_bytes(b"old")
    merge(parts, tmp_path / "c")
    assert contents(tmp_path / "c") == contents(whole[1])
