"""The VADER sentences: the archive, the classes, the cache, and what goes wrong with pip."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from serve.errors import Failure, UserError
from trainer import vader
from trainer.data import load_task
from trainer.tasks import VADER_DOMAINS

# One rating on each side of every cut, and on the cuts themselves.
MEANS = [-3.0, -1.8, -1.79, -0.8, -0.79, -0.6, -0.59, 0.0, 0.59, 0.6, 0.79, 0.8, 1.79, 1.8, 3.0]
FIVE = [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]
TWO = {-3.0: 0, -1.8: 0, -1.79: 0, -0.8: 0, 0.8: 1, 1.79: 1, 1.8: 1, 3.0: 1}


def pack(files: dict[str, bytes | str]) -> bytes:
    """A tar.gz; a str value is the target of a symbolic link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def ratings(domain: str) -> bytes:
    lines = [f"{i}\t{mean}\t{domain} rated {mean}" for i, mean in enumerate(MEANS)]
    return ("\r\n".join(lines) + "\r\n").encode()


def sdist(**changes: bytes | str) -> bytes:
    """A source distribution in the shape of the real one, some domains' files replaced."""
    files = {name: changes.get(domain, ratings(domain)) for domain, name in vader._MEMBERS.items()}
    return pack({vader._ARCHIVE: pack(files), "vaderSentiment-3.3.2/setup.py": b"raise SystemExit"})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fetches(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def fetch() -> bytes:
        calls.append(1)
        return sdist()

    monkeypatch.setattr(vader, "fetch", fetch)
    return calls


@pytest.mark.parametrize("domain", VADER_DOMAINS)
def test_five_classes_cut_where_they_are_said_to(domain: str, fetches: list[int]) -> None:
    found = vader.load(domain, 5)
    assert found.texts == [f"{domain} rated {mean}" for mean in MEANS]
    assert found.labels.tolist() == FIVE


def test_two_classes_leave_the_neutral_band_out(fetches: list[int]) -> None:
    found = vader.load("tweet", 2)
    assert dict(zip(found.texts, found.labels.tolist(), strict=True)) == {
        f"tweet rated {mean}": label for mean, label in TWO.items()
    }


def test_the_archive_is_fetched_once(fetches: list[int], cache: Path) -> None:
    for domain in VADER_DOMAINS:
        vader.load(domain, 2)
    assert len(fetches) == 1
    assert [path.name for path in cache.iterdir()] == [vader.CACHE_NAME]


def test_a_task_reads_its_domain_and_is_cut_for_testing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "\n".join(f"{i}\t{i % 5 - 2}\tsentence {i // 2}{'!' * (i % 2)}" for i in range(400))
    monkeypatch.setattr(vader, "fetch", lambda: sdist(film=rows.encode()))
    train, test = (set(load_task("vader-film-5", part).texts) for part in ("train", "test"))
    assert train | test == set(load_task("vader-film-5").texts)
    assert len(train) + len(test) == 400
    # "sentence 7" and "sentence 7!" are on one side.
    assert not {text.rstrip("!") for text in train} & {text.rstrip("!") for text in test}


def test_texts_are_cleaned_and_repeats_kept_once() -> None:
    lines = "1\t2.0\tfish &amp; chips   now\r\n2\t-1.0\tfish & chips now\r\n\r\n3\t0.5\tYes\r\n"
    found = vader.parse(sdist(product=lines.encode()))["product"]
    assert found.texts == ["fish & chips now", "Yes"]
    np.testing.assert_array_equal(found.means, [2.0, 0.5])


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (b"not a tar archive", "archive is damaged"),
        (sdist()[:200], "archive is damaged"),
        (pack({"vaderSentiment-3.3.2/setup.py": b""}), "hutto_ICWSM_2014.tar.gz"),
        (sdist(film="/etc/passwd"), "movieReviewSnippets_GroundTruth.txt is not the file"),
        (sdist(tweet=b"1\tmany\ttext\r\n"), "VADER tweet ratings are damaged"),
        (sdist(tweet=b"1\t0.5\r\n"), "VADER tweet ratings are damaged"),
        (sdist(tweet=b"1\t0.5\tcaf\xe9\r\n"), "VADER tweet ratings are damaged"),
    ],
)
def test_another_archive_is_refused(archive: bytes, message: str) -> None:
    with pytest.raises(Failure, match=message):
        vader.parse(archive)


def test_a_damaged_cache_says_what_to_do(fetches: list[int], cache: Path) -> None:
    vader.load("film", 2)
    path = cache / vader.CACHE_NAME
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(Failure, match=r"vader-3\.3\.2\.parquet is damaged .* remove it"):
        vader.load("film", 2)


def test_what_is_not_there_is_named(cache: Path) -> None:
    with pytest.raises(UserError, match="no VADER domain 'book': there are film"):
        vader.load("book", 2)


def test_without_an_index_pip_fails_in_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The real pip, kept from the network.
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        Failure, match=r"pip could not fetch vaderSentiment .*METAPT_CACHE"
    ) as error:
        vader.load("film", 2)
    assert "\n" not in str(error.value)
    assert not cache.exists()


def test_a_file_with_another_hash_is_refused_before_it_is_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vaderSentiment-3.3.2.tar.gz").write_bytes(sdist())
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(Failure, match=r"is not the published file .*hash"):
        vader.load("film", 2)
