"""Pictures of the demo's tabs for the README: light, dark, and as wide as a telephone.

    python -m demo BUNDLE --port 7860 &
    python docs/screenshots.py http://127.0.0.1:7860/ docs/images

Needs chromium, chromium-driver and selenium, as the browser tests do.
"""

from __future__ import annotations

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


def visit(address: str, folder: Path, form: str, teach: bool) -> None:
    """Picture every tab in one form."""
    width, dark = FORMS[form]
    window = browser(Path(tempfile.mkdtemp()), width, 900, dark)

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
        picture(window, folder / f"classify-{form}.png", width)
        tab("why")
        click("#why-go")
        until(lambda: found("#why-words .words span"))
        picture(window, folder / f"why-{form}.png", width)
        tab("compare")
        click("#compare-go")
        until(lambda: found("#compare-table td"))
        picture(window, folder / f"compare-{form}.png", width)
        tab("many")
        found("#many-text textarea")[0].send_keys("\n".join(MANY))
        click("#many-go")
        until(lambda: "rows" in found("#many-where")[0].text)
        picture(window, folder / f"many-{form}.png", width)
        tab("teach")
        click("#teach-fill")
        until(lambda: found("#teach-examples-0 textarea")[0].get_property("value"))
        if teach:
            click("#teach-go")
            until(lambda: "served now" in found("#teach-status")[0].text, 900)
        picture(window, folder / f"teach-{form}.png", width)
        tab("bonnet")
        time.sleep(2)
        picture(window, folder / f"bonnet-{form}.png", width)
    finally:
        window.quit()


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[3:] or FORMS:
        visit(sys.argv[1], target, name, teach=name == "light")
