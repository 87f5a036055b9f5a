"""What all tabs are made of: the task switch, the sentence beside a field, the session."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from demo.state import Room
from serve.errors import Failure, UserError

KNOWN = (UserError, Failure)
FAST = 4  # classifications at a time; each uses all the cores that the classifier has
SLOW = 1  # tables at a time


def session_of(request: gr.Request | None) -> str:
    """The session's id: one browser tab or one client."""
    return (request.session_hash if request is not None else None) or "local"


def task_switch(room: Room, elem_id: str, label: str = "Task") -> gr.Radio:
    """The switch; it is one of those that a taught task appears in."""
    names = room.main_tasks()
    return gr.Radio(names, value=names[0], label=label, elem_id=elem_id)


def problem(elem_id: str) -> gr.Markdown:
    """A place for one sentence below a field, empty and hidden at first."""
    return gr.Markdown(visible=False, elem_id=elem_id, elem_classes="problem")


def say(error: Exception | str | None) -> dict[str, Any]:
    """The update of a `problem`: shows the sentence, or hides it for None."""
    # The sentence may quote what the visitor typed; as text it must not become Markdown or HTML.
    text = "" if error is None else plain(str(error))
    return gr.update(value=text, visible=error is not None)


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"[\\`*_{}\[\]<>#|~$&]", lambda mark: f"&#{ord(mark[0])};", text)


def cut_note(room: Room, session: str, name: str) -> str:
    """What stands beside the answer to a text that was cut."""
    read = room.classifier.encoder.room(room.task(session, name))
    return f"Of this text the first {read} tokens were read; the rest was left out."


def in_batches(count: int) -> str:
    """How many batches something ran in, in words."""
    return "one batch" if count == 1 else f"{count} batches"


@contextmanager
def handed_over(path: str) -> Iterator[str]:
    """A file in a folder of its own, for the length of the `yield` that shows it: Gradio copies it
    then, and the folder goes, also when the visitor leaves or stops."""
    try:
        yield path
    finally:
        shutil.rmtree(Path(path).parent, ignore_errors=True)
