"""How the demo is served: behind a password, behind a proxy's path, by a public relay, or not."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import serve_toy as toy
from demo_page import proxy, served_page

from demo.__main__ import DemoConfig, run_demo
from serve.errors import Failure

pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")
httpx = pytest.importorskip("httpx")

TEXT = "the film was very long and great"
TIMEOUT = {"timeout": 120}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_bundle(tmp_path_factory.mktemp("demo") / "bundle")


def test_a_password_is_asked_for_and_opens(bundle: Path) -> None:
    with served_page(bundle, {"auth": ("ada", "secret")}) as (address, _):
        for path in ("config", "gradio_api/info"):
            assert httpx.get(address + path, timeout=120).status_code == 401
        refused = httpx.post(
            address + "login", data={"username": "ada", "password": "wrong"}, timeout=120
        )
        assert refused.status_code == 400
        found = gradio_client.Client(
            address, auth=("ada", "secret"), verbose=False, httpx_kwargs=TIMEOUT
        )
        assert found.predict(TEXT, "film", api_name="/classify")["label"]


def test_it_works_under_the_path_of_a_proxy(bundle: Path) -> None:
    with (
        served_page(bundle, {"root_path": "/demo"}) as (address, room),
        proxy(address, "/demo") as (outside, seen),
    ):
        page = httpx.get(outside, timeout=120).text
        assert re.search(r'"root":"' + outside.rstrip("/") + '"', page)
        assets = re.findall(r'(?:src|href)="\./(assets/[^"]+)"', page)[:5]
        assert assets
        for name in assets:
            assert httpx.get(outside + name, timeout=120).status_code == 200
        found = gradio_client.Client(outside, verbose=False, httpx_kwargs=TIMEOUT)
        answer = found.predict(TEXT, "film", api_name="/classify")
        assert answer["label"] == room.classifier.classify([TEXT], "film")[0].label
    assert all(path.startswith("/demo/") for path in seen)


def test_previews_of_a_link_name_no_address_outside(bundle: Path) -> None:
    with served_page(bundle) as (address, _):
        page = httpx.get(address, timeout=120).text
        head = page[: page.index("</head>")]
        assert not re.findall(r'(?:content|href|src)="https?://', head)
        assert 'property="og:title" content="MetaPT' in head and 'name="description"' in head
        assert 'charset="utf-8"' in head and 'name="viewport"' in head


class Launched(Exception):
    """The page would be open now."""


@pytest.mark.parametrize("share", [False, True])
def test_only_the_flag_opens_a_public_address(
    bundle: Path, share: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import gradio as gr

    given: dict[str, Any] = {}

    def launch(_: gr.Blocks, **settings: Any) -> None:
        given.update(settings)
        raise Launched

    monkeypatch.setattr(gr.Blocks, "launch", launch)
    with pytest.raises(Launched):
        run_demo(DemoConfig(bundle=str(bundle), share=share, threads=1))
    assert given["share"] is share and given["server_name"] == "127.0.0.1"
    assert ("whoever has the address" in caplog.text) is share


TAUGHT = """
import os, signal, sys, threading
import torch
import demo.__main__, demo.app
from demo.teach import LESSON

opened = demo.app.open_page

def lesson():
    weights = torch.randn(300, 300, requires_grad=True)
    for step in range(10**6):
        torch.autograd.grad((weights @ weights).tanh().sum(), weights)
        if step == 20:
            os.kill(os.getpid(), signal.SIGTERM)

def open_page(page, room, **settings):
    found = opened(page, room, **settings)
    threading.Thread(target=lesson, name=LESSON, daemon=True).start()
    return found

demo.app.open_page = open_page
sys.exit(demo.__main__.main())
"""


def test_sigterm_during_a_lesson_ends_the_process_in_order(bundle: Path) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-c", TAUGHT, str(bundle), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "ready on http" in done.stderr and "terminate" not in done.stderr


def test_a_port_in_use_is_one_line(bundle: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = (
            rf"cannot listen on 127\.0\.0\.1:{port} \(Address already in use\): pass another --port"
        )
        with pytest.raises(Failure, match=said):
            run_demo(DemoConfig(bundle=str(bundle), port=port, threads=1))
