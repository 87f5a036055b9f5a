"""`--prepare`: texts and labels become tokenised shards, small enough to carry to a GPU.

A pool is one safetensors file: `tokens` (uint16, all texts one after another), `offsets`
(int64, [N + 1]), one int8 column [N] per label, -1 where a text has no such label, and, where a
judge read the texts, `degrees` (uint8, [N, 5]): its probabilities of the five degrees, in 255ths.

Which sentences of a review have its label? With a judge (`trainer.pretraining.judge`) those whose
words say so; without one, the first and last, and others that a bag of words agrees to.
"""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import SGDClassifier
from tokenizers import Tokenizer

from serve.errors import Failure, UserError
from serve.files import atomic_write
from trainer.pretraining.judge import DEGREES, NEUTRAL
from trainer.pretraining.recipe import COLUMNS, Labelled, Plain, Recipe
from trainer.pretraining.rows import class_of, classes_of, read_rows
from trainer.pretraining.texts import HeldOut, pick, sentences

logger = logging.getLogger(__name__)

MAX_TOKENS = 64  # of a labelled text: the tasks are sentences of about 20 words
SPAN_TOKENS = 48  # of a plain window for span corruption
MARGIN = 0.4  # log odds by which the bag of words must agree with an inherited label
MARGIN_WHOLE = 0.7  # log odds by which it must contradict the label of a whole text to drop it
# Weight of a judge's degrees that agree with the document's label, and of those against it.
AGREES, AGAINST = 1.3, 0.3
CLEAR, VAGUE = 0.8, 0.6  # polarity: the share of a side without neutral; the most that is neutral
SURE = 0.6  # of three: probability from which a text has a tone
SURE_STAR = 0.4  # of five
_INDEX = "pools.json"
JUDGED, JUDGED_SHARE = 5, 0.6  # sentences of an unlabelled document; share of their pool

Verdicts = Callable[[list[str]], np.ndarray]  # texts -> probabilities of the five degrees [N, 5]


@dataclass
class Pool:
    """Texts of one source. tokens: [sum S]; offsets: [N + 1]; columns: name -> [N]; degrees:
    [N, 5] in 255ths, or None."""

    name: str
    tokens: np.ndarray
    offsets: np.ndarray
    columns: dict[str, np.ndarray]
    share: float = 1.0
    degrees: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def text(self, index: int) -> np.ndarray:
        """Token ids of one text, [S]."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Token counts, [N]."""
        return np.diff(self.offsets)


class BagOfWords:
    """Log odds of "positive" from words and word pairs, trained on whole labelled documents.

    It only decides which sentences may inherit their document's label.
    """

    def __init__(self, rows: list[tuple[str, int]]) -> None:
        self.vectorizer = HashingVectorizer(
            ngram_range=(1, 2), n_features=2**20, alternate_sign=False, lowercase=True,
            binary=True, norm="l2",
        )  # fmt: skip
        self.model = SGDClassifier(loss="log_loss", alpha=2e-6, max_iter=8, tol=None,
                                   random_state=0)  # fmt: skip
        self.model.fit(self.vectorizer.transform([t for t, _ in rows]), [y for _, y in rows])

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Log odds, [N]."""
        return self.model.decision_function(self.vectorizer.transform(texts))


def document_labels(recipe: Recipe, limit: int | None = None) -> list[tuple[str, int]]:
    """(text, polarity) of the recipe's labelled documents, at most `limit` of a set."""
    found = []
    for entry in recipe.labelled:
        if "polarity" in entry.columns:
            rows = read_rows(entry.file, limit)
            labels = [class_of(row, *entry.columns["polarity"]) for row in rows]
            found += [(r["text"], y) for r, y in zip(rows, labels, strict=True) if y >= 0]
    return found


def labelled_rows(entry: Labelled, held_out: HeldOut, rng: np.random.Generator
                  ) -> Iterator[tuple[str, dict[str, int], bool, str]]:  # fmt: skip
    """(text, classes, trusted, whole document) for every example of a labelled set."""
    for row in read_rows(entry.file):
        classes = classes_of(row, entry.columns)
        document = row["text"]
        if not entry.split or document.count(" ") < 24:
            parts = [(document, True)]
        else:
            parts = pick(document, rng, middle=4)
            title = row.get("title")
            if title:
                parts.append((str(title), True))
        for text, edge in parts:
            if text not in held_out:
                yield text.replace("\n", " "), classes, edge or not entry.split, document


