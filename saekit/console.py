"""What a person sees in a terminal: a live bar where there is one, plain lines elsewhere, and tables."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from saekit.display.colours import coloured
from saekit.lens.tokens import visible

if TYPE_CHECKING:
    from saekit.catalog import Context
    from saekit.catalog.build import Progress as BuildProgress

WIDTH = 120  # where there is no terminal to ask
ROWS = 12  # of SAEs trained together, shown live one by one; of more only how far they reach


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=WIDTH)


out = _console(stderr=False)
err = _console(stderr=True)


class RunReporter:
    """Progress of a training run on stderr: a few live lines on a terminal, a line every few seconds elsewhere."""

    def __init__(self, every: float = 5.0) -> None:
        self._every, self._last = every, 0.0
        self._live: Live | None = None
        self._first: tuple[float, int] | None = None  # when the first figures came, and for which step
        self._told_step = -1.0  # of the last evaluation that was told in a line
        self._losses: dict[str, _Smooth] = {}

    def __enter__(self) -> RunReporter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def line(self, text: str) -> None:
        err.print(Text(text))

    def progress(self, step: int, steps: int, figures: dict[str, float]) -> None:
        now = time.monotonic()
        self._first = self._first or (now, step)
        for key, value in figures.items():
            if key.rpartition("/")[2] == "loss":
                figures = figures | {key: self._losses.setdefault(key, _Smooth()).add(value)}
        left = self._left(now, step, steps)
        if err.is_terminal:
            if self._live is None:
                self._live = Live(console=err, auto_refresh=False)
                self._live.start()
            self._live.update(_run(step, steps, left, figures), refresh=True)
        elif step == steps or now - self._last >= self._every:
            self._last = now
            if (at := figures.get("held_out_step", -1)) > self._told_step:
                self._told_step = at
                self.line(f"  held out at {_held_out(figures)}")
            head = f"  step {step}/{steps}  {step / steps:.0%}  {_count(figures['tokens'])} tokens"
            rate = f"{figures['tokens_per_second']:,.0f} tok/s"
            self.line("  ".join(filter(None, (head, _of_all(figures), rate, left))))

    def _left(self, now: float, step: int, steps: int) -> str:
        assert self._first is not None
        start, first = self._first
        if step in (first, steps):
            return ""
        seconds = round((now - start) / (step - first) * (steps - step))
        minutes, hours = seconds // 60, seconds // 3600
        clock = f"{hours}:{minutes % 60:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
        return f"{clock} left"


class _Smooth:
    """The mean of the values so far, each weighing half as much as the one after it."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float:
        self._sum, self._weight = 0.5 * self._sum + value, 0.5 * self._weight + 1
        return self._sum / self._weight


def _run(step: int, steps: int, left: str, figures: Mapping[str, float]) -> RenderableType:
    """What is live: how far the run is, its figures, and its last evaluation; of several SAEs a row for each."""
    tokens = f"{_count(figures['tokens'])}/{_count(figures['tokens_in_all'])} tokens"
    head = Text("  ".join(filter(None, (f"{step / steps:4.0%}", f"step {step}/{steps}", tokens, left))))
    line = Table.grid(padding=(0, 2))
    bar = ProgressBar(steps, step, width=max(6, min(30, err.width - len(head) - 4)))
    line.add_row(bar, head)
    rate = f"{figures['tokens_per_second']:,.0f} tok/s"
    names = _saes(figures)
    if len(names) > 1 and len(names) <= min(ROWS, err.height - 4):
        return Group(line, _run_table(names, figures), Text(rate))
    told = _of_all(figures)
    lines: list[RenderableType] = [line]
    lines += [Text(told), Text(rate)] if len(names) > 1 else [Text(f"{told}  {rate}")]
    if "held_out_step" in figures:
        lines.append(Text(f"held out at {_held_out(figures)}", style="dim"))
    return Group(*lines)


