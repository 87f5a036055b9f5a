"""The training mixture: batch `step` is a function of (seed, step), so a run resumes exactly.

Kinds of batch:
  words   a question asked in words around the text, another wording in every row;
  prefix  a question asked by a soft prompt in front of the text, mode `prefix`;
  full    the same, mode `full`;
  span    span corruption, with some rows of `words` as text-to-text targets if that is asked;
  distil  texts for the teacher, with the template and a polarity label.
"""

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from serve.errors import UserError
from trainer.pretraining.asker import Asker, Wording
from trainer.pretraining.corruption import EOS, FIRST_SENTINEL, corrupt
from trainer.pretraining.packing import of_length, pad
from trainer.pretraining.shards import Pool
from trainer.pretraining.topics import NAME, Topics
from trainer.pretraining.wordings import ABOUT, OPINIONS, QUESTIONS, Question

BANDS = (8, 12, 16, 20, 26, 34, 48)  # tokens of a text; a batch takes one band, +- 25 %
BAND_SHARES = (0.13, 0.16, 0.2, 0.2, 0.15, 0.1, 0.06)
FIRST_PIECE = 103  # ids below are special tokens and sentinels
LONG = 18  # tokens from which a text counts as long
GROUPS = 8  # soft prompts in one batch
SILENT = 0.45  # share of them that are random pieces: a prompt tuned from there starts as well as
# the template alone
ASKED_TOPICS = 0.25  # share of questions about topics among those in words,
SILENT_TOPICS = 0.4  # and of soft prompts that are random pieces
ASPECTS = 0.15  # share of opinion texts with a few of their own words in front, as an aspect
PLAIN_TEMPLATE = 0.3  # share of rows of kind `words` that have the template and any label words
PROMPT_LENGTHS = (20, 20, 20, 10, 50, 100)  # how many of a soft prompt's vectors a batch uses


@dataclass
class Batch:
    """One batch. ids, mask: [B, S]; classes: [B] what row i was drawn for, which head `columns[i]`
    judges; words: [B, C] ids of the label words, -1 padded; targets: [B, C]
    what is to be answered, as probabilities (1 for the class, or a judge's); restricted: [B]
    rows judged among their own label words only, since nothing says which words are wanted;
    tasks: [G] soft prompts, B a multiple of G; random: [G, P] piece ids that stand in for a soft
    prompt that says nothing (task -1); labels: [B, L] targets of kind `span`, -100 where nothing
    is asked.
    """

    kind: str
    ids: Tensor
    mask: Tensor
    classes: Tensor | None = None
    columns: list[str] | None = None
    words: Tensor | None = None
    targets: Tensor | None = None
    restricted: Tensor | None = None
    tasks: Tensor | None = None
    random: Tensor | None = None
    prompt_length: int = 0
    labels: Tensor | None = None


@dataclass(frozen=True)
class SoftTask:
    """A question asked by soft prompt number `index`, answered with `words` (ids by class)."""

    index: int
    question: Question
    names: tuple[str, ...]
    words: tuple[int, ...]


def soft_tasks(asker: Asker) -> list[SoftTask]:
    """One task per question and label-word set, in a stable order."""
    tasks: list[SoftTask] = []
    for question in QUESTIONS:
        groups = dict.fromkeys([*question.words, *(w for _, w in question.fixed),
                                *question.arbitrary])  # fmt: skip
        for names in groups:
            ids = tuple(asker.ids(name)[0] for name in names)
            tasks.append(SoftTask(len(tasks), question, names, ids))
    return tasks


