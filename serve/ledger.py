"""The ledger: what the routes changed about tasks, agreed upon by all replicas of a cluster.

A replica serves the tasks of its bundle's folder, as the folder is now, and on top of them the
ledger's changes, the latest one for each task. One process keeps the ledger; every replica follows
it by long polls, and its next poll is its word that it has applied what it got.

Nothing is kept on a disk. The ledger and each replica hold all changes: a new replica gets them
from the ledger before it takes requests, and a new ledger gets them back from the replicas that
join it. They are lost when all of them end at once, as a single server's are when it ends.

Plain asyncio without Ray, which `serve.cluster` puts around it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from serve.task import Task

HELD, GONE, FOLDER = "held", "gone", "folder"
_SILENCE = 15.0  # seconds without a poll after which a replica counts as dead
_LOOK = 0.25  # seconds; how often a publisher looks whether a silent replica has to be given up


@dataclass(frozen=True)
class Change:
    """The latest word about a task.

    Attributes:
        order: later changes have higher ones, whichever ledger made them.
        kind: `held`, serve `task`; `gone`, do not serve it; `folder`, serve what the folder has.
    """

    order: int
    name: str
    kind: str
    task: Task | None = None


@dataclass(frozen=True)
class Page:
    """What a replica has to apply to be at `version` of the ledger named `epoch`; the version
    counts what this ledger has learnt, in the order in which it has."""

    epoch: str
    version: int
    changes: list[Change]


@dataclass(frozen=True)
class Outcome:
    """What became of a change.

    Attributes:
        replicas: that are alive; `late` of them have not confirmed in time.
        problems: what the others could not do, by replica.
    """

    replicas: int
    late: int
    problems: dict[str, str]


@dataclass
class _Member:
    version: int
    seen: float
    problems: Mapping[str, str] = field(default_factory=dict)


class Ledger:
    """The changes and the replicas that follow them. All calls on one event loop.

    Attributes:
        epoch: of this ledger; a replica that comes with another has to join first.
        version: how many times it has learnt of a change.
    """

    def __init__(self, silence: float = _SILENCE) -> None:
        """Args:
        silence: seconds without a poll after which a replica is not waited for any more.
        """
        self.epoch, self.version = secrets.token_hex(8), 0
        self._silence = silence
        self._changes: dict[str, tuple[int, Change]] = {}  # by task; with the version it came at
        self._members: dict[str, _Member] = {}
        self._moved = asyncio.Condition()

    async def join(self, replica: str, changes: Iterable[Change] = ()) -> Page:
        """Take part from now on.

        Args:
            replica: its id.
            changes: that the replica knows of, from another ledger; the latest of each task stays.
        """
        async with self._moved:
            for change in changes:
                known = self._changes.get(change.name)
                if known is None or known[1].order < change.order:
                    self._learn(change)
            self._members = self._alive() | {replica: _Member(-1, time.monotonic())}
            self._moved.notify_all()
            return self._page(-1)

    async def follow(
        self, replica: str, epoch: str, version: int, problems: Mapping[str, str], wait: float
    ) -> Page | None:
        """Confirm `version`, and wait for what comes after it.

        Args:
            problems: of the replica at this version: what it could not do, by task.
            wait: seconds after which an empty page is given.

        Returns:
            the changes after `version`, or None when the replica has to join (again).
        """
        async with self._moved:
            if epoch != self.epoch or replica not in self._members:
                return None
            self._members[replica] = _Member(version, time.monotonic(), dict(problems))
            self._moved.notify_all()
            try:
                async with asyncio.timeout(wait):
                    await self._moved.wait_for(lambda: self.version > version)
            except TimeoutError:
                pass  # an empty page says that nothing happened
            return self._page(version)

    async def publish(
        self, name: str, kind: str, task: Task | None, after: int, wait: float
    ) -> Outcome:
        """Make a change, and wait until every living replica has applied it.

        Args:
            after: the highest order that the caller knows of; a new ledger may not know it yet.
            wait: seconds after which the replicas that have not are counted as late. The change
                stays made; they follow.
        """
        async with self._moved:
            latest = max((change.order for _, change in self._changes.values()), default=0)
            self._learn(Change(max(latest, after) + 1, name, kind, task))
            version = self.version
            self._moved.notify_all()
            end = time.monotonic() + wait
            while self._behind(version) and time.monotonic() < end:
                try:
                    async with asyncio.timeout(_LOOK):
                        await self._moved.wait()
                except TimeoutError:
                    continue  # a replica may have fallen silent meanwhile
            alive = self._alive()
            done = {key: m for key, m in alive.items() if m.version >= version}
            problems = {key: m.problems[name] for key, m in done.items() if name in m.problems}
            return Outcome(len(alive), len(alive) - len(done), problems)

    async def leave(self, replica: str) -> None:
        """Take part no more."""
        async with self._moved:
            self._members.pop(replica, None)
            self._moved.notify_all()

    def _learn(self, change: Change) -> None:
        self.version += 1
        self._changes[change.name] = self.version, change

    def _page(self, after: int) -> Page:
        fresh = [change for version, change in self._changes.values() if version > after]
        return Page(self.epoch, self.version, fresh)

    def _alive(self) -> dict[str, _Member]:
        oldest = time.monotonic() - self._silence
        return {key: member for key, member in self._members.items() if member.seen >= oldest}

    def _behind(self, version: int) -> bool:
        return any(member.version < version for member in self._alive().values())
