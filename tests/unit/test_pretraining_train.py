"""The loop on a tiny model: resume, processes, the mixture's batches, and the silent prompts."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from tokenizers import Tokenizer

from serve.errors import Failure, UserError
from trainer.pretraining.loading import source, usual_loaders
from trainer.pretraining.losses import Auxiliary, batch_loss
from trainer.pretraining.mixture import Batch, Mixture
from trainer.pretraining.model import new_model, save_backbone
from trainer.pretraining.parallel import Workers
from trainer.pretraining.recipe import COLUMNS
from trainer.pretraining.shards import Pool
from trainer.pretraining.state import Progress
from trainer.pretraining.train import LATER, Schedule, initial_prompts, train
from trainer.pretraining.vocabulary import build_tokenizer, train_pieces
from trainer.pretraining.wordings import HELD_OUT, QUESTIONS, label_words
from trainer.t5 import FrozenT5

SHARES = {k: v for k, v in LATER.items() if k != "distil"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(train_pieces(["the film was great"] * 9, 330, label_words()))


def pools(size: int = 120) -> dict[str, Pool]:
    rng = np.random.default_rng(0)
    found = {}
    for name in ("reviews", "windows"):
        lengths = rng.integers(6, 50, size)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = rng.integers(110, 300, offsets[-1]).astype(np.uint16)
        columns = {c: np.full(size, -1, np.int8) for c in COLUMNS}
        if name == "reviews":
            columns["polarity"] = rng.integers(0, 2, size).astype(np.int8)
            columns["tone"] = rng.integers(0, 3, size).astype(np.int8)
            columns["star"] = rng.integers(0, 5, size).astype(np.int8)
        found[name] = Pool(name, tokens, offsets, columns)
    return found


def setting(tokenizer: Tokenizer) -> tuple[FrozenT5, Auxiliary, Mixture]:
    mixture = Mixture(pools(), tokenizer, 200, seed=3)
    model = new_model(tokenizer.get_vocab_size(), width=32, layers=2, decoder_layers=1, heads=4,
                      feed_forward=64, deviation=0.05, seed=0)  # fmt: skip
    words = sorted({mixture.asker.ids(w)[0] for w in label_words()})
    prompts = initial_prompts(mixture.tasks, mixture.asker.ids, model.shared.weight, 100, 0)
    return (FrozenT5(model, trainable=True), Auxiliary(prompts, 32, torch.tensor(words)), mixture)


SCHEDULE = Schedule(rate=1e-3, steps=8, warmup=2, fresh_warmup=2)


def run(tokenizer: Tokenizer, folder: Path, workers: int, stops: list[int | None],
        loaders: int | None = None) -> dict[str, torch.Tensor]:  # fmt: skip
    """Train with an interruption after each number of `stops`; fresh objects every time."""
    folder.mkdir()
    for number, stop in enumerate(stops):
        t5, auxiliary, mixture = setting(tokenizer)
        train(t5, auxiliary, mixture, None, SCHEDULE, folder, resume=number > 0, workers=workers,
              stop_after=stop, loaders=loaders)  # fmt: skip
    return {**t5.model.state_dict(), **auxiliary.state_dict()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_resume_equals_uninterrupted_run(tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = run(tokenizer, tmp_path / "a", 1, [None])
    parts = run(tokenizer, tmp_path / "b", 1, [3, 5, None])
    fewer = run(tokenizer, tmp_path / "c", 1, [5])
    assert same(whole, parts)
    assert not same(whole, fewer)


def test_batches_made_ahead_are_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = run(tokenizer, tmp_path / "a", 1, [None])
    ahead = run(tokenizer, tmp_path / "b", 1, [3, None], loaders=2)
    assert same(whole, ahead)


def test_batches_made_ahead_are_asked_for_in_order(tokenizer: Tokenizer) -> None:
    *_, mixture = setting(tokenizer)
    take = source(mixture, lambda done: SHARES, first=4, rank=1, count=2, loaders=1)
    for step in (4, 5):
        wanted = mixture.batch(2 * step + 1, SHARES)
        assert torch.equal(take(step, 0.0).ids, wanted.ids)
    with pytest.raises(ValueError, match="6 is next"):
        take(5, 0.0)


def test_on_a_cpu_nothing_makes_batches_ahead_but_on_a_gpu_the_other_cores_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)))
    assert usual_loaders(torch.device("cpu")) == 0
    assert usual_loaders(torch.device("cuda")) == 4


def test_gradient_of_processes_is_the_mean_of_their_batches(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def gradient(workers: int, steps: list[int]) -> torch.Tensor:
        t5, auxiliary, mixture = setting(tokenizer)

        def compute(rank: int, step: int, done: float) -> list[float]:
            batch = mixture.batch(step * workers + rank, SHARES)
            batch_loss(t5, auxiliary, batch, None, 0.5, 0.0).loss.backward()
            return [0.0] * 5

        team = Workers([t5.model, auxiliary], compute, workers)
        rows = []
        for step in steps:
            team.step(step, 0.0)
            rows.append(team.gradients[0].clone())
        team.close()
        return torch.stack(rows).mean(0)

    torch.testing.assert_close(gradient(2, [4]), gradient(1, [8, 9]), atol=1e-6, rtol=1e-4)


def test_batches_are_a_function_of_seed_and_step(tokenizer: Tokenizer) -> None:
    *_, first = setting(tokenizer)
    *_, second = setting(tokenizer)
    kinds = set()
    for step in range(60):
        a, b = first.batch(step, SHARES), second.batch(step, SHARES)
        assert a.kind == b.kind and torch.equal(a.ids, b.ids)
        kinds.add(a.kind)
    assert kinds == set(SHARES)


def test_kinds_left_out_are_never_drawn(tokenizer: Tokenizer, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    drawn = set()
    batch = Mixture.batch

    def watch(self: Mixture, step: int, shares: dict[str, float]) -> Batch:
        drawn.add((found := batch(self, step, shares)).kind)
        return found

    monkeypatch.setattr(Mixture, "batch", watch)
    t5, auxiliary, mixture = setting(tokenizer)
    schedule = replace(SCHEDULE, steps=40, without=("prefix", "full"))
    train(t5, auxiliary, mixture, None, schedule, tmp_path)
    assert drawn == {"words", "span"}  # without a teacher, nothing is distilled


def test_a_short_run_is_not_all_warm_up() -> None:
    short, long = Schedule(steps=140, warmup=150), Schedule(steps=14000, warmup=150)
    # A third of the way: (1 + cos(pi / 3)) / 2 where the warm-up is over.
    assert short.factor(Progress(step=47), 150) == pytest.approx(0.75, abs=0.01)
    assert short.factor(Progress(step=9), 150) == pytest.approx(0.25, rel=0.02)
    assert long.factor(Progress(step=74), 150) == pytest.approx(0.25, rel=0.001)
    assert Schedule(minutes=5).factor(Progress(step=74), 150) == pytest.approx(0.25)


def test_spans_come_with_questions_only_where_questions_are_asked(tokenizer: Tokenizer) -> None:
    *_, mixture = setting(tokenizer)

    def questions(shares: dict[str, float]) -> int:
        labels = mixture.batch(0, shares).labels
        assert labels is not None
        lengths = (labels != -100).sum(1)
        known = torch.tensor(sorted({w for task in mixture.tasks for w in task.words}))
        return int(((lengths == 3) & torch.isin(labels[:, 1], known)).sum())

    assert questions({"span": 1.0}) == 0
    assert questions({"span": 1.0, "words": 0.0}) >= 2


def test_targets_are_the_classes_that_rows_were_drawn_for(tokenizer: Tokenizer) -> None:
    *_, mixture = setting(tokenizer)
    for step in range(40):
        batch = mixture.batch(step, {"words": 0.5, "prefix": 0.5})
        assert batch.words is not None and batch.targets is not None
        assert torch.equal(batch.targets.argmax(1), batch.classes)
        assert torch.equal(batch.targets.sum(1), torch.ones(len(batch.ids)))
        assert not batch.targets[batch.words < 0].any()
        assert (batch.ids == 3).sum(1).tolist() == [1] * len(batch.ids)  # one <extra_id_0> a row


def test_held_out_wordings_are_never_asked(tokenizer: Tokenizer) -> None:
    trained = {w for q in QUESTIONS for w, _ in q.fixed} | {w for q in QUESTIONS for w in q.listing}
    assert len(HELD_OUT) >= 3
    assert not trained & {w for w, _ in HELD_OUT}


def test_silent_prompts_do_not_touch_the_bank(tokenizer: Tokenizer) -> None:
    t5, auxiliary, mixture = setting(tokenizer)
    batch = next(b for b in (mixture.batch(s, {"prefix": 1.0}) for s in range(99))
                 if (b.tasks < 0).any() and (b.tasks >= 0).any())  # fmt: skip
    batch_loss(t5, auxiliary, batch, None, 0.0, 0.0).loss.backward()
    touched = set(auxiliary.prompts.grad.abs().sum((1, 2)).nonzero()[:, 0].tolist())
    assert touched == set(batch.tasks[batch.tasks >= 0].tolist())


def plain_logits(t5: FrozenT5, batch: Batch) -> torch.Tensor:
    """transformers' own logits [B, V] where the answer stands."""
    start = torch.tensor([[0, 3]]).expand(len(batch.ids), -1)
    return t5.model(input_ids=batch.ids, attention_mask=batch.mask.long(),
                    decoder_input_ids=start).logits[:, -1]  # fmt: skip


