"""What a terminal shows of a run: lines of at most its width, figures that are those told, one row per SAE."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from saekit import console
from saekit.catalog.build import Progress as CatalogFigures
from saekit.catalog.feature import Context
from saekit.console import AnswersProgress, CatalogProgress, ContextText, RunReporter

STEP = {"loss": 0.0523, "l0": 32.0, "explained_variance": 0.941, "dead": 0.012, "mse": 9.0, "aux": 0.0}
RUN = {"saes": 1, "tokens": 860_160, "tokens_in_all": 1_398_784, "tokens_per_second": 24_100.4}
EVALUATED = {"held_out_step": 400, "held_out_explained_variance": 0.938, "held_out_ce_recovered": 0.981}
LONG = {"saes": 1, "tokens": 123_456_789_012, "tokens_in_all": 400e9, "tokens_per_second": 1_234_567.0}


@pytest.fixture
def terminal(monkeypatch):
    """What is written to a terminal of 80 × 24, or to a file."""

    def make(live: bool = True) -> io.StringIO:
        written = io.StringIO()
        width = 80 if live else console.WIDTH
        made = Console(
            file=written, force_terminal=live, width=width, height=24, highlight=False, color_system=None
        )
        monkeypatch.setattr(console, "err", made)
        return written

    return make


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as they are given."""

    def make(*seconds: float) -> None:
        monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=iter(seconds).__next__))

    return make


