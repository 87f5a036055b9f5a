"""Under the bonnet: the clusters that MetaPT saw, training curves, the prompts' nearest words.

All of it comes from `bonnet.json` in the bundle's folder (`trainer/bonnet.py` writes it); without
that file the tab shows what the bundle itself says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from demo.html import grid, size
from demo.state import Room
from serve.errors import Failure
from serve.files import read_json

_CURVES = {
    "validation_accuracy": "Validation accuracy",
    "validation_loss": "Held-out loss",
    "loss": "Training loss",
}


_METHODS = {
    "tune": "tuned on samples", "metapt": "MetaPT, a start", "ppt": "PPT, a start",
    "shipped": "trained with the backbone", "start": "common words, untrained",
}  # fmt: skip
_TASKS = ["Prompt", "Made by", "Labels", "Label words", "Size", "Validation accuracy"]
_WORDS = ["Prompt token", "Nearest words (cosine)"]


def read_bonnet(folder: Path) -> dict[str, Any]:
    """The file's content, empty where there is no file.

    Raises:
        Failure: it is damaged or of another format.
    """
    path = folder / "bonnet.json"
    if not path.is_file():
        return {}
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != 1:
        raise Failure(f"{path} is not of format 1: run the quick start again, or remove the file")
    return found


def map_table(columns: dict[str, list[Any]]) -> pd.DataFrame:
    """The map's columns as a table: x, y, cluster, label, text."""
    return pd.DataFrame(
        {
            "x": columns["x"],
            "y": columns["y"],
            "cluster": [f"cluster {number}" for number in columns["clusters"]],
            "label": columns["labels"],
            "text": columns["texts"],
        }
    ).sort_values("cluster", kind="stable")


def curve_table(curves: dict[str, list[dict[str, float]]], figure: str) -> pd.DataFrame:
    """One figure of all curves: step, value, run."""
    rows = [
        (line["step"], line[figure], run)
        for run, lines in curves.items()
        for line in lines
        if figure in line
    ]
    return pd.DataFrame(rows, columns=["step", "value", "run"])


def task_rows(room: Room) -> list[list[str]]:
    """What the bundle says of its prompts."""
    rows = []
    for name, task in room.bundled.items():
        figures = task.info.get("figures") or {}
        accuracy = figures.get("validation_accuracy")
        same = task.words == task.labels
        method = str(task.info.get("method") or "")
        rows.append(
            [
                name, _METHODS.get(method, method),
                ", ".join(task.labels), "the labels" if same else ", ".join(task.words),
                size(room.prompt_bytes(task)),
                "not measured" if accuracy is None else f"{accuracy:.0%}",
            ]
        )  # fmt: skip
    return rows


def word_rows(positions: list[dict[str, Any]]) -> list[list[str]]:
    """A prompt's nearest words: [token, words with their cosine]."""
    return [
        [
            str(item["position"] + 1),
            ", ".join(f"{word} ({near:.2f})" for word, near in item["words"]),
        ]
        for item in positions
    ]


def build(room: Room) -> None:
    """Build the tab in the Blocks that is open."""
    bundle = room.classifier.bundle
    found = read_bonnet(bundle.folder)
    gr.HTML(grid(_TASKS, task_rows(room), "The prompts of this bundle"), elem_id="bonnet-tasks")
    if not found.get("map"):
        gr.Markdown(
            "This bundle carries no map of the clusters that MetaPT saw. The quick start makes a "
            "bundle that does: `python -m trainer quickstart`, and then `python -m demo`.",
            elem_id="bonnet-none", elem_classes="lead",
        )  # fmt: skip
    if found.get("map"):
        gr.ScatterPlot(
            map_table(found["map"]), x="x", y="y", color="cluster", height=460,
            tooltip=["cluster", "label", "text"], x_title=" ", y_title=" ", elem_id="bonnet-map",
            title="MetaPT's tasks: clusters (t-SNE)",
        )  # fmt: skip
    curves = found.get("curves") or {}
    if curves:
        figure = gr.Dropdown(
            [(title, key) for key, title in _CURVES.items()], value="validation_accuracy",
            label="Training curves", elem_id="bonnet-figure",
        )  # fmt: skip
        plot = gr.LinePlot(
            curve_table(curves, "validation_accuracy"), x="step", y="value", color="run",
            height=300, y_title=" ", elem_id="bonnet-curves",
        )  # fmt: skip
        figure.change(
            lambda key: curve_table(curves, key), figure, plot,
            api_visibility="private", show_progress="hidden",
        )  # fmt: skip
    words = found.get("words") or {}
    if words:
        names = list(words)
        prompt = gr.Dropdown(
            names, value=names[0], label="Nearest words of a prompt", elem_id="bonnet-prompt"
        )
        table = gr.HTML(grid(_WORDS, word_rows(words[names[0]])), elem_id="bonnet-words")
        prompt.change(
            lambda name: grid(_WORDS, word_rows(words[name])), prompt, table,
            api_visibility="private", show_progress="hidden",
        )  # fmt: skip
