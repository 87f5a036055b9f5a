"""Classify: a text, the switch, the answer, and what switching costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from demo.html import facts, size
from demo.parts import FAST, KNOWN, cut_note, problem, say, session_of, task_switch
from demo.samples import samples
from demo.state import MAX_TEXT, Room

# The link is made in the browser, which knows the address that the visitor sees (behind a proxy
# the server does not). Navigation inside the page needs no request.
_LINK = """(text, task) => {
  const url = new URL(window.location.href.split("?")[0]);
  url.searchParams.set("task", task); url.searchParams.set("text", text);
  window.history.replaceState({}, "", url);
  return [text, task, {value: url.href, visible: true, __type__: "update"}].slice(2);
}"""


@dataclass
class ClassifyTab:
    """Components that the page needs."""

    text: gr.Textbox
    switch: gr.Radio
    outputs: list[Any]
    run: Any


def facts_html(room: Room, session: str, name: str, milliseconds: float | None) -> str:
    """What the task adds, what it shares, and the time of the answer."""
    task = room.task(session, name)
    backbone = room.classifier.bundle.header["backbone"].get("id")
    prompt, shared = room.prompt_bytes(task), room.backbone_bytes()
    pairs = [
        (size(prompt), f"the prompt of “{name}”: all that a switch changes"),
        (size(shared), f"backbone “{backbone}”, loaded once, the same for every task"),
        (f"{shared / prompt:,.0f} : 1", "shared to changed"),
    ]
    if milliseconds is not None:
        pairs.insert(0, (f"{milliseconds:.1f} ms", "for this answer, measured on the server"))
    return facts(pairs)


def build(room: Room) -> ClassifyTab:
    """Build the tab in the Blocks that is open."""
    first = room.main_tasks()[0]

    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            text = gr.Textbox(
                label="Text", lines=4, max_lines=12, max_length=MAX_TEXT, elem_id="classify-text",
                placeholder="Type or paste a text", value=samples(first)[0],
            )  # fmt: skip
            wrong_text = problem("classify-problem")
            switch = task_switch(room, "classify-task")
            examples = gr.Dataset(
                components=[gr.Textbox(visible=False)], samples=[[s] for s in samples(first)],
                label="Examples for this task", elem_id="classify-examples",
            )  # fmt: skip
            with gr.Row():
                go = gr.Button("Classify", variant="primary", elem_id="classify-go")
                share = gr.Button("Link to this", elem_id="classify-share")
            link = gr.Textbox(
                label="Link", visible=False, interactive=False, buttons=["copy"],
                elem_id="classify-link",
            )  # fmt: skip
        with gr.Column(scale=2, min_width=300):
            answer = gr.Label(label="Answer", num_top_classes=10, elem_id="classify-answer")
            note = gr.Markdown(visible=False, elem_classes="quiet", elem_id="classify-note")
            numbers = gr.HTML(facts_html(room, "", first, None), elem_id="classify-facts")

    outputs = [answer, numbers, note, wrong_text]

    def run(value: str, name: str, request: gr.Request) -> tuple[Any, ...]:
        session = session_of(request)
        try:
            if not (value or "").strip():
                return (
                    None,
                    facts_html(room, session, name, None),
                    gr.update(visible=False),
                    say(None),
                )
            found = room.classify(session, [value], name)
        except KNOWN as error:
            return None, gr.skip(), gr.update(visible=False), say(error)
        result = found.results[0]
        return (
            result.probabilities,
            facts_html(room, session, name, found.milliseconds),
            gr.update(value=cut_note(room, session, name), visible=result.truncated),
            say(None),
        )

    def show_samples(name: str, request: gr.Request) -> Any:
        own = room.examples(session_of(request), name)
        return gr.update(samples=[[s] for s in own or samples(name)])

    live: dict[str, Any] = {
        "fn": run, "inputs": [text, switch], "outputs": outputs, "show_progress": "hidden",
        "api_visibility": "private", "concurrency_limit": FAST, "concurrency_id": "fast",
    }  # fmt: skip
    # While a request is under way, only the last of further keystrokes is sent after it.
    text.input(**live, trigger_mode="always_last")
    go.click(**live)
    switch.change(**live).then(
        show_samples, switch, examples, api_visibility="private", show_progress="hidden"
    )
    examples.click(
        lambda row: row[0], examples, text, api_visibility="private", show_progress="hidden"
    ).then(**live)
    share.click(None, [text, switch], link, js=_LINK)
    return ClassifyTab(text, switch, outputs, live)
