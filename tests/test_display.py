"""What things show of themselves: whole, harmless, small, the same in a notebook and in a terminal."""

from __future__ import annotations

import dataclasses
import html as html_of
import io
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from catalog.brute import made
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from saekit.catalog import Catalog
from saekit.catalog.feature import Context, Feature
from saekit.catalog.tables import write_table
from saekit.cli import main
from saekit.display.catalog import RULE, to_start_with
from saekit.display.comparison import differing
from saekit.display.html import SCOPE
from saekit.display.terminal import spark
from saekit.lens.reading import Reading, Track
from saekit.lens.tokens import visible
from saekit.steering.compare import Comparison, Odds
from saekit.steering.directions import Direction
from saekit.steering.sweep import Figures, SteeringSweep, SweepRow

SITE = "blocks.2.hook_resid_pre"
HOSTILE = [
    "<script>alert(1)</script>", "</style><img src=x onerror=alert(1)>", "\x1b[31mred\x1b[0m", "\u202egnol", "$x^2$",
    "\\frac{", "&lt;", '"><b onclick=', " a\nb", "漢字", "🦊", "\x00", "[bold]", " Jedi", "\u200f", "e\u0301\u0302", "\t", "'", '"', "`",
]  # fmt: skip
TAGS = {
    "div", "span", "style", "b", "br", "code", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "svg", "rect",
    "title", "path", "polyline", "polygon", "circle", "text",
}  # fmt: skip
ATTRIBUTES = {
    "class", "style", "title", "viewbox", "preserveaspectratio", "role", "aria-label", "x", "y", "width", "height", "d", "points",
    "fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "text-anchor", "cx", "cy", "r",
}  # fmt: skip


class Page(HTMLParser):
    """The tags, attributes and runs of text of an output, and the cells of its tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes = set[str](), set[str]()
        self.runs, self.cells, self.grounds, self.text = list[str](), list[str](), list[tuple[str, str]](), ""
        self._open = list[tuple[str, str]]()
        self.feed(page)
        self.close()
        assert not self._open, "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "br":
            self.tags.add(tag)
            return
        self._tag(tag, attrs)
        self._open.append((tag, dict(attrs).get("class") or ""))
        if self._open[-1] == ("div", "run"):
            self.runs.append("")
        if tag == "td":
            self.cells.append("")
        if tag == "b" and self._in("div", "run"):
            self.grounds.append((str(dict(attrs)["title"]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag(tag, attrs)

    def _tag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def _in(self, tag: str, kind: str) -> bool:
        return (tag, kind) in self._open

    def handle_data(self, data: str) -> None:
        if self._in("style", ""):
            return
        self.text += data
        if self._in("div", "run"):
            self.runs[-1] += data
            if self._open[-1][0] == "b":
                title, text = self.grounds[-1]
                self.grounds[-1] = title, text + data
        if any(tag == "td" for tag, _ in self._open):
            self.cells[-1] += data


def shown(text: str) -> str:
    return visible(text).replace("\n", "↵\n")


def harmless(page: str) -> Page:
    """No tag or attribute that could run, fetch or leave the output's own place; nothing invisible in it."""
    read = Page(page)
    assert read.tags <= TAGS
    assert read.attributes <= ATTRIBUTES
    assert page.startswith(f'<div class="{SCOPE}"><style>.{SCOPE}')
    style = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert len(style) == 1
    assert all(rule.strip().startswith(f".{SCOPE}") for rule in re.findall(r"(?:^|\})([^{}]+)\{", style[0]))
    assert not re.search(r"url\(|@import|javascript:|https?:", style[0])
    assert visible(page) == page
    return read


def in_terminal(what: Any, width: int = 120, **options: Any) -> str:
    out = io.StringIO()
    settings = {"force_terminal": True, "color_system": "truecolor", "highlight": False, "no_color": False}
    Console(file=out, width=width, **(settings | options)).print(what)
    return out.getvalue()