def shown(written: io.StringIO, *calls: tuple[int, int, dict[str, float]]) -> list[str]:
    """The last picture of the live lines."""
    with RunReporter() as reporter:
        for step, steps, figures in calls:
            reporter.progress(step, steps, figures)
    last = re.split(r"\x1b\[2K", written.getvalue())[-1]
    return [line.rstrip() for line in re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", last).strip("\r\n").split("\n")]


def sweep(names: list[str], **more: float) -> dict[str, float]:
    found = RUN | {"saes": len(names)}
    for i, name in enumerate(names):
        found |= {f"{name}/{key}": value + i / 10 for key, value in (STEP | more).items()}
    return found


@pytest.mark.parametrize("figures", [RUN | STEP, RUN | STEP | EVALUATED, LONG | STEP | EVALUATED])
@pytest.mark.parametrize(("step", "steps"), [(420, 683), (301_408_176, 976_562_500)])
def test_the_live_lines_fit_80_columns_and_say_what_matters(terminal, clock, figures, step, steps) -> None:
    clock(0.0, 3600.0)
    lines = shown(terminal(), (step - step // 10, steps, figures), (step, steps, figures))
    assert len(lines) == 2 + ("held_out_step" in figures)  # nothing is folded
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("━")
    assert f"{step / steps:.0%}  step {step}/{steps}" in lines[0]
    assert lines[0].endswith(" left")
    assert lines[1].startswith("loss 0.0523  L0 32.0  EV 0.941  dead 1.2%  ")
    assert lines[2:] in ([], ["held out at step 400: EV 0.938  CE recovered 0.981"])
    if figures["tokens"] == 860_160:
        assert "860k/1.40M tokens" in lines[0]
        assert lines[1].endswith("24,100 tok/s")


def test_the_loss_is_smoothed_and_the_other_figures_are_not(terminal) -> None:
    calls = [(i, 9, RUN | STEP | {"loss": value, "l0": value}) for i, value in enumerate([10.0, 20.0], 1)]
    assert shown(terminal(), *calls)[1].startswith("loss 16.67  L0 20.0")  # (0.5 · 10 + 20) / 1.5


def test_a_sweep_is_a_table_and_a_long_one_its_reach(terminal) -> None:
    evaluated = {"held_out_step": 1, "k16/held_out_explained_variance": 0.91}
    lines = shown(terminal(), (1, 2, sweep(["k16", "k32"]) | evaluated))
    assert [line.split() for line in lines[1:]] == [
        ["loss", "L0", "EV", "dead", "held-out", "EV"],
        ["k16", "0.0523", "32.0", "0.941", "1.2%", "0.910"],
        ["k32", "0.1523", "32.1", "1.041", "11.2%"],
        ["24,100", "tok/s"],
    ]
    many = shown(
        terminal(),
        (1, 2, sweep([f"k{i}" for i in range(30)]) | {"held_out_step": 7, "k3/held_out_ce_recovered": 0.5}),
    )
    assert many[1:] == [
        "30 SAEs  loss 0.0523…2.952  L0 32.0…34.9  EV 0.941…3.841  dead 1.2%…291.2%",
        "24,100 tok/s",
        "held out at step 7: CE recovered 0.500",
    ]


def test_elsewhere_there_are_plain_lines_and_an_evaluation_is_told_once(terminal, clock) -> None:
    written = terminal(live=False)
    clock(0.0, 10.0, 20.0, 20.1)
    with RunReporter() as reporter:
        reporter.line("logged to checkpoints/a/metrics.jsonl")
        reporter._last = -9.0
        for step, more in ((10, {}), (20, EVALUATED), (30, EVALUATED), (40, EVALUATED)):
            reporter.progress(step, 40, RUN | STEP | more)
    assert written.getvalue().splitlines() == [
        "logged to checkpoints/a/metrics.jsonl",
        "  step 10/40  25%  860k tokens  loss 0.0523  L0 32.0  EV 0.941  dead 1.2%  24,100 tok/s",
        "  held out at step 400: EV 0.938  CE recovered 0.981",
        "  step 20/40  50%  860k tokens  loss 0.0523  L0 32.0  EV 0.941  dead 1.2%  24,100 tok/s  0:20 left",
        "  step 30/40  75%  860k tokens  loss 0.0523  L0 32.0  EV 0.941  dead 1.2%  24,100 tok/s  0:10 left",
        "  step 40/40  100%  860k tokens  loss 0.0523  L0 32.0  EV 0.941  dead 1.2%  24,100 tok/s",
    ]


def test_progress_in_one_line_leaves_nothing_of_a_longer_one_behind(terminal, clock) -> None:
    written = terminal()
    clock(0.0, 10.0, 20.0)
    with AnswersProgress() as progress:
        progress(999_999, 1_000_000_000)
        progress(1, 2)
        *_, longer, shorter = written.getvalue().split("\r\x1b[2K")
        assert longer.rstrip("\r") == "  999,999 of 1,000,000,000 answers"
        assert shorter.rstrip("\r") == "  1 of 2 answers"
    assert written.getvalue().endswith("\r\x1b[2K"), "the last one goes, too"


def test_progress_stays_in_one_line_of_a_narrow_terminal_and_is_plain_elsewhere(terminal, clock) -> None:
    found = CatalogFigures(10**12, 10**6, 10**6, 10**6, 1e9)
    written = terminal()
    clock(0.0, 10.0, 0.0, 10.0)
    CatalogProgress()(found)
    assert len(re.sub(r"\x1b\[[0-9]*[A-Z]", "", written.getvalue()).strip("\r")) == 80
    written = terminal(live=False)
    with CatalogProgress() as progress:
        progress(found)
    assert written.getvalue().startswith(
        "  1,000,000,000,000 tokens, 1,000,000 of 1,000,000 features alive, "
    )
    assert "\r" not in written.getvalue()
    assert "\x1b" not in written.getvalue()


@pytest.mark.parametrize("colours", [True, False])
def test_a_context_shows_where_the_feature_fires_also_without_colours(colours: bool) -> None:
    context = Context(
        [" the", " Jedi", "\x1b\n"],
        [0.0, 2.0, 1.0],
        peak=1,
        document=0,
        norm=1.0,
        sink=False,
        token_ids=[1, 2, 3],
    )
    written = io.StringIO()
    shown = Console(
        file=written, force_terminal=True, color_system="truecolor" if colours else None, width=80
    )
    shown.print(ContextText(context, 2.0))
    if colours:
        assert re.search(r"\x1b\[[0-9;]*48;2;[0-9;]*m Jedi", written.getvalue())
        assert "«" not in written.getvalue()
    else:
        assert written.getvalue().rstrip("\n") == " the« Jedi»\\x1b↵"
