"""A small Ray on this machine, for the tests of `--ray`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

STORE = 80 << 20  # bytes of Ray's object store; its own minimum is 75 MiB


@pytest.fixture(scope="module")
def cluster() -> Iterator[int]:
    """Ray with two cores and an object store of so many bytes."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")
    for attempt in range(3):
        try:
            ray.init(
                "local", num_cpus=2, object_store_memory=STORE, include_dashboard=False,
                log_to_driver=False,
            )  # fmt: skip
            break
        except Exception:  # bare ones: it gives itself 30 s, which a busy machine exceeds
            ray.shutdown()
            if attempt == 2:
                raise
    yield STORE
    ray.shutdown()