def plain_terminal(what: Any, width: int = 120) -> str:
    return in_terminal(what, width, force_terminal=False, color_system=None)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Catalog:
    """Every token, explanation and label is hostile."""
    folder = made(tmp_path_factory.mktemp("hostile") / "hostile")
    n = len(Catalog.open(folder).vocabulary)
    tokens = [HOSTILE[i % len(HOSTILE)] + (str(i) if i >= len(HOSTILE) else "") for i in range(n)]
    write_table(folder, "vocabulary", {"token_id": list(range(n)), "token": tokens})
    features = list(range(0, 24, 2))
    said = {
        "feature": features,
        "method": ["llm"] * 12,
        "model": ["<i>m</i>\x1b[0m"] * 12,
        "prompt": ["p"] * 12,
    }
    write_table(
        folder, "explanations", {**said, "text": [HOSTILE[i % len(HOSTILE)] + " words" for i in features]}
    )
    judged = {
        "scorer": ["pearson"] * 12,
        "judge": [""] * 12,
        "judge_prompt": [""] * 12,
        "score": [0.1 * (i % 9) for i in range(12)],
    }
    write_table(
        folder, "scores", {**said, **judged, "control": [None] * 12, "n": [9] * 12, "failures": [0] * 12}
    )
    return Catalog.open(folder)


@pytest.fixture(scope="module")
def tiny() -> Catalog:
    return Catalog.open("tiny")


def odds(tokens: list[str], shift: float) -> list[Odds]:
    return [Odds(token, -1.0 - i, -1.0 - i + shift * (-1) ** i) for i, token in enumerate(tokens)]


@pytest.fixture(scope="module")
def side() -> Comparison:
    p = torch.full((len(HOSTILE),), 1 / len(HOSTILE))
    return Comparison(
        prompt="Once <b>\x1b[2J", edits=(Direction(torch.ones(8), SITE, "<u>\u202eup").add(2.0),), plain="", steered="", kl=0.5,
        top_tokens=[(token, 0.1, 0.01 * i) for i, token in enumerate(HOSTILE)],
        kl_tokens=[(token, 0.1 - 0.02 * i) for i, token in enumerate(HOSTILE)],
        plain_odds=odds([*HOSTILE, " end"], 0.5), steered_odds=odds([" start", *HOSTILE[::2]], 0.25), p_plain=p, p_steered=p,
    )  # fmt: skip


def figures(effect: float, perplexity: float, **more: Any) -> Figures:
    return Figures(kl=effect * 2, perplexity=perplexity, repetition=0.25, distinct=0.75, **more)


@pytest.fixture(scope="module")
def sweep() -> SteeringSweep:
    def row(place: str, strength: float, effect: float, perplexity: float) -> SweepRow:
        control = figures(effect / 4, 13.0, keywords=effect / 4)
        least = figures(0.0, 11.0, keywords=0.0)
        most = figures(effect / 2, 17.0, keywords=effect / 2)
        return SweepRow(
            place, strength, f"text {strength:g} {HOSTILE[0]}", figures(effect, perplexity, keywords=effect), control, least, most,
            HOSTILE[2],
        )  # fmt: skip

    rows = [row(place, s, s / 8, 10 + s**2) for place in ("<i>a</i>", "b$\x1b") for s in (0.0, 1.0, 2.0, 8.0)]
    return SteeringSweep(tuple(rows), figures(0.0, 10.0, keywords=0.0), "plain " + HOSTILE[1])


@pytest.fixture(scope="module")
def reading() -> Reading:
    tokens = (*HOSTILE, "漢", "nothing")
    values = (*map(float, range(1, len(tokens))), math.nan)
    about = ("<i>a</i> $x$", "blocks.0.hook_resid_pre")
    tracks = Track(*about, "activation", values, 0.0, 8.0), Track(*about, "projection", values, 3.0, 2.0)
    return Reading(tokens, (False,) * len(tokens), tracks)


@pytest.fixture(scope="module", params=["feature", "silent", "catalog", "side", "sweep", "reading"])
def anything(request, hostile, side, sweep, reading) -> Any:
    return {
        "feature": hostile[2],
        "silent": hostile[23],
        "catalog": hostile,
        "side": side,
        "sweep": sweep,
        "reading": reading,
    }[request.param]


def test_an_output_is_harmless(anything) -> None:
    harmless(anything._repr_html_())


