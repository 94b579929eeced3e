"""Edits at several strengths, at one place or several, and norm-matched random directions at the same ones beside them.

Random directions collapse a text as readily as chosen ones, so a strength says nothing without its control. Every
strength of a prompt is continued in one batch, all from the same seeds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.steering.compare import next_token_probabilities
from saekit.steering.directions import Direction
from saekit.steering.edits import Edit
from saekit.steering.generate import Generated, Prompt, generate, prompt_ids
from saekit.steering.judging import (
    distinct,
    keyword_rate,
    kl_parts,
    perplexity,
    reactivation,
    repetition,
    word_ids,
)
from saekit.steering.positions import Positions
from saekit.steering.steer import steer

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType
    from transformer_lens.model_bridge import TransformerBridge

Make = Callable[[float], Edit]  # strength → edit, e.g. `feature.add`
TOLERATED = 2.0  # times the plain perplexity, up to which a text still counts as fluent
AT_ONCE = 64  # rows of a batch,
TOKENS_AT_ONCE = 4096  # and tokens of their prompts: each has its logits in memory
EFFECTS = {
    "keywords": "texts with a keyword",
    "reactivation": "feature when read again",
    "kl": "KL, nats",
}  # what an effect is measured by, the first that is known


@dataclass(frozen=True)
class Figures:
    """What one edit does to the continuations of all prompts. None: not asked for, or not known."""

    kl: float  # KL(steered ‖ plain) of the token after the prompt, nats, mean over prompts
    perplexity: float  # of the continuations under the plain model, median
    repetition: float  # rep-3 of the continuations, mean
    distinct: float  # distinct-2 of all continuations together
    keywords: float | None = None  # share of continuations with a keyword in them
    keyword_p: float | None = (
        None  # probability of a keyword as the token after the prompt, mean over prompts
    )
    reactivation: float | None = (
        None  # of the feature when its text is read again unsteered, over its maximum, mean
    )


@dataclass(frozen=True)
class SweepRow:
    """What one strength does at one place."""

    place: str  # the edit's site, or the name under which it was given
    strength: float
    text: str  # prompt and continuation, of the first prompt's first sample
    steered: Figures
    control: Figures  # means over random directions of the same norm
    control_least: Figures
    control_most: Figures
    control_text: str


@dataclass(frozen=True)
class SteeringSweep:
    """Strengths against what they do. Iterates over its rows."""

    rows: tuple[SweepRow, ...]
    plain: Figures
    plain_text: str

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> SweepRow:
        return self.rows[index]

    @property
    def effect(self) -> str:
        """The figure that the effect of a strength is told by: the first of `keywords`, `reactivation`, `kl` that is known."""
        return next(
            name for name in EFFECTS if all(getattr(row.steered, name) is not None for row in self.rows)
        )

    def knee(self, place: str | None = None) -> SweepRow | None:
        """The strongest row whose text is still fluent and whose effect no random direction has.

        Fluent: perplexity at most twice the plain one. Effect: the keywords' rate, else the feature's reactivation, else
        KL, above the control's greatest. None where no row has both; then no strength can be recommended.
        """
        fit = [
            row
            for row in self.rows
            if row.strength != 0
            and place in (None, row.place)
            and row.steered.perplexity <= TOLERATED * self.plain.perplexity
            and getattr(row.steered, self.effect) > getattr(row.control_most, self.effect)
        ]
        return max(fit, key=lambda row: (abs(row.strength), getattr(row.steered, self.effect)), default=None)

    def records(self) -> list[dict[str, Any]]:
        """A flat dictionary a row, for a data frame: the control's figures begin with `control_`."""
        found = []
        for row in self.rows:
            flat: dict[str, Any] = {"place": row.place, "strength": row.strength, "text": row.text}
            flat |= asdict(row.steered)
            for name in ("control", "control_least", "control_most"):
                flat |= {f"{name}_{key}": value for key, value in asdict(getattr(row, name)).items()}
            found.append(flat | {"control_text": row.control_text})
        return found

    def to_json(self) -> str:
        return json.dumps(
            {"plain": asdict(self.plain), "plain_text": self.plain_text, "rows": self.records()}
        )

    def figure(self) -> Figure:
        """A matplotlib figure: effect, fluency, KL and repetition against strength, the control as a band."""
        from saekit.steering.figures import sweep_figure

        return sweep_figure(self)

    def _repr_html_(self) -> str:
        from saekit.display.sweep import sweep_html

        return sweep_html(self)

    def __rich__(self) -> RenderableType:
        from saekit.display.sweep import sweep_text

        return sweep_text(self)

    def _repr_pretty_(self, p: Any, cycle: bool) -> None:
        """IPython's: coloured in a terminal, as `print` has it elsewhere."""
        from saekit.display.terminal import pretty

        pretty(self, p)

    def wandb_table(self) -> Any:
        """The rows as a `wandb.Table`, to be logged."""
        import wandb

        records = self.records()
        columns: list[Any] = list(records[0])
        return wandb.Table(columns=columns, data=[[record[name] for name in columns] for record in records])

    def __str__(self) -> str:
        """Plain text, whose control characters and bidi overrides are escapes."""
        from saekit.lens.tokens import visible

        name = self.effect

        def row(place: str, strength: str, f: Figures, control: str) -> str:
            value = getattr(f, name)
            effect = "" if value is None else f"{value:.3f}"
            return f"{place:<28} {strength:>8}  {effect:>8}  {f.perplexity:10.1f}  {f.kl:7.2f}  {f.repetition:6.2f}  {control}"

        short = {"keywords": "keywords", "reactivation": "again", "kl": "KL"}[name]
        lines = [
            f"{'place':<28} {'strength':>8}  {short:>8}  {'perplexity':>10}  {'KL':>7}  {'rep-3':>6}  random"
        ]
        lines.append(row("plain", "", self.plain, ""))
        for r in self.rows:
            least, most = getattr(r.control_least, name), getattr(r.control_most, name)
            lines.append(
                row(
                    r.place,
                    f"{r.strength:g}",
                    r.steered,
                    f"{least:.3f} … {most:.3f}, perplexity {r.control.perplexity:.0f}",
                )
            )
        return visible("\n".join([*lines, self.suggestion]))

    @property
    def suggestion(self) -> str:
        """The knee in words."""
        best = self.knee()
        if best is None:
            return "no strength is both fluent and beyond the controls"
        return f"suggested: {best.strength:g} at {best.place}"


