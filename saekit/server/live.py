"""What the model behind the page is asked: each question, once its mistakes are ruled out, becomes a job for its turn.

A job is a generator of what it finds out, as the events that the page reads. It puts its edits on the model and lets go
of it when it ends for whatever reason; once nobody waits for it, the next forward ends it (`leash`).
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saekit.catalog.firing import firing
from saekit.errors import InvalidInput
from saekit.lm import token_strings
from saekit.server.questions import ActivationsQuestion, SteerQuestion, StreamQuestion, SweepQuestion
from saekit.server.turns import Event, Job, Left
from saekit.steering.compare import TOP, next_token_probabilities
from saekit.steering.generate import Generated, prompt_ids, stream_rows
from saekit.steering.judging import kl_parts, perplexity
from saekit.steering.kinds import WITHOUT_STRENGTH
from saekit.steering.steer import steer
from saekit.steering.sweep import Figures, Judge, SteeringSweep, SweepRow, control_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.catalog import Catalog

TOLD = ("perplexity", "kl", "repetition", "reactivation")  # the figures of a sweep that the page shows


class Live:
    """One catalog and its model. Methods raise what is wrong with a question before it waits for its turn."""

    def __init__(self, catalog: Catalog, model: TransformerBridge) -> None:
        self.catalog, self.model = catalog, model

    def stream(self, question: StreamQuestion) -> Job:
        """Plain, steered and control text as they come, all in one batch from one seed."""
        edits = [edit.edit(self.catalog) for edit in question.edits]
        sides = {"plain": [], "steered": edits}
        if question.control:
            sides["control"] = [control_of(edit, question.seed + i) for i, edit in enumerate(edits)]
        model, ids = self.model, prompt_ids(self.model, question.prompt, question.max_new_tokens)

        def answer(left: threading.Event) -> Generator[Event]:
            began, rows = time.perf_counter(), list(sides.values())
            with leash(model, left):
                with steer(model, rows=rows, positions=question.positions):
                    p = next_token_probabilities(model, ids.expand(len(rows), -1))
                    yield {
                        "event": "start",
                        "sides": list(sides),
                        "kl": finite(kl_parts(p[1], p[0]).sum()),
                        "top_tokens": self._moved(p),
                        "edits": [str(edit) for edit in edits],
                    }
                    pieces = stream_rows(
                        model,
                        [question.prompt] * len(rows),
                        question.max_new_tokens,
                        seed=[question.seed] * len(rows),
                        temperature=question.temperature,
                    )
                    made = yield from spoken(pieces, list(sides))
                strange = [strangeness(model, m) for m in made]
            yield {
                "event": "done",
                "texts": {side: m.text for side, m in zip(sides, made, strict=True)},
                "perplexity": {side: finite(x) for side, x in zip(sides, strange, strict=True)},
                "tokens": max(len(m.ids) - m.prompt_length for m in made),
                "seconds": round(time.perf_counter() - began, 3),
            }

        return answer

    def steer(self, question: SteerQuestion) -> Job:
        """The same in one piece, without a control."""
        job = self.stream(StreamQuestion(**question.model_dump()))

        def answer(left: threading.Event) -> Generator[Event]:
            found = {key: value for event in job(left) for key, value in event.items()}  # start and done
            yield {
                "prompt": question.prompt,
                "plain": found["texts"]["plain"],
                "steered": found["texts"]["steered"],
                "kl": found["kl"],
                "top_tokens": found["top_tokens"],
            }

        return answer

    def activations(self, question: ActivationsQuestion) -> Job:
        """What fires on each token of a text."""

        def answer(left: threading.Event) -> Generator[Event]:
            with leash(self.model, left):
                found = firing(self.model, self.catalog.sae, question.text)
            yield {"tokens": found.tokens, "features": found.features}

        return answer

    def sweep(self, question: SweepQuestion) -> Job:
        """The first edit at each strength, and a random direction at the same one; the other edits stay as they are."""
        first, *others = question.edits
        if first.kind in WITHOUT_STRENGTH:
            raise InvalidInput(f"edits.0.kind: {first.kind} takes no strength, so there is nothing to sweep")
        beside = [edit.edit(self.catalog) for edit in others]
        swept = [first.model_copy(update={"strength": s}).edit(self.catalog) for s in question.strengths]
        pairs = [(edit, control_of(edit, question.seed)) for edit in swept]
        prompt_ids(self.model, question.prompt, question.max_new_tokens)  # what is wrong with it is told now

        def answer(left: threading.Event) -> Generator[Event]:
            with leash(self.model, left):
                judge = Judge(
                    self.model,
                    [question.prompt],
                    samples=question.samples,
                    max_new_tokens=question.max_new_tokens,
                    positions=question.positions,
                    temperature=question.temperature,
                    seed=question.seed,
                )
                [(plain, plain_text)] = judge([[]])
                found = judge([[edit, *beside] for pair in pairs for edit in pair])
                rows: list[SweepRow] = []
                for edit, _ in pairs:
                    (steered, text), (control, said) = next(found), next(found)
                    rows.append(
                        SweepRow(edit.site, edit.strength, text, steered, control, control, control, said)
                    )
                    yield {
                        "event": "row",
                        "strength": edit.strength,
                        "steered": told(steered),
                        "control": told(control),
                    }
            knee = SteeringSweep(tuple(rows), plain, plain_text).knee()
            yield {"event": "done", "plain": told(plain), "knee": knee and knee.strength}

        return answer

    def _moved(self, p: Tensor) -> list[list[Any]]:
        """[token, p of each side] of the tokens whose probability steering moved most; p [sides, V]."""
        ids = (p[1] - p[0]).abs().topk(min(TOP, p.shape[1])).indices.tolist()
        tokens = token_strings(self.model.tokenizer, ids)
        return [[token, *map(finite, p[:, i])] for token, i in zip(tokens, ids, strict=True)]


@contextlib.contextmanager
def leash(model: TransformerBridge, left: threading.Event) -> Iterator[None]:
    """While open, a forward of the model raises `Left` once nobody waits for what it finds."""

    def pull(*_: Any) -> None:
        if left.is_set():
            raise Left

    handle = model.original_model.register_forward_pre_hook(pull)
    try:
        yield
    finally:
        handle.remove()


def strangeness(model: TransformerBridge, made: Generated) -> float:
    """The continuation's perplexity under the model as it stands."""
    return perplexity(model, made.ids.to(model.cfg.device), made.prompt_length)


def spoken(
    pieces: Generator[list[str], None, list[Generated]], sides: Sequence[str]
) -> Generator[Event, None, list[Generated]]:
    """An event for each piece of text; returns what the whole generation returns."""
    made: list[Generated] = []

    def steps() -> Iterator[list[str]]:
        made.extend((yield from pieces))

    for step in steps():
        for side, piece in zip(sides, step, strict=True):
            if piece:
                yield {"event": "text", "side": side, "text": piece}
    return made


def told(figures: Figures) -> dict[str, float | None]:
    return {name: finite(getattr(figures, name)) for name in TOLD}


def finite(x: float | Tensor | None) -> float | None:
    """The number, or null where a text has been steered to pieces: JSON knows no infinity."""
    return float(x) if x is not None and math.isfinite(x) else None