def test_a_terminal_gets_nothing_that_moves_it(anything) -> None:
    for width in (50, 120):
        text = in_terminal(anything, width)
        assert "\x1b[" in text
        assert not re.search(
            r"\x1b(?!\[[0-9;]*m)|[\x00-\x09\x0b-\x1a\u202e\u200f]", text
        )  # but for colours of its own
        assert all(cell_len(line) <= width for line in plain_terminal(anything, width).splitlines())
    assert "\x1b" not in plain_terminal(anything)
    assert "\x1b" not in str(anything)


def test_markup_in_a_token_is_literal(side) -> None:
    assert "'[bold]'" in plain_terminal(side)


def test_no_color_is_heeded(anything, monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    Console(file=out, force_terminal=True, highlight=False, width=100).print(anything)
    assert not re.search(r"\x1b\[[0-9;]*(3[0-8]|4[0-8])", out.getvalue())


def test_ipython_shows_colours_on_a_terminal_only(anything, monkeypatch) -> None:
    from IPython.lib.pretty import pretty

    assert pretty(anything) == str(anything)  # pytest is no terminal
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert re.search(r"\x1b\[[0-9;]+m", pretty(anything))
    monkeypatch.setenv("NO_COLOR", "1")
    assert pretty(anything) == str(anything)


def test_figures_of_hostile_tokens_draw_without_a_warning(anything, tmp_path) -> None:
    figure = anything.figure()
    figure.savefig(tmp_path / "f.png")
    for axes in figure.axes:
        assert axes.get_title()
        assert axes.get_xlabel() or axes.get_ylabel() or axes.get_xticklabels()


def test_letters_that_no_font_has_are_escapes() -> None:
    from saekit.lens.drawing import drawable, drawable_token

    assert drawable("é–↵ naïve") == "é–↵ naïve"
    assert drawable("漢a") == "\\u6f22a"
    assert drawable("a\nb\x1b$") == "a↵b\\x1b\\$"
    assert drawable_token(" Jedi") == "' Jedi'"


# A feature


def test_every_token_of_every_context_is_there_with_its_activation(hostile) -> None:
    for feature in hostile:
        read = harmless(feature._repr_html_())
        contexts = feature.contexts[:10] + [b.contexts[0] for b in reversed(feature.bands) if b.contexts]
        assert read.runs == ["".join(map(shown, c.tokens)) for c in contexts]
        top = feature.max_activation
        grounds = [
            (f"{a:.3g}", shown(token))
            for c in contexts
            for i, (token, a) in enumerate(zip(c.tokens, c.activations, strict=True))
            if a >= 0.03 * top or i == c.peak
        ]
        assert read.grounds == grounds


def test_a_feature_says_what_is_known_of_it(hostile, tiny) -> None:
    for feature in (hostile[2], tiny[2189], tiny[3900]):
        read = harmless(feature._repr_html_())
        terminal = " ".join(plain_terminal(feature, 4000).split())
        assert f"feature {feature.index}" in read.text
        for what in (f"{feature.score:.2f}", f"{feature.density:.3%}", f"{feature.max_activation:.3g}"):
            assert what in read.text
            assert what in terminal
        assert visible(feature.explanation) in read.text
        assert " ".join(visible(feature.explanation).split()) in terminal
        for t in feature.logits_top[:8] + feature.logits_bottom[:8]:
            assert visible(t.token).replace("\n", "↵") in read.cells
            assert f"{t.effect:+.3g}" in read.cells
            assert " ".join(repr(visible(t.token)).split()) in terminal
        for t in feature.top_tokens[:8]:
            assert f"{t.mean_activation:.3g}" in read.cells
        for n in feature.neighbours[:5] + feature.coactive[:5]:
            assert str(n.feature) in read.cells
            assert f"{n.similarity:.2f}" in read.cells
        bars = re.findall(r"<rect [^>]*><title>[^:]*: ([\d,]+) tokens", feature._repr_html_())
        assert [int(n.replace(",", "")) for n in bars] == [b.count for b in feature.histogram if b.count]


def test_a_scorer_is_named_with_its_control(tiny) -> None:
    said = "explained by tokens, pearson 0.62 (shuffled -0.03), auc 0.80 (shuffled 0.50)"
    assert said in Page(tiny[2189]._repr_html_()).text
    assert said in plain_terminal(tiny[2189])


def wide(tiny: Catalog, tokens: int, contexts: int) -> Feature:
    """A feature that fires on every token of long contexts."""
    feature = tiny[int(tiny.density.argmax())]
    context = Context(
        [" wide"] * tokens, [feature.max_activation] * tokens, tokens - 1, 0, 20.0, True, [1] * tokens
    )
    feature.__dict__["contexts"] = [context] * contexts
    return feature


def test_an_output_stays_small(tiny) -> None:
    dense = tiny[int(tiny.density.argmax())]
    assert dense.density > 0.5
    long = wide(tiny, 128, 20)
    longest = wide(tiny, 5000, 20)
    for thing in (dense, long, longest, tiny):
        assert len(thing._repr_html_().encode()) < 60_000
    assert Page(longest._repr_html_()).runs[0] == " wide" * 160  # around the peak
    assert "sink" in Page(longest._repr_html_()).text
    assert "(sink)" in plain_terminal(long, 400)


def test_a_record_is_printed_by_the_command_line_as_rich_prints_it(tiny, capsys) -> None:
    main(["catalog", "show", "tiny", "2189"])
    assert capsys.readouterr().out == plain_terminal(tiny[2189])
    main(["catalog", "show", "tiny", "2189", "--bands"])
    more = capsys.readouterr().out
    assert more.startswith(plain_terminal(tiny[2189]))
    assert more.count("of its firings") == len(tiny[2189].bands)


# A catalog


def test_a_catalog_counts_every_feature_once(hostile, tiny) -> None:
    for catalog in (hostile, tiny):
        page = catalog._repr_html_()
        counts = [
            int(n.replace(",", "")) for n in re.findall(r"<title>[^:]*: ([\d,]+) features</title>", page)
        ]
        alive, scored = int((catalog.density > 0).sum()), int((~np.isnan(catalog.score)).sum())
        assert sum(counts) == alive + scored
        text = harmless(page).text
        assert f"{alive:,} of {len(catalog):,}" in text
        assert RULE in text
        assert f"{alive:,} of {len(catalog):,}" in plain_terminal(catalog)


def test_the_ten_to_start_with_are_the_best_of_each_tenth(tiny) -> None:
    ten = to_start_with(tiny)
    assert len({f.index for f in ten}) == 10
    density, score = tiny.density, np.round(np.nan_to_num(tiny.score, nan=-1), 2)
    usual = sorted(np.flatnonzero((density >= 1e-4) & (density <= 1e-2)), key=lambda i: -density[i])
    for feature, part in zip(ten, np.array_split(usual, 10), strict=True):
        assert feature.index in part
        assert score[feature.index] == max(score[i] for i in part)
    cells = Page(tiny._repr_html_()).cells
    rows = plain_terminal(tiny, 200).splitlines()[-10:]
    for feature, row in zip(ten, rows, strict=True):
        assert str(feature.index) in cells
        assert row.split()[0] == str(feature.index)


def test_a_catalog_in_which_nothing_fired(hostile, tmp_path) -> None:
    folder = shutil.copytree(hostile.path, tmp_path / "copy")
    columns = hostile.table("features").to_pydict()
    for name in ("density", "max_activation", "mean_activation"):
        columns[name] = [0.0] * len(hostile)
    write_table(folder, "features", columns)
    for name in ("explanations", "scores"):
        write_table(folder, name, {column: [] for column in hostile.table(name).column_names})
    silent = Catalog.open(folder)
    assert to_start_with(silent) == []
    assert "0 of 24" in harmless(silent._repr_html_()).text
    assert "0 of 24" in plain_terminal(silent)
    silent.figure().savefig(tmp_path / "f.png")


# A comparison

WORDS = st.lists(st.sampled_from([" a", " b", " c", "d"]), max_size=12)


@given(WORDS, WORDS)
def test_what_is_not_marked_is_the_same_in_both(one: list[str], other: list[str]) -> None:
    changed = differing(one, other)
    kept = [
        [token for token, new in zip(side, marks, strict=True) if not new]
        for side, marks in zip((one, other), changed, strict=True)
    ]
    assert kept[0] == kept[1]
    assert differing(one, one) == ([False] * len(one),) * 2


def test_both_texts_are_whole_and_what_differs_is_marked(side) -> None:
    read = harmless(side._repr_html_())
    texts = [
        shown(side.prompt + "".join(o.token for o in each)) for each in (side.plain_odds, side.steered_odds)
    ]
    assert read.runs == texts
    changed = differing([o.token for o in side.plain_odds], [o.token for o in side.steered_odds])
    marked = [
        (f"log p: plain {o.plain:.2f}, steered {o.steered:.2f} nats", shown(o.token))
        for each, marks in zip((side.plain_odds, side.steered_odds), changed, strict=True)
        for o, new in zip(each, marks, strict=True)
        if new
    ]
    assert read.grounds == marked
    assert any(text == " end" for _, text in marked)
    for token, p, q in side.top_tokens:
        at = read.cells.index(visible(token).replace("\n", "↵"))
        assert read.cells[at + 2 : at + 5] == [f"{p:.2%}", f"{q:.2%}", f"{q - p:+.2%}"]
    assert "0.5 nats" in read.text
    assert f"{side.perplexity:.3g}" in read.text


def test_likelier_steered_is_blue_and_likelier_plain_orange(side) -> None:
    pattern = r'<b( class="below")? title="log p: plain (\S+), steered (\S+) nats"'
    found = re.findall(pattern, side._repr_html_())
    assert {below for below, *_ in found} == {"", ' class="below"'}
    for below, plain, steered in found:
        assert bool(below) == (float(steered) < float(plain))


def test_a_chat_is_shown_by_its_messages(side) -> None:
    chat = dataclasses.replace(side, prompt=[{"role": "user", "content": "<Hi>"}])
    assert harmless(chat._repr_html_()).runs[0].startswith("user: <Hi>↵\n")
    assert "user: <Hi>" in plain_terminal(chat)


def test_an_empty_continuation(side) -> None:
    short = dataclasses.replace(side, plain_odds=[], steered_odds=[], edits=())
    assert harmless(short._repr_html_()).runs == [shown(side.prompt)] * 2
    assert "no edit" in plain_terminal(short)
    short.figure()


# A sweep


def test_every_row_of_a_sweep_stands_beside_its_control(sweep) -> None:
    read = harmless(sweep._repr_html_())
    terminal = plain_terminal(sweep, 200)
    for i, row in enumerate(sweep):
        told = [
            visible(row.place), f"{row.strength:g}", f"{row.steered.keywords:.3f}", f"0.000 … {row.control_most.keywords:.3f}",
            f"{row.steered.perplexity:.1f}", "13.0", f"{row.steered.kl:.2f}", "0.25",
        ]  # fmt: skip
        assert read.cells[8 * (i + 1) : 8 * (i + 2)] == told
        assert terminal.splitlines()[i + 2].split() == " ".join(told).split()
        assert visible(row.text) in read.cells
        assert visible(row.text) in terminal
    assert read.text.startswith("suggested: 2 at <i>a</i>")


def test_a_place_that_all_rows_share_is_told_once(sweep) -> None:
    told = plain_terminal(dataclasses.replace(sweep, rows=sweep.rows[:2]), 200).splitlines()
    assert told[0].strip() == "at <i>a</i>"
    assert told[1].split()[0] == "strength"
    assert [row.split()[0] for row in told[2:5]] == ["plain", "0", "1"]
    assert all("<i>a</i>" not in row for row in told[1:5])


def test_the_knee_stands_out(sweep) -> None:
    page = sweep._repr_html_()
    chosen = re.findall(r'<tr class="chosen">(.*?)</tr>', page)
    assert len(chosen) == 1
    cells = [html_of.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", chosen[0])]
    assert cells[:2] == ["<i>a</i>", "2"] == [sweep.knee().place, f"{sweep.knee().strength:g}"]
    bold = re.findall(r"\x1b\[1;32m\s*([^\x1b]*?)\s*\x1b", in_terminal(sweep, 200))
    assert bold[:2] == cells[:2]
    none = dataclasses.replace(sweep, rows=sweep.rows[3:4])
    assert none.knee() is None
    assert "chosen" not in none._repr_html_().split("</style>")[1]
    assert "no strength is both" in plain_terminal(none)


def test_a_curve_has_a_point_for_each_strength(sweep) -> None:
    page = sweep._repr_html_()
    panels = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(panels) == len(sweep.figure().axes) == 4  # keywords, perplexity, KL, repetition
    for panel in panels:
        lines = re.findall(r'<polyline points="([^"]*)"', panel)
        assert [len(line.split()) for line in lines] == [4, 4]
        assert panel.count("<polygon") == 2
        numbers = [float(x) for line in lines for point in line.split() for x in point.split(",")]
        assert all(0 <= x <= 230 for x in numbers)
    first = [
        float(point.split(",")[1])
        for point in re.findall(r'<polyline points="([^"]*)"', panels[0])[0].split()
    ]
    assert first == sorted(first, reverse=True)  # more is higher
    assert first[0] - first[1] == pytest.approx((first[0] - first[3]) / 8, abs=0.1)


def test_a_sweep_goes_by_the_first_figure_that_is_known(sweep) -> None:
    def with_(name: str, value: float | None) -> SteeringSweep:
        def of(f: Figures) -> Figures:
            return dataclasses.replace(f, keywords=None, **({name: value} if name else {}))

        parts = ("steered", "control", "control_least", "control_most")
        rows = [dataclasses.replace(row, **{part: of(getattr(row, part)) for part in parts}) for row in sweep]
        return SteeringSweep(tuple(rows), dataclasses.replace(sweep.plain, keywords=None), "")

    assert sweep.effect == "keywords"
    assert with_("", None).effect == "kl"
    again = with_("reactivation", 0.75)
    assert again.effect == "reactivation"
    assert "again" in str(again).splitlines()[0]
    assert "0.750" in str(again).splitlines()[2]
    assert "feature when read again" in plain_terminal(again, 200).splitlines()[0]
    assert "0.750" in harmless(again._repr_html_()).cells


# Pieces


def test_blocks_say_how_counts_compare() -> None:
    assert spark([0, 1, 800, 400]) == " ▁█▄"
    assert spark([0, 0]) == spark([]) == ""


def test_two_outputs_do_not_fight(hostile, sweep) -> None:
    """All that the style says is of one class, whose name changes with what it says."""
    from saekit.display import html

    assert html.STYLE.count(f".{SCOPE}") >= 3 * 20
    assert re.fullmatch(r"saekit-[0-9a-f]{6}", SCOPE)
    assert hostile[2]._repr_html_().split("</style>")[0] == sweep._repr_html_().split("</style>")[0]


def test_colours_suit_any_ground() -> None:
    """No text has a colour of its own: it stands on tints of the ground that the notebook has."""
    from saekit.display import html

    colours = set(re.findall(r"(?<![-\w])(?:color|fill): ([^;}]+)", html.STYLE))
    assert colours <= {"inherit", "currentColor", "none", "rgb(76 139 209)"}


def test_a_faint_level_is_no_bright_block_in_a_terminal() -> None:
    """Letters in the colour first, then grounds that begin at a grey; what is silent, or no number, has neither."""
    from saekit.display.colours import coloured

    shown = coloured(
        [("a", 0.02), ("b", 0.1), ("c", -0.1), ("d", 0.3), ("e", 1.0), ("f", -3.0), ("g", math.nan)]
    )
    assert [(shown.plain[span.start : span.end], span.style) for span in shown.spans] == [
        ("b", "rgb(76,139,209)"),
        ("c", "rgb(232,144,60)"),
        ("d", "black on rgb(128,147,168)"),
        ("e", "black on rgb(76,139,209)"),
        ("f", "black on rgb(232,144,60)"),
    ]


def test_what_is_no_number_has_no_ground(reading) -> None:
    assert "nan" not in reading._repr_html_()
    assert (
        reading._repr_html_().count("<b") == 2 * (len(reading.tokens) - 1) - 1
    )  # one is what colours turn at


def test_importing_what_shows_itself_draws_in_no_notebook() -> None:
    source = "".join(
        path.read_text("utf-8") for path in (Path(__file__).parent.parent / "saekit" / "display").glob("*.py")
    )
    assert "IPython" not in source.replace("For IPython", "")
