"""The demo in a real browser: every tab is used, a task is taught and then answers."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

pytest.importorskip("gradio")
pytest.importorskip("selenium", reason="no browser: pip install selenium, and chromium with it")

from demo_page import browser, export_tiny, served_page
from demo_screen import Screen

from demo.tabs.many import write_csv

pytestmark = pytest.mark.browser

TEXT = "the film was good but the story was terrible"
LESSON = {
    "good": ["the film was great", "great food", "great acting", "the plot was great", "great room",
             "the service is great"],
    "bad": ["the film was awful", "awful food", "awful acting", "the plot was awful", "awful room",
            "the service is awful"],
}  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path) -> Iterator[tuple[str, Any]]:
    bundle = export_tiny(tmp_path_factory.mktemp("demo") / "bundle", tiny_t5)
    points = {"texts": ["a film", "<b>food</b>"], "clusters": [0, 1], "labels": ["0", "1"],
              "x": [0.0, 1.0], "y": [1.0, 0.0]}  # fmt: skip
    curve = [{"step": i, "validation_accuracy": 0.5 + i / 10, "loss": 1.0 - i / 10} for i in (0, 1)]
    words = [{"position": 0, "words": [["great", 0.9], ["good", 0.5]]}]
    document = {"format": 1, "map": points, "curves": {"metapt": curve}, "words": {"film": words}}
    (bundle / "bonnet.json").write_text(json.dumps(document))
    with served_page(bundle, backbone=str(tiny_t5)) as found:
        yield found


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    found = browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def screen(page: tuple[str, Any], window: Any) -> Screen:
    window.get(f"{page[0]}?text={quote(TEXT)}")
    found = Screen(window)
    found.until(lambda: "%" in found.text("#classify-answer"), "the first answer")
    return found


def test_a_link_fills_the_page_and_the_answer_is_serves(
    page: tuple[str, Any], screen: Screen
) -> None:
    assert screen.all("#classify-text textarea")[0].get_property("value") == TEXT
    expected = page[1].classifier.classify([TEXT], "film")[0]
    assert screen.text("#classify-answer h2") == expected.label
    assert f"{expected.score:.0%}" in screen.text("#classify-answer")
    facts = screen.text("#classify-facts")
    assert "measured on the server" in facts and "all that a switch changes" in facts
    screen.click("#classify-share")
    link = screen.until(
        lambda: screen.all("#classify-link textarea, #classify-link input")[0].get_property(
            "value"
        ),
        "the link",
    )
    assert quote("story was terrible").replace("%20", "+") in link and "task=film" in link


def test_only_the_tasks_are_in_the_switch(screen: Screen) -> None:
    assert screen.choices("#classify-task") == ["film"]


def test_why_colours_every_word(screen: Screen) -> None:
    screen.tab("Why")
    screen.click("#why-go")
    words = screen.until(lambda: screen.all("#why-words .words span"), "coloured words")
    assert [word.text for word in words] == TEXT.split()
    assert all("without it" in word.get_attribute("title") for word in words)
    screen.until(lambda: "terrible" in screen.text("#why-table"), "the table of words")


def test_compare_shows_every_prompt(screen: Screen) -> None:
    screen.tab("Compare")
    screen.click("#compare-go")
    screen.until(lambda: screen.all("#compare-table td"), "the comparison")
    shown = screen.text("#compare-table")
    for title in ("Tuned prompt", "MetaPT start", "Tuned from random", "Random prompt"):
        assert title in shown
    assert "4 prompts, one batch" in screen.text("#compare-time")


def test_an_empty_field_gets_a_sentence_beside_it(screen: Screen) -> None:
    screen.tab("Many texts")
    screen.click("#many-go")
    screen.until(lambda: "Paste one text a line" in screen.text("#many-problem"), "the sentence")


def test_many_texts_are_classified_sorted_and_filtered(
    page: tuple[str, Any], screen: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def write(*arguments: Any) -> str:
        written.append(Path(write_csv(*arguments)))
        return str(written[0])

    monkeypatch.setattr("demo.tabs.many.write_csv", write)
    texts = ["good film", "awful food", "the room was okay"]
    screen.tab("Many texts")
    screen.type("#many-text textarea", "\n".join(texts))
    screen.click("#many-go")
    screen.until(lambda: "3 of 3 rows" in screen.text("#many-where"), "the table")
    screen.until(lambda: all(text in screen.text("#many-table") for text in texts), "the rows")
    lines = screen.text("#many-table").splitlines()
    rows = {text: lines[lines.index(text) + 1] for text in texts}
    expected = page[1].classifier.classify(texts, "film")
    assert rows == {text: result.label for text, result in zip(texts, expected, strict=True)}
    assert not screen.all("#many-problem")[0:1] or not screen.text("#many-problem")
    screen.type("#many-contains textarea, #many-contains input", "food")
    screen.until(lambda: "1 of 3 rows" in screen.text("#many-where"), "the filter")
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    screen.window.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    screen.click("#many-download")
    # From Gradio's copy: what was written is gone by now.
    files = screen.until(lambda: list(tmp_path.glob("*.csv")), "the download")
    with files[0].open(encoding="utf-8", newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == texts
    assert len(written) == 1 and not written[0].parent.exists()


def test_teaching_serves_a_task_that_answers_right(
    page: tuple[str, Any], screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random tiny T5 needs larger steps than a trained one to be steered at all.
    monkeypatch.setattr("demo.teach.RATE", 0.3)
    screen.tab("Teach")
    screen.type("#teach-name textarea, #teach-name input", "my task")
    screen.click("#teach-go")
    screen.until(lambda: "Name 2 to 10 labels" in screen.text("#teach-problem"), "the sentence")
    screen.type("#teach-labels textarea, #teach-labels input", ", ".join(LESSON))
    for number, texts in enumerate(LESSON.values()):
        screen.type(f"#teach-examples-{number} textarea", "\n".join(texts))
    screen.click("#teach-go")
    screen.until(lambda: "is served now" in screen.text("#teach-status"), "the lesson", 400)
    status = screen.text("#teach-status")
    for start in ("MetaPT start:", "common words:", "random start:"):
        assert start in status
    assert screen.all("#teach-accuracy canvas, #teach-accuracy svg")
    assert screen.all("#teach-download")[0].is_displayed()

    screen.tab("Classify")
    screen.until(lambda: screen.choices("#classify-task") == ["film", "my task"], "the new task")
    right = 0
    for label, texts in LESSON.items():
        screen.type("#classify-text textarea", texts[0])
        screen.choose("#classify-task", "my task")
        screen.click("#classify-go")
        screen.until(
            lambda: set(screen.text("#classify-answer").split()) >= set(LESSON), "its labels"
        )
        room = page[1]
        key = next(key for key in room.classifier.tasks if key.startswith("visitor."))
        expected = room.classifier.classify([texts[0]], key)[0]
        screen.until(
            lambda answer=expected.label: screen.text("#classify-answer h2") == answer, "the answer"
        )
        right += expected.label == label
    assert right == 2
    screen.tab("Many texts")
    assert screen.choices("#many-task") == ["film", "my task"]


def test_under_the_bonnet_shows_map_curves_and_words(screen: Screen) -> None:
    screen.tab("Under the bonnet")
    screen.until(lambda: screen.all("#bonnet-map canvas, #bonnet-map svg"), "the map")
    screen.until(lambda: screen.all("#bonnet-curves canvas, #bonnet-curves svg"), "the curves")
    screen.until(lambda: "great (0.90), good (0.50)" in screen.text("#bonnet-words"), "the words")


def test_a_telephone_needs_no_sideways_scrolling(screen: Screen) -> None:
    window = screen.window
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    time.sleep(0.5)
    wide = window.execute_script("return document.documentElement.scrollWidth")
    assert wide <= 390


def test_no_address_but_the_servers_was_called(page: tuple[str, Any], screen: Screen) -> None:
    own = urlsplit(page[0]).netloc
    called = set()
    for entry in screen.window.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = urlsplit(message["params"]["request"]["url"])
            if url.scheme in ("http", "https", "ws", "wss"):
                called.add(url.netloc)
    assert called == {own}
    severe = [e for e in screen.window.get_log("browser") if e["level"] == "SEVERE"]
    assert not severe, severe