def sweep(
    model: TransformerBridge,
    prompts: Prompt | Sequence[Prompt],
    make: Make | Mapping[str, Make],
    strengths: Sequence[float],
    *,
    keywords: Iterable[str] = (),
    samples: int = 1,
    controls: int = 3,
    max_new_tokens: int = 20,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float | None = None,
    positions: Positions = "all",
) -> SteeringSweep:
    """Continue prompts at each strength.

    prompts: a text, or several. make: strength → edit, e.g. `feature.add`; or several by name, e.g. one a layer.
    keywords: words that the steered text should speak of. samples: continuations of each prompt. controls: random directions,
    whose norm is that of the edit's direction, added in the same amount.
    Raises `InvalidInput` for no strength, no prompt, or fewer than one sample or control.
    """
    texts: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
    if not strengths:
        raise InvalidInput("strengths: expected at least one number, e.g. 0,2,4,8")
    if not texts or samples < 1 or controls < 1:
        raise InvalidInput(
            f"sweep: expected a prompt, a sample and a control at least, got {len(texts)}, {samples} and {controls}"
        )
    judge = Judge(
        model, texts, words=list(keywords), samples=samples, max_new_tokens=max_new_tokens, positions=positions,
        temperature=temperature, top_p=top_p, seed=seed,
    )  # fmt: skip
    [(plain, plain_text)] = judge([[]])
    rows = []
    places = make if isinstance(make, Mapping) else {"": make}
    for name, of in places.items():
        edits = [of(strength) for strength in strengths]
        random = [[control_of(edit, seed + i) for edit in edits] for i in range(controls)]
        found = list(judge([[edit] for row in [edits, *random] for edit in row]))
        n = len(strengths)
        for i, (strength, edit) in enumerate(zip(strengths, edits, strict=True)):
            beside = [found[n * (1 + c) + i] for c in range(controls)]
            rows.append(
                SweepRow(
                    place=name or edit.site,
                    strength=strength,
                    text=found[i][1],
                    steered=found[i][0],
                    control=_of(statistics.fmean, [f for f, _ in beside]),
                    control_least=_of(min, [f for f, _ in beside]),
                    control_most=_of(max, [f for f, _ in beside]),
                    control_text=beside[0][1],
                )
            )
    return SteeringSweep(tuple(rows), plain, plain_text)


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, (str, Tensor)) or bool(prompts and isinstance(prompts[0], Mapping))


