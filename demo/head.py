"""The page's head: Gradio's template names its own site and picture to link previews, and a
manifest at the root of the host; ours does neither.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

_META = re.compile(
    rb'<meta\s+(?:property|name)="(?:og|twitter):[^"]*"\s+content="[^"]*"\s*/?>\s*'
    # It is asked for at the root of the host, whatever path a proxy shows the page under.
    rb'|<link rel="manifest"[^>]*>\s*'
)


class PlainHead:
    """ASGI middleware that replaces the preview tags of HTML pages by a title and a description.

    Args:
        app: what answers; title, description: of the page.
    """

    def __init__(self, app: Any, title: str, description: str) -> None:
        self.app = app
        self.tags = (
            f'<meta property="og:title" content="{escape(title)}" />\n\t\t'
            f'<meta name="description" content="{escape(description)}" />\n\t</head>'
        ).encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass everything on but HTML, which is held back until it is whole."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: dict[str, Any] | None = None
        body = b""

        async def sending(message: Any) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and _is_html(message):
                start = message
            elif message["type"] == "http.response.body" and start is not None:
                body += message.get("body", b"")
                if message.get("more_body"):
                    return
                body = _META.sub(b"", body).replace(b"</head>", self.tags, 1)
                headers = [h for h in start["headers"] if h[0].lower() != b"content-length"]
                headers.append((b"content-length", str(len(body)).encode()))
                await send({**start, "headers": headers})
                await send({"type": "http.response.body", "body": body})
            else:
                await send(message)

        await self.app(scope, receive, sending)


def _is_html(message: Any) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/html")
        for name, value in message["headers"]
    )
