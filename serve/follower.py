"""A replica's side of the ledger: its tasks are the folder's, with the ledger's changes on top."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from serve import bundle as bundles
from serve.classifier import Classifier
from serve.errors import Failure, UserError
from serve.ledger import FOLDER, GONE, HELD, Change, Outcome, Page
from serve.prompt import Arrays
from serve.task import Task

log = logging.getLogger(__name__)

Publish = Callable[[str, str, Task | None], Outcome]


class SharedClassifier(Classifier):
    """A classifier whose tasks are added and removed on all replicas, or reported as not.

    Attributes:
        publish: makes a change known; set before the first of them.
    """

    publish: Publish

    def add_task(
        self,
        name: str,
        record: Mapping[str, Any] | None = None,
        prompt: np.ndarray | Arrays | None = None,
    ) -> Task:
        """As `Classifier.add_task`, on every replica.

        Raises:
            Failure: also when a replica could not, or did not confirm in time.
        """
        held = self.read_task(name, record, prompt)  # what is wrong with it is said here
        from_folder = record is None or prompt is None
        outcome = self.publish(name, FOLDER if from_folder else HELD, None if from_folder else held)
        _check(outcome, f"task '{name}'")
        return held

    def remove_task(self, name: str) -> None:
        """As `Classifier.remove_task`, on every replica."""
        self.task(name)
        _check(self.publish(name, GONE, None), f"task '{name}'")


def _check(outcome: Outcome, what: str) -> None:
    """Raises: Failure when not every living replica has done it."""
    if outcome.problems:
        first = next(iter(outcome.problems.values()))
        raise Failure(f"{len(outcome.problems)} of {outcome.replicas} replicas failed: {first}")
    if outcome.late:
        raise Failure(
            f"{outcome.late} of {outcome.replicas} replicas have not confirmed {what} yet; they "
            "will when they answer again"
        )


class Follower:
    """Applies pages of the ledger, and follows the bundle's folder. One call at a time.

    Attributes:
        changes: applied so far, the latest of each task; a new ledger learns them from here.
        problems: what could not be done, by task; the empty name is the folder itself.
    """

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self._stamp: object = None  # the folder has to be read once: it may have changed already
        self.epoch, self.version = "", -1
        self.changes: dict[str, Change] = {}
        self.problems: dict[str, str] = {}

    def apply(self, page: Page) -> None:
        """Bring the tasks to the page's version, and to what the folder has now."""
        for change in sorted(page.changes, key=lambda item: item.order):
            self.changes[change.name] = change
            if change.kind != FOLDER:
                self._settle(change)
        again = {change.name for change in page.changes if change.kind == FOLDER}
        self._follow_folder(again)
        self.epoch, self.version = page.epoch, page.version

    def _settle(self, change: Change) -> None:
        self.problems.pop(change.name, None)
        try:
            if change.task is not None:
                self._classifier.serve_task(change.task)
            else:
                self._forget(change.name)
        except (UserError, Failure) as error:
            self._complain(change.name, str(error))

    def _forget(self, name: str) -> None:
        if name in self._classifier.tasks:
            Classifier.remove_task(self._classifier, name)  # here only: the others know it too

    def _complain(self, name: str, message: str) -> None:
        if self.problems.get(name) != message:  # it is tried again with every page
            log.error("%s", message)
        self.problems[name] = message

    def _follow_folder(self, again: set[str]) -> None:
        """Serve the folder's tasks as they are now, those apart that the ledger speaks about.

        Args:
            again: tasks that were asked for, and shall be there.
        """
        folder = self._classifier.bundle.folder
        try:
            status = os.stat(folder / "bundle.json")
            stamp = status.st_mtime_ns, status.st_size, status.st_ino
            if stamp == self._stamp and not again:
                return
            fresh = bundles.load(folder, verify=False)
        except (UserError, Failure, OSError) as error:
            self._complain("", f"{folder} cannot be read again: {error}")
            self.problems |= dict.fromkeys(again, self.problems[""])
            return
        if self._classifier.bundle.has_other_graphs(fresh):
            message = f"{folder} has other graphs now: deploy the application again"
            self._complain("", message)
            self.problems |= dict.fromkeys(again, message)
            return
        self.problems.pop("", None)
        spoken = {name for name, change in self.changes.items() if change.kind != FOLDER}
        whole = True
        for name in [name for name in self._classifier.tasks if name not in fresh.tasks]:
            if name not in spoken:
                self._forget(name)
        for name in again - set(fresh.tasks):
            self._complain(name, f"{folder} has no task '{name}'")
        for name, task in fresh.tasks.items():
            if name not in spoken:
                whole &= self._take(fresh, task)
        self._stamp = stamp if whole else None

    def _take(self, fresh: bundles.Bundle, task: Task) -> bool:
        """Serve the folder's version of a task; whether that went well."""
        self.problems.pop(task.name, None)
        if self._classifier.tasks.get(task.name) == task:
            return True
        try:
            self._classifier.serve_task(replace(task, arrays=fresh.read_prompt(task)))
        except (UserError, Failure) as error:
            self._complain(task.name, str(error))
            return False
        return True