def _of(how: Callable[[list[float]], float], figures: Sequence[Figures]) -> Figures:
    """Figure by figure, one of several."""
    columns = [asdict(each) for each in figures]
    found: dict[str, Any] = {
        name: None if columns[0][name] is None else how([c[name] for c in columns]) for name in columns[0]
    }
    return Figures(**found)


class Judge:
    """Continues prompts under edits, many at once, and says what came of each row of them."""

    def __init__(
        self, model: TransformerBridge, prompts: Sequence[Prompt], *, words: Sequence[str] = (), samples: int = 1,
        max_new_tokens: int = 20, positions: Positions = "all", temperature: float = 1.0, top_p: float | None = None,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.words, self.n, self.positions = model, list(words), max_new_tokens, positions
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
        self.each = [p for p in prompts for _ in range(samples)]
        self.seeds = [seed + i for i in range(len(self.each))]
        self.ids = [prompt_ids(model, prompt, max_new_tokens) for prompt in prompts]
        self.word_ids = word_ids(model, self.words)
        self.plain_p = self._next([[]])[0]
        widest = TOKENS_AT_ONCE // max(map(len, self.ids))
        self.rows_at_once = max(1, min(AT_ONCE, widest) // len(self.each))

    def __call__(self, rows: Sequence[Sequence[Edit]]) -> Iterator[tuple[Figures, str]]:
        """(figures, first text) of each row's edits, as they become known; of none: of the plain model.

        The first edit of a row is what its re-activation is of.
        """
        for start in range(0, len(rows), self.rows_at_once):
            part = rows[start : start + self.rows_at_once]
            probabilities = self._next(part)
            with self._steered([row for row in part for _ in self.each]):
                made = generate(
                    self.model, self.each * len(part), self.n, seed=self.seeds * len(part), **self.sampling
                )
            for i, row in enumerate(part):
                texts = made[i * len(self.each) : (i + 1) * len(self.each)]
                yield self._figures(row, texts, probabilities[i]), texts[0].text

    def _steered(self, rows: Sequence[Sequence[Edit]]) -> Any:
        return steer(self.model, rows=rows, positions=self.positions)

    def _next(self, rows: Sequence[Sequence[Edit]]) -> list[Tensor]:
        """[prompts, V] next-token probabilities after each prompt, of each row's edits."""
        with self._steered(rows):
            of_prompts = [next_token_probabilities(self.model, ids.expand(len(rows), -1)) for ids in self.ids]
        return list(torch.stack(of_prompts, 1))

    def _figures(self, row: Sequence[Edit], texts: list[Generated], p: Tensor) -> Figures:
        model = self.model
        new = [made.ids[made.prompt_length :].tolist() for made in texts]
        again = None
        if row and row[0].sae is not None and row[0].latent is not None:
            sae, latent = row[0].sae, row[0].latent
            again = statistics.fmean(reactivation(model, sae, latent, m.ids, m.prompt_length) for m in texts)
            again /= row[0].max_activation or 1.0
        return Figures(
            kl=float(kl_parts(p, self.plain_p).sum(1).mean()),
            perplexity=statistics.median(
                perplexity(model, m.ids.to(model.cfg.device), m.prompt_length) for m in texts
            ),
            repetition=statistics.fmean(map(repetition, new)),
            distinct=distinct(new),
            keywords=keyword_rate([made.continuation for made in texts], self.words) if self.words else None,
            keyword_p=float(p[:, self.word_ids].sum(1).mean()) if self.word_ids else None,
            reactivation=again,
        )


def control_of(edit: Edit, seed: int = 0) -> Edit:
    """The same edit along a random direction of the same norm: as much is added, in the same places, of something else."""
    direction = Direction.random(edit.direction, edit.site, seed)
    return replace(edit, direction=direction.vector, label=direction.label)
