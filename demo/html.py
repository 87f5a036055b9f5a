"""Pieces of HTML. Every text of a visitor goes through `escape`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["bar", "escape", "facts", "grid", "size"]


def size(count: float) -> str:
    """Bytes for people: 154 kB, 47.3 MB."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB" if count >= 1e3 else f"{count:.0f} B"
    return f"{count / 1e6:.1f} MB"


def bar(share: float) -> str:
    """A bar filled to `share` of its width."""
    return f'<div class="bar"><i style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></i></div>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Numbers with what they are, side by side: (number, meaning)."""
    cells = "".join(
        f"<div><b>{escape(n)}</b><span>{escape(what)}</span></div>" for n, what in pairs
    )
    return f'<div class="facts">{cells}</div>'


def grid(headers: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> str:
    """A table; on a telephone each row is a block, its cells under their columns' names."""
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in headers)
    body = []
    for first, *others in rows:
        cells = "".join(
            f'<td data-name="{escape(name)}">{escape(str(value))}</td>'
            for name, value in zip(headers[1:], others, strict=True)
        )
        body.append(f"<tr><th scope=row>{escape(str(first))}</th>{cells}</tr>")
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    return (
        f'<div class="scroll"><table class="grid">{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