def test_loss_of_a_restricted_row_is_the_softmax_over_its_words(tokenizer: Tokenizer) -> None:
    t5, auxiliary, mixture = setting(tokenizer)
    batch = mixture.batch(0, {"words": 1.0})
    batch.restricted = torch.ones(len(batch.ids), dtype=torch.bool)
    with torch.no_grad():
        found = batch_loss(t5, auxiliary, batch, None, 0.0, 0.0).answer
        logits = plain_logits(t5, batch)
    plain = []
    for row, words, c in zip(logits, batch.words, batch.classes, strict=True):
        own = torch.tensor([row[w] for w in words if w >= 0])
        plain.append(float(-own.log_softmax(0)[c]))
    assert found == pytest.approx(np.mean(plain), rel=1e-4)


def test_a_judges_degrees_are_what_is_answered(tokenizer: Tokenizer) -> None:
    known = pools()
    degrees = np.random.default_rng(1).dirichlet(np.ones(5), len(known["reviews"]))
    known["reviews"].degrees = np.round(255 * degrees).astype(np.uint8)
    mixture = Mixture(known, tokenizer, 200, seed=3)
    t5, auxiliary, _ = setting(tokenizer)
    batch = mixture.batch(0, {"words": 1.0})
    judged = [c in ("polarity", "tone", "star") for c in batch.columns]
    assert any(judged)
    rounded = known["reviews"].degrees / 255
    low, middle, high = rounded[:, :2].sum(1), rounded[:, 2], rounded[:, 3:].sum(1)
    possible = {"polarity": np.stack([low + middle / 2, high + middle / 2], 1),
                "tone": np.stack([low, middle, high], 1), "star": rounded}  # fmt: skip
    for column, target in zip(batch.columns, batch.targets, strict=True):
        if column in possible:
            table = possible[column] / possible[column].sum(1, keepdims=True)
            nearest = np.abs(table - target[: table.shape[1]].numpy()).sum(1).min()
            assert nearest < 1e-6
    with torch.no_grad():
        found = batch_loss(t5, auxiliary, batch, None, 0.0, 0.0).answer
        logits = plain_logits(t5, batch)
    plain = []
    for row, words, target, alone in zip(
        logits, batch.words, batch.targets, batch.restricted, strict=True
    ):
        ids = [int(w) for w in words if w >= 0]
        among = ids if alone else auxiliary.candidates.tolist()
        total = torch.logsumexp(row[among], 0)
        plain.append(-sum(float(t * (row[w] - total)) for w, t in zip(ids, target, strict=False)))
    assert found == pytest.approx(np.mean(plain), rel=1e-4)


