"""The ledger and its followers: every replica serves the same tasks, whoever dies when."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import serve_toy as toy

from serve import bundle as bundles
from serve.classifier import Classifier
from serve.errors import Failure, UserError
from serve.follower import Follower, SharedClassifier
from serve.ledger import FOLDER, GONE, HELD, Change, Ledger, Outcome
from serve.task import Task


def task(name: str) -> Task:
    return Task(name, ["a", "b"], ["a", "b"], [3, 4], "{text}", [], [1])


def run(story: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 20))


# ---- the ledger ----------------------------------------------------------------------------------


def test_publish_returns_when_the_last_replica_has_confirmed() -> None:
    async def story() -> None:
        ledger = Ledger()
        for name in ("one", "two"):
            page = await ledger.join(name)
            assert (page.version, page.changes) == (0, [])
            assert await ledger.follow(name, ledger.epoch, 0, {}, 0.01) is not None
        published = asyncio.create_task(ledger.publish("film", HELD, task("film"), 0, 5))
        page = await ledger.follow("one", ledger.epoch, 0, {}, 5)
        assert page is not None and page.version == 1
        assert page.changes == [Change(1, "film", HELD, task("film"))]
        await ledger.follow("one", ledger.epoch, 1, {}, 0.01)
        assert not published.done()  # the second has not
        await ledger.follow("two", ledger.epoch, 1, {"film": "no room"}, 0.01)
        assert await published == Outcome(2, 0, {"two": "no room"})

    run(story)


def test_a_replica_that_does_not_answer_is_late_and_one_that_fell_silent_is_not_waited_for() -> (
    None
):
    async def story() -> None:
        ledger = Ledger()
        await ledger.join("slow")
        assert await ledger.publish("film", GONE, None, 0, 0.01) == Outcome(1, 1, {})
        ledger = Ledger(silence=0.05)
        await ledger.join("dead")
        assert await ledger.publish("film", GONE, None, 0, 10) == Outcome(0, 0, {})

    run(story)


def test_a_replica_that_left_is_not_waited_for() -> None:
    async def story() -> None:
        ledger = Ledger()
        await ledger.join("one")
        published = asyncio.create_task(ledger.publish("film", GONE, None, 0, 10))
        await asyncio.sleep(0)
        await ledger.leave("one")
        assert await published == Outcome(0, 0, {})

    run(story)


def test_a_new_replica_gets_the_latest_change_of_every_task() -> None:
    async def story() -> None:
        ledger = Ledger()
        for kind, held in ((HELD, task("film")), (GONE, None)):
            await ledger.publish("film", kind, held, 0, 0.01)
        await ledger.publish("food", HELD, task("food"), 0, 0.01)
        page = await ledger.join("new")
        assert page.version == 3
        assert {c.name: c.kind for c in page.changes} == {"film": GONE, "food": HELD}

    run(story)


def test_who_is_unknown_or_comes_from_another_ledger_has_to_join() -> None:
    async def story() -> None:
        ledger = Ledger()
        await ledger.join("one")
        assert await ledger.follow("one", "another", 0, {}, 0.01) is None
        assert await ledger.follow("two", ledger.epoch, 0, {}, 0.01) is None

    run(story)


def test_a_new_ledger_learns_from_replicas_and_the_later_change_wins() -> None:
    async def story() -> None:
        ledger = Ledger()
        await ledger.join("behind", [Change(3, "film", HELD, task("film"))])
        assert await ledger.follow("behind", ledger.epoch, 1, {}, 0.01) is not None
        # This one had heard more of the old ledger; what the first lacks must reach it.
        await ledger.join("ahead", [Change(4, "film", GONE), Change(5, "food", GONE)])
        page = await ledger.follow("behind", ledger.epoch, 1, {}, 5)
        assert page is not None
        assert {(c.name, c.kind) for c in page.changes} == {("film", GONE), ("food", GONE)}
        # And what is older than all of it changes nothing.
        page = await ledger.join("oldest", [Change(2, "film", HELD, task("film"))])
        assert {(c.name, c.kind) for c in page.changes} == {("film", GONE), ("food", GONE)}

    run(story)


def test_a_change_is_later_than_all_that_its_maker_knows() -> None:
    async def story() -> None:
        ledger = Ledger()  # a new one, which the replica that publishes has not joined yet
        await ledger.publish("film", GONE, None, 7, 0.01)
        page = await ledger.join("one", [Change(7, "film", HELD, task("film"))])
        assert [(c.order, c.kind) for c in page.changes] == [(8, GONE)]

    run(story)


# ---- followers -----------------------------------------------------------------------------------


class Replica:
    """A classifier and its follower, without a process around them."""

    def __init__(self, folder: Path, ledger: Ledger, name: str) -> None:
        self.classifier = SharedClassifier(folder, threads=1, spin=False)
        self.follower = Follower(self.classifier)
        self.ledger, self.name = ledger, name

    async def turn(self) -> None:
        """One round of what `serve.cluster.Server` does for ever."""
        f = self.follower
        page = await self.ledger.follow(self.name, f.epoch, f.version, f.problems, 0.01)
        if page is None:
            page = await self.ledger.join(self.name, list(f.changes.values()))
        f.apply(page)

    def label(self, name: str) -> str:
        return self.classifier.classify(["good film"], name)[0].label


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return toy.make_bundle(tmp_path / "b")


def held(folder: Path, name: str, seed: int = 9) -> Task:
    record = toy.record(["left", "right"], ["dull", "nice"])
    return Classifier(folder, threads=1).read_task(name, record, toy.prompt_of(seed))


def test_replicas_serve_what_was_published_and_a_new_one_does_too(folder: Path) -> None:
    async def story() -> None:
        ledger = Ledger()
        one = Replica(folder, ledger, "one")
        await one.turn()
        added = held(folder, "mood")
        await ledger.publish("mood", HELD, added, 0, 0.01)
        await ledger.publish("food", GONE, None, 0, 0.01)
        await one.turn()
        two = Replica(folder, ledger, "two")  # a replica that was started again
        await two.turn()
        for replica in (one, two):
            assert set(replica.classifier.tasks) == {"film", "mood"}
            assert replica.classifier.tasks["mood"].sha256 == added.sha256
        assert one.label("mood") == two.label("mood")

    run(story)


def test_a_folder_that_changes_is_followed_without_being_asked(folder: Path) -> None:
    async def story() -> None:
        one = Replica(folder, Ledger(), "one")
        await one.turn()
        toy.add(folder, "mood", ["left", "right"], ["dull", "nice"], toy.prompt_of(9))
        toy.add(folder, "film", ["lo", "hi"], ["awful", "great"], toy.prompt_of(4))
        bundles.remove_task(folder, "food")
        await one.turn()
        assert set(one.classifier.tasks) == {"film", "mood"}
        assert one.classifier.tasks == bundles.load(folder).tasks
        assert one.label("film") in ("lo", "hi")
        assert not one.follower.problems

    run(story)


def test_what_was_published_stands_above_the_folder_until_a_load_from_it(folder: Path) -> None:
    async def story() -> None:
        ledger = Ledger()
        one = Replica(folder, ledger, "one")
        await ledger.publish("film", HELD, held(folder, "film"), 0, 0.01)
        await ledger.publish("food", GONE, None, 0, 0.01)
        await one.turn()
        toy.add(folder, "film", ["lo", "hi"], ["awful", "great"], toy.prompt_of(4))
        await one.turn()
        assert one.classifier.tasks["film"].labels == ["left", "right"]
        assert "food" not in one.classifier.tasks
        await ledger.publish("film", FOLDER, None, 0, 0.01)
        await ledger.publish("food", FOLDER, None, 0, 0.01)
        await one.turn()
        assert one.classifier.tasks["film"].labels == ["lo", "hi"]
        assert one.label("food") in ("no", "so-so", "yes")

    run(story)


def test_a_task_that_a_folder_lacks_is_reported_for_that_task_only(folder: Path) -> None:
    async def story() -> None:
        ledger = Ledger()
        one = Replica(folder, ledger, "one")
        await one.turn()
        published = asyncio.create_task(ledger.publish("mood", FOLDER, None, 0, 5))
        await asyncio.sleep(0.01)
        await one.turn()
        await one.turn()  # the word of the first is in the second
        problems = (await published).problems
        assert list(problems) == ["one"] and "has no task 'mood'" in problems["one"]
        published = asyncio.create_task(ledger.publish("film", FOLDER, None, 0, 5))
        await asyncio.sleep(0.01)
        await one.turn()
        await one.turn()
        assert await published == Outcome(1, 0, {})

    run(story)


def test_a_damaged_prompt_in_the_folder_leaves_the_version_that_is_served(folder: Path) -> None:
    async def story() -> None:
        one = Replica(folder, Ledger(), "one")
        await one.turn()
        before = one.classifier.tasks["film"]
        toy.add(folder, "film", ["lo", "hi"], ["awful", "great"], toy.prompt_of(4))
        path = folder / bundles.load(folder).tasks["film"].prompt
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        await one.turn()
        assert one.classifier.tasks["film"] == before
        assert "hash" in one.follower.problems["film"]
        path.write_bytes(good)  # repaired: the next round takes it, though bundle.json is the same
        await one.turn()
        assert one.classifier.tasks["film"].labels == ["lo", "hi"]
        assert not one.follower.problems

    run(story)


def test_other_graphs_are_not_followed(folder: Path, tmp_path: Path) -> None:
    async def story() -> None:
        one = Replica(folder, Ledger(), "one")
        await one.turn()
        other = toy.make_bundle(tmp_path / "other", max_tokens=32)
        (other / "model.fp16.onnx").write_bytes(b"changed")
        header = bundles.load(folder).header
        (other / "bundle.json").unlink()
        bundles.create(other, header)
        folder.rename(tmp_path / "aside")
        other.rename(folder)
        await one.turn()
        assert set(one.classifier.tasks) == {"film", "food"}
        assert "other graphs" in one.follower.problems[""]

    run(story)


# ---- what a client is told -----------------------------------------------------------------------


def test_adding_is_refused_before_anyone_hears_of_it(folder: Path) -> None:
    classifier = SharedClassifier(folder, threads=1)
    classifier.publish = lambda *_: pytest.fail("published")
    with pytest.raises(UserError, match="has no task 'mood'"):
        classifier.add_task("mood")
    with pytest.raises(UserError, match="8 wide"):
        classifier.add_task("mood", toy.record(["a", "b"], ["dull", "nice"]),
                            toy.prompt_of(1)[:, :4])  # fmt: skip
    with pytest.raises(UserError, match="no task 'mood'"):
        classifier.remove_task("mood")


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (Outcome(3, 0, {"two": "no room"}), "1 of 3 replicas failed: no room"),
        (Outcome(3, 2, {}), "2 of 3 replicas have not confirmed task 'film' yet"),
    ],
)
def test_what_not_all_replicas_did_is_a_failure(
    folder: Path, outcome: Outcome, message: str
) -> None:
    classifier = SharedClassifier(folder, threads=1)
    classifier.publish = lambda *_: outcome
    with pytest.raises(Failure, match=message):
        classifier.add_task("film")
    with pytest.raises(Failure, match=message):
        classifier.remove_task("film")
