"""Many texts: paste or upload, classify with progress, filter, sort, plot, download."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from demo.parts import KNOWN, SLOW, handed_over, problem, say, session_of, task_switch
from demo.state import MAX_TEXT, Room
from demo.table import ORDERS, TEXT_NAMES, read_lines, read_sheet, view

PAGE = 50  # rows shown at a time: the browser never holds the whole table
_CHUNK = 256  # texts between two steps of the progress bar
_ALL = "all labels"
_HEADERS = ["row", "text", "label", "confidence"]
_COLOURS = ["#0d9488", "#d97706", "#6366f1", "#db2777", "#65a30d", "#0284c7", "#9333ea", "#ca8a04",
            "#64748b", "#dc2626"]  # fmt: skip
_SHOWN = 300  # characters of a text in the table; the download has all


@dataclass
class ManyTab:
    """Components that the page needs."""

    switch: gr.Radio


def classify_all(
    room: Room, session: str, texts: list[str], name: str
) -> Iterator[tuple[int, pd.DataFrame | None]]:
    """Classify in chunks: yields (texts done, None), and last (all, the table).

    The table's columns: row (from 1), text, label, confidence, one per label, and `cut`: whether
    only the beginning of the text was read.
    """
    task = room.task(session, name)  # one for all texts: a lesson may replace it meanwhile
    labels = task.labels
    results = []
    for start in range(0, len(texts), _CHUNK):
        chunk = [text[:MAX_TEXT] for text in texts[start : start + _CHUNK]]
        results += room.answer(chunk, [task] * len(chunk)).results
        yield len(results), None
    table = pd.DataFrame(
        {
            "row": range(1, len(texts) + 1),
            "text": texts,
            "label": [result.label for result in results],
            "confidence": [round(result.score, 4) for result in results],
        }
    )
    odds = pd.DataFrame(
        {f"p({label})": [round(r.probabilities[label], 4) for r in results] for label in labels}
    )
    cut = [
        result.truncated or len(text) > MAX_TEXT
        for text, result in zip(texts, results, strict=True)
    ]
    yield len(results), pd.concat([table, odds, pd.DataFrame({"cut": cut})], axis=1)


def distributions(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of each label, and of each label by steps of ten per cent of confidence."""
    counts = table["label"].value_counts().rename_axis("label").reset_index(name="rows")
    steps = (table["confidence"] * 10).clip(upper=9).astype(int) * 10
    names = steps.map(lambda low: f"{low}–{low + 10} %")
    spread = table.assign(confidence=names).groupby(["confidence", "label"]).size()
    return counts, spread.reset_index(name="rows")


def write_csv(table: pd.DataFrame, name: str) -> str:
    """The table as a CSV file in a folder of its own, which the caller removes."""
    safe = "".join(char if char.isalnum() or char in "-_." else "-" for char in name) or "table"
    path = Path(tempfile.mkdtemp(prefix="metapt-")) / f"{safe}-labels.csv"
    table.to_csv(path, index=False)
    return str(path)


