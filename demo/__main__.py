"""`python -m demo [BUNDLE]`: open the page."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import sys
import threading
from dataclasses import dataclass

from serve.cli import Command, option, prepare, run
from serve.errors import Failure, UserError, install
from serve.options import MOST_THREADS

log = logging.getLogger(__name__)


@dataclass
class DemoConfig:
    """Try prompts in the browser, compare them, teach one.

    Without BUNDLE it shows the quick start's (runs/quickstart/bundle), and where there is none, one
    of the prompts that ship: made at the first start in seconds, without training, and kept in
    the cache folder ($METAPT_CACHE, or ~/.cache/metapt).
    """

    bundle: str | None = option(None, help="folder of a bundle", positional=True)
    backbone: str | None = option(
        None, help="the backbone of the bundle, for teaching (default: as the bundle names it)"
    )
    precision: str = option("fp32", help="fp32, int8, fp16: one that the bundle has")
    threads: int | None = option(
        None,
        help="threads of an answer; default: the physical cores",
        minimum=1,
        maximum=MOST_THREADS,
    )
    host: str = option("127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    port: int | None = option(
        None, help="port to listen on (default: the first free one from 7860)",
        minimum=1, maximum=65535,
    )  # fmt: skip
    root_path: str | None = option(None, help="path under which a proxy shows the page: /demo")
    share: bool = option(False, help="a public address through Gradio's relay (leaves the machine)")
    auth: str = option(
        "", help="ask visitors for these; better in METAPT_DEMO_AUTH", metavar="USER:PASSWORD"
    )
    max_rows: int = option(20_000, help="rows of a table", minimum=1)
    max_upload: float = option(5.0, help="MB of an uploaded file", minimum=0.001)
    browser: bool = option(False, help="open the page in a browser")

    examples = [
        "",
        "runs/quickstart/bundle --port 8080",
        "bundle --host 0.0.0.0   # with METAPT_DEMO_AUTH=ada:secret set",
    ]


def parse_auth(value: str) -> tuple[str, str] | None:
    """USER:PASSWORD as a pair, None for nothing.

    Raises:
        UserError: there is no colon, or one side is empty.
    """
    if not value:
        return None
    user, colon, password = value.partition(":")
    if not (user and colon and password):
        raise UserError("--auth takes USER:PASSWORD, for example ada:secret")
    return user, password


def check_port(host: str, port: int) -> None:
    """Raises: Failure at once, not when the page has been built, where nobody can listen."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        reason = str(error.strerror or error).split(" (")[0]  # Python tells the address again
        raise Failure(
            f"cannot listen on {host}:{port} ({reason}): pass another --port, or --host"
        ) from None


def run_demo(config: DemoConfig) -> int:
    """Open the page and serve it until interrupted."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: nothing is called outside
    auth = parse_auth(config.auth or os.environ.get("METAPT_DEMO_AUTH", ""))
    from demo.bundles import find_bundle

    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"gradio is not installed: {install('demo')}")
    if config.port is not None:
        check_port(config.host, config.port)
    bundle = find_bundle(config.bundle)  # it may be made while the page's libraries load
    from gradio.tunneling import CURRENT_TUNNELS

    from demo.app import build_page, open_page
    from demo.state import Limits, Room
    from demo.teach import LESSON
    from serve.classifier import Classifier

    classifier = Classifier(bundle(), config.precision, threads=config.threads, spin=False)
    classifier.warm()
    room = Room(classifier, Limits(config.max_rows, config.max_upload), config.backbone)
    if auth is None and config.share:
        log.warning("--share without --auth: whoever has the address can use this machine")
    page = build_page(room)
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks its own address whether it is there
        given = [os.environ.get(name), "localhost", "127.0.0.1", "::1", config.host]
        os.environ[name] = ",".join(filter(None, given))
    try:
        local, public = open_page(
            page, room, server_name=config.host, server_port=config.port, auth=auth,
            root_path=config.root_path, share=config.share, inbrowser=config.browser,
        )  # fmt: skip
    except OSError as error:  # Gradio has no finer kind for a port that was taken meanwhile
        raise Failure(f"cannot listen on {config.host} ({error}): pass another --port") from None
    log.info("ready on %s%s", local, f" and {public}" if public else "")
    code = 0
    try:
        page.block_thread()  # returns after Ctrl-C
    except SystemExit as end:  # SIGTERM
        code = int(end.code or 0)
    if any(thread.name == LESSON for thread in threading.enumerate()):
        # It may be inside torch, which aborts when Python takes the interpreter down under it.
        for tunnel in CURRENT_TUNNELS:
            tunnel.kill()
        logging.shutdown()
        os._exit(code)
    return code


def main() -> int:
    """The command line; there is one command, so it is not named."""
    prepare()
    commands = {"demo": Command(DemoConfig, run_demo)}
    return run("python -m", "Open the demo.", commands, ["demo", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
