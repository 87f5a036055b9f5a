"""One JSON file a run, named by the hash of its configuration: what is there need not run again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from serve.errors import Failure
from serve.files import read_json, write_json

Settings = dict[str, Any]


def settings_hash(settings: Settings) -> str:
    """16 hex digits of a configuration: equal settings, equal hash, in whatever order."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """The finished runs of an output folder.

    Args:
        out: OUT; runs are in OUT/runs/<hash>.json, starts (prompts) in OUT/starts/<hash>/.
    """

    def __init__(self, out: str | Path):
        self.out = Path(out)

    def run_path(self, settings: Settings) -> Path:
        """Where the result of a run stands."""
        return self.out / "runs" / f"{settings_hash(settings)}.json"

    def start_path(self, settings: Settings) -> Path:
        """Where the prompt of a start stands."""
        return self.out / "starts" / settings_hash(settings)

    def has_start(self, settings: Settings) -> bool:
        """Whether a start is finished (prompt folders appear whole or not at all)."""
        return (self.start_path(settings) / "task.json").is_file()

    def load(self, settings: Settings) -> dict[str, Any] | None:
        """The record of a run, None where it has not finished.

        Raises:
            Failure: the file is damaged, or of other settings (two settings with one hash).
        """
        path = self.run_path(settings)
        if not path.is_file():
            return None
        record = read_json(path)
        if not isinstance(record, dict) or record.get("settings") != json.loads(
            json.dumps(settings)
        ):
            raise Failure(f"{path} is not of the run its name stands for: remove it")
        return record

    def save(self, settings: Settings, result: dict[str, Any], versions: dict[str, str]) -> None:
        """Write the record of a run, whole or not at all."""
        write_json(
            self.run_path(settings),
            {"settings": settings, "result": result, "versions": versions},
        )
