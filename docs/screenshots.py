"""Pictures of the demo's tabs for the README: light, dark, and as wide as a telephone.

    python -m demo BUNDLE --port 7860 &
    python docs/screenshots.py http://127.0.0.1:7860/ docs/images         # those of the README
    python docs/screenshots.py http://127.0.0.1:7860/ pictures --all

Needs chromium, chromium-driver and selenium, as the browser tests do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from demo_page import browser

TEXT = "The acting was great but the story is dull and far too long."
FORMS = {"light": (1120, False), "dark": (1120, True), "narrow": (390, False)}
# What the README shows.
SHOWN = ("classify", "why-dark", "compare", "many-narrow", "teach", "bonnet")
MANY = ["Great film.", "Awful food.", "It was okay, I suppose.", "Never again.", "I love it!"]


def until(check: Callable[[], Any], seconds: float = 120) -> None:
    """Wait for `check`, whatever it raises meanwhile."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if check():
                return
        except (WebDriverException, IndexError):
            pass
        time.sleep(0.3)
    raise SystemExit("the page did not come to rest")


def picture(window: Any, path: Path, width: int) -> None:
    """Save the whole page."""
    height = window.execute_script("return document.body.scrollHeight")
    size = {"width": width, "height": min(int(height), 2400), "deviceScaleFactor": 1}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "mobile": width < 500})
    time.sleep(1)
    window.save_screenshot(str(path))


def visit(address: str, folder: Path, form: str, wanted: tuple[str, ...], profile: Path) -> None:
    """Picture the tabs that are wanted in one form; a wanted lesson is taught to its end."""
    width, dark = FORMS[form]
    window = browser(profile, width, 900, dark)

    def save(tab: str) -> None:
        name = tab if form == "light" else f"{tab}-{form}"
        if not wanted or name in wanted:
            picture(window, folder / f"demo-{name}.png", width)

    def found(css: str) -> Any:
        return window.find_elements("css selector", css)

    def click(css: str) -> None:
        window.execute_script("arguments[0].click()", found(css)[0])

    def tab(name: str) -> None:
        # By its link: on a telephone some tabs' buttons wait in a menu.
        window.get(f"{address}?text={quote(TEXT)}&tab={name}")
        until(lambda: found(f"#{name}-go, #{name}-tasks")[0].is_displayed())
        time.sleep(1)

    try:
        window.get(f"{address}?text={quote(TEXT)}")
        until(lambda: "%" in found("#classify-answer")[0].text)
        save("classify")
        tab("why")
        click("#why-go")
        until(lambda: found("#why-words .words span"))
        save("why")
        tab("compare")
        click("#compare-go")
        until(lambda: found("#compare-table td"))
        save("compare")
        tab("many")
        found("#many-text textarea")[0].send_keys("\n".join(MANY))
        click("#many-go")
        until(lambda: "rows" in found("#many-where")[0].text)
        save("many")
        tab("teach")
        click("#teach-fill")
        until(lambda: found("#teach-examples-0 textarea")[0].get_property("value"))
        if form == "light":
            click("#teach-go")
            until(lambda: "served now" in found("#teach-status")[0].text, 900)
        save("teach")
        tab("bonnet")
        time.sleep(2)
        save("bonnet")
    finally:
        window.quit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pictures of the demo's tabs.")
    parser.add_argument("address", help="of the page")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--all", action="store_true", help="every tab in every form")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for form in FORMS:
        with tempfile.TemporaryDirectory() as profile:
            visit(given.address, given.folder, form, () if given.all else SHOWN, Path(profile))
