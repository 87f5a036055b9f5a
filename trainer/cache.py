"""Where downloads and embeddings are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder `$METAPT_CACHE`, or `~/.cache/metapt`; it need not exist yet."""
    chosen = os.environ.get("METAPT_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "metapt"