def labelled_pool(entry: Labelled, tokenizer: Tokenizer, held_out: HeldOut,
                  checker: BagOfWords | None, seed: int, judge: Verdicts | None = None
                  ) -> Pool:  # fmt: skip
    """The pool of one labelled set.

    With a judge, opinions are its verdicts, which the document's label leans on. Without, sentences
    of a split document keep polarity, tone and star at the edges, and elsewhere only where the
    checker agrees with the document by MARGIN.
    """
    rng = np.random.default_rng(seed)
    rows = list(labelled_rows(entry, held_out, rng))
    texts = [row[0] for row in rows]
    columns = {name: np.full(len(rows), -1, np.int8) for name in COLUMNS}
    for i, (_, classes, _, _) in enumerate(rows):
        for name, value in classes.items():
            columns[name][i] = value
    columns["genre"][:] = entry.genre
    degrees = None
    if judge is not None and {"polarity", "tone", "star"} & set(entry.columns):
        degrees = judge(texts) * np.array([leaning(row[1]) for row in rows])
        degrees /= degrees.sum(1, keepdims=True)
        columns |= opinions(degrees)
    elif checker is not None and "polarity" in entry.columns:
        odds = checker(texts)
        sign = np.where(columns["polarity"] == 1, 1.0, -1.0)
        trusted = np.array([row[2] for row in rows])
        # A bag of words misreads negation and irony, which is what the edges are kept to teach.
        bar = np.where(trusted, -np.inf if entry.split else -MARGIN_WHOLE, MARGIN)
        doubtful = (columns["polarity"] >= 0) & (sign * odds < bar)
        # Of a review without a verdict, no word says which sentence has its star.
        doubtful |= ~trusted & (columns["polarity"] < 0) & (columns["tone"] < 0)
        for name in ("polarity", "tone", "star"):
            columns[name][doubtful] = -1
    if entry.genre == 0 and "subjective" not in entry.columns:
        columns["genre"][rng.random(len(rows)) < 0.5] = -1  # films are half of everything
    return _pool(entry.name, texts, columns, tokenizer, MAX_TOKENS, entry.share, degrees)


def leaning(classes: dict[str, int]) -> tuple[float, ...]:
    """Weights of the five degrees by what the document says; a sentence may always be neutral."""
    side, star = classes.get("polarity", -1), classes.get("star", -1)
    if side < 0 and star >= 0 and star != NEUTRAL:
        side = int(star > NEUTRAL)
    if side >= 0:
        sides = (AGREES, AGREES, 1.0, AGAINST, AGAINST)
        return sides[::-1] if side else sides
    if star < 0 and classes.get("tone", -1) == 1:
        return (AGAINST, AGAINST, AGREES, AGAINST, AGAINST)
    return (1.0,) * DEGREES


def opinions(degrees: np.ndarray) -> dict[str, np.ndarray]:
    """Columns polarity, tone and star of probabilities [N, 5]; -1 where they are not sure."""
    tones = np.stack([degrees[:, :2].sum(1), degrees[:, 2], degrees[:, 3:].sum(1)], 1)
    sides = tones[:, [0, 2]] / np.maximum(tones[:, [0, 2]].sum(1, keepdims=True), 1e-6)
    found = {
        "polarity": (sides.argmax(1), (sides.max(1) > CLEAR) & (tones[:, 1] < VAGUE)),
        "tone": (tones.argmax(1), tones.max(1) > SURE),
        "star": (degrees.argmax(1), degrees.max(1) > SURE_STAR),
    }
    return {
        name: np.where(sure, value, -1).astype(np.int8) for name, (value, sure) in found.items()
    }


def judged_pool(entries: list[Plain], tokenizer: Tokenizer, held_out: HeldOut, judge: Verdicts,
                seed: int) -> Pool:  # fmt: skip
    """Sentences of unlabelled documents with the judge's verdicts, five of each document."""
    rng = np.random.default_rng(seed)
    texts: list[str] = []
    genres: list[int] = []
    for entry in entries:
        for row in read_rows(entry.file, entry.judged, seed):
            fit = [
                s for s in sentences(row["text"]) if 2 <= s.count(" ") <= 44 and s not in held_out
            ]
            chosen = rng.permutation(len(fit))[:JUDGED].tolist()
            texts += [fit[i] for i in chosen]
            genres += [entry.genre if rng.random() < 0.5 else -1 for _ in chosen]
    columns = {name: np.full(len(texts), -1, np.int8) for name in COLUMNS}
    degrees = judge(texts)
    columns |= {"genre": np.array(genres, np.int8), **opinions(degrees)}
    return _pool("judged", texts, columns, tokenizer, MAX_TOKENS, JUDGED_SHARE, degrees)


def _pool(name: str, texts: list[str], columns: dict[str, np.ndarray], tokenizer: Tokenizer,
          limit: int, share: float, degrees: np.ndarray | None = None) -> Pool:  # fmt: skip
    encoded = [e.ids[:limit] for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    keep = np.array([len(ids) > 1 for ids in encoded], bool)
    kept = [ids for ids in encoded if len(ids) > 1]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in kept])]).astype(np.int64)
    tokens = np.fromiter((t for ids in kept for t in ids), np.uint16, int(offsets[-1]))
    levels = None if degrees is None else np.round(255 * degrees[keep]).astype(np.uint8)
    return Pool(name, tokens, offsets, {k: v[keep] for k, v in columns.items()}, share, levels)


