"""The page: its tabs, what happens when it opens and closes, and how it is launched."""

from __future__ import annotations

from typing import Any

import gradio as gr

from demo import api
from demo.parts import session_of
from demo.state import MAX_TEXT, Room
from demo.tabs import classify

TITLE = "MetaPT: one backbone, a prompt for each task"
_LEAD = (
    "A task here is a soft prompt: some rows of numbers in front of a frozen model. Switching the "
    "task swaps the prompt and nothing else."
)
_WAITING = 128  # requests in the queue; past it a visitor is told that the server is busy


def build_page(room: Room) -> gr.Blocks:
    """The page over a room. Nothing is launched."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# One backbone, a prompt for each task")
        gr.Markdown(_LEAD, elem_classes="lead")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Classify", id="classify"):
                first = classify.build(room)
        switches: list[gr.Radio] = [first.switch]
        api.build(room)

        def enter(request: gr.Request) -> list[Any]:
            """Put the visitor's tasks into the switches, and what the link names into its fields."""
            session = session_of(request)
            room.visitor(session)
            names = room.names(session)
            query = dict(request.query_params)
            chosen = query["task"] if query.get("task") in names else names[0]
            text = query.get("text", "")[:MAX_TEXT]
            update = gr.update(choices=names, value=chosen)
            return [text or gr.skip(), *(update for _ in switches)]

        page.load(
            enter, None, [first.text, *switches], api_visibility="private", show_progress="hidden"
        ).then(**first.run)

        def leave(request: gr.Request) -> None:
            room.leave(session_of(request))

        page.unload(leave)
    page.queue(max_size=_WAITING, default_concurrency_limit=4)
    return page
