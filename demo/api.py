"""What a client calls: `gradio_client.Client(url).predict("Great!", "film", api_name="/classify")`.

A client has a session like a browser tab has, and sees the tasks that it taught itself.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from demo.parts import FAST, KNOWN, session_of
from demo.state import Room

MOST = 1000  # texts of one call


def build(room: Room) -> None:
    """Add the endpoints to the Blocks that is open."""

    def tasks(request: gr.Request) -> dict[str, list[str]]:
        """The tasks of this session with their labels."""
        session = session_of(request)
        return {name: room.task(session, name).labels for name in room.names(session)}

    def classify(text: str, task: str, request: gr.Request) -> dict[str, Any]:
        """Label, probabilities and the server's time for one text."""
        return classify_many([text], task, request)["results"][0]

    def classify_many(texts: list[str], task: str, request: gr.Request) -> dict[str, Any]:
        """Labels and probabilities of at most 1000 texts."""
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise gr.Error("texts must be a list of strings", print_exception=False)
        if len(texts) > MOST:
            raise gr.Error(f"at most {MOST} texts in a call", print_exception=False)
        try:
            found = room.classify(session_of(request), texts, task)
        except KNOWN as error:
            raise gr.Error(str(error), print_exception=False) from None
        each = found.milliseconds / max(1, len(texts))
        results = [
            {
                "label": result.label,
                "probabilities": result.probabilities,
                "truncated": result.truncated,
                "milliseconds": round(each, 3),
            }
            for result in found.results
        ]
        return {"results": results, "milliseconds": round(found.milliseconds, 3)}

    for function in (tasks, classify, classify_many):
        gr.api(function, api_name=function.__name__, concurrency_limit=FAST, concurrency_id="fast")
