"""The demo's page for tests, on a bundle exported from a tiny T5, and a browser to look at it."""

from __future__ import annotations

import http.client
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


@contextmanager
def proxy(target: str, prefix: str) -> Iterator[tuple[str, list[str]]]:
    """A reverse proxy that shows `target` under a path, as nginx's proxy_pass with a slash does."""
    host, port = target.removeprefix("http://").rstrip("/").split(":")
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def forward(self) -> None:
            seen.append(self.path)
            if not self.path.startswith(prefix + "/"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            inner = http.client.HTTPConnection(host, int(port), timeout=120)
            headers = {**self.headers, "Connection": "close"}
            inner.request(self.command, self.path.removeprefix(prefix), body, headers)
            answer = inner.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            while part := answer.read1(65536):
                self.wfile.write(part)
                self.wfile.flush()
            inner.close()

        do_GET = do_POST = forward  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{prefix}/", seen
    finally:
        server.shutdown()
        server.server_close()


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