def page_of(table: pd.DataFrame, kept: pd.DataFrame, page: int) -> tuple[list[list[Any]], int, str]:
    """The rows of a page, the page's number within bounds, and a line that says where one is."""
    pages = max(1, -(-len(kept) // PAGE))
    page = min(max(1, page), pages)
    part = kept.iloc[(page - 1) * PAGE : page * PAGE][_HEADERS]
    rows = [
        [row, text if len(text) <= _SHOWN else text[:_SHOWN] + " …", label, f"{confidence:.0%}"]
        for row, text, label, confidence in part.itertuples(index=False)
    ]
    where = f"{len(kept):,} of {len(table):,} rows, page {page} of {pages}"
    return rows, page, where


def build(room: Room) -> ManyTab:
    """Build the tab in the Blocks that is open."""
    limits = room.limits
    gr.Markdown(
        f"Paste one text a line, or upload a CSV, TSV or text file: up to {limits.rows:,} rows and "
        f"{limits.megabytes:g} MB.",
        elem_classes="lead",
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            text = gr.Textbox(
                label="Texts, one a line", lines=6, max_lines=10, elem_id="many-text",
                max_length=int(limits.megabytes * 1e6),
            )  # fmt: skip
            file = gr.File(
                label="Or a file", file_types=[".csv", ".tsv", ".txt"], elem_id="many-file",
                height=140,
            )  # fmt: skip
            column = gr.Dropdown(label="Column of the texts", visible=False, elem_id="many-column")
            wrong = problem("many-problem")
            switch = task_switch(room, "many-task")
            with gr.Row():
                go = gr.Button("Classify all", variant="primary", elem_id="many-go")
                stop = gr.Button("Stop", elem_id="many-stop")
        with gr.Column(scale=1, min_width=300):
            status = gr.Markdown("No table yet.", elem_id="many-status", elem_classes="quiet")
            plot = gr.BarPlot(
                x="label", y="rows", title="How many of each label", height=240, visible=False,
                x_title=" ", y_title="rows", elem_id="many-plot",
            )  # fmt: skip
            sure = gr.BarPlot(
                x="confidence", y="rows", color="label", title="How sure", height=240,
                visible=False, x_title="confidence", y_title="rows", elem_id="many-sure",
            )  # fmt: skip
            download = gr.DownloadButton(
                "Download CSV", visible=False, elem_id="many-download", size="sm"
            )
    result = gr.State()
    with gr.Column(visible=False) as after:
        with gr.Row():
            label = gr.Dropdown([_ALL], value=_ALL, label="Label", min_width=140)
            order = gr.Dropdown(
                list(ORDERS), value="as given", label="Order", elem_id="many-order", min_width=140
            )
            contains = gr.Textbox(label="Text contains", elem_id="many-contains", min_width=140)
            at_most = gr.Slider(
                0, 100, value=100, step=1, label="Confidence at most, %", min_width=140
            )
        shown = gr.Dataframe(
            headers=["#", "text", "label", "sure"], interactive=False, wrap=True,
            elem_id="many-table",
            column_widths=["13%", "43%", "26%", "18%"], label="Answers",
        )  # fmt: skip
        with gr.Row(equal_height=True):
            back = gr.Button("Back", size="sm", elem_id="many-back", scale=0, min_width=90)
            where = gr.Markdown(elem_id="many-where", elem_classes="quiet")
            on = gr.Button("Next", size="sm", elem_id="many-next", scale=0, min_width=90)
    page = gr.State(1)

    def columns(path: str | None) -> tuple[Any, Any]:
        if path is None:
            return gr.update(visible=False), say(None)
        try:
            sheet = read_sheet(path, limits.rows, limits.megabytes)
        except KNOWN as error:
            return gr.update(visible=False), say(error)
        best = sheet.guess(TEXT_NAMES)
        return gr.update(choices=sheet.header, value=best, visible=True), say(None)

    def read(pasted: str, path: str | None, name: str | None) -> list[str]:
        if path is None:
            return read_lines(pasted or "", limits.rows)
        sheet = read_sheet(path, limits.rows, limits.megabytes)
        return sheet.column(name if name in sheet.header else sheet.guess(TEXT_NAMES))

    hidden = gr.update(visible=False)

    def run(
        pasted: str, path: str | None, column_name: str | None, name: str, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        session = session_of(request)
        try:
            texts = read(pasted, path, column_name)
            started = time.perf_counter()
            for done, table in classify_all(room, session, texts, name):
                seconds = time.perf_counter() - started
                rate = done / max(seconds, 1e-9)
                if table is None:
                    left = (len(texts) - done) / rate
                    line = (
                        f"{done:,} of {len(texts):,} texts, {rate:,.0f} a second, {left:.0f} s left"
                    )
                    yield (line, *[gr.skip()] * 7, say(None))
                    continue
                counts, spread = distributions(table)
                spent = f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
                line = f"{done:,} texts in {spent}: {rate:,.0f} a second"
                if cut := int(table["cut"].sum()):
                    line += f"; of {cut:,} only the beginning was read"
                labels = [column[2:-1] for column in table if str(column).startswith("p(")]
                colours = dict(zip(labels, _COLOURS * 9, strict=False))
                with handed_over(write_csv(table, name)) as path:
                    yield (
                        line, table,
                        gr.update(value=counts, visible=True, y_lim=[0, int(counts["rows"].max())]),
                        gr.update(value=spread, visible=True, color_map=colours),
                        gr.update(value=path, visible=True),
                        gr.update(visible=True), gr.update(choices=[_ALL, *labels], value=_ALL), 1,
                        say(None),
                    )  # fmt: skip
        except KNOWN as error:
            yield ("", None, hidden, hidden, hidden, hidden, gr.skip(), 1, say(error))

    def show(
        table: pd.DataFrame | None, wanted: str, how: str, part: str, most: float, number: int
    ) -> tuple[Any, ...]:
        if table is None:
            return gr.skip(), gr.skip(), gr.skip()
        kept = view(table, None if wanted == _ALL else wanted, most / 100, part, how)
        rows, number, line = page_of(table, kept, number)
        return rows, number, line

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    filters = [result, label, order, contains, at_most, page]
    seen = [shown, page, where]
    file.change(columns, file, [column, wrong], **quiet)
    running = go.click(
        run, [text, file, column, switch],
        [status, result, plot, sure, download, after, label, page, wrong],
        api_visibility="private", concurrency_limit=SLOW, concurrency_id="slow",
        show_progress="minimal", show_progress_on=[status],
    )  # fmt: skip
    running.then(show, filters, seen, **quiet)
    stop.click(lambda: "Stopped.", None, status, cancels=[running], **quiet)
    for changed in (label, order, contains, at_most):
        changed.input(lambda: 1, None, page, **quiet).then(show, filters, seen, **quiet)
    back.click(lambda number: number - 1, page, page, **quiet).then(show, filters, seen, **quiet)
    on.click(lambda number: number + 1, page, page, **quiet).then(show, filters, seen, **quiet)
    return ManyTab(switch)
