"""What the server can be asked, for programs: paths, JSON schemas of the questions, events, limits."""

from __future__ import annotations

from typing import Any

from saekit.server.guard import MAX_BODY
from saekit.server.questions import LIMITS, ActivationsQuestion, SteerQuestion, StreamQuestion, SweepQuestion

WAITING_EVENT = {"event": "waiting", "ahead": "how many questions are served before this one"}
ERROR_EVENT = {"event": "error", "error": "what went wrong after the answer had begun"}
NDJSON, JSON = "application/x-ndjson", "application/json"


def description(waiting: int) -> dict[str, Any]:
    """waiting: how many questions may be in line."""
    return {
        "about": "A catalog of features with its model behind it. Questions are JSON; one is answered at a time.",
        "paths": {
            "/api/stream": {
                "method": "POST",
                "does": "continues a prompt plainly and steered, from one seed, and tells the text as it comes",
                "question": StreamQuestion.model_json_schema(),
                "answer": NDJSON,
                "events": [
                    WAITING_EVENT,
                    {
                        "event": "start",
                        "sides": "plain, steered, and control where asked for",
                        "kl": "KL(steered ‖ plain) of the token after the prompt, nats",
                        "top_tokens": "[token, its probability on each side], those that moved most first",
                        "edits": "the edits in words",
                    },
                    {"event": "text", "side": "whose", "text": "the next piece"},
                    {
                        "event": "done",
                        "texts": "prompt and continuation of each side",
                        "perplexity": "of each continuation under the plain model",
                        "tokens": "new tokens of the longest side",
                        "seconds": "since its turn came",
                    },
                    ERROR_EVENT,
                ],
            },
            "/api/sweep": {
                "method": "POST",
                "does": "measures the first edit at each strength, beside a random direction at the same one",
                "question": SweepQuestion.model_json_schema(),
                "answer": NDJSON,
                "events": [
                    WAITING_EVENT,
                    {
                        "event": "row",
                        "strength": "the strength",
                        "steered": "perplexity and repetition of the continuations, KL of the token after the prompt, "
                        "reactivation: the feature when the text is read again unsteered, over its maximum",
                        "control": "the same of the random direction",
                    },
                    {
                        "event": "done",
                        "plain": "the same of the plain model",
                        "knee": "the strongest fluent strength whose effect no random direction has, or null",
                    },
                    ERROR_EVENT,
                ],
            },
            "/api/steer": {
                "method": "POST",
                "does": "as /api/stream, in one piece and without a control",
                "question": SteerQuestion.model_json_schema(),
                "answer": JSON,
                "fields": ["prompt", "plain", "steered", "kl", "top_tokens"],
            },
            "/api/activations": {
                "method": "POST",
                "does": "tells which features fire on each token of a text, strongest first",
                "question": ActivationsQuestion.model_json_schema(),
                "answer": JSON,
                "fields": ["tokens", "features"],
            },
        },
        "limits": {**LIMITS, "body": MAX_BODY, "waiting": waiting},
        "errors": {
            "400": "the question is wrong",
            "403": "Host or Origin is another's",
            "404": "there is no such feature or path",
            "408": "the body came too slowly",
            "413": "the body is too long",
            "415": "the body is not application/json",
            "429": "too many questions are waiting; ask again after Retry-After seconds",
            "503": "the server is stopping",
        },
    }