def test_saved_folder_is_an_ordinary_t5(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    t5, *_ = setting(tokenizer)
    save_backbone(t5.model, tokenizer, tmp_path / "mini")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "mini", dtype=torch.float32)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "mini")
    inputs = loaded("the film It was <extra_id_0>.", return_tensors="pt")
    with torch.no_grad():
        ours = t5.model(**inputs, decoder_input_ids=torch.tensor([[0, 3]])).logits
        theirs = model(**inputs, decoder_input_ids=torch.tensor([[0, 3]])).logits
    torch.testing.assert_close(theirs, ours, atol=5e-3, rtol=5e-3)  # stored in 16 bits


def test_a_process_that_fails_ends_the_step() -> None:
    module = torch.nn.Linear(2, 2)

    def compute(rank: int, step: int, done: float) -> list[float]:
        if rank == 1:
            raise SystemExit(3)
        return [0.0] * 5

    team = Workers([module], compute, 2)
    with pytest.raises(Failure, match="--resume"):
        team.step(0, 0.0)


def test_a_process_that_is_killed_while_it_waits_is_noticed_at_once() -> None:
    team = Workers([torch.nn.Linear(2, 2)], lambda rank, step, done: [float(step)] * 5, 3)
    assert team.step(7, 0.0).tolist() == [[7.0] * 5] * 3
    os.kill(team.processes[0].pid, signal.SIGKILL)
    team.processes[0].join()
    with pytest.raises(Failure, match="--resume"):
        team.step(8, 0.0)


def test_processes_end_with_the_one_that_started_them() -> None:
    code = (
        "import os, torch\n"
        "from trainer.pretraining.parallel import Workers\n"
        "team = Workers([torch.nn.Linear(2, 2)], lambda *_: [0.0] * 5, 3)\n"
        "team.step(0, 0.0)\n"
        "print(*[p.pid for p in team.processes], flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pids = [int(pid) for pid in found.stdout.split()]
    assert len(pids) == 2 and found.returncode == -signal.SIGKILL
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert psutil.wait_procs(left, timeout=20)[1] == []


def test_a_run_is_not_resumed_with_other_settings(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def begin(seed: int, resume: bool, workers: int = 1) -> None:
        t5, auxiliary, mixture = setting(tokenizer)
        train(t5, auxiliary, mixture, None, SCHEDULE, tmp_path, resume=resume, workers=workers,
              stop_after=2, settings={"seed": seed})  # fmt: skip

    begin(1, resume=False)
    with pytest.raises(UserError, match="of a run with seed 1, this one has 2"):
        begin(2, resume=True)
    with pytest.raises(UserError, match="of a run with processes 1, this one has 2"):
        begin(1, resume=True, workers=2)
    begin(1, resume=True)


def test_unlabelled_recipe_is_refused(tokenizer: Tokenizer) -> None:
    plain = {"windows": pools()["windows"]}
    with pytest.raises(UserError, match="polarity"):
        Mixture(plain, tokenizer, 200, seed=3)
