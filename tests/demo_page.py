"""The demo's page for tests, on a bundle exported from a tiny T5, and a browser to look at it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NO_BROWSER = "no browser: apt-get install chromium chromium-driver && pip install selenium"


def export_tiny(folder: Path, backbone_folder: Path, tokens: int = 6) -> Path:
    """A bundle of three prompts on a tiny T5: `film`, `film-from-random` and the start `metapt`."""
    from exporter.export import export_bundle
    from trainer.backbone import load_backbone
    from trainer.initial import initial_params
    from trainer.prompt import Prompt, TaskRecord

    backbone = load_backbone(str(backbone_folder))
    prompts = []
    for seed, (name, method) in enumerate(
        [("film", "tune"), ("film-from-random", "tune"), ("metapt", "metapt")]
    ):
        params = initial_params(backbone, "vocab", "prefix", tokens, seed)
        record = TaskRecord(
            name=name, labels=["negative", "positive"], words=["bad", "good"], mode="prefix",
            backbone=backbone.name, backbone_sha256=backbone.sha256, method=method,
        )  # fmt: skip
        prompts.append(Prompt({key: value.detach() for key, value in params.items()}, record))
    export_bundle(prompts, backbone, folder, max_tokens=64)
    return folder


@contextmanager
def served_page(
    bundle: Path, launch: dict[str, Any] | None = None, **options: Any
) -> Iterator[tuple[str, Any]]:
    """The page at work: its address and its room.

    `launch` goes to `demo.app.open_page`, `options` to `Room`.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from demo.app import build_page, open_page
    from demo.state import Room
    from serve.classifier import Classifier

    room = Room(Classifier(bundle, threads=1, spin=False), **options)
    page = build_page(room)
    address, _ = open_page(page, room, **{"server_name": "127.0.0.1", **(launch or {})})
    try:
        yield address, room
    finally:
        page.close()


def browser(profile: Path, width: int = 1200, height: int = 900, dark: bool = False) -> Any:
    """Headless Chromium, or a skipped test where it is not installed."""
    import pytest

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip(NO_BROWSER)
    webdriver = pytest.importorskip("selenium.webdriver", reason=NO_BROWSER)
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", f"--window-size={width},{height}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    window.set_page_load_timeout(120)
    window.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    if dark:
        window.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
        )
    return window
