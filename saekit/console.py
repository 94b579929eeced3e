"""What a person sees in a terminal: a live bar where there is one, plain lines elsewhere, and tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from saekit.lens.colours import coloured
from saekit.lens.tokens import visible

if TYPE_CHECKING:
    from saekit.catalog import Context
    from saekit.catalog.build import Progress as BuildProgress

WIDTH = 120  # where there is no terminal to ask


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=WIDTH)


out = _console(stderr=False)
err = _console(stderr=True)


class RunReporter:
    """Progress of a training run on stderr: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, every: float = 5.0) -> None:
        self._live = err.is_terminal
        self._every, self._last = every, 0.0
        self._bar: Progress | None = None
        self._task: Any = None
        self._first: tuple[float, int] | None = None  # when the first figures came, and for which step

    def __enter__(self) -> RunReporter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def line(self, text: str) -> None:
        err.print(Text(text))

    def progress(self, step: int, steps: int, figures: dict[str, float]) -> None:
        text = _figures(figures)
        if not self._live:
            now = time.monotonic()
            self._first = self._first or (now, step)
            if step == steps or now - self._last >= self._every:
                self._last = now
                self.line(f"  step {step}/{steps}  {text}{self._left(now, step, steps)}")
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=err,
            )
            self._task = self._bar.add_task("", total=steps, text="")
            self._bar.start()
        self._bar.update(self._task, completed=step, text=text)

    def _left(self, now: float, step: int, steps: int) -> str:
        assert self._first is not None
        start, first = self._first
        if step in (first, steps):
            return ""
        return f"  {(now - start) / (step - first) * (steps - step):,.0f} s left"


def _figures(figures: dict[str, float]) -> str:
    rate = f"{figures['tokens_per_second']:,.0f} tok/s"
    if "saes" in figures:
        low, high = figures["explained_variance_low"], figures["explained_variance_high"]
        return f"{figures['saes']} SAEs  EV {low:.3f} … {high:.3f}  dead up to {figures['dead']:.1%}  {rate}"
    parts = [f"loss {figures['loss']:.4g}"]
    if "l0" in figures:
        parts += [
            f"L0 {figures['l0']:.1f}",
            f"EV {figures['explained_variance']:.3f}",
            f"dead {figures['dead']:.1%}",
        ]
    return "  ".join([*parts, rate])


class _NowAndThen:
    """Lines of progress on stderr, not too many."""

    def __init__(self, every: float = 5.0) -> None:
        self._last, self._every = time.monotonic(), every

    def _line(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last >= (0.2 if err.is_terminal else self._every):
            self._last = now
            err.print(Text(text), end="\r" if err.is_terminal else "\n")


class CatalogProgress(_NowAndThen):
    """Progress of a catalog build."""

    def __call__(self, p: BuildProgress) -> None:
        left = "" if p.seconds_left is None else f", {p.seconds_left:,.0f} s left"
        self._line(
            f"  {p.tokens:,} tokens, {p.alive:,} of {p.latents:,} features alive, {p.tokens_per_second:,.0f} tok/s{left}"
        )


class AnswersProgress(_NowAndThen):
    """Progress of questions to a language model."""

    def __call__(self, answers: int, of: int) -> None:
        self._line(f"  {answers:,} of {of:,} answers")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table; the first column is left-aligned, as are texts, and numbers are right-aligned."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        text = i == 0 or any(isinstance(row[i], (str, Text)) and not _is_number(row[i]) for row in rows)
        made.add_column(name, justify="left" if text else "right", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(visible(str(cell))) for cell in row))
    return made


def _is_number(cell: object) -> bool:
    return (
        str(cell)
        .replace(".", "")
        .replace("%", "")
        .replace("-", "")
        .replace(",", "")
        .replace("e", "")
        .isdigit()
    )


def context_text(context: Context, top: float) -> Text:
    """A context's tokens on grounds as strong as their activation; top: the activation of the strongest ground."""
    return coloured(
        (token, a / top if top > 0 else 0.0)
        for token, a in zip(context.tokens, context.activations, strict=True)
    )
