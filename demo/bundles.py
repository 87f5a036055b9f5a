"""Which bundle the page shows when none is named, and how it is made at the first start."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import exporter
import trainer
from serve.bundle import VERSION
from serve.errors import Failure
from serve.files import read_json, sha256
from trainer.cache import cache_folder

log = logging.getLogger(__name__)

MINI = Path(trainer.__file__).parent / "backbones" / "mini"  # trainer.backbone would load torch
QUICKSTART = Path("runs/quickstart/bundle")  # where `python -m trainer quickstart` writes
GRAPHS = Path(exporter.__file__).parent / "graphs"  # what such a bundle is made of, besides
_LAYOUT = "2"  # of what demo.first makes; another number makes every cached bundle anew


def cached() -> Path:
    """The folder of first starts: `$METAPT_CACHE/demo`, or `~/.cache/metapt/demo`."""
    return cache_folder() / "demo"


def shipped(backbone: Path = MINI) -> Path:
    """The folder of the bundle of the prompts that ship, by all that it is made of."""
    whole = hashlib.sha256(f"{_LAYOUT} {VERSION}".encode())
    for path in sorted([*backbone.rglob("*.safetensors"), *GRAPHS.rglob("*.*")]):
        whole.update(f"{path.name} {sha256(path)}".encode())
    return cached() / f"shipped-{whole.hexdigest()[:12]}"


def from_quickstart(backbone: Path = MINI) -> Path | None:
    """The quick start's bundle, where it was run here and is of today's backbone."""
    header = QUICKSTART / "bundle.json"
    if not header.is_file():
        return None
    of = read_json(header).get("backbone") or {}
    if of.get("id") == "mini" and of.get("sha256") != sha256(backbone / "model.safetensors"):
        log.info("%s is of an earlier mini: not shown, run the quick start again", QUICKSTART)
        return None
    return QUICKSTART


def find_bundle(named: str | None) -> Callable[[], Path]:
    """Begin to look for the bundle; what is given back waits for it.

    It is the one that is named, or the quick start's, or one of the prompts that ship, which is
    made where it is missing: in a process of its own, so that the page can load meanwhile, and
    torch's memory goes when it ends.

    Raises:
        Failure: making it failed (when it is waited for).
    """
    found = Path(named) if named is not None else from_quickstart()
    if found is not None:
        return lambda: found
    folder = shipped()
    bundle = folder / "bundle"
    if (bundle / "bundle.json").is_file():
        return lambda: bundle
    log.info("first start: making a bundle of the prompts that ship, in %s, which keeps it", folder)
    process = subprocess.Popen([sys.executable, "-m", "demo.first", "--out", str(folder)])

    def wait() -> Path:
        try:
            code = process.wait()
        except BaseException:  # interrupted: the other process must not go on alone
            process.terminate()
            process.wait()
            raise
        if code != 0:
            raise Failure(
                "the bundle could not be made, for the reason above: correct that and start "
                "again, or name a bundle: python -m demo BUNDLE"
            )
        return bundle

    return wait
