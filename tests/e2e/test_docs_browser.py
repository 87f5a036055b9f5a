"""The server's page of its routes in a real browser: it lists them, and asks one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import serve_toy as toy
from serve_process import TOKEN, Process, running

pytest.importorskip("selenium", reason="no browser: pip install selenium, and chromium with it")

from demo_page import browser
from demo_screen import Screen

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with running(toy.make_bundle(tmp_path_factory.mktemp("docs") / "b")) as process:
        yield process


@pytest.fixture(scope="module")
def screen(server: Process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Screen]:
    window = browser(tmp_path_factory.mktemp("profile"))
    window.get(f"http://127.0.0.1:{server.port}/docs")
    found = Screen(window)
    found.until(lambda: found.all("section details"), "the routes")
    yield found
    window.quit()


def route(screen: Screen, method: str, path: str) -> Any:
    for part in screen.all("section > details"):
        head = part.find_element("css selector", "summary")
        if head.text.split()[:2] == [method, path]:
            screen.window.execute_script("arguments[0].open = true", part)
            return part
    raise AssertionError(f"no {method} {path}: {screen.body()}")


def answer(screen: Screen, part: Any, wanted: str) -> str:
    screen.window.execute_script(
        "arguments[0].click()", part.find_element("css selector", "button")
    )
    shown = part.find_element("css selector", "pre")
    screen.until(lambda: shown.text.startswith(wanted), wanted)
    return shown.text


def test_a_text_is_classified_by_its_example(screen: Screen) -> None:
    shown = answer(screen, route(screen, "POST", "/classify"), "200 OK")
    assert '"task": "film"' in shown and '"probabilities"' in shown


def test_the_task_of_a_path_is_one_that_is_served(screen: Screen) -> None:
    shown = answer(screen, route(screen, "POST", "/v2/models/{task}/infer"), "200 OK")
    assert '"model_name": "film"' in shown
    assert '"ready": true' in answer(screen, route(screen, "GET", "/v2/health/ready"), "200 OK")


def test_administration_asks_for_the_token(screen: Screen) -> None:
    part = route(screen, "POST", "/v2/repository/index")
    assert "admin token" in answer(screen, part, "401")
    part.find_element("css selector", "input[type=password]").send_keys(TOKEN)
    assert '"name": "food"' in answer(screen, part, "200 OK")


def test_nothing_was_asked_of_anybody_else(screen: Screen, server: Process) -> None:
    asked = screen.window.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert asked and all(url.startswith(f"http://127.0.0.1:{server.port}/") for url in asked)
