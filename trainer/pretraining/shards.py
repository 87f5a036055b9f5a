"""`--prepare`: texts and labels become tokenised shards, small enough to carry to a GPU.

A pool is one safetensors file: `tokens` (uint16, all texts one after another), `offsets`
(int64, [N + 1]) and one int8 column [N] per label, -1 where a text has no such label.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import SGDClassifier
from tokenizers import Tokenizer

from serve.errors import UserError
from serve.files import atomic_write
from trainer.pretraining.recipe import COLUMNS, Labelled, Plain, Recipe
from trainer.pretraining.texts import HeldOut, pick, sentences

logger = logging.getLogger(__name__)

MAX_TOKENS = 64  # of a labelled text: the tasks are sentences of about 20 words
SPAN_TOKENS = 48  # of a plain window for span corruption
MARGIN = 0.4  # log odds by which the bag of words must agree with an inherited label
MARGIN_WHOLE = 0.7  # log odds by which it must contradict the label of a whole text to drop it


@dataclass
class Pool:
    """Texts of one source. tokens: [sum S]; offsets: [N + 1]; columns: name -> [N]."""

    name: str
    tokens: np.ndarray
    offsets: np.ndarray
    columns: dict[str, np.ndarray]
    share: float = 1.0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def text(self, index: int) -> np.ndarray:
        """Token ids of one text, [S]."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Token counts, [N]."""
        return np.diff(self.offsets)


def read_rows(file: Path, limit: int | None = None, seed: int = 0) -> list[dict]:
    """Rows of a Parquet file as dictionaries; a random `limit` of them where given."""
    table = pq.read_table(file)
    if "text" not in table.column_names:
        raise UserError(f"{file} has no column `text`")
    if limit is not None and limit < table.num_rows:
        chosen = np.random.default_rng(seed).permutation(table.num_rows)[:limit]
        table = table.take(np.sort(chosen))
    return table.to_pylist()


def _class(row: dict, source: str, classes: dict[str, int]) -> int:
    value = row.get(source)
    if value is None:
        return -1
    key = str(int(value)) if isinstance(value, float) and value == int(value) else str(value)
    return classes.get(key, -1)


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
            labels = [_class(row, *entry.columns["polarity"]) for row in rows]
            found += [(r["text"], y) for r, y in zip(rows, labels, strict=True) if y >= 0]
    return found


def labelled_rows(entry: Labelled, held_out: HeldOut, rng: np.random.Generator
                  ) -> Iterator[tuple[str, dict[str, int], bool, str]]:  # fmt: skip
    """(text, classes, trusted, whole document) for every example of a labelled set."""
    for row in read_rows(entry.file):
        classes = {name: _class(row, *spec) for name, spec in entry.columns.items()}
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
                  checker: BagOfWords | None, seed: int) -> Pool:  # fmt: skip
    """The pool of one labelled set. Sentences of a split document keep polarity, tone and star
    at the edges, and elsewhere only where the checker agrees with the document by MARGIN."""
    rng = np.random.default_rng(seed)
    rows = list(labelled_rows(entry, held_out, rng))
    texts = [row[0] for row in rows]
    columns = {name: np.full(len(rows), -1, np.int8) for name in COLUMNS}
    for i, (_, classes, _, _) in enumerate(rows):
        for name, value in classes.items():
            columns[name][i] = value
    columns["genre"][:] = entry.genre
    if checker is not None and ("polarity" in entry.columns):
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
    return _pool(entry.name, texts, columns, tokenizer, MAX_TOKENS, entry.share)


def _pool(name: str, texts: list[str], columns: dict[str, np.ndarray], tokenizer: Tokenizer,
          limit: int, share: float) -> Pool:  # fmt: skip
    encoded = [e.ids[:limit] for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    keep = np.array([len(ids) > 1 for ids in encoded], bool)
    kept = [ids for ids in encoded if len(ids) > 1]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in kept])]).astype(np.int64)
    tokens = np.fromiter((t for ids in kept for t in ids), np.uint16, int(offsets[-1]))
    return Pool(name, tokens, offsets, {k: v[keep] for k, v in columns.items()}, share)


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


def prepare(recipe: Recipe, tokenizer: Tokenizer, folder: Path, seed: int) -> None:
    """Write every pool of the recipe, and `pools.json`, to `folder`."""
    held_out = HeldOut.read(recipe.held_out)
    logger.info("%d held-out sentences", len(held_out.keys))
    documents = [row for row in document_labels(recipe) if row[0] not in held_out]
    checker = BagOfWords(documents)
    pools = [labelled_pool(entry, tokenizer, held_out, checker, seed) for entry in recipe.labelled]
    pools += plain_pools(recipe.plain, tokenizer, held_out, seed)
    index = []
    for pool in pools:
        with atomic_write(folder / f"{pool.name}.safetensors") as path:
            save_file({"tokens": pool.tokens, "offsets": pool.offsets, **pool.columns}, path)
        counts = {c: np.bincount(v[v >= 0]).tolist() for c, v in pool.columns.items()
                  if (v >= 0).any()}  # fmt: skip
        logger.info("%s: %d texts, %d tokens, %s", pool.name, len(pool), len(pool.tokens), counts)
        index.append({"name": pool.name, "share": pool.share, "texts": len(pool),
                      "tokens": len(pool.tokens), "classes": counts})  # fmt: skip
    with atomic_write(folder / "pools.json") as path:
        path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def load_pools(folder: Path) -> dict[str, Pool]:
    """Read what `prepare` wrote; UserError if it is not there."""
    path = folder / "pools.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: run the backbone command with --prepare first")
    pools = {}
    for entry in json.loads(path.read_text(encoding="utf-8")):
        data = load_file(folder / f"{entry['name']}.safetensors")
        tokens, offsets = data.pop("tokens"), data.pop("offsets")
        pools[entry["name"]] = Pool(entry["name"], tokens, offsets, data, entry["share"])
    return pools
