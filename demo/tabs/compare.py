"""Compare: one text under all tasks and prompts side by side, live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from demo.compare import compare, table
from demo.parts import FAST, KNOWN, in_batches, problem, say, session_of
from demo.samples import samples
from demo.state import MAX_TEXT, Room


@dataclass
class CompareTab:
    """Components that the page needs."""

    text: gr.Textbox
    live: dict[str, Any]


def build(room: Room) -> CompareTab:
    """Build the tab in the Blocks that is open."""
    gr.Markdown(
        "All prompts answer the same text, mixed in a batch. Edit the sentence: an answer that "
        "changes is marked, so that one sees which prompt flinches.",
        elem_classes="lead",
    )
    text = gr.Textbox(
        label="Text", lines=2, max_lines=8, max_length=MAX_TEXT, elem_id="compare-text",
        value=samples(room.main_tasks()[0])[2],
    )  # fmt: skip
    wrong = problem("compare-problem")
    go = gr.Button("Compare", variant="primary", elem_id="compare-go")
    time = gr.Markdown(elem_id="compare-time", elem_classes="quiet")
    shown = gr.HTML(elem_id="compare-table")
    before = gr.State({})

    def run(
        value: str, old: dict[str, str], request: gr.Request
    ) -> tuple[str, str, dict[str, str], Any]:
        try:
            found = compare(room, session_of(request), value or "")
        except KNOWN as error:
            return "", "", old, say(error)
        count = sum(len(row) for row in found.answers.values())
        times = in_batches(found.batches)
        line = f"{count} prompts, {times} of mixed tasks: {found.milliseconds:.1f} ms"
        if any(result.truncated for row in found.answers.values() for result in row.values()):
            line += ". The text is longer than some of them read; its end was left out there."
        return line, table(found, old), found.labels(), say(None)

    live: dict[str, Any] = {
        "fn": run, "inputs": [text, before], "outputs": [time, shown, before, wrong],
        "api_visibility": "private", "show_progress": "hidden",
        "concurrency_limit": FAST, "concurrency_id": "fast",
    }  # fmt: skip
    text.input(**live, trigger_mode="always_last")
    go.click(**live)
    return CompareTab(text, live)