class Mixture:
    """Draws batches. shares: kind -> probability; tokens: about how many a batch holds; topics:
    None asks no questions about them."""

    def __init__(self, pools: dict[str, Pool], tokenizer: Tokenizer, tokens: int, seed: int,
                 rate: float = 0.15, mean_span: float = 3.0, topics: Topics | None = None
                 ) -> None:  # fmt: skip
        self.pools = {name: pool for name, pool in pools.items() if name != NAME}
        self.tokens, self.seed, self.topics = tokens, seed, topics
        self.rate, self.mean_span = rate, mean_span
        self.asker = Asker(tokenizer)
        self.size = tokenizer.get_vocab_size()
        self.colon = np.array(self.asker.ids(":"), np.uint16)
        self.tasks = soft_tasks(self.asker)
        self._add_columns()
        self.classes = {q.column: max(len(w) for w in q.words) for q in QUESTIONS}
        self.index: dict[tuple[str, int], list[tuple[Pool, np.ndarray, np.ndarray, float]]] = {}
        for question in QUESTIONS:
            for c in range(self.classes[question.column]):
                self.index[question.column, c] = self._indexed(question.column, c)
        names = {q.name for q in QUESTIONS if self._usable(q)}
        self.questions = [q for q in QUESTIONS if q.name in names]
        if "polarity" not in names:
            raise UserError("no labelled set has both classes of `polarity`: add one to the recipe")
        self.tasks_of = {n: [t for t in self.tasks if t.question.name == n] for n in names}

    def _usable(self, question: Question) -> bool:
        return all(self.index[question.column, c] for c in range(len(question.words[0])))

    def _add_columns(self) -> None:
        for pool in self.pools.values():
            columns = pool.columns
            if pool.name == "windows":
                continue
            columns["long"] = (pool.lengths >= LONG).astype(np.int8)
            if (columns["subjective"] < 0).all():
                opinion, neutral = columns["polarity"] >= 0, columns["tone"] == 1
                film = columns["genre"] <= 0
                columns["subjective"] = np.where(
                    opinion & film, 1, np.where(neutral & ~opinion, 0, -1)
                ).astype(np.int8)

    def _indexed(self, column: str, c: int
                 ) -> list[tuple[Pool, np.ndarray, np.ndarray, float]]:  # fmt: skip
        found = []
        for pool in self.pools.values():
            values = pool.columns.get(column)
            if values is None or pool.name == "windows":
                continue
            rows = np.flatnonzero(values == c)
            if len(rows) >= 2:
                rows = rows[np.argsort(pool.lengths[rows], kind="stable")]
                # A set of few rows is not repeated as often as its share says.
                share = max(pool.share, 0.05) * min(1.0, len(rows) / 2000)
                found.append((pool, rows, pool.lengths[rows], share))
        return found

    def _draw(self, column: str, c: int, band: int, rng: np.random.Generator
              ) -> tuple[list[int], tuple[float, ...]]:  # fmt: skip
        """A text of class c, about `band` tokens long, and the probabilities of all classes."""
        choices = self.index[column, c]
        shares = np.array([share for *_, share in choices])
        pool, rows, lengths, _ = choices[rng.choice(len(choices), p=shares / shares.sum())]
        if column == "long":
            band = int(rng.integers(18, 27)) if c else int(rng.integers(6, 13))
        row = int(rows[of_length(lengths, band, rng)])
        text = pool.text(row)
        if column in OPINIONS and rng.random() < ASPECTS:
            # "food quality: The pizza was cold.", the form that aspect tasks have.
            start, size = rng.integers(len(text)), rng.integers(1, 4)
            text = np.concatenate([text[start : start + size], self.colon, text])
        if column in OPINIONS and pool.degrees is not None:
            return text.tolist(), answers_of(column, pool.degrees[row] / 255)
        return text.tolist(), _one_hot(c, self.classes[column])

    def _question(self, band: int, rng: np.random.Generator) -> Question:
        able = [
            q
            for q in self.questions
            if not (q.name == "follows" and band < 26) and not (q.name == "length" and band < 20)
        ]
        weights = np.array([q.weight for q in able])
        return able[rng.choice(len(able), p=weights / weights.sum())]

    def batch(self, step: int, shares: dict[str, float]) -> Batch:
        """Batch number `step`; every call with the same arguments gives the same batch."""
        rng = np.random.default_rng([self.seed, step])
        kinds = list(shares)
        weights = np.array([shares[k] for k in kinds])
        kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
        if kind == "span":
            return self._span(rng, asked="words" in shares)
        band = BANDS[rng.choice(len(BANDS), p=np.array(BAND_SHARES) / sum(BAND_SHARES))]
        if kind in ("prefix", "full"):
            return self._soft(kind, band, rng)
        return self._words(kind, band, rng)

    def _words(self, kind: str, band: int, rng: np.random.Generator) -> Batch:
        count = max(8, self.tokens // (band + (6 if kind == "distil" else 10)))
        rows, classes, columns, words, targets = [], [], [], [], []
        restricted = np.zeros(count, bool)
        for row in range(count):
            if kind != "distil" and self.topics is not None and rng.random() < ASKED_TOPICS:
                c, wording, text = self._topic(self.topics, band, rng)
                rows.append([*wording.before, *text, *wording.after, EOS])
                targets.append(_one_hot(c, len(wording.words)))
                classes.append(c)
                columns.append("topic")
                words.append(wording.words)
                restricted[row] = True
                continue
            question = QUESTIONS[0] if kind == "distil" else self._question(band, rng)
            if kind == "distil":
                wording = self.asker.template
            elif rng.random() < PLAIN_TEMPLATE:
                task = self._opinion(rng)
                question, restricted[row] = task.question, True
                wording = Wording((), self.asker.template.after, task.words)
            else:
                options = self.asker.wordings[question.name]
                wording = options[rng.integers(len(options))]
            c = int(rng.integers(len(wording.words)))
            text, target = self._draw(question.column, c, band, rng)
            rows.append([*wording.before, *text, *wording.after, EOS])
            targets.append(target)
            classes.append(c)
            columns.append(question.column)
            words.append(wording.words)
        batch = self._pack(kind, rows, classes, columns, words, targets)
        batch.restricted = torch.from_numpy(restricted)
        return batch

    def _topic(self, topics: Topics, band: int, rng: np.random.Generator
               ) -> tuple[int, Wording, list[int]]:  # fmt: skip
        """The class, the wording and a text of a question with label words of its own. The words
        are not in the text where others are to be had."""
        clusters = topics.choices(rng)
        c = int(rng.integers(len(clusters)))
        text = topics.text(clusters[c], band, rng)
        words = tuple(topics.name(cluster, rng, text) for cluster in clusters)
        return c, self.asker.about_wording(int(rng.integers(len(ABOUT))), words), text

    def _opinion(self, rng: np.random.Generator) -> SoftTask:
        """A label-word set whose meaning fits the template: what a user would ask."""
        tasks = [
            task
            for name in ("polarity", "tone", "stars")
            for task in self.tasks_of.get(name, [])
            if task.names in task.question.words
        ]
        return tasks[rng.integers(len(tasks))]

    def _soft(self, kind: str, band: int, rng: np.random.Generator) -> Batch:
        length = PROMPT_LENGTHS[rng.integers(len(PROMPT_LENGTHS))]
        if kind == "full":
            length = min(length, 20)  # every row pays for the prompt
        own = band + 6 + (length if kind == "full" else 0)
        per_group = max(2, self.tokens // own // GROUPS)
        rows, classes, columns, words = [], [], [], []
        tasks, targets = [], []
        random = np.zeros((GROUPS, length), np.int64)
        for group in range(GROUPS):
            after = self.asker.template.after
            question = self._question(band, rng)
            options = self.tasks_of[question.name]
            task = options[rng.integers(len(options))]
            silent = rng.random() < SILENT
            if silent and self.topics is not None and rng.random() < SILENT_TOPICS:
                random[group] = rng.integers(FIRST_PIECE, FIRST_PIECE + 5000, length) % self.size
                tasks.append(-1)
                clusters = self.topics.choices(rng)
                names = tuple(self.topics.name(cluster, rng) for cluster in clusters)
                # The first two of ABOUT are templates that a task would have.
                after = self.asker.about_wording(int(rng.integers(2)), names).after
                for _ in range(per_group):
                    c = int(rng.integers(len(clusters)))
                    rows.append([*self.topics.text(clusters[c], band, rng), *after, EOS])
                    targets.append(_one_hot(c, len(names)))
                    classes.append(c)
                    columns.append("topic")
                    words.append(names)
                continue
            if silent:
                task = self._opinion(rng)
                question = task.question
                random[group] = rng.integers(FIRST_PIECE, FIRST_PIECE + 5000, length) % self.size
            tasks.append(-1 if silent else task.index)
            for _ in range(per_group):
                c = int(rng.integers(len(task.words)))
                text, target = self._draw(question.column, c, band, rng)
                rows.append([*text, *after, EOS])
                targets.append(target)
                classes.append(c)
                columns.append(question.column)
                words.append(task.words)
        batch = self._pack(kind, rows, classes, columns, words, targets)
        batch.tasks, batch.prompt_length = torch.tensor(tasks), length
        batch.random = torch.from_numpy(random)
        batch.restricted = (batch.tasks < 0).repeat_interleave(per_group)
        return batch

    def _span(self, rng: np.random.Generator, asked: bool) -> Batch:
        pool = self.pools["windows"]
        sources, targets = [], []
        for _ in range(max(4, self.tokens * (3 if asked else 4) // 4 // 44)):
            text = pool.text(int(rng.integers(len(pool))))
            if len(text) < 6:
                continue
            source, target = corrupt(text, self.rate, self.mean_span, rng)
            sources.append(source)
            targets.append(target)
        # The whole target of a question, as text.
        for _ in range(max(2, self.tokens // 4 // 40) if asked else 0):
            question = self._question(26, rng)
            options = self.asker.wordings[question.name]
            wording = options[rng.integers(len(options))]
            c = int(rng.integers(len(wording.words)))
            asked_of, _ = self._draw(question.column, c, 24, rng)
            sources.append([*wording.before, *asked_of, *wording.after, EOS])
            targets.append([FIRST_SENTINEL, wording.words[c], EOS])
        ids, mask = pad(sources)
        labels, real = pad(targets)
        return Batch("span", ids, mask, labels=labels.masked_fill(~real, -100))

    @staticmethod
    def _pack(kind: str, rows: list[list[int]], classes: list[int],
              columns: list[str], words: list[tuple[int, ...]], targets: list[tuple[float, ...]]
              ) -> Batch:  # fmt: skip
        ids, mask = pad(rows)
        width = max(len(w) for w in words)
        table = torch.tensor([[*w, *[-1] * (width - len(w))] for w in words])
        wanted = torch.tensor([[*t, *[0.0] * (width - len(t))] for t in targets])
        return Batch(kind, ids, mask, torch.tensor(classes), columns, table, wanted)


def _one_hot(c: int, size: int) -> tuple[float, ...]:
    return tuple(float(i == c) for i in range(size))


def answers_of(column: str, degrees: np.ndarray) -> tuple[float, ...]:
    """What a judge's degrees [5] say to a question about opinions, as probabilities."""
    low, middle, high = degrees[:2].sum(), degrees[2], degrees[3:].sum()
    answers = {"polarity": (low + middle / 2, high + middle / 2), "tone": (low, middle, high),
               "star": degrees.tolist()}[column]  # fmt: skip
    return tuple(float(a) for a in np.array(answers) / sum(answers))
