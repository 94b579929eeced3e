from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from catalog.brute import Seen
from catalog.explain.worlds import world, written


@pytest.fixture(scope="session")
def seen() -> Seen:
    return world()


@pytest.fixture(scope="session")
def original(seen, tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("world") / "catalog", seen)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A catalog of its own for a test that writes."""
    return shutil.copytree(original, tmp_path / "catalog")
