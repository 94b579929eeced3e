"""A comparison as it shows itself: plain and steered text beside each other, what differs in them, what became likelier."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import chain

from rich.console import Group
from rich.table import Table
from rich.text import Text

from saekit.console import table
from saekit.display import html
from saekit.display.terminal import DOWN, SOFT, STRONG, UP, line, listed, token
from saekit.lens.tokens import visible
from saekit.steering.compare import Comparison, Odds
from saekit.steering.generate import Said

WIDEST = 72  # points of a bar for the likeliest token
LEGEND = "what differs: blue where the steered model finds it likelier, orange where the plain one does"


def differing(one: Sequence[str], other: Sequence[str]) -> tuple[list[bool], list[bool]]:
    """Which tokens of two texts are no part of the longest runs that they share, in order."""
    changed = [True] * len(one), [True] * len(other)
    for block in SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks():
        for side, start in zip(changed, (block.a, block.b), strict=True):
            side[start : start + block.size] = [False] * block.size
    return changed


def prompt_text(prompt: Said) -> str:
    """A prompt as it is read; of a chat each message in a line of its own, after who speaks."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{message.get('role', '')}: {message.get('content', '')}\n" for message in prompt)


def _sides(side: Comparison) -> list[tuple[str, list[Odds], list[bool]]]:
    """(name, continuation, what differs in it) of the plain text and of the steered one."""
    plain, steered = side.plain_odds, side.steered_odds
    changed = differing([o.token for o in plain], [o.token for o in steered])
    return [("plain", plain, changed[0]), ("steered", steered, changed[1])]


def _edits(side: Comparison) -> str:
    return "; ".join(str(edit) for edit in side.edits) or "no edit"


def _figures(side: Comparison) -> list[tuple[str, str]]:
    return [
        ("KL of the next token", f"{side.kl:.3g} nats"),
        ("perplexity of the steered text under the plain model", f"{side.perplexity:.3g}"),
    ]


# A notebook


def comparison_html(side: Comparison) -> str:
    """Both texts with what differs on coloured grounds, each token's log-probabilities under the pointer, and what moved."""
    columns = "".join(html.titled(name, _text(side, odds, changed)) for name, odds, changed in _sides(side))
    most = max(chain.from_iterable((p, q) for _, p, q in side.top_tokens), default=0.0)
    moved = [
        (
            html.code(name),
            f"{_bar(p, most, 'bar plain')}{_bar(q, most, 'bar')}",
            f"{p:.2%}",
            f"{q:.2%}",
            f"{q - p:+.2%}",
        )
        for name, p, q in side.top_tokens
    ]
    parts = [(html.code(name), f"{part:+.3g}") for name, part in side.kl_tokens]
    tables = html.titled(
        "next-token probabilities that moved",
        html.table(("token", "", "plain", "steered", "moved"), moved, (0, 1)),
    ) + html.titled("their parts in the KL", html.table(("token", "nats"), parts))
    return html.whole(
        f'<div class="say">{html.text(_edits(side))}</div>{html.facts(_figures(side))}',
        f'<div class="columns">{columns}</div><div class="soft">{html.text(LEGEND)}</div>',
        f'<div class="columns">{tables}</div>',
    )


def _text(side: Comparison, odds: Sequence[Odds], changed: Sequence[bool]) -> str:
    """Prompt and continuation. What differs and is likelier steered stands on blue, what is likelier plain on orange."""
    tokens = (
        (o.token, (0.6 if o.steered >= o.plain else -0.6) if new else 0.0, _log_probabilities(o))
        for o, new in zip(odds, changed, strict=True)
    )
    return html.run(
        f'<span class="soft">{html.literal(prompt_text(side.prompt))}</span>', html.grounds(tokens)
    )


def _log_probabilities(odds: Odds) -> str:
    return f"log p: plain {odds.plain:.2f}, steered {odds.steered:.2f} nats"


def _bar(p: float, most: float, kind: str) -> str:
    return f'<span class="{kind}" style="width:{WIDEST * p / most if most else 0:.1f}px"></span>'


# A terminal


def comparison_text(side: Comparison) -> Group:
    """The same as coloured text; the two texts share the width."""
    texts = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style=STRONG, expand=True)
    cells = []
    for name, odds, changed in _sides(side):
        texts.add_column(name, ratio=1, overflow="fold")
        cells.append(_coloured(side, odds, changed))
    texts.add_row(*cells)
    facts = listed((Text.assemble((f"{name} ", SOFT), value) for name, value in _figures(side)), "   ")
    rows = [
        (token(name), f"{p:.2%}", f"{q:.2%}", Text(f"{q - p:+.2%}", UP if q > p else DOWN))
        for name, p, q in side.top_tokens
    ]
    moved = table(("next token", "plain", "steered", "moved"), rows)
    return Group(line(_edits(side), "bold cyan"), facts, Text(""), texts, Text(""), moved)


def _coloured(side: Comparison, odds: Sequence[Odds], changed: Sequence[bool]) -> Text:
    shown = Text.assemble((visible(prompt_text(side.prompt)), SOFT))
    for o, new in zip(odds, changed, strict=True):
        shown.append(visible(o.token), "" if not new else UP if o.steered >= o.plain else DOWN)
    return shown
