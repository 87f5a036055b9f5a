"""One text under every task and every prompt at hand, in batches of mixed tasks."""

from __future__ import annotations

from dataclasses import dataclass

from demo.html import bar, escape
from demo.state import Room, check_text
from serve.errors import UserError
from serve.readout import Result

KINDS = {
    "tuned": ("Tuned prompt", "as it is served"),
    "metapt": ("MetaPT start", "meta-trained, never tuned on the task"),
    "start": ("Common words", "a prompt that says nothing: the backbone alone"),
    "start-of-lesson": ("Its start", "where the lesson began"),
    "from-best": ("Tuned from a prompt", "the same samples, the start beside this"),
    "from-words": ("Tuned from words", "the same samples, without MetaPT"),
    "from-random": ("Tuned from random", "the same samples, without MetaPT"),
    "from-ppt": ("Tuned from PPT", "the same samples, another start"),
    "ppt": ("PPT start", "pre-trained without clusters, never tuned"),
    "random": ("Random prompt", "noise of the same spread"),
}


@dataclass(frozen=True)
class Comparison:
    """Answers by task and kind of prompt, the time for them, and how many batches they were."""

    answers: dict[str, dict[str, Result]]
    milliseconds: float
    batches: int

    def labels(self) -> dict[str, str]:
        """`task/kind` -> label, to see later which changed."""
        return {
            f"{task}/{kind}": result.label
            for task, row in self.answers.items()
            for kind, result in row.items()
        }


def compare(room: Room, session: str, text: str) -> Comparison:
    """Classify a text with every prompt of every task of a visitor, in one call.

    Raises:
        UserError: the text is empty or too long.
    """
    check_text(text)
    if not text.strip():
        raise UserError("Type a text to compare the prompts on.")
    names = room.names(session)
    cells = [
        (name, kind, key) for name in names for kind, key in room.variants(session, name).items()
    ]
    found = room.classify_keys([text] * len(cells), [key for _, _, key in cells])
    answers: dict[str, dict[str, Result]] = {name: {} for name in names}
    for (name, kind, _), result in zip(cells, found.results, strict=True):
        answers[name][kind] = result
    return Comparison(answers, found.milliseconds, found.batches)


def table(found: Comparison, before: dict[str, str]) -> str:
    """The comparison as an HTML table; answers that differ from `before` are marked."""
    present = {kind for row in found.answers.values() for kind in row}
    kinds = [kind for kind in KINDS if kind in present]
    kinds += sorted(present - set(kinds))
    titles = {kind: KINDS.get(kind, (kind, "")) for kind in kinds}
    head = "".join(f"<th>{escape(a)}<small>{escape(b)}</small></th>" for a, b in titles.values())
    rows = []
    for name, row in found.answers.items():
        cells = []
        for kind in kinds:
            result = row.get(kind)
            if result is None:
                cells.append(f'<td data-name="{escape(titles[kind][0])}"><small>none</small></td>')
                continue
            old = before.get(f"{name}/{kind}")
            changed = old is not None and old != result.label
            was = f"<small>was {escape(old or '')}</small>" if changed else ""
            cells.append(
                f'<td data-name="{escape(titles[kind][0])}"{" class=changed" if changed else ""}>'
                f"<b>{escape(result.label)}</b> {result.score:.0%}{bar(result.score)}{was}</td>"
            )
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    return (
        '<div class="scroll"><table class="grid even"><thead><tr><th>Task</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
