"""The demo in a real browser, at work: files, cancelled lessons, the keyboard, a proxy's path."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("gradio")
pytest.importorskip("selenium", reason="no browser: pip install selenium, and chromium with it")

from demo_page import browser, export_tiny, proxy, served_page
from demo_screen import Screen

pytestmark = pytest.mark.browser

TEXT = "the film was good but the story was terrible"
ROWS = 10_000
WORDS = "film food service story acting plot room".split()
RECORD = """
const seen = window.seen = [];
const look = () => { const t = document.querySelector("#many-status")?.innerText;
  if (t && t !== seen.at(-1)) seen.push(t); };
new MutationObserver(look).observe(document.body, {subtree: true, childList: true,
  characterData: true});
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path) -> Iterator[tuple[str, Any]]:
    bundle = export_tiny(tmp_path_factory.mktemp("demo") / "bundle", tiny_t5)
    with served_page(bundle, {"root_path": "/demo"}, backbone=str(tiny_t5)) as found:
        yield found


@pytest.fixture(scope="module")
def seen_paths(page: tuple[str, Any]) -> Iterator[tuple[str, list[str]]]:
    with proxy(page[0], "/demo") as found:
        yield found


@pytest.fixture(scope="module")
def screen(
    seen_paths: tuple[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Screen]:
    window = browser(tmp_path_factory.mktemp("profile"))
    window.get(f"{seen_paths[0]}?text={quote(TEXT)}")
    found = Screen(window)
    found.until(lambda: "%" in found.text("#classify-answer"), "the first answer")
    yield found
    window.quit()


def write(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_everything_is_asked_for_below_the_proxys_path(
    seen_paths: tuple[str, list[str]], screen: Screen
) -> None:
    asked = {path for path in seen_paths[1] if path != "/favicon.ico"}
    assert len(asked) > 10 and all(path.startswith("/demo/") for path in asked)
    screen.click("#classify-share")
    link = screen.until(
        lambda: screen.all("#classify-link textarea, #classify-link input")[0].get_property(
            "value"
        ),
        "the link",
    )
    assert link.startswith(seen_paths[0] + "?")


def test_the_keyboard_reaches_what_the_mouse_does(screen: Screen) -> None:
    from selenium.webdriver.common.keys import Keys

    screen.window.execute_script("document.querySelector('#classify-text textarea').focus()")
    stops = []
    for _ in range(12):
        screen.press(Keys.TAB)
        stops.append(screen.focused())
    wanted = ["classify-task INPUT", "classify-examples BUTTON", "classify-go BUTTON",
              "classify-share BUTTON"]  # fmt: skip
    positions = [stops.index(stop) for stop in wanted]
    assert positions == sorted(positions)
    screen.window.execute_script("document.querySelector('#classify-examples button').focus()")
    example = screen.text("#classify-examples button").removesuffix("...")  # shown shortened
    screen.press(Keys.SPACE)
    screen.until(
        lambda: screen.all("#classify-text textarea")[0].get_property("value").startswith(example),
        "the example in the field",
    )


def test_ten_thousand_rows_show_their_progress_and_a_page_of_themselves(
    page: tuple[str, Any], screen: Screen, tmp_path: Path
) -> None:
    rows = [[str(i), f"the {WORDS[i % 7]} was {'good' if i % 3 else 'bad'}"] for i in range(ROWS)]
    screen.tab("Many texts")
    screen.window.execute_script(RECORD)
    screen.upload(
        "#many-file input[type=file]", write(tmp_path / "many.csv", ["id", "review"], rows)
    )
    screen.until(
        lambda: screen.all("#many-column input")[0].get_property("value") == "review",
        "the column that was guessed",
    )
    screen.click("#many-go")
    screen.until(lambda: f"{ROWS:,} of {ROWS:,} rows" in screen.text("#many-where"), "all", 400)
    told = screen.window.execute_script("return window.seen")
    assert any("of 10,000 texts" in line and "s left" in line for line in told)
    assert any(line.startswith("10,000 texts in") for line in told)
    # The browser never holds the whole table.
    assert 0 < len(screen.all("#many-table tbody tr")) <= 120
    screen.click("#many-next")
    screen.until(lambda: "page 2 of 200" in screen.text("#many-where"), "page 2")
    screen.until(lambda: "51" in screen.text("#many-table").split(), "row 51")


def test_a_wrong_file_gets_a_sentence_beside_it(screen: Screen, tmp_path: Path) -> None:
    screen.tab("Many texts")
    screen.click("#many-file button[aria-label='Remove this file'], "
                 "#many-file button[aria-label='Clear']")  # fmt: skip
    screen.upload(
        "#many-file input[type=file]", write(tmp_path / "odd.csv", ["a", "b"], [["1", "2"], ["3"]])
    )
    screen.until(
        lambda: "Row 3 of “odd.csv” has 1 cells" in screen.text("#many-problem"), "the sentence"
    )
    assert not screen.all(".toast-wrap .toast-body")


def fill_lesson(screen: Screen, path: Path, name: str) -> None:
    rows = [
        [f"{word} was {kind}", label]
        for word in WORDS
        for kind, label in (("great", "yes"), ("awful", "no"))
    ]
    screen.tab("Teach")
    screen.upload("input[data-testid^='Upload CSV']", write(path, ["text", "label"], rows))
    screen.until(
        lambda: (
            screen.all("#teach-labels textarea, #teach-labels input")[0].get_property("value")
            == "yes, no"
        ),
        "the labels of the file",
    )
    first = screen.all("#teach-examples-0 textarea")[0].get_property("value")
    assert first.splitlines() == [f"{word} was great" for word in WORDS]
    screen.type("#teach-name textarea, #teach-name input", name)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that leave a visitor the time to press a button."""
    from trainer import tune

    real = tune.prompt_gradient

    def late(*args: Any) -> Any:
        time.sleep(0.5)
        return real(*args)

    monkeypatch.setattr(tune, "prompt_gradient", late)


def test_a_lesson_is_cancelled_and_nothing_is_kept(
    page: tuple[str, Any], screen: Screen, tmp_path: Path, slow: None
) -> None:
    before = set(page[1].classifier.tasks)
    fill_lesson(screen, tmp_path / "lesson.csv", "dropped")
    screen.click("#teach-go")
    screen.until(lambda: "MetaPT start, step" in screen.text("#teach-status"), "the first steps")
    screen.click("#teach-cancel")
    screen.until(lambda: "Nothing was kept" in screen.text("#teach-status"), "the cancellation")
    assert set(page[1].classifier.tasks) == before
    screen.until(lambda: screen.all("#teach-go")[0].is_enabled(), "Teach to be open again")


def test_a_cancelled_comparison_leaves_the_task_that_was_learnt(
    screen: Screen, tmp_path: Path, slow: None
) -> None:
    fill_lesson(screen, tmp_path / "lesson.csv", "kept")
    screen.click("#teach-go")
    screen.until(lambda: "common words, step" in screen.text("#teach-status"), "the second run")
    screen.click("#teach-cancel")
    screen.until(lambda: "the task is served" in screen.text("#teach-status"), "the cancellation")
    screen.tab("Classify")
    screen.until(lambda: screen.choices("#classify-task") == ["film", "kept"], "the new task")
