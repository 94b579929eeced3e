"""Tokens + model + SAEs → catalog folders, in one pass over the text.

    corpus ──units of 8 rows──▶ forward to the last site ──▶ x of each SAE ──encode──▶ firings ──▶ its state ──▶ tables
                                                                              weights ──▶ logit effects, neighbours ──▶

A unit is always forwarded and encoded alone, and a state is free of order: which units a process looks at, and when, changes
no bit of what they make together. So a build that was killed goes on from its last saved state, one in parts is merged
(`catalog.parts`), and both write the files of one that nobody touched.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saekit.catalog.accumulate import UNIT_ROWS, Firings, State, Unit
from saekit.catalog.encode import encode
from saekit.catalog.parts import NOTHING, PART, folder_of, write_part
from saekit.catalog.stream import Position
from saekit.catalog.tables import CATALOG, SCHEMA_VERSION
from saekit.catalog.weights import describe, excluded_tokens, look_at
from saekit.catalog.working import DONE, STATE, begin, check_free, clear, put, working
from saekit.catalog.writing import write_catalog
from saekit.errors import FileMissing, InvalidInput, first_line
from saekit.files import read_json, staged, write_json
from saekit.sae import SAE
from saekit.sites import capture
from saekit.tokens import TokenBatch, Tokens, token_batches

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SAVE_EVERY = 30.0  # seconds
SAVING_TAKES = 0.1  # of the time, at most
POSITION, SPILLED = "position.json", "spilled"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
LIBRARIES = ("saekit", "torch", "transformer_lens")


@dataclass(frozen=True)
class Progress:
    """How far a build has come."""

    tokens: int  # evaluated so far
    alive: int  # latents that have fired, of all SAEs
    latents: int  # of all SAEs
    tokens_per_second: float  # since this process began to look
    seconds_left: float | None  # of the pass; None where nobody knows how long the corpus is


@dataclass(frozen=True)
class Options:
    """What is kept of the text."""

    contexts: int = 20  # per latent, the strongest
    window: int = 64  # tokens around a peak
    bands: int = 5
    per_band: int = 4
    sample_rows: int = 128

    def __post_init__(self) -> None:
        least = {"contexts": 1, "window": 1, "bands": 1, "per_band": 1, "sample_rows": 0}
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or not least[name] <= value <= 10_000:
                raise InvalidInput(
                    f"catalog: {name} is a whole number from {least[name]} to 10,000, got {value!r:.80}"
                )


def build(
    model: TransformerBridge,
    sae: SAE | Sequence[SAE],
    tokens: Tokens | Tensor | Iterable[Tensor],
    folder: str | Path,
    *,
    contexts: int = 20,
    window: int = 64,
    bands: int = 5,
    per_band: int = 4,
    sample_rows: int = 128,
    max_tokens: int | None = None,
    include_special: bool = False,
    licence: str | None = None,
    part: tuple[int, int] | None = None,
    progress: Callable[[Progress], None] | None = None,
    resume: bool = True,
) -> Path | list[Path]:
    """Write a catalog of the SAE's features over the tokens; see `tables` for what is in it.

    sae: several share each forward, whatever sites they read, and get `folder/<site>` each (where two read one site, with
        what sets them apart). Transcoders read their site and act on another; crosscoders are refused.
    contexts: kept per feature, at most one per document. window: tokens around a peak. bands, per_band: of the active range,
        and contexts drawn from each. sample_rows: of the corpus, drawn, of which all activations are kept.
    max_tokens: stop after the unit, of 8 rows, in which so many have been evaluated. include_special: count BOS, EOS and pad
        too. licence: of the corpus, for those with whom the catalog is shared.
    part: (i, n) looks at every n-th unit, from the i-th on, and leaves in `folder` what `catalog.merge` takes; all of the
        corpus is read, and max_tokens counts all of it. progress: gets a `Progress` after each unit.
    resume: go on where a build of the same was stopped or killed, from what it left in `<folder>.building`; False starts anew.

    A catalog that was there is replaced when the new one is whole. The state is saved twice a minute, and when the pass ends
    with an exception, Ctrl-C included. The same arguments give the same bytes, in one process or several, stopped or not, on
    machines whose arithmetic is the same.

    Returns the folder; of a list of SAEs one for each; of a part the part's. Raises `InvalidInput` for an SAE that does
    not fit, an empty corpus, a folder that holds something else, and a build that was begun with other arguments.
    """
    saes, names = ([sae], [""]) if isinstance(sae, SAE) else (list(sae), distinct_names(sae))
    if not saes:
        raise InvalidInput("catalog: expected at least one SAE, got an empty list")
    folder = Path(folder).resolve()
    options = Options(contexts, window, bands, per_band, sample_rows)
    whole, (i, n) = part is None, _check_part(part)
    if max_tokens is not None and (isinstance(max_tokens, bool) or max_tokens < 1):
        raise InvalidInput(f"catalog: max_tokens starts at 1, got {max_tokens!r}")
    for one in saes:
        _check_sae(one, model)
    for name in names if whole else [""]:
        check_free(folder / name, *((CATALOG, "catalog") if whole else (PART, "part of a catalog")))
    label = tokens.label if isinstance(tokens, Tokens) else "token ids"
    origin = {
        "schema": SCHEMA_VERSION,
        **{library: version(library) for library in LIBRARIES},
        "device": torch.device(str(model.cfg.device)).type,
        "names": names,
        "about": [describe(model, one) for one in saes],
        "corpus": {"label": Path(label).name, "licence": licence},
        **asdict(options),
        "max_tokens": max_tokens,
        "excluded": excluded_tokens(model, include_special),
        "part": None if whole else [i, n],
    }
    with working(folder) as place:
        if not resume:
            clear(place)
        begin(place, origin)
        survey = _Survey(model, saes, origin, place)
        try:
            survey.start()
            end = survey.look(tokens, progress)
            if whole and end.tokens == 0:
                raise InvalidInput(NOTHING)
            made = []
            for k, name in enumerate(names if whole else [""]):
                with staged(place / DONE) as done:
                    if whole:
                        weights = look_at(model, saes[k], origin["about"][k])
                        write_catalog(done, survey.states[k], weights, origin, end)
                    else:
                        first = zip(saes, origin["about"], strict=True) if i == 1 else ()
                        write_part(done, survey.states, [look_at(model, *one) for one in first], origin, end)
                made.append(put(place, place / DONE, folder, name))
        except BaseException as error:
            survey.keep()
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise InvalidInput(
                    f"catalog {folder}: could not be written ({first_line(error)}). Make room, then start it again: it goes "
                    "on from what it has saved"
                ) from error
            raise
        clear(place)
    return made if whole and not isinstance(sae, SAE) else made[0]


def distinct_names(saes: Sequence[SAE]) -> list[str]:
    """A name for each: the site; where several read one, architecture and width with it; and a number where that is not enough."""
    names = [sae.sites[0] for sae in saes]
    longer = [f"{sae.sites[0]}-{sae.architecture}-{sae.d_sae}" for sae in saes]
    names = [long if names.count(name) > 1 else name for name, long in zip(names, longer, strict=True)]
    return [
        f"{name}-{names[: k + 1].count(name)}" if names.count(name) > 1 else name
        for k, name in enumerate(names)
    ]


def _check_part(part: tuple[int, int] | None) -> tuple[int, int]:
    i, n = (1, 1) if part is None else part if isinstance(part, (tuple, list)) and len(part) == 2 else (0, 0)
    if (
        not all(isinstance(number, int) and not isinstance(number, bool) for number in (i, n))
        or not 1 <= i <= n
    ):
        raise InvalidInput(f"catalog: part {part!r}; expected (i, n) with 1 ≤ i ≤ n, such as (1, 4)")
    return i, n


def _check_sae(sae: SAE, model: TransformerBridge) -> None:
    if sae.is_crosscoder:
        raise InvalidInput(
            f"catalog: this is a crosscoder, which reads {', '.join(sae.sites)} at once, and its features have a direction "
            "at each; only SAEs and transcoders, which act on one site, have catalogs"
        )
    sae.check_fits(model)


class _Survey:
    """The state of the pass, in memory and in its working folder."""

    def __init__(
        self, model: TransformerBridge, saes: Sequence[SAE], origin: dict[str, Any], place: Path
    ) -> None:
        self.model, self.saes, self.place = model, saes, place
        self.part: tuple[int, int] = tuple(origin["part"] or (1, 1))
        self.max_tokens: int | None = origin["max_tokens"]
        self.excluded = list(origin["excluded"].values())
        self.origin = origin
        self.states: list[State] = []
        self.position = Position()  # of the states
        self.whole = True  # all states are of `position`
        self.saved = 0  # units
        self.save_at = time.monotonic() + SAVE_EVERY

    # On disk

    def start(self) -> None:
        """With what was saved, or with nothing."""
        saved, own = self.place / STATE, self.place / SPILLED
        shutil.rmtree(own, ignore_errors=True)
        if saved.exists():
            try:
                position = Position(**read_json(saved / POSITION))
                self.states = [
                    State.load(folder_of(saved, k), folder_of(own, k)) for k in range(len(self.saes))
                ]
            except (InvalidInput, FileMissing, KeyError, TypeError) as error:
                raise InvalidInput(
                    f"catalog: {saved} is damaged ({first_line(error)}); start anew with resume=False"
                ) from error
            self.position, self.saved = position, position.units
            return
        kept = {name: self.origin[name] for name in Options.__dataclass_fields__}
        self.states = [
            State(sae.d_sae, self.model.cfg.d_vocab, **kept, folder=folder_of(own, k))
            for k, sae in enumerate(self.saes)
        ]

    def save(self) -> None:
        begun = time.monotonic()
        with staged(self.place / STATE) as folder:
            for k, state in enumerate(self.states):
                folder_of(folder, k).mkdir()
                state.save(folder_of(folder, k))
            write_json(folder / POSITION, asdict(self.position))
        self.saved, now = self.position.units, time.monotonic()
        self.save_at = now + max(SAVE_EVERY, (now - begun) / SAVING_TAKES)

    def keep(self) -> None:
        """What can be gone on with stays; a working folder that is of no use does not."""
        if self.whole and self.position.units > self.saved and self.position.tokens:
            with contextlib.suppress(OSError):  # it goes on from an earlier one
                self.save()
        if not (self.place / STATE).exists():
            with contextlib.suppress(OSError):  # the reason for being here is what is to be told
                clear(self.place)

    # The pass

    def look(
        self, tokens: Tokens | Tensor | Iterable[Tensor], progress: Callable[[Progress], None] | None
    ) -> Position:
        """Look at this part's units, from `position` on; what comes before is read again and has to be what it was."""
        i, n = self.part
        at, resumed, clock = Position(), self.position, None
        for batch in token_batches(tokens, UNIT_ROWS):
            ids, documents = batch.ids.numpy(), batch.documents.numpy()
            special = np.isin(ids, self.excluded)
            before, at = at, at.after(ids, documents, int((~special).sum()))
            if before.units < resumed.units:
                if at.units == resumed.units and at != resumed:
                    break
            else:
                clock = clock or _Clock(tokens, self.max_tokens, resumed, self.tokens)
                own = before.units % n == i - 1
                seen = self._look_at(batch, special, before.rows) if own else []
                with _undisturbed():
                    self.whole = False
                    for state, unit in zip(self.states, seen, strict=False):
                        state.add(unit)
                    self.position, self.whole = at, True
                if progress:
                    progress(clock.read(at, self))
                if time.monotonic() >= self.save_at:
                    self.save()
            if self.max_tokens is not None and at.tokens >= self.max_tokens:
                break
        if at != self.position:
            raise InvalidInput(
                f"catalog: the corpus is not the one with which the build in {self.place} was begun: its first "
                f"{resumed.rows:,} rows differ. Put it back as it was, or start anew with resume=False"
            )
        return at

    def _look_at(self, batch: TokenBatch, special: NDArray[np.bool_], first_row: int) -> list[Unit]:
        """A forward, and what each SAE makes of it."""
        ids, documents = batch.ids.numpy(), batch.documents.numpy()
        R, T = ids.shape
        flat = np.flatnonzero(~special)
        activations = capture(self.model, [sae.site for sae in self.saes], batch.ids)
        norms = {site: x.float().norm(dim=-1).cpu().numpy() for site, x in activations.items()}
        found = []
        for sae in self.saes:
            x = activations[sae.site].reshape(R * T, -1)
            active = encode(sae, x[torch.from_numpy(flat).to(x.device)])
            at = flat[active.tokens.cpu().numpy()]
            firings = Firings(
                latents=active.latents.cpu().numpy(),
                values=active.values.float().cpu().numpy(),
                rows=first_row + at // T,
                positions=at % T,
            )
            found.append(Unit(ids, documents, special, norms[sae.site], first_row, firings))
        return found

    @property
    def tokens(self) -> int:
        return self.states[0].tokens


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C has to wait: a state that it leaves between two units is of no use to the build that goes on from it."""
    asked: list[tuple[int, FrameType | None]] = []
    try:
        before = signal.signal(signal.SIGINT, lambda *call: asked.append(call))
    except ValueError:  # not the main thread, where no Ctrl-C arrives
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked and callable(before):
        before(*asked[0])


class _Clock:
    """How fast the pass is, and how long it will take."""

    def __init__(self, corpus: Any, max_tokens: int | None, start: Position, tokens: int) -> None:
        self._rows = len(corpus) if hasattr(corpus, "__len__") else None
        self._max_tokens, self._start, self._tokens = max_tokens, start, tokens
        self._begun = time.monotonic()

    def _share(self, at: Position) -> float | None:
        """Of the pass that is done."""
        shares = [at.rows / self._rows] if self._rows else []
        shares += [at.tokens / self._max_tokens] if self._max_tokens else []
        return max(shares, default=None)

    def read(self, at: Position, survey: _Survey) -> Progress:
        seconds = max(1e-9, time.monotonic() - self._begun)
        before, share = self._share(self._start), self._share(at)
        left = None
        if share is not None and before is not None and share > before:
            left = max(0.0, seconds * (1 - share) / (share - before))
        return Progress(
            tokens=survey.tokens,
            alive=sum(state.alive for state in survey.states),
            latents=sum(sae.d_sae for sae in survey.saes),
            tokens_per_second=(survey.tokens - self._tokens) / seconds,
            seconds_left=left,
        )
