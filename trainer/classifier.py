"""The small classifier that gives open sentences their pseudo-labels (paper, section 4.1).

The paper fine-tunes a RoBERTa; here logistic regression on hashed words and pairs of words
annotates thousands of sentences a second on one core, or on sentence embeddings a hundred or two.
It learns from the labelled texts and from their single sentences, which carry their text's label:
trained on whole reviews only, it calls nearly every single sentence five stars, because short
reviews are.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve.errors import UserError
from trainer.corpus import split_sentences
from trainer.data import Examples
from trainer.embed import embed, encoder_source, load_encoder
from trainer.onnx_encoder import choose_encoder

logger = logging.getLogger(__name__)

KINDS = ("tfidf", "embedding", "bundle")
_FEATURES = 2**18  # hashed words and pairs: memory does not grow with the vocabulary
_STRENGTH = {"tfidf": 3.0, "embedding": 1.0}  # C; larger fits closer and is surer of itself
_ITERATIONS = 100  # of L-BFGS; accuracy no longer changes after about 50
_EMBEDDED_TEXTS = 20_000  # what --classifier embedding learns from at most: minutes on two cores


class Measured:
    """Anything with class probabilities, and so with an accuracy."""

    classes: int

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """[N, C], the class probabilities of N texts."""
        raise NotImplementedError

    def measure(self, test: Examples, threshold: float) -> dict[str, float]:
        """Accuracy on held-out texts: of all, within one class, and of those above `threshold`."""
        found = self.probabilities(test.texts)
        best = found.argmax(axis=1)
        right = best == test.labels
        sure = found.max(axis=1) >= threshold
        return {
            "rows": len(test),
            "accuracy": float(right.mean()),
            "within_one": float((np.abs(best - test.labels) <= 1).mean()),
            "confident_share": float(sure.mean()),
            "confident_accuracy": float(right[sure].mean()) if sure.any() else 0.0,
        }


class BundleLabeller(Measured):
    """A task of a bundle: a prompt on a T5, exported to ONNX, run by onnxruntime without torch.

    Args:
        folder: the bundle.
        task: one of its tasks; None where it has one only.

    Raises:
        UserError: no such bundle or task. Failure: a damaged bundle.
    """

    def __init__(self, folder: str, task: str | None = None):
        from serve.classifier import Classifier

        self._classifier: Any = Classifier(folder)
        tasks = sorted(self._classifier.tasks)
        if task is None and len(tasks) != 1:
            raise UserError(
                f"--bundle {folder} has the tasks {', '.join(tasks)}: pass --bundle-task"
            )
        self.task = task or tasks[0]
        if self.task not in tasks:
            raise UserError(f"--bundle-task {self.task}: {folder} has {', '.join(tasks)}")
        self.folder = str(Path(folder).absolute())
        self.names = tuple(self._classifier.tasks[self.task].labels)
        self.words = tuple(self._classifier.tasks[self.task].words)
        self.classes = len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the bundle itself: a session cannot travel, and need not.
        return {**vars(self), "_classifier": None}

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """[N, C], the class probabilities of N texts."""
        if self._classifier is None:
            from serve.classifier import Classifier

            # An actor has one core, and the process that sent it has checked the files.
            self._classifier = Classifier(self.folder, threads=1, spin=False, verify=False)
        results = self._classifier.classify(list(texts), task=self.task) if len(texts) else []
        table = [[result.probabilities[name] for name in self.names] for result in results]
        return np.array(table, np.float64).reshape(len(texts), self.classes)


@dataclass
class Labeller(Measured):
    """A trained classifier of C classes.

    Attributes:
        kind: "tfidf" or "embedding".
        model: from scikit-learn; has `predict_proba`.
        encoder: the sentence encoder of kind "embedding".
        classes: C.
    """

    kind: str
    model: Any
    encoder: Any
    classes: int

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """[N, C], the class probabilities of N texts."""
        if not len(texts):
            return np.zeros((0, self.classes))
        if self.encoder is None:
            return self.model.predict_proba(list(texts))
        vectors = self.encoder.encode(
            list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=False
        )
        return self.model.predict_proba(vectors)


def with_sentences(examples: Examples, words: tuple[int, int]) -> tuple[list[str], np.ndarray]:
    """The texts, then the sentences of those that have several, with their texts' labels."""
    texts = list(examples.texts)
    labels = examples.labels.tolist()
    for text, label in zip(examples.texts, examples.labels.tolist(), strict=True):
        parts = split_sentences(text)
        if len(parts) < 2:
            continue
        for part in parts:
            if words[0] <= part.count(" ") + 1 <= words[1]:
                texts.append(part)
                labels.append(label)
    return texts, np.array(labels, dtype=np.int64)


def train_labeller(
    examples: Examples,
    kind: str = "tfidf",
    *,
    encoder: str | None = None,
    engine: str = "torch",
    rows: int = 0,
    seed: int = 0,
    words: tuple[int, int] = (4, 60),
) -> Labeller:
    """Train the classifier.

    Args:
        examples: the labelled texts.
        kind: "tfidf" or "embedding".
        encoder: see `trainer.embed.encoder_source`; used by kind "embedding".
        engine: what runs it then: see `trainer.onnx_encoder.choose_encoder`; "auto" is "onnx".
        rows: labelled texts to learn from at most, drawn by `seed`; 0 for all.
        seed: of that draw.
        words: how many words a sentence may have.

    Raises:
        UserError: a class without a text, or a single class.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    if rows and len(examples) > rows:
        examples = examples.sample(rows, seed)
    for index in np.flatnonzero(examples.counts == 0):
        raise UserError(
            f"{examples.source} has no training row of class '{examples.names[index]}': the "
            "classifier cannot learn it; add some, or pass another --data or --task"
        )
    if len(examples.names) < 2:
        raise UserError(
            f"{examples.source} holds rows of class '{examples.names[0]}' only: a classifier needs "
            "at least two classes"
        )
    started = time.monotonic()
    texts, labels = with_sentences(examples, words)
    # Balanced: star ratings are skewed, and the prior of the reviews is not that of the corpus.
    regression = LogisticRegression(
        C=_STRENGTH[kind], max_iter=_ITERATIONS, class_weight="balanced"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # see _ITERATIONS
        if kind == "embedding":
            if len(texts) > _EMBEDDED_TEXTS:
                part = Examples(texts, labels, examples.names).sample(_EMBEDDED_TEXTS, seed)
                texts, labels = part.texts, part.labels
            chosen = choose_encoder(encoder_source(encoder), engine, otherwise="onnx")
            runs = load_encoder(chosen) if isinstance(chosen, str) else chosen
            model = regression.fit(embed(texts, encoder, load=lambda _: runs), labels)
            result = Labeller(kind, model, runs, len(examples.names))
        else:
            model = make_pipeline(
                HashingVectorizer(
                    n_features=_FEATURES, ngram_range=(1, 2), alternate_sign=False, norm=None
                ),
                TfidfTransformer(sublinear_tf=True),
                regression,
            ).fit(texts, labels)
            result = Labeller(kind, model, None, len(examples.names))
    logger.info(
        "classifier (%s) trained on %d texts and sentences of %s in %.0f s",
        kind, len(texts), examples.source, time.monotonic() - started,
    )  # fmt: skip
    return result