def _run_table(names: Sequence[str], figures: Mapping[str, float]) -> Table:
    """A row for each SAE of a sweep; what was never evaluated has no column of it."""
    forms = {"loss": "{:.4g}", "l0": "{:.1f}", "explained_variance": "{:.3f}", "dead": "{:.1%}",
             "held_out_explained_variance": "{:.3f}", "held_out_ce_recovered": "{:.3f}"}  # fmt: skip
    titles = ["loss", "L0", "EV", "dead", "held-out EV", "CE rec."]
    shown = {
        title: (key, form)
        for title, (key, form) in zip(titles, forms.items(), strict=True)
        if any(f"{name}/{key}" in figures for name in names)
    }
    made = Table(box=None, pad_edge=False, header_style="dim")
    made.add_column("", no_wrap=True, overflow="ellipsis")
    for title in shown:
        made.add_column(title, justify="right", no_wrap=True)
    for name in names:
        own = (figures.get(f"{name}/{key}") for key, _ in shown.values())
        cells = (
            "" if v is None else form.format(v) for v, (_, form) in zip(own, shown.values(), strict=True)
        )
        made.add_row(Text(visible(name)), *cells)
    return made


def _saes(figures: Mapping[str, float]) -> list[str]:
    """The names in a sweep; none where one SAE is trained alone."""
    return [key.removesuffix("/loss") for key in figures if key.endswith("/loss")]


def _of_all(figures: Mapping[str, float]) -> str:
    """The figures of one SAE, or how far those of several reach, in a line."""
    names = _saes(figures) or [""]
    forms = {"loss": ("loss", "{:.4g}"), "l0": ("L0", "{:.1f}"), "explained_variance": ("EV", "{:.3f}"),
             "dead": ("dead", "{:.1%}")}  # fmt: skip
    parts = [f"{len(names)} SAEs"] if len(names) > 1 else []
    parts += [_reach(figures, names, key, *told) for key, told in forms.items()]
    return "  ".join(filter(None, parts))


def _held_out(figures: Mapping[str, float]) -> str:
    """The last evaluation, in a line."""
    names = _saes(figures) or [""]
    ev = _reach(figures, names, "held_out_explained_variance", "EV", "{:.3f}")
    ce = _reach(figures, names, "held_out_ce_recovered", "CE recovered", "{:.3f}")
    return f"step {figures['held_out_step']:.0f}: {'  '.join(filter(None, (ev, ce)))}"


def _reach(figures: Mapping[str, float], names: Sequence[str], key: str, title: str, form: str) -> str:
    """A figure, or the least and the greatest of several, with its title; nothing where nobody has it."""
    keys = [f"{name}/{key}" if name else key for name in names]
    found = sorted(
        {form.format(figures[k]): figures[k] for k in keys if k in figures}.items(), key=lambda p: p[1]
    )
    if not found:
        return ""
    return f"{title} {found[0][0]}" if len(found) == 1 else f"{title} {found[0][0]}…{found[-1][0]}"


def _count(n: float) -> str:
    """A number of tokens in few characters: 860k, 1.40M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.{0 if n >= 100 * size or unit == 'k' else 2}f}{unit}"
    return f"{n:.0f}"


class _NowAndThen:
    """Progress on stderr: one line that changes on a terminal and is gone at the end, a line now and then elsewhere."""

    def __init__(self, every: float = 5.0) -> None:
        self._last, self._every = time.monotonic(), every

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._erase()

    def _line(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last >= (0.2 if err.is_terminal else self._every):
            self._last = now
            self._erase()
            if err.is_terminal:  # one line of it, whatever the width: a second one could not be erased
                err.print(Text(text), no_wrap=True, overflow="ellipsis", end="\r")
            else:
                err.print(Text(text))

    def _erase(self) -> None:
        if err.is_terminal:
            err.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))


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


@dataclass(frozen=True)
class ContextText:
    """A context's tokens on grounds as strong as their activation; with its «peak» marked where there are no colours.

    top: the activation of the strongest ground.
    """

    context: Context
    top: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._text(console)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._text(console))

    def _text(self, console: Console) -> Text:
        if console.color_system is None or console.no_color:
            return Text(visible(str(self.context)).replace("\n", "↵\n"), overflow="fold")
        return coloured(
            (token, a / self.top if self.top > 0 else 0.0)
            for token, a in zip(self.context.tokens, self.context.activations, strict=True)
        )
