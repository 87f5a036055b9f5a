"""Teach: name a task and its labels, give examples, watch a prompt learn, and use it at once."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd

from demo import lesson as sample
from demo.parts import KNOWN, handed_over, plain, problem, say, session_of
from demo.state import Room, Visitor
from demo.table import LABEL_NAMES, TEXT_NAMES, read_sheet
from demo.teach import (
    MOST_EXAMPLES,
    MOST_LABELS,
    Cancelled,
    Lesson,
    Lessons,
    Step,
    make_lesson,
    parse_labels,
    served,
    study,
    write_zip,
)
from serve.errors import UserError

_REDRAW = 0.7  # seconds between two drawings of the curves, which cost a browser more than a step
_COLOURS = {"MetaPT start": "#0d9488", "bundle's prompt": "#0d9488", "common words": "#6366f1",
            "random start": "#d97706"}  # fmt: skip


def run_titles(room: Room) -> dict[str, str]:
    """What the runs are called, by the starts that the bundle carries."""
    best = "MetaPT start" if room.start("metapt") is not None else "bundle's prompt"
    return {"best": best, "words": "common words", "random": "random start"}


def start_words(room: Room) -> str:
    """The lead's words for the first start."""
    if room.start("metapt") is not None:
        return "the MetaPT start"
    return (
        "the prompt of this bundle that answers your examples best as it is (the quick start's "
        "bundle has a MetaPT start)"
    )


@dataclass
class TeachTab:
    """Components that the page needs."""

    taught: gr.Textbox  # hidden; changes to the new task's name when there is one


