"""Pictures as a few bytes. Drawing them takes a small training run longer than all the rest of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextlib.contextmanager
def sketched() -> Iterator[None]:
    """In place of each picture a PNG of one pixel that holds the figure's texts and curves; of those in a page nothing."""
    from matplotlib.figure import Figure
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from saekit.training.report import panels

    def save(figure: Figure, path: Any, **_: Any) -> None:
        shown = PngInfo()
        for place in (figure, *figure.axes):
            for text in place.texts:
                shown.add_itxt("text", text.get_text())
            for line in place.lines:
                shown.add_itxt("line", repr(line.get_xydata().tolist()))
        Image.new("L", (1, 1)).save(path, format="png", pnginfo=shown)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        patch.setattr(panels, "svg", lambda *_: "")
        yield
