"""Wordings of the questions, tokenised once."""

import itertools
import re
from dataclasses import dataclass

from tokenizers import Tokenizer

from trainer.pretraining.wordings import ABOUT, QUESTIONS, SENTINEL, TEMPLATE, Question


@dataclass(frozen=True)
class Wording:
    """Token ids before and after the text, and the label words' ids by class."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    words: tuple[int, ...]


class Asker:
    """Tokenises the wordings once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.template = self.wording(TEMPLATE, ("terrible", "great"))
        self.about = [self._parts(pattern) for pattern in ABOUT]
        self.comma, self.either = self.ids(","), self.ids("or")
        self.wordings = {q.name: self._all(q) for q in QUESTIONS}

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def wording(self, pattern: str, words: tuple[str, ...], order: tuple[int, ...] | None = None
                ) -> Wording:  # fmt: skip
        """A pattern with its label words filled in, listed in the given order."""
        order = order or tuple(range(len(words)))
        listed = [words[i] for i in order]
        text = ", ".join(listed[:-1]) + " or " + listed[-1]
        before, after = pattern.replace("{words}", text).split("{text}")
        assert SENTINEL in before + after
        return Wording(self.ids(before), self.ids(after), tuple(self.ids(w)[0] for w in words))

    def _parts(self, pattern: str) -> list[str | tuple[int, ...]]:
        """A pattern cut at its slots, which stay as they are, what is between them as ids."""
        parts = re.split(r"(\{text\}|\{words\})", pattern)
        return [p if p.startswith("{") else self.ids(p) for p in parts if p]

    def about_wording(self, number: int, words: tuple[int, ...]) -> Wording:
        """Wording `number` of ABOUT with label words given by their ids."""
        listed = [i for word in words[:-1] for i in (word, *self.comma)][: -len(self.comma)]
        listed += [*self.either, words[-1]]
        sides: list[list[int]] = [[]]
        for part in self.about[number]:
            if part == "{text}":
                sides.append([])
            else:
                sides[-1] += listed if isinstance(part, str) else part
        before, after = sides
        return Wording(tuple(before), tuple(after), words)

    def _all(self, question: Question) -> list[Wording]:
        fixed = [self.wording(pattern, words) for pattern, words in question.fixed]
        listed = []
        for pattern, words in itertools.product(question.listing, question.words):
            count = len(words)
            orders = [tuple(range(count)), tuple(reversed(range(count)))]
            if count == 3:
                orders.append((2, 0, 1))
            listed += [self.wording(pattern, words, order) for order in orders]
        # Fixed wordings and listings are asked equally often in all.
        repeat = max(1, round(len(listed) / max(len(fixed), 1)))
        return fixed * repeat + listed
