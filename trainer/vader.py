"""Sentences rated by 20 people each, for the quick start: Hutto and Gilbert, ICWSM 2014.

The source distribution of the package vaderSentiment (MIT) carries them in a tar archive within
the tar archive. pip fetches it, with whatever index, proxy or local folder pip is set up with, and
checks the pinned hash. Nothing of the package is installed or run by us, and neither archive is
unpacked to disk: the four members that are needed are read by name.

Film sentences are those of the Stanford Sentiment Treebank: use either, not both.
"""

from __future__ import annotations

import html
import importlib.util
import io
import logging
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serve.errors import Failure, UserError
from serve.files import atomic_write
from trainer.cache import cache_folder
from trainer.data import Examples
from trainer.tasks import FIVE_LABELS, TWO_LABELS, VADER_DOMAINS

logger = logging.getLogger(__name__)

VERSION = "3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
CACHE_NAME = f"vader-{VERSION}.parquet"

# Mean ratings run from -4 to 4. Two classes leave out the band in which people disagree or see
# nothing; five classes cut at values that give every class of every domain enough to draw from
# (equal fifths of the scale, +-0.8 and +-2.4, would leave the outer ones nearly empty).
NEUTRAL_BAND = 0.8  # two classes: at or below -0.8 negative, at or above 0.8 positive
FIVE_CUTS = (-1.8, -0.6, 0.6, 1.8)  # five classes: below -1.8, from -1.8, -0.6, 0.6, 1.8

_ARCHIVE = f"vaderSentiment-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
_MEMBERS = {
    "film": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "product": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "tweet": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
    "editorial": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
}
_LARGEST = 64 << 20  # bytes; the real members are below 5 MiB
_PATIENCE = 600  # seconds for pip, which has its own retries


@dataclass(frozen=True)
class Rated:
    """N sentences of one domain and the mean rating of each, [N] in -4..4."""

    texts: list[str]
    means: np.ndarray


def load(domain: str, classes: int) -> Examples:
    """The sentences of a domain in two or five classes; fetched on first use.

    Args:
        domain: "film", "product", "tweet" or "editorial".
        classes: 2 (negative, positive; the band within 0.8 of zero is left out) or 5.

    Raises:
        UserError: another domain or number of classes.
        Failure: the data can be had neither from the cache nor through pip.
    """
    if domain not in VADER_DOMAINS:
        raise UserError(f"no VADER domain '{domain}': there are {', '.join(VADER_DOMAINS)}")
    rated = sentences()[domain]
    source = f"VADER {domain} sentences"
    if classes == 2:
        kept = np.flatnonzero(np.abs(rated.means) >= NEUTRAL_BAND)
        labels = (rated.means[kept] > 0).astype(np.int64)
        return Examples([rated.texts[i] for i in kept], labels, TWO_LABELS, source)
    if classes == 5:
        labels = np.digitize(rated.means, FIVE_CUTS).astype(np.int64)
        return Examples(list(rated.texts), labels, FIVE_LABELS, source)
    raise UserError(f"VADER sentences come in 2 or 5 classes, not {classes}")


def sentences() -> dict[str, Rated]:
    """All rated sentences by domain, from the cache or, on first use, through pip."""
    path = cache_folder() / CACHE_NAME
    if not path.is_file():
        logger.info("fetching vaderSentiment %s (2.5 MB) through pip, once", VERSION)
        _store(parse(fetch()), path)
    return _read(path)


def fetch() -> bytes:
    """The source distribution, as pip downloads and checks it.

    Raises:
        UserError: this Python has no pip.
        Failure: pip could not get the file, or got another one.
    """
    if importlib.util.find_spec("pip") is None:
        raise UserError("this Python has no pip to fetch data with: run python -m ensurepip")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pins = folder / "requirements.txt"
        pins.write_text(f"vaderSentiment=={VERSION} --hash=sha256:{SHA256}\n", "utf-8")
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--retries", "1",
            "--disable-pip-version-check", "--no-deps", "--no-binary", "vaderSentiment",
            "--require-hashes", "--requirement", str(pins), "--dest", str(folder),
        ]  # fmt: skip
        # pip asks a source distribution for its metadata, for which it fetches setuptools; the one
        # that is installed does as well and saves that download.
        quick = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
        code, output = _run([*command, *quick])
        if code and quick and "metadata" in output:
            code, output = _run(command)
        found = sorted(folder.glob("*.tar.gz"))
        if code or not found:
            raise Failure(_explain(output))
        return found[0].read_bytes()


