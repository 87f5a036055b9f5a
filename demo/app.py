"""The page: its tabs, and what happens when a visitor comes, teaches and leaves."""

from __future__ import annotations

from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from demo import api
from demo.head import PlainHead
from demo.parts import session_of
from demo.state import MAX_TEXT, Room
from demo.tabs import bonnet, classify, compare, many, teach, why
from demo.theme import CSS, theme

TITLE = "MetaPT: one backbone, a prompt for each task"
_LEAD = (
    "A task here is a soft prompt: some rows of numbers in front of a frozen model. Switching the "
    "task swaps the prompt and nothing else."
)
_WAITING = 128  # requests in the queue; past it a visitor is told that the server is busy
_TABS = ("classify", "why", "compare", "many", "teach", "bonnet")


def build_page(room: Room) -> gr.Blocks:
    """The page over a room. Nothing is launched."""
    # Copies of files made for downloads go after an hour; whoever made one removes it.
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# One backbone, a prompt for each task")
        gr.Markdown(_LEAD, elem_classes="lead")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Classify", id="classify"):
                classify_tab = classify.build(room)
            with gr.Tab("Why", id="why"):
                why_tab = why.build(room)
            with gr.Tab("Compare", id="compare"):
                compare_tab = compare.build(room)
            with gr.Tab("Many texts", id="many"):
                many_tab = many.build(room)
            with gr.Tab("Teach", id="teach"):
                teach_tab = teach.build(room)
            with gr.Tab("Under the bonnet", id="bonnet"):
                bonnet.build(room)
        api.build(room)
        switches = [classify_tab.switch, why_tab.switch, many_tab.switch]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

        def enter(request: gr.Request) -> list[Any]:
            """The visitor's tasks into the switches, what the link names into its fields."""
            session = session_of(request)
            room.visitor(session)
            names = room.names(session)
            query = dict(request.query_params)
            chosen = query["task"] if query.get("task") in names else names[0]
            text = query.get("text", "")[:MAX_TEXT] or gr.skip()
            tab = query["tab"] if query.get("tab") in _TABS else _TABS[0]
            update = gr.update(choices=names, value=chosen)
            return [gr.update(selected=tab), text, text, text, *(update for _ in switches)]

        def refresh(name: str, request: gr.Request) -> list[Any]:
            """A new task into every switch, chosen there."""
            names = room.names(session_of(request))
            return [gr.update(choices=names, value=name) for _ in switches]

        def leave(request: gr.Request) -> None:
            room.leave(session_of(request))

        texts = [classify_tab.text, why_tab.text, compare_tab.text]
        page.load(enter, None, [tabs, *texts, *switches], **quiet).then(**classify_tab.run)
        teach_tab.taught.change(refresh, teach_tab.taught, switches, **quiet)
        page.unload(leave)
    page.queue(max_size=_WAITING, default_concurrency_limit=4)
    return page


def open_page(page: gr.Blocks, room: Room, **settings: Any) -> tuple[str, str | None]:
    """Serve the page in threads of this process.

    Args:
        settings: of `Blocks.launch`: server_name, server_port, auth, root_path, share ...

    Returns:
        Its address on this machine, and with `share` the public one.

    Raises:
        OSError: the port is taken.
    """
    _, local, public = page.launch(
        prevent_thread_lock=True,
        max_file_size=int(room.limits.megabytes * 1e6),
        theme=theme(),
        css=CSS,
        ssr_mode=False,
        quiet=True,
        show_error=True,
        footer_links=["api", "settings"],
        app_kwargs={"middleware": [Middleware(PlainHead, title=TITLE, description=_LEAD)]},
        **settings,
    )
    return local, public
