"""The activation-additions experiment: what adding a word's direction does to text about it, and to other text.

For each block and coefficient c, c · (h⁺ − h⁻) of two short prompts is added from the first position on, and the
log-probability of each token of two texts, sentence by sentence, is compared with the plain model's:

    ratio = exp(− mean over sentences of mean over tokens of (log p_steered − log p_plain))

Below 1 the text has become more likely. Beside it the same ratio for writing the word before each sentence instead
(Turner 2023, arXiv 2308.10248, section 4.1).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.steering.directions import Prefix
from saekit.steering.steer import steer

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure
    from transformer_lens.model_bridge import TransformerBridge

SHORTEST = 5  # tokens of a sentence, without BOS
AT_ONCE = 8  # sentences in a forward
COEFFICIENTS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Effect:
    """Perplexity ratios, steered over plain."""

    site: str
    coefficient: float
    topic: float
    other: float


@dataclass(frozen=True)
class Additions:
    """Every site and coefficient, and prompting beside them."""

    model: str
    positive: str
    negative: str
    topic_sentences: int
    other_sentences: int
    rows: tuple[Effect, ...]
    prompted_topic: float
    prompted_other: float

    def best(self, spare: float = 1.01) -> Effect | None:
        """The row that helps the topic most while the other text's perplexity rises by at most 1 %; None where none helps."""
        fit = [row for row in self.rows if row.topic < 1 and row.other <= spare]
        return min(fit, key=lambda row: row.topic, default=None)

    def records(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def figure(self) -> Figure:
        """Topic and other ratios against the site, a line a coefficient, prompting as horizontal lines."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.5, 3.4), layout="constrained")
        sites = list(dict.fromkeys(row.site for row in self.rows))
        coefficients = list(dict.fromkeys(row.coefficient for row in self.rows))
        panels = (
            ("topic", "text on the topic", self.prompted_topic),
            ("other", "other text", self.prompted_other),
        )
        for axes, (name, title, prompted) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
            for i, c in enumerate(coefficients):
                at = {row.site: getattr(row, name) for row in self.rows if row.coefficient == c}
                shade = 0.25 + 0.75 * i / max(1, len(coefficients) - 1)
                axes.plot(
                    range(len(sites)), [at[site] for site in sites], marker="o", markersize=3, color="#c44e52",
                    alpha=shade, label=f"c = {c:g}",
                )  # fmt: skip
            axes.axhline(1.0, color="#8c8c8c", linewidth=0.8)
            axes.axhline(prompted, color="#4c72b0", linestyle="--", linewidth=1, label="word written before")
            axes.set_xticks(range(len(sites)), [_short(site) for site in sites], fontsize=8)
            axes.set(title=title, xlabel="block that it is added before")
        figure.axes[0].set_ylabel("perplexity, steered / plain")
        figure.axes[0].legend(fontsize=7)
        return figure

    def __str__(self) -> str:
        lines = [f"{self.positive!r} − {self.negative!r} in {self.model}: perplexity ratios, topic / other"]
        sites = list(dict.fromkeys(row.site for row in self.rows))
        coefficients = list(dict.fromkeys(row.coefficient for row in self.rows))
        found = {(row.site, row.coefficient): row for row in self.rows}
        lines.append(f"{'site':<26}" + "".join(f"{f'c = {c:g}':>16}" for c in coefficients))
        for site in sites:
            cells = (found[site, c] for c in coefficients)
            lines.append(f"{site:<26}" + "".join(f"{f'{r.topic:.3f} / {r.other:.3f}':>16}" for r in cells))
        lines.append(f"{'written before':<26}{f'{self.prompted_topic:.3f} / {self.prompted_other:.3f}':>16}")
        best = self.best()
        lines.append(
            f"best with the other text spared: {best.site}, c = {best.coefficient:g}, {best.topic:.3f} / {best.other:.3f}"
            if best
            else "nothing helps the topic and spares the other text"
        )
        return "\n".join(lines)


def activation_additions(
    model: TransformerBridge,
    topic: str,
    other: str,
    *,
    positive: str = " weddings",
    negative: str = " ",
    sites: Sequence[str] | None = None,
    coefficients: Sequence[float] = COEFFICIENTS,
    progress: Callable[[str], object] | None = None,
) -> Additions:
    """Measure every site and coefficient on two texts.

    topic, other: texts; they are cut into sentences, of which those under five tokens are left out. sites: by default the
    residual stream before each block. Raises `InvalidInput` for a text without a sentence, `UnknownName` for a site.
    """
    if not coefficients:
        raise InvalidInput("coefficients: expected at least one number, e.g. 1,2,4")
    texts = {"topic": sentences(model, topic), "other": sentences(model, other)}
    for name, found in texts.items():
        if not found:
            raise InvalidInput(f"{name}: no sentence of {SHORTEST} tokens or more ")
    sites = list(sites or (f"blocks.{i}.hook_resid_pre" for i in range(model.cfg.n_layers)))
    plain = {name: _log_probs(model, found) for name, found in texts.items()}
    word = model.to_tokens(positive, prepend_bos=False)[0]
    prompted = {name: _ratio(_after(model, word, found), plain[name]) for name, found in texts.items()}
    rows = []
    for site in sites:
        prefix = Prefix.from_contrast(model, positive, negative, site=site)
        for c in coefficients:
            with steer(model, prefix.add(c)):
                ratios = {n: _ratio(_log_probs(model, found), plain[n]) for n, found in texts.items()}
            rows.append(Effect(site, float(c), ratios["topic"], ratios["other"]))
            if progress:
                progress(f"{site}, c = {c:g}: topic {ratios['topic']:.3f}, other {ratios['other']:.3f}")
    return Additions(
        str(model.cfg.model_name), positive, negative, len(texts["topic"]), len(texts["other"]), tuple(rows),
        prompted["topic"], prompted["other"],
    )  # fmt: skip


def sentences(model: TransformerBridge, text: str) -> list[Tensor]:
    """Ids [T] with BOS of each sentence that is long enough, cut where the context ends."""
    parts = (part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text))
    ids = (model.to_tokens(part, truncate=False)[0][: model.cfg.n_ctx - SHORTEST] for part in parts if part)
    return [row for row in ids if len(row) > SHORTEST]


def read_text(path: str | Path) -> str:
    """A text file. Raises `InvalidInput` where it is no UTF-8 text."""
    from saekit.files import existing

    try:
        return existing(Path(path), "text").read_text("utf-8")
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise InvalidInput(f"text {path}: expected a UTF-8 text file ({error})") from error


@torch.no_grad()
def _log_probs(model: TransformerBridge, rows: Sequence[Tensor], start: int = 1) -> list[Tensor]:
    """Of each row of ids [T], the log-probabilities [T − start] of those from `start` on."""
    found = []
    for part in (rows[i : i + AT_ONCE] for i in range(0, len(rows), AT_ONCE)):
        ids = torch.nn.utils.rnn.pad_sequence(
            list(part), batch_first=True
        )  # what comes after changes nothing before it
        log_p = model(ids)[:, start - 1 : -1].float().log_softmax(-1).gather(2, ids[:, start:, None])
        found += [values[: len(row) - start, 0].cpu() for values, row in zip(log_p, part, strict=True)]
    return found


def _after(model: TransformerBridge, word: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """Those of each sentence's tokens with the word written before it, after BOS."""
    written = [torch.cat([ids[:1], word.to(ids), ids[1:]]) for ids in rows]
    return _log_probs(model, written, start=1 + len(word))


def _ratio(steered: list[Tensor], plain: list[Tensor]) -> float:
    changes = [float((s - p).mean()) for s, p in zip(steered, plain, strict=True)]
    return float(torch.tensor(changes, dtype=torch.float64).mean().neg().exp())


def _short(site: str) -> str:
    found = re.search(r"blocks\.(\d+)\.", site)
    return found[1] if found and site.endswith("resid_pre") else site
