"""Which bundle the page shows when none is named, and how it is made at the first start."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from serve.errors import Failure

log = logging.getLogger(__name__)


def cached() -> Path:
    """The folder of the first start: `$METAPT_CACHE/demo`, or `~/.cache/metapt/demo`."""
    chosen = os.environ.get("METAPT_CACHE")
    base = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "metapt"
    return base / "demo"


def find_bundle(named: str | None) -> Path:
    """The bundle that is named, or the cached one, made first where it is missing.

    Raises:
        Failure: making it failed.
    """
    if named is not None:
        return Path(named)
    folder = cached()
    if not (folder / "bundle" / "bundle.json").is_file():
        log.info("first start: making a bundle in %s, which takes minutes and is kept", folder)
        # In a process of its own, so that the memory of training goes when it ends. A stopped run
        # goes on at the next start: every stage keeps its result.
        command = [sys.executable, "-m", "trainer", "quickstart", "--out", str(folder)]
        code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
        if code != 0:
            raise Failure("the bundle could not be made, for the reason above: correct that and "
                          "start again, or name a bundle: python -m demo BUNDLE")  # fmt: skip
    return folder / "bundle"
