"""Rows of a data set on the Hugging Face hub, through `datasets` (an optional extra)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from serve.errors import Failure, UserError, install
from trainer.tasks import Hub

logger = logging.getLogger(__name__)

_PATIENCE = 8.0  # seconds that the hub is waited for; `datasets` alone retries for minutes


def _reachable(source: Hub) -> bool:
    """Whether the hub answers for this data set, asked once instead of with many retries."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.is_offline_mode():
        return False
    try:
        HfApi().dataset_info(source.id, timeout=_PATIENCE)
    except HfHubHTTPError:  # it does answer; `datasets` will say what is wrong with the set
        return True
    except Exception as error:  # any failure to reach it means "use the cache"
        logger.debug("the hub does not answer for %s: %s", source.id, error)
        return False
    return True


@contextmanager
def _offline() -> Iterator[None]:
    """Keep `datasets` to its cache: it would ask an unreachable hub five times, for half a minute.

    Both libraries read the environment variable once, at import, so the constants are set.
    """
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def load(source: Hub, split: str | None, task: str) -> list[dict[str, Any]]:
    """The rows of a data set, each with the field `split` ("train", "validation" or "test").

    Without a connection the local cache of `datasets` is used.

    Args:
        source: where the set lies.
        split: the only split that is needed, or None for all. A set that lacks it is read whole.
        task: the task's name, for errors.

    Raises:
        UserError: `datasets` is not installed.
        Failure: the hub does not answer and the set is not in the cache.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"task '{task}' comes from the Hugging Face hub, which needs the 'datasets' package: "
            f"{install('hub')}, or pass local files with --data-dir FOLDER"
        ) from None
    offline = not _reachable(source)
    cache_only = _offline() if offline else nullcontext()
    wanted = dict(source.splits)
    if split is not None and split in wanted:
        wanted = {split: wanted[split]}
    rows: list[dict[str, Any]] = []
    with cache_only:
        for name, hub_name in wanted.items():
            try:
                table = datasets.load_dataset(source.id, source.config, split=hub_name)
            except Exception as error:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                reason = "the hub does not answer and it is not in the cache" if offline else first
                raise Failure(
                    f"data set {source.id} of task '{task}' could not be loaded ({reason}): pass "
                    "local files with --data-dir FOLDER, or connect to the hub"
                ) from None
            for row in table:
                records = row[source.explode] if source.explode else [{}]
                rows.extend({**row, **record, "split": name} for record in records)
    return rows
