"""The loop on a tiny model: resume, processes, rates, and the mixture's batches."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pretraining_toy import SHARES, make_tokenizer, pools, setting
from tokenizers import Tokenizer

from serve.errors import Failure, UserError
from trainer.pretraining.loading import source, usual_loaders
from trainer.pretraining.losses import Auxiliary, Result, batch_loss
from trainer.pretraining.mixture import Batch, Mixture
from trainer.pretraining.model import save_backbone
from trainer.pretraining.parallel import Workers
from trainer.pretraining.state import Progress
from trainer.pretraining.train import FIRST, LATER, Schedule, make_optimizer, train
from trainer.pretraining.wordings import HELD_OUT, QUESTIONS
from trainer.t5 import FrozenT5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


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


@pytest.mark.parametrize(
    ("done", "shares"), [(0.0, FIRST), (0.29, FIRST), (0.3, LATER), (1, LATER)]
)
def test_the_mixture_changes_when_the_first_share_of_a_run_is_over(
    done: float, shares: dict[str, float]
) -> None:
    schedule = Schedule(first=0.3)
    assert schedule.shares(done) == shares
    without = replace(schedule, without=("distil", "full")).shares(done)
    assert without == {kind: shares[kind] for kind in ("words", "prefix", "span")}
    assert FIRST["distil"] > 0.4 > 0.1 > LATER["distil"]  # the teacher first, then questions


def test_each_part_of_the_model_has_its_rate(tokenizer: Tokenizer) -> None:
    t5, auxiliary, _ = setting(tokenizer)
    schedule = Schedule(rate=1e-3, fresh=7.0, prompt=0.5, warmup=30, fresh_warmup=4)
    groups = make_optimizer(t5, auxiliary, schedule).param_groups
    names = {id(p): n for n, p in [*t5.model.named_parameters(), *auxiliary.named_parameters()]}
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(names)
    want = {  # rate, steps of warm-up, weight decay
        "shared": (1e-3, 30, 0.0), "encoder": (1e-3, 30, 0.01), "decoder": (7e-3, 4, 0.01),
        "heads": (7e-3, 4, 0.0), "prompts": (0.5, 30, 0.0),
    }  # fmt: skip
    for name, group in found.items():
        figures = (group["peak"], group["warmup"], group["weight_decay"])
        assert figures == pytest.approx(want[name.split(".")[0]]), name


@pytest.mark.parametrize("clip", [1e-3, 1e9])
def test_the_gradient_of_each_part_is_cut_to_the_largest_norm(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float
) -> None:
    norms: list[float] = []

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                norms.append(float(torch.cat([p.grad.ravel() for p in group["params"]]).norm()))

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    t5, auxiliary, mixture = setting(tokenizer)
    train(t5, auxiliary, mixture, None, replace(SCHEDULE, clip=clip, without=("span",)), tmp_path,
          stop_after=1)  # fmt: skip
    moved = [norm for norm in norms if norm]  # the bank is left alone by a batch without prompts
    assert len(norms) == 5 and len(moved) >= 4
    if clip < 1:
        assert moved == pytest.approx([clip] * len(moved), rel=2e-3)
    else:
        assert min(moved) > 1e-3


def test_the_teacher_counts_half_once_the_first_share_of_a_run_is_over(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []

    def watched(t5: FrozenT5, auxiliary: Auxiliary, batch: Batch, teacher: None,
                aux_weight: float, distil_weight: float) -> Result:  # fmt: skip
        seen.append((aux_weight, distil_weight))
        return batch_loss(t5, auxiliary, batch, teacher, aux_weight, distil_weight)

    monkeypatch.setattr("trainer.pretraining.train.batch_loss", watched)
    schedule = replace(SCHEDULE, steps=4, first=0.5, aux_weight=0.7, distil_weight=5.0)
    train(*setting(tokenizer), None, schedule, tmp_path)
    assert seen == [(0.7, 5.0)] * 2 + [(0.7, 2.5)] * 2


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


def test_a_run_that_diverged_keeps_its_last_checkpoint(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state.safetensors"
    t5, auxiliary, mixture = setting(tokenizer)
    train(t5, auxiliary, mixture, None, SCHEDULE, tmp_path, workers=1, stop_after=2)
    before = state.read_bytes()
    with torch.no_grad():
        t5.model.shared.weight.mul_(1e30)
    monkeypatch.setattr("trainer.pretraining.train.load_state", lambda *_: Progress(step=2))
    with pytest.raises(Failure, match="the gradient is not finite at step 2: lower --rate"):
        train(t5, auxiliary, mixture, None, SCHEDULE, tmp_path, workers=1, resume=True,
              checkpoint_seconds=0)  # fmt: skip
    assert state.read_bytes() == before


def test_unlabelled_recipe_is_refused(tokenizer: Tokenizer) -> None:
    plain = {"windows": pools()["windows"]}
    with pytest.raises(UserError, match="polarity"):
        Mixture(plain, tokenizer, 200, seed=3)
