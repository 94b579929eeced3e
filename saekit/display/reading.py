"""A reading as it shows itself: the text once for each feature and direction, on grounds of what it says of each token."""

from __future__ import annotations

from rich.text import Text

from saekit.display import html
from saekit.display.colours import coloured
from saekit.display.terminal import STRONG, line
from saekit.lens.reading import Reading


def reading_html(reading: Reading) -> str:
    """For a notebook; the value of a token on a ground is under the pointer."""
    parts = []
    for track in reading.tracks:
        tokens = (
            (token, level, f"{t}: {track.values[t]:.4g}")
            for t, (token, level) in enumerate(reading.levels(track))
        )
        parts.append(html.titled(track.title, html.run(html.grounds(tokens))))
    return html.whole(*parts)


def reading_text(reading: Reading) -> Text:
    """The same as coloured text."""
    parts = [
        part
        for track in reading.tracks
        for part in (line(track.title, STRONG), coloured(reading.levels(track)))
    ]
    return Text("\n").join(parts)
