"""Runs of these tests draw no pictures, but for those of a module that says `DRAWN = True`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sketches import sketched


@pytest.fixture(scope="module", autouse=True)
def pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    if getattr(request.module, "DRAWN", False):
        yield
    else:
        with sketched():
            yield
