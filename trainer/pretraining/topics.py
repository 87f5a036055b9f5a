"""Questions about what a text is about, without a label: clusters of texts and their telling words.

A backbone that is asked for opinions only answers nothing else: tuned on forty news items, prompts
of weights that had seen ten topics stayed at chance. So plain text and sentences of reviews are
clustered by the teacher's embeddings, and the words that set a cluster apart become names of it. A
question about topics offers the names of a few clusters and asks which is the text's; the label
words are others in every question, so that it is their meaning that has to be compared with the
text, and not a fixed set of classes learned.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from tokenizers import Tokenizer

from serve.files import read_json, write_json
from trainer.cpu import half_precision
from trainer.pretraining.corruption import EOS
from trainer.pretraining.packing import of_length, pad
from trainer.pretraining.recipe import COLUMNS
from trainer.pretraining.shards import Pool
from trainer.pretraining.teacher import Teacher
from trainer.pretraining.wordings import opinion_words

logger = logging.getLogger(__name__)

NAME = "topics"  # of the pool
NAMES = 3  # of a cluster
TEXTS = 60_000  # of plain text that are clustered, and as many of reviews
LEAST = 50  # texts of a cluster, on average
SHORTEST, LONGEST = 8, 48  # tokens of a text
_FILE = "topics.json"
_FEWEST = 15  # texts that a name must be in
_BATCH = 256


def make_topics(pools: dict[str, Pool], teacher: Teacher, tokenizer: Tokenizer, clusters: int,
                seed: int, half: bool | None = None) -> tuple[Pool, list[list[str]]]:  # fmt: skip
    """Texts of the pools with column `topic`, their cluster, and the clusters' names.

    Half of the clusters, the first, are of pool `plain`, the others of labelled pools and of pool
    `judged`. Where there are few texts there are fewer clusters.

    Args:
        pools: what `prepare` made; teacher: reads the student's ids.
        clusters: K; half: products in bf16, see `trainer.cpu.half_precision`.
    """
    rng = np.random.default_rng(seed)
    texts: list[np.ndarray] = []
    topic: list[np.ndarray] = []
    names: list[list[str]] = []
    opinions = [name for name in pools if name not in ("windows", "pairs", "plain", NAME)]
    for sources in (["plain"], opinions):
        found = _texts([pools[name] for name in sources if name in pools], rng)
        count = min(clusters // 2, len(found) // LEAST)
        if count < 2:
            continue
        vectors = embed(teacher, found, half)
        # As many starts as there are clusters make K-means slow, and no better for this.
        fit = MiniBatchKMeans(count, batch_size=4096, n_init=1, random_state=seed).fit(vectors)
        labels = fit.predict(vectors)
        telling = telling_words(found, labels, count, tokenizer, {n for g in names for n in g})
        kept = [c for c in range(count) if telling[c]]
        place = np.full(count, -1)
        place[kept] = len(names) + np.arange(len(kept))
        texts += [found[i] for i in np.flatnonzero(place[labels] >= 0)]
        topic.append(place[labels][place[labels] >= 0])
        names += [telling[c] for c in kept]
    columns = {name: np.full(len(texts), -1, np.int8) for name in COLUMNS}
    columns["topic"] = np.concatenate(topic).astype(np.int16) if topic else np.zeros(0, np.int16)
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
    tokens = np.concatenate(texts) if texts else np.zeros(0, np.uint16)
    return Pool(NAME, tokens, offsets, columns, 0.0), names


def _texts(pools: Sequence[Pool], rng: np.random.Generator) -> list[np.ndarray]:
    """At most TEXTS texts of fitting length, as many of every pool as its share of them all."""
    rows = [(pool, np.flatnonzero((pool.lengths >= SHORTEST) & (pool.lengths <= LONGEST)))
            for pool in pools]  # fmt: skip
    total = sum(len(fit) for _, fit in rows)
    found = []
    for pool, fit in rows:
        count = min(len(fit), TEXTS * len(fit) // max(total, 1))
        found += [pool.text(int(i)) for i in rng.choice(fit, count, replace=False)]
    return found


@torch.no_grad()
def embed(teacher: Teacher, texts: Sequence[np.ndarray], half: bool | None = None) -> np.ndarray:
    """Mean of the teacher's last states, of unit length: ids of N texts -> [N, D]."""
    device = next(teacher.parameters()).device
    order = np.argsort([len(text) for text in texts], kind="stable")
    result: np.ndarray | None = None
    for start in range(0, len(order), _BATCH):
        part = order[start : start + _BATCH]
        ids, mask = pad([[*texts[i].tolist(), EOS] for i in part])
        with torch.autocast(device.type, torch.bfloat16, enabled=half_precision(device, half)):
            vectors = teacher.embed(ids.to(device), mask.long().to(device)).float().cpu().numpy()
        if result is None:
            result = np.zeros((len(texts), vectors.shape[1]), np.float32)
        result[part] = vectors
    return np.zeros((0, 1), np.float32) if result is None else result


