"""Why: the words that carried the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from demo.html import escape, facts, grid
from demo.parts import FAST, KNOWN, cut_note, in_batches, problem, say, session_of, task_switch
from demo.samples import samples
from demo.state import MAX_TEXT, Room
from demo.why import coloured, explain, ranking

_HEADERS = ["Word", "Weight", "Without it", "Answer then"]


@dataclass
class WhyTab:
    """Components that the page needs."""

    text: gr.Textbox
    switch: gr.Radio


def build(room: Room) -> WhyTab:
    """Build the tab in the Blocks that is open."""
    first = room.main_tasks()[0]
    gr.Markdown(
        "Every word is left out in turn, and all these texts run in batches through the served "
        "graph: no gradients, no second model.",
        elem_classes="lead",
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            text = gr.Textbox(
                label="Text", lines=4, max_lines=12, max_length=MAX_TEXT, elem_id="why-text",
                value=samples(first)[0],
            )  # fmt: skip
            wrong = problem("why-problem")
            switch = task_switch(room, "why-task")
            go = gr.Button("Which words?", variant="primary", elem_id="why-go")
        with gr.Column(scale=3, min_width=320):
            shown = gr.HTML(elem_id="why-words")
            table = gr.HTML(elem_id="why-table")

    def run(value: str, name: str, request: gr.Request) -> tuple[Any, ...]:
        session = session_of(request)
        try:
            found = explain(room, session, value or "", name)
        except KNOWN as error:
            return "", "", say(error)
        label = escape(found.result.label)
        key = (
            f'<p class="key"><span class="for">for {label}</span>'
            f'<span class="against">against {label}</span></p>'
        )
        times = in_batches(found.batches)
        numbers = facts(
            [
                (found.result.label, f"with {found.result.score:.0%}"),
                (f"{len(found.pieces) + 1} texts", f"in {times}, {found.milliseconds:.0f} ms"),
            ]
        )
        note = ""
        if found.result.truncated:
            # Without a word that is read, one more of the end is.
            note = f"<p>{cut_note(room, session, name)} Weights tell less then.</p>"
        return (
            numbers + coloured(value, found) + key + note,
            grid(_HEADERS, ranking(value, found), "The heaviest words, weights in log-odds"),
            say(None),
        )

    outputs = [shown, table, wrong]
    live: dict[str, Any] = {
        "fn": run, "inputs": [text, switch], "outputs": outputs, "api_visibility": "private",
        "concurrency_limit": FAST, "concurrency_id": "fast",
    }  # fmt: skip
    go.click(**live)
    text.submit(**live)
    switch.change(**live)
    return WhyTab(text, switch)
