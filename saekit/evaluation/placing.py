"""Names beside points, where there is room: each label takes the place around its point that covers least."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]
Line = tuple[Point, Point]
Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels

DIRECTIONS = 16
DISTANCES = (9, 16, 26, 40, 58, 80)  # points
NEAR = DISTANCES[1]  # from farther off a thin line leads to the point
SIZE = 8  # points
SQUARE = 6.0  # pixels: how finely lines and points are seen


def place_labels(axes: Axes, points: Mapping[str, Point], lines: Iterable[Line]) -> None:
    """Write each name beside its point, off the other names, the points and the lines. The layout has to stand."""
    renderer: Any = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixels = axes.figure.dpi / 72
    frame = _box(axes.get_window_extent(renderer))
    at = {name: tuple(axes.transData.transform(point)) for name, point in points.items()}
    taken = [_square(point) for point in at.values()]
    for line in lines:
        start, end = axes.transData.transform(line)
        taken += _squares(tuple(start), tuple(end))
    if legend := axes.get_legend():
        taken.append(_box(legend.get_window_extent(renderer)))

    for name, point in sorted(at.items(), key=lambda item: item[1]):
        text = name.replace("$", r"\$")
        width, height = _size(axes, text, renderer)
        candidates = [
            (_beside(point, distance * pixels, 2 * math.pi * turn / DIRECTIONS, width, height), distance)
            for distance in DISTANCES
            for turn in range(DIRECTIONS)
        ]

        def cost(candidate: tuple[Box, int], area: float = width * height) -> float:
            box, distance = candidate
            outside = area - _overlap(box, frame)
            return 50 * outside + 10 * sum(_overlap(box, other) for other in taken) + distance

        box, distance = min(candidates, key=cost)
        taken.append(box)
        axes.annotate(
            text,
            points[name],
            xytext=tuple(axes.transData.inverted().transform(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))),
            ha="center",
            va="center",
            fontsize=SIZE,
            arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            if distance > NEAR
            else None,
        )


def _box(extent: Any) -> Box:
    return extent.x0, extent.y0, extent.x1, extent.y1


def _size(axes: Axes, text: str, renderer: Any) -> Point:
    """Width and height of a label, with a little air."""
    written = axes.text(0.5, 0.5, text, fontsize=SIZE, transform=axes.transAxes)
    extent = written.get_window_extent(renderer)
    written.remove()
    return extent.width + 4, extent.height + 2


def _beside(point: Point, distance: float, angle: float, width: float, height: float) -> Box:
    """The box that lies `distance` off the point, on the side of `angle`."""
    left = point[0] + distance * math.cos(angle) - width * (1 - math.cos(angle)) / 2
    bottom = point[1] + distance * math.sin(angle) - height * (1 - math.sin(angle)) / 2
    return left, bottom, left + width, bottom + height


def _squares(start: Point, end: Point) -> Iterator[Box]:
    """Small squares along a line."""
    n = int(math.dist(start, end) // SQUARE) + 1
    for i in range(n + 1):
        yield _square((start[0] + (end[0] - start[0]) * i / n, start[1] + (end[1] - start[1]) * i / n))


def _square(at: Point) -> Box:
    return at[0] - SQUARE / 2, at[1] - SQUARE / 2, at[0] + SQUARE / 2, at[1] + SQUARE / 2


def _overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0
