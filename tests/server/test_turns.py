"""The line of those who ask the model, by itself: the thread that it is answered in."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator, Iterator

import pytest
import torch

from saekit.server.turns import Event, Turns


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Torch's own setting, whatever the machine is."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_model_computes_with_what_torch_had_at_the_start(two_threads) -> None:
    """A first question that comes while the map is made, with one thread, is no reason to be slow for good."""

    def job(left: threading.Event) -> Generator[Event]:
        torch.ones(4).sum()
        yield {"threads": torch.get_num_threads()}

    async def asked() -> list[Event]:
        turns = Turns()
        torch.set_num_threads(1)  # as somewhere else the map has it
        try:
            async with turns.join() as turn:
                turn.start(job)
                return await turn.events()
        finally:
            turns.stop()

    assert asyncio.run(asked()) == [{"threads": 2}]
