"""What a visitor of the demo does in a browser, in a few words."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Screen:
    """What a visitor does, in a few words."""

    def __init__(self, window: Any) -> None:
        self.window = window

    def until(self, check: Callable[[], Any], what: str, seconds: float = 120) -> Any:
        """Wait for `check`; elements may be replaced while they are looked at."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if found := check():
                    return found
            except (WebDriverException, IndexError):
                pass
            time.sleep(0.1)
        raise AssertionError(
            f"waited {seconds} s for {what}; the page shows:\n{self.body()[:2000]}"
        )

    def all(self, css: str) -> list[Any]:
        return self.window.find_elements("css selector", css)

    def body(self) -> str:
        return self.window.execute_script("return document.body.innerText")

    def text(self, css: str) -> str:
        return self.all(css)[0].text

    def click(self, css: str) -> None:
        button = self.until(lambda: self.all(css)[0], css)
        self.until(button.is_enabled, f"{css} to be enabled")
        self.window.execute_script("arguments[0].click()", button)

    def tab(self, name: str) -> None:
        def press() -> bool:
            for button in self.all("button[role=tab]"):
                if button.get_attribute("textContent").strip() == name:
                    self.window.execute_script("arguments[0].click()", button)
                    return button.get_attribute("aria-selected") == "true"
            return False

        self.until(press, f"tab {name}")

    def type(self, css: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        field = self.until(lambda: self.all(css)[0], css)
        self.until(field.is_displayed, css)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    def choices(self, css: str) -> list[str]:
        return [item.text.strip() for item in self.all(f"{css} label") if item.text.strip()]

    def choose(self, css: str, name: str) -> None:
        def pick() -> bool:
            for item in self.all(f"{css} label"):
                if item.text.strip() == name:
                    item.find_element("css selector", "input").click()
                    return True
            return False

        self.until(pick, f"{name} in {css}")

    def upload(self, css: str, path: Path) -> None:
        """Choose a file, as the browser's own dialogue would."""
        self.until(lambda: self.all(css)[0], css).send_keys(str(path))

    def focused(self) -> str:
        """Of what the keyboard is on: its own and its nearest named ancestor's id, and its tag."""
        return self.window.execute_script(
            "const e = document.activeElement;"
            "return (e.closest('[id^=classify-],[id^=tabs]')?.id || '') + ' ' + e.tagName"
        )

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.window).send_keys(*keys).perform()
