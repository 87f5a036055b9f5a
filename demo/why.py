"""Which words carried an answer: each is left out in turn, in batches of the served graph.

No gradients and no second model: what is measured is the very graph that answers, on inputs that
lack one word. With s(t) = log p(label | t) - log(1 - p(label | t)) for the label of the whole text,
word i weighs s(text) - s(text without word i); positive means that it spoke for the label.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from demo.html import escape
from demo.state import Room, check_text
from serve.errors import UserError
from serve.readout import Result

MOST_PIECES = 96  # left out one by one; in a longer text several words go together
_EDGE = 1e-6  # a probability of 1 has no finite log-odds


@dataclass(frozen=True)
class Piece:
    """A word (or a few) and what leaving it out does.

    Attributes:
        start, end: where it stands in the text.
        weight: log-odds that it adds to the label; without: the label's probability without it.
        answer: the label without it.
    """

    start: int
    end: int
    weight: float
    without: float
    answer: str


@dataclass(frozen=True)
class Explanation:
    """The answer for the whole text and the weight of its pieces."""

    result: Result
    pieces: list[Piece]
    milliseconds: float
    batches: int


def spans(text: str, most: int = MOST_PIECES) -> list[tuple[int, int]]:
    """The words of a text as (start, end); where there are more than `most`, neighbours join."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    each = max(1, math.ceil(len(words) / most))
    groups = [words[i : i + each] for i in range(0, len(words), each)]
    return [(group[0][0], group[-1][1]) for group in groups]


def log_odds(probability: float) -> float:
    """log p - log (1 - p), kept finite."""
    p = min(1 - _EDGE, max(_EDGE, probability))
    return math.log(p) - math.log1p(-p)


def explain(room: Room, session: str, text: str, name: str) -> Explanation:
    """Leave out every word of a text.

    Raises:
        UserError: the text has no word, is too long, or the task is not there.
    """
    check_text(text)
    places = spans(text)
    if not places:
        raise UserError("There is no word to leave out. Type a text.")
    task = room.task(session, name)
    texts = [text, *(text[:start] + text[end:] for start, end in places)]
    found = room.answer(texts, [task] * len(texts))
    whole = found.results[0]
    base = log_odds(whole.score)
    pieces = [
        Piece(
            start, end, base - log_odds(other.probabilities[whole.label]),
            other.probabilities[whole.label], other.label,
        )
        for (start, end), other in zip(places, found.results[1:], strict=True)
    ]  # fmt: skip
    return Explanation(whole, pieces, found.milliseconds, found.batches)


def coloured(text: str, found: Explanation) -> str:
    """The text as HTML, each piece tinted by its weight."""
    strongest = max((abs(piece.weight) for piece in found.pieces), default=0.0) or 1.0
    label = escape(found.result.label)
    parts, position = [], 0
    for piece in found.pieces:
        parts.append(escape(text[position : piece.start]))
        shade = 0.75 * abs(piece.weight) / strongest
        kind = "for" if piece.weight >= 0 else "against"
        title = f"without it: {label} {piece.without:.0%} (whole text {found.result.score:.0%})"
        word = escape(text[piece.start : piece.end])
        parts.append(f'<span class="{kind}" style="--a:{shade:.2f}" title="{title}">{word}</span>')
        position = piece.end
    parts.append(escape(text[position:]))
    return f'<div class="words">{"".join(parts)}</div>'


def ranking(text: str, found: Explanation, most: int = 8) -> list[list[str]]:
    """The heaviest words: [word, weight, the label's probability without it, answer without it]."""
    heavy = sorted(found.pieces, key=lambda piece: -abs(piece.weight))[:most]
    return [
        [text[p.start : p.end], f"{p.weight:+.2f}", f"{p.without:.0%}", p.answer] for p in heavy
    ]