def plain_pools(entries: list[Plain], tokenizer: Tokenizer, held_out: HeldOut, seed: int
                ) -> list[Pool]:  # fmt: skip
    """Pools `windows` (span corruption), `pairs` (`follows`) and `plain` (genre, tone)."""
    rng = np.random.default_rng(seed)
    windows: list[str] = []
    pairs: list[tuple[str, int]] = []
    single: list[tuple[str, int, int]] = []
    for entry in entries:
        previous = ""
        for row in read_rows(entry.file, entry.documents, seed):
            found = [s for s in sentences(row["text"]) if s not in held_out]
            for start in range(0, len(found), 2):
                windows.append(" ".join(found[start : start + 2]))
            fit = [s for s in found if 4 <= s.count(" ") <= 30]
            for i in rng.permutation(len(fit))[:4].tolist():
                single.append((fit[i], entry.genre, 1 if entry.neutral else -1))
            if len(found) > 3 and all(s.count(" ") < 26 for s in found[1:3]):
                pairs.append((f"{found[1]} {found[2]}", 1))
                if previous:
                    pairs.append((f"{found[1]} {previous}", 0))
                previous = found[2]
    pools = []
    for name, texts, labels in (
        ("windows", windows, {}),
        ("pairs", [p[0] for p in pairs], {"follows": [p[1] for p in pairs]}),
        ("plain", [s[0] for s in single],
         {"genre": [s[1] for s in single], "tone": [s[2] for s in single]}),
    ):  # fmt: skip
        columns = {c: np.asarray(labels.get(c, [-1] * len(texts)), np.int8) for c in COLUMNS}
        limit = SPAN_TOKENS if name == "windows" else MAX_TOKENS
        pools.append(_pool(name, texts, columns, tokenizer, limit, 0.3))
    return pools


def prepare(recipe: Recipe, tokenizer: Tokenizer, folder: Path, seed: int,
            judge: Verdicts | None = None) -> None:  # fmt: skip
    """Write every pool of the recipe, and `pools.json`, to `folder`."""
    held_out = HeldOut.read(recipe.held_out)
    logger.info("%d held-out sentences", len(held_out.keys))
    checker = None
    if judge is None:
        rows = [row for row in document_labels(recipe) if row[0] not in held_out]
        if len({polarity for _, polarity in rows}) < 2:
            raise UserError(
                "the recipe has no labelled reviews of both polarities, by which sentences are "
                "checked: add a set with a column of polarity, or pass --judge"
            )
        checker = BagOfWords(rows)
    pools = [labelled_pool(entry, tokenizer, held_out, checker, seed, judge)
             for entry in recipe.labelled]  # fmt: skip
    if judge is not None and (unlabelled := [entry for entry in recipe.plain if entry.judged]):
        pools.append(judged_pool(unlabelled, tokenizer, held_out, judge, seed))
    pools += plain_pools(recipe.plain, tokenizer, held_out, seed)
    _write_index([_write_pool(pool, folder) for pool in pools], folder)


def _write_pool(pool: Pool, folder: Path) -> dict[str, Any]:
    """Write a pool; returns its entry in the index."""
    tensors = {"tokens": pool.tokens, "offsets": pool.offsets, **pool.columns}
    if pool.degrees is not None:
        tensors["degrees"] = pool.degrees
    with atomic_write(folder / f"{pool.name}.safetensors") as path:
        save_file(tensors, path)
    counts = {c: np.bincount(v[v >= 0]).tolist() for c, v in pool.columns.items()
              if (v >= 0).any()}  # fmt: skip
    logger.info("%s: %d texts, %d tokens, %s", pool.name, len(pool), len(pool.tokens), counts)
    return {"name": pool.name, "share": pool.share, "texts": len(pool),
            "tokens": len(pool.tokens), "classes": counts}  # fmt: skip


def _write_index(index: list[dict[str, Any]], folder: Path) -> None:
    with atomic_write(folder / _INDEX) as path:
        path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def add_pool(pool: Pool, folder: Path) -> None:
    """A pool more, or another in place of one of that name, for shards that are there."""
    index = [entry for entry in json.loads((folder / _INDEX).read_text("utf-8"))
             if entry["name"] != pool.name]  # fmt: skip
    _write_index([*index, _write_pool(pool, folder)], folder)


def load_pools(folder: Path) -> dict[str, Pool]:
    """Read what `prepare` wrote; UserError if it is not there."""
    path = folder / _INDEX
    if not path.is_file():
        raise UserError(f"{path} is missing: run the backbone command with --prepare first")
    pools = {}
    for entry in json.loads(path.read_text(encoding="utf-8")):
        pool = folder / f"{entry['name']}.safetensors"
        try:
            data = load_file(pool)
        except (SafetensorError, FileNotFoundError) as error:
            raise Failure(f"{pool} is damaged ({error}): pass --prepare") from None
        tokens, offsets, degrees = (
            data.pop("tokens"),
            data.pop("offsets"),
            data.pop("degrees", None),
        )
        pools[entry["name"]] = Pool(entry["name"], tokens, offsets, data, entry["share"], degrees)
    return pools
