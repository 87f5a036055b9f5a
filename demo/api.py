"""What a client calls.

gradio_client.Client(url).predict("Great!", "film", api_name="/classify")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from demo import compare as comparing
from demo import why
from demo.parts import FAST, KNOWN, session_of
from demo.state import Room
from serve.readout import Result

MOST = 1000  # texts of one call


@contextmanager
def _in_words() -> Iterator[None]:
    """Wrong input reaches the client as its sentence, without a trace in the server's log."""
    try:
        yield
    except KNOWN as error:
        raise gr.Error(str(error), print_exception=False) from None


def _plain(result: Result) -> dict[str, Any]:
    return {
        "label": result.label,
        "probabilities": result.probabilities,
        "truncated": result.truncated,
    }


def build(room: Room) -> None:
    """Add the endpoints to the Blocks that is open."""

    def tasks(request: gr.Request) -> dict[str, list[str]]:
        """The tasks of this session with their labels."""
        session = session_of(request)
        return {name: room.task(session, name).labels for name in room.names(session)}

    def classify(text: str, task: str, request: gr.Request) -> dict[str, Any]:
        """Label and probabilities of one text, and the server's time for it."""
        with _in_words():
            found = room.classify(session_of(request), [text], task)
        return {**_plain(found.results[0]), "milliseconds": round(found.milliseconds, 3)}

    def classify_many(texts: list[str], task: str, request: gr.Request) -> dict[str, Any]:
        """Labels and probabilities of at most 1000 texts, and the server's time for all."""
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise gr.Error("texts must be a list of strings", print_exception=False)
        if len(texts) > MOST:
            raise gr.Error(f"at most {MOST} texts in a call", print_exception=False)
        with _in_words():
            found = room.classify(session_of(request), texts, task)
        return {
            "results": [_plain(result) for result in found.results],
            "milliseconds": round(found.milliseconds, 3),
        }

    def explain(text: str, task: str, request: gr.Request) -> dict[str, Any]:
        """The answer, and for each word the log-odds that it adds and the answer without it."""
        with _in_words():
            found = why.explain(room, session_of(request), text, task)
        words = [
            {
                "word": text[piece.start : piece.end],
                "weight": piece.weight,
                "probability_without": piece.without,
                "label_without": piece.answer,
            }
            for piece in found.pieces
        ]
        return {**_plain(found.result), "words": words, "milliseconds": found.milliseconds}

    def compare(text: str, request: gr.Request) -> dict[str, Any]:
        """The text under every prompt of every task of this session."""
        with _in_words():
            found = comparing.compare(room, session_of(request), text)
        answers = {
            task: {kind: _plain(result) for kind, result in row.items()}
            for task, row in found.answers.items()
        }
        return {"answers": answers, "milliseconds": found.milliseconds}

    for function in (tasks, classify, classify_many, explain, compare):
        gr.api(function, api_name=function.__name__, concurrency_limit=FAST, concurrency_id="fast")