def curves(steps: list[Step], runs: dict[str, str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The steps as two tables to plot: loss on held-out examples, accuracy in per cent."""
    rows: list[tuple[Any, ...]] = [
        (step.step, runs[step.run], step.validation_loss, 100 * step.accuracy) for step in steps
    ]
    # The plot takes its colours from the first data it sees: every run must be among them.
    missing = set(runs) - {step.run for step in steps}
    rows += [(0, runs[run], None, None) for run in sorted(missing)]
    table = pd.DataFrame(rows, columns=["step", "start", "loss", "accuracy"])
    loss, accuracy = table[["step", "start", "loss"]], table[["step", "start", "accuracy"]]
    return loss, accuracy


def fields_of_file(path: str, room: Room) -> tuple[list[str], list[str]]:
    """Labels in the order of their appearance, and each one's texts, one a line.

    Raises:
        UserError: the file cannot be read, or its labels are not 2 to 10.
    """
    sheet = read_sheet(path, MOST_EXAMPLES, room.limits.megabytes)
    if len(sheet.header) < 2:
        raise UserError("The file needs two columns: text and label.")
    names = [name for name in sheet.header if name.strip().lower() in LABEL_NAMES]
    label_column = names[0] if names else sheet.header[-1]
    if not {name.lower() for name in sheet.header} & {*TEXT_NAMES, *LABEL_NAMES}:
        again = [name for name in sheet.header if name in map(str.strip, sheet.column(name))]
        if again:  # the first line is an example as well: there is no header
            label_column = min(again, key=lambda name: len(set(sheet.column(name))))
            sheet = replace(sheet, rows=[sheet.header, *sheet.rows])
            gr.Info("The file has no header: its first line is taken as an example.")
    texts = sheet.column(sheet.guess(TEXT_NAMES, not_this=label_column))
    groups: dict[str, list[str]] = {}
    for text, label in zip(texts, sheet.column(label_column), strict=True):
        groups.setdefault(" ".join(label.split()), []).append(" ".join(text.split()))
    if mixed := next((label for label in groups if "," in label), None):
        raise UserError(f"The label “{mixed}” contains a comma. Rename it in the file.")
    labels = parse_labels("\n".join(groups))
    return labels, ["\n".join(groups[label]) for label in labels]


def result_line(lessons: Lessons, served_right: int, runs: dict[str, str]) -> str:
    """What the runs reached, in words."""
    from trainer.tune import no_better_than_one_answer

    parts = []
    for run, title in runs.items():
        if run in lessons.prompts:
            figures = lessons.prompts[run].task.figures
            parts.append(
                f"**{title}: {figures['validation_accuracy']:.0%}** "
                f"(best at step {figures['best_step']} of {figures['steps']})"
            )
    words = ", ".join(plain(word) for word in lessons.words)
    doubt, accuracy = "", served_right / lessons.held
    if no_better_than_one_answer(accuracy, np.array(lessons.classes)) is not None:
        doubt = (
            " **That is hardly more than one answer for every text would get:** the backbone may "
            "not know what is asked (mini knows opinions), or it takes more examples."
        )
    start, best = lessons.starts["best"], runs["best"]
    began = ""
    if start.name != "metapt":
        began = f" The {best} is that of “{plain(start.name)}”, of {start.among} tried."
    return (
        f"Accuracy on the {lessons.held} examples held out: {'; '.join(parts)}. Served is the "
        f"prompt of the lowest loss on them, from {runs[lessons.winner()]}: onnxruntime answers "
        f"{served_right} of {lessons.held} right.{doubt} Label words: {words}.{began}"
    )


def build(room: Room) -> TeachTab:
    """Build the tab in the Blocks that is open."""
    runs = run_titles(room)
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    gr.Markdown(
        f"Name a task and 2 to {MOST_LABELS} labels, give some examples of each, press Teach. A "
        f"prompt is tuned on two thirds of them: from {start_words(room)}, from common words and "
        "from random numbers. The rest choose the step and the run that are served, to you alone, "
        "in every tab, until you close the page or leave it for an hour; on texts that chose "
        "nothing expect a little less.",
        elem_classes="lead",
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            name = gr.Textbox(label="Task", max_length=60, elem_id="teach-name")
            labels = gr.Textbox(
                label="Labels, separated by commas", elem_id="teach-labels", max_length=500,
            )  # fmt: skip
            wrong = problem("teach-problem")
            with gr.Row():
                fill = gr.Button("Fill in an example", size="sm", elem_id="teach-fill")
                upload = gr.UploadButton(
                    "Upload CSV (text, label)", file_types=[".csv", ".tsv"], size="sm",
                    elem_id="teach-upload",
                )  # fmt: skip
            boxes = [
                gr.Textbox(
                    label="Examples", lines=4, max_lines=6, visible=False,
                    elem_id=f"teach-examples-{i}",
                )
                for i in range(MOST_LABELS)
            ]  # fmt: skip
            with gr.Row():
                go = gr.Button("Teach", variant="primary", elem_id="teach-go")
                cancel = gr.Button("Cancel", elem_id="teach-cancel", interactive=False)
        with gr.Column(scale=1, min_width=300):
            status = gr.Markdown(
                "Nothing taught yet. While a prompt learns, its loss and its accuracy on the "
                "examples held out are drawn here.",
                elem_id="teach-status",
            )
            accuracy = gr.LinePlot(
                x="step", y="accuracy", color="start", color_map=_COLOURS, y_lim=[0, 100],
                title="Held-out accuracy, %", height=230, elem_id="teach-accuracy", y_title=" ",
                visible=False,
            )  # fmt: skip
            loss = gr.LinePlot(
                x="step", y="loss", color="start", color_map=_COLOURS, title="Held-out loss",
                height=230, elem_id="teach-loss", y_title=" ", visible=False,
            )  # fmt: skip
            download = gr.DownloadButton(
                "Download the prompt (safetensors, zip)", visible=False, elem_id="teach-download"
            )
    taught = gr.Textbox(visible=False)

    def show_boxes(value: str) -> list[Any]:
        names = [part.strip() for part in re.split(r"[,\n]", value) if part.strip()][:MOST_LABELS]
        return [
            gr.update(visible=True, label=f"Examples of “{names[i]}”, one a line")
            if i < len(names)
            else gr.update(visible=False)
            for i in range(MOST_LABELS)
        ]

    def fill_fields(names: list[str], groups: list[str]) -> list[Any]:
        filled = [
            gr.update(value=group, visible=True, label=f"Examples of “{label}”, one a line")
            for label, group in zip(names, groups, strict=True)
        ]
        return [", ".join(names), *filled, *[gr.update(value="", visible=False)] * (
            MOST_LABELS - len(filled))]  # fmt: skip

    def fill_sample() -> list[Any]:
        groups = ["\n".join(texts) for texts in sample.EXAMPLES.values()]
        return [sample.NAME, *fill_fields(list(sample.EXAMPLES), groups), say(None)]

    def fill_file(path: str) -> list[Any]:
        try:
            names, groups = fields_of_file(path, room)
        except KNOWN as error:
            return [gr.skip()] * (1 + MOST_LABELS) + [say(error)]
        return [*fill_fields(names, groups), say(None)]

    outputs = [status, accuracy, loss, download, taught, go, cancel, wrong]
    on, off = gr.update(interactive=True), gr.update(interactive=False)

    def idle(message: Any, error: Exception | None = None) -> tuple[Any, ...]:
        skip = gr.skip()
        return message, skip, skip, skip, skip, on, off, say(error)

    def run(
        task_name: str, label_text: str, request: gr.Request, *rest: str
    ) -> Iterator[tuple[Any, ...]]:
        session = session_of(request)
        visitor = room.visitor(session)
        try:
            names = parse_labels(label_text or "")
            groups = [(box or "").splitlines() for box in rest[: len(names)]]
            lesson = make_lesson(task_name or "", names, groups)
            room.check_can_teach(session, lesson.name)
        except KNOWN as error:
            yield idle(gr.skip(), error)
            return
        visitor.cancel.clear()
        lessons, steps, served_runs, drawn = Lessons(), [], 0, 0.0
        hide = gr.update(visible=False)
        yield ("Loading the backbone …", hide, hide, hide, gr.skip(), off, on, say(None))
        try:
            for item in study(room, lesson, visitor.cancel, lessons):
                visitor.seen = time.monotonic()  # still here
                if item is None:
                    continue
                steps.append(item)
                if len(lessons.prompts) > served_runs:
                    # A run is done: its prompt need not wait for the comparison.
                    serve(session, visitor, lesson, lessons)
                    served_runs = len(lessons.prompts)
                if time.monotonic() - drawn < _REDRAW:
                    continue
                drawn = time.monotonic()
                curve, points = curves(steps, runs)
                line = (
                    f"{runs[item.run]}, step {item.step}: held-out accuracy {item.accuracy:.0%}, "
                    f"loss {item.validation_loss:.2f}"
                )
                skip = gr.skip()
                plots = [gr.update(value=table, visible=True) for table in (points, curve)]
                yield line, *plots, skip, lesson.name if served_runs else skip, skip, skip, skip
            right = serve(session, visitor, lesson, lessons)
            curve, points = curves(steps, runs)
        except Cancelled:
            kept = "The comparison was cancelled; the task is served." if served_runs else ""
            yield idle(kept or "Cancelled. Nothing was kept.")
            return
        except KNOWN as error:
            yield idle("Not taught.", error)
            return
        with handed_over(write_zip(lessons.prompts[lessons.winner()])) as path:
            yield (
                f"“{plain(lesson.name)}” is served now: choose it in any tab.\n\n"
                + result_line(lessons, right, runs),
                *[gr.update(value=table, visible=True) for table in (points, curve)],
                gr.update(value=path, visible=True),
                lesson.name,
                on,
                off,
                say(None),
            )

    def serve(session: str, visitor: Visitor, lesson: Lesson, lessons: Lessons) -> int:
        """Serve what has been learned; returns how many held-out examples the graph gets right."""
        from demo.teach import split

        winner = lessons.winner()
        record, arrays = served(room, lessons.prompts[winner])
        variants = {
            f"from-{run}": served(room, prompt)[1]
            for run, prompt in lessons.prompts.items() if run != winner
        }  # fmt: skip
        start = lessons.starts["best"]
        variants["metapt" if start.name == "metapt" else "start-of-lesson"] = start.arrays()
        tries = sample.TRY if lesson.labels == list(sample.EXAMPLES) else lesson.texts[:3]
        taught = room.add(session, lesson.name, record, arrays, variants, tries, visitor)
        held = split(lesson.classes)[1]
        found = room.classify_keys([lesson.texts[i] for i in held], taught.key)
        return sum(
            result.label == lesson.labels[lesson.classes[i]]
            for i, result in zip(held, found.results, strict=True)
        )

    def stop(request: gr.Request) -> str:
        room.visitor(session_of(request)).cancel.set()
        return "Cancelling …"

    labels.change(show_boxes, labels, boxes, **quiet)
    fill.click(fill_sample, None, [name, labels, *boxes, wrong], **quiet)
    upload.upload(fill_file, upload, [labels, *boxes, wrong], **quiet)
    go.click(
        run, [name, labels, *boxes], outputs, api_visibility="private", show_progress="minimal",
        show_progress_on=[status], concurrency_limit=1, concurrency_id="teach",
    )  # fmt: skip
    cancel.click(stop, None, status, **quiet, queue=False)
    return TeachTab(taught)