def _run(command: list[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {_PATIENCE} seconds"
    return done.returncode, done.stdout + done.stderr


def _explain(output: str) -> str:
    """One line for what pip said."""
    if "DO NOT MATCH THE HASHES" in output:
        return (
            f"the vaderSentiment {VERSION} that pip got is not the published file (its hash "
            "differs): check pip's index settings"
        )
    errors = [line[7:].strip() for line in output.splitlines() if line.startswith("ERROR: ")]
    reason = errors[0].rstrip(".") if errors else (output.strip().splitlines() or ["no reason"])[-1]
    return (
        f"pip could not fetch vaderSentiment {VERSION} ({reason[:200]}): check the network and "
        "pip's index settings (pip config list), or set METAPT_CACHE to a folder with a "
        f"{CACHE_NAME} made elsewhere, or pass --data FILE"
    )


def parse(archive: bytes) -> dict[str, Rated]:
    """The rated sentences of a source distribution.

    A sentence that occurs twice in a domain is kept once, with its first rating. Some tweets are
    variants of each other that differ in marks only ("Yay." and "Yay!"); they stay, and
    `trainer.data.choose_split` puts all of them on one side.

    Raises:
        Failure: the archive does not hold what version 3.3.2 holds.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as outer:
            inner_bytes = _member(outer, _ARCHIVE)
        with tarfile.open(fileobj=io.BytesIO(inner_bytes), mode="r:gz") as inner:
            files = {domain: _member(inner, name) for domain, name in _MEMBERS.items()}
    except (tarfile.TarError, OSError, EOFError, KeyError) as error:
        raise Failure(f"the vaderSentiment archive is damaged ({error}): fetch it again") from None
    return {domain: _parse_ratings(content, domain) for domain, content in files.items()}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.getmember(name)
    if not member.isreg() or member.size > _LARGEST:  # a link could point outside the archive
        raise tarfile.ReadError(f"{name} is not the file it should be")
    stream = archive.extractfile(member)
    assert stream is not None  # a regular file always has content
    return stream.read()


def _parse_ratings(content: bytes, domain: str) -> Rated:
    texts: list[str] = []
    means: list[float] = []
    seen: set[str] = set()
    try:
        lines = content.decode("utf-8").split("\n")
        for line in lines:
            if not line.strip():
                continue
            _, mean, text = line.rstrip("\r").split("\t")
            text = " ".join(html.unescape(text).split())
            if text in seen:
                continue
            seen.add(text)
            texts.append(text)
            means.append(float(mean))
    except ValueError as error:
        raise Failure(f"the VADER {domain} ratings are damaged ({error}): fetch again") from None
    return Rated(texts, np.array(means))


def _store(rated: dict[str, Rated], path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    columns: dict[str, list[str] | list[float]] = {
        "domain": [domain for domain, part in rated.items() for _ in part.texts],
        "mean": [float(mean) for part in rated.values() for mean in part.means],
        "text": [text for part in rated.values() for text in part.texts],
    }
    with atomic_write(path) as temporary:
        parquet.write_table(arrow.table(columns), temporary, compression="zstd")


def _read(path: Path) -> dict[str, Rated]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path, columns=["domain", "mean", "text"])
    except (arrow.ArrowInvalid, OSError) as error:
        first = str(error).splitlines()[0]
        raise Failure(f"{path} is damaged ({first}): remove it to fetch it again") from None
    if set(table.column_names) != {"domain", "mean", "text"}:
        raise Failure(f"{path} lacks a column of domain, mean, text: remove it to fetch it again")
    domains = np.array(table["domain"].to_pylist())
    means = table["mean"].to_numpy()
    texts = table["text"].to_pylist()
    result = {}
    for domain in VADER_DOMAINS:
        rows = np.flatnonzero(domains == domain)
        if not len(rows):
            raise Failure(f"{path} has no {domain} sentences: remove it to fetch it again")
        result[domain] = Rated([texts[i] for i in rows], means[rows])
    return result