def telling_words(texts: Sequence[np.ndarray], labels: np.ndarray, count: int,
                  tokenizer: Tokenizer, taken: set[str]) -> list[list[str]]:  # fmt: skip
    """The NAMES words of each of `count` clusters that set it apart, none twice and none `taken`.

    A word is a whole piece of letters, no stop word and no opinion; its weight is its part of the
    divergence of the cluster's texts from all: p log(p / q), p and q the shares of texts that
    hold it.
    """
    pieces = {i: word for word, i in tokenizer.get_vocab().items()}
    size = max(pieces) + 1
    left_out = taken | ENGLISH_STOP_WORDS | opinion_words()
    holds = np.zeros((count, size), np.int64)
    for text, label in zip(texts, labels, strict=True):
        holds[label, np.unique(text)] += 1
    able = [i for i, word in pieces.items()
            if word.isalpha() and len(word) > 2 and holds[:, i].sum() >= _FEWEST
            and word not in left_out]  # fmt: skip
    if not able:
        return [[] for _ in range(count)]
    inside = holds[:, able] / np.maximum(np.bincount(labels, minlength=count)[:, None], 1)
    overall = holds[:, able].sum(0) / len(texts)
    weight = inside * np.log(np.maximum(inside, 1e-9) / overall)
    best = np.argsort(-weight, axis=1)
    names: list[list[str]] = [[] for _ in range(count)]
    used: set[int] = set()
    for _ in range(NAMES):  # every cluster its best before any its second
        for c in range(count):
            free = (int(i) for i in best[c] if i not in used and weight[c, i] > 0)
            if (chosen := next(free, None)) is not None:
                used.add(chosen)
                names[c].append(pieces[able[chosen]])
    return names


def save_names(names: list[list[str]], folder: Path) -> None:
    """Write the clusters' names beside the shards."""
    write_json(folder / _FILE, names)


class Topics:
    """Draws questions about topics.

    Args:
        pool: with column `topic`; names: ids of each cluster's names.
    """

    def __init__(self, pool: Pool, names: Sequence[Sequence[int]]) -> None:
        self.pool, self.names = pool, [tuple(ids) for ids in names]
        column = pool.columns["topic"]
        self.rows = []
        for c in range(len(names)):
            rows = np.flatnonzero(column == c)
            self.rows.append(rows[np.argsort(pool.lengths[rows], kind="stable")])
        self.lengths = [pool.lengths[rows] for rows in self.rows]
        able = np.array([len(rows) >= 4 for rows in self.rows], bool)
        self.able = np.flatnonzero(able)

    @staticmethod
    def load(pools: dict[str, Pool], folder: Path, tokenizer: Tokenizer) -> "Topics | None":
        """What `make_topics` wrote to the shards; None where there is too little of it."""
        if NAME not in pools or not (folder / _FILE).is_file():
            return None
        ids = tokenizer.get_vocab()
        names = [[ids[word] for word in group] for group in read_json(folder / _FILE)]
        found = Topics(pools[NAME], names)
        return found if len(found.able) >= 4 else None

    @property
    def words(self) -> set[int]:
        """Ids of all names."""
        return {i for ids in self.names for i in ids}

    def choices(self, rng: np.random.Generator) -> list[int]:
        """Two to six clusters, of anywhere or of neighbours: clusters of plain text have the
        numbers before those of reviews."""
        count = min(int(rng.integers(2, 7)), len(self.able) // 2)
        half = len(self.able) // 2
        among = (self.able, self.able[:half], self.able[half:])[rng.integers(3)]
        return rng.choice(among, count, replace=False).tolist()

    def text(self, cluster: int, band: int, rng: np.random.Generator) -> list[int]:
        """A text of the cluster, about `band` tokens long."""
        place = of_length(self.lengths[cluster], band, rng)
        return self.pool.text(int(self.rows[cluster][place])).tolist()

    def name(self, cluster: int, rng: np.random.Generator, text: Sequence[int] = ()) -> int:
        """One of a cluster's names, one that is not in `text` if there is one."""
        names = [i for i in self.names[cluster] if i not in text] or self.names[cluster]
        return names[rng.integers(len(names))]
