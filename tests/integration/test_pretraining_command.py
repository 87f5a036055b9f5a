"""`python -m trainer backbone` from raw files to a folder that the toolkit loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel

from serve.errors import UserError
from trainer.backbone import load_backbone
from trainer.pretraining.command import run_backbone
from trainer.pretraining.config import BackboneConfig
from trainer.pretraining.wordings import label_words

GOOD = "lovely charming superb touching bright honest".split()
BAD = "dull clumsy noisy tedious lifeless shallow".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    texts, labels = [], []
    for i in range(200):
        words = BAD if i % 2 else GOOD
        chosen = " and ".join(rng.choice(words, 4))
        texts.append(f"The story is {chosen} from the first scene on.")
        labels.append(1 - i % 2)
    pq.write_table(pa.table({"text": texts, "label": labels}), folder / "reviews.parquet")
    lines = [f"Station {i} lies on the river. It opened in {1800 + i}. Trains stop there. "
             f"The town has {i} houses." for i in range(60)]  # fmt: skip
    pq.write_table(pa.table({"text": lines}), folder / "plain.parquet")
    pq.write_table(pa.table({"text": texts[:1]}), folder / "held.parquet")
    (folder / "recipe.toml").write_text(
        'held_out = ["held.parquet"]\n'
        '[[labelled]]\nname = "reviews"\nfile = "reviews.parquet"\n'
        'columns = { polarity = ["label", { 0 = 0, 1 = 1 }] }\n'
        '[[plain]]\nfile = "plain.parquet"\ndocuments = 60\n'
    )
    return folder


LAUNCH = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip


def backbone(
    data: Path, folder: Path, *flags: str, through: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, *through, "-m", "trainer", "backbone", "--data-dir", str(data),
        "--labelled", str(data / "recipe.toml"), "--shards", str(folder / "shards"),
        "--out", str(folder / "tiny"), "--width", "32", "--heads", "4", "--layers", "2",
        "--feed-forward", "64", "--vocab-size", "500", "--batch-tokens", "200", *flags,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)


def test_from_files_to_a_backbone(data: Path, tmp_path: Path) -> None:
    done = backbone(data, tmp_path, "--prepare")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "tiny").exists()
    done = backbone(data, tmp_path, "--steps", "3", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr and "min left" in done.stderr
    loaded = load_backbone(str(tmp_path / "tiny"))
    assert loaded.t5.width == 32 and loaded.tokenizer.eos_token_id == 1
    with safe_open(tmp_path / "tiny" / "model.safetensors", "pt") as file:
        assert {str(file.get_tensor(k).dtype) for k in file.keys()} == {"torch.float16"}  # noqa: SIM118
    again = backbone(data, tmp_path, "--steps", "5", "--workers", "2")
    assert again.returncode == 2 and "--resume" in again.stderr
    other = backbone(data, tmp_path, "--steps", "5", "--workers", "2", "--resume", "--seed", "2")
    assert other.returncode == 2 and "prepared with another seed" in other.stderr
    less = backbone(data, tmp_path, "--workers", "2", "--resume", "--without", "full")
    assert less.returncode == 2 and "of a run with without [], this one has ['full']" in less.stderr
    more = backbone(data, tmp_path, "--steps", "5", "--workers", "2", "--resume")
    assert more.returncode == 0, more.stderr
    with safe_open(tmp_path / "tiny.run" / "state.safetensors", "pt") as file:
        assert '"step": 5' in file.metadata()["progress"]
    # The same flags over shards whose pieces are numbered otherwise, as preparing anew may do it.
    tokenizer = tmp_path / "shards" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text("utf-8") + "\n", "utf-8")
    anew = backbone(data, tmp_path, "--steps", "6", "--workers", "2", "--resume")
    assert anew.returncode == 2 and "tokenizer" in anew.stderr


def test_start_goes_on_from_a_backbone(data: Path, tmp_path: Path) -> None:
    done = backbone(data, tmp_path, "--steps", "2", "--workers", "2")
    assert done.returncode == 0, done.stderr
    before = tmp_path / "before"
    (tmp_path / "tiny").rename(before)
    shutil.rmtree(tmp_path / "tiny.run")
    old = backbone(data, tmp_path, "--steps", "1", "--workers", "2", "--start", str(before))
    assert old.returncode == 2 and "prepared with another start" in old.stderr
    # Nothing moves at rate 0 but the soft prompts, whose rate is their own; flags of another
    # geometry (see `backbone`) do not count.
    flags = ("--workers", "2", "--start", str(before), "--width", "64", "--vocab-size", "600")
    done = backbone(data, tmp_path, *flags, "--prepare")
    assert done.returncode == 0, done.stderr
    done = backbone(data, tmp_path, *flags, "--steps", "1", "--rate", "0")
    assert done.returncode == 0, done.stderr
    assert "of its soft prompts" in done.stderr
    was, now = (load_file(folder / "model.safetensors") for folder in (before, tmp_path / "tiny"))
    assert was.keys() == now.keys() and all(torch.equal(was[k], now[k]) for k in was)
    was, now = (load_file(f / "soft_prompts.safetensors") for f in (before, tmp_path / "tiny"))
    assert was.keys() == now.keys()
    for key in was:  # one step of Adam at 1e-2, with a warm-up of one step
        assert (was[key] - now[key]).abs().max() < 0.011
    assert read_vocabulary(before) == read_vocabulary(tmp_path / "tiny")
    done = backbone(data, tmp_path, "--start", str(tmp_path / "shards"))
    assert done.returncode == 2 and "is no backbone" in done.stderr
    strange = json.loads((before / "tokenizer.json").read_text("utf-8"))
    for token in strange["added_tokens"]:
        token["content"] = token["content"].replace("</s>", "</end>")
    strange["model"]["vocab"]["</end>"] = strange["model"]["vocab"].pop("</s>")
    (before / "tokenizer.json").write_text(json.dumps(strange), "utf-8")
    done = backbone(data, tmp_path, "--start", str(before))
    assert done.returncode == 2 and "does not number </s>" in done.stderr


def read_vocabulary(folder: Path) -> dict[str, int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def test_a_judge_is_trained_once_labels_the_sentences_and_is_the_teacher(
    data: Path, tmp_path: Path
) -> None:
    make_bert(tmp_path / "bert")
    flags = ("--teacher", str(tmp_path / "bert"), "--judge", str(tmp_path / "judge"))
    refused = backbone(data, tmp_path, "--prepare", *flags[2:])
    assert refused.returncode == 2 and "--teacher" in refused.stderr
    done = backbone(data, tmp_path, "--prepare", "--workers", "2", *flags)
    assert done.returncode == 0, done.stderr
    judged = load_file(tmp_path / "shards" / "reviews.safetensors")["degrees"]
    assert judged.shape[1] == 5 and judged.sum(1).float().mean() == pytest.approx(255, abs=2)
    made = (tmp_path / "judge" / "judge.safetensors").stat().st_mtime_ns
    done = backbone(data, tmp_path, "--steps", "2", "--workers", "2", *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "judge" / "judge.safetensors").stat().st_mtime_ns == made
    assert load_backbone(str(tmp_path / "tiny")).t5.width == 32
    other = backbone(data, tmp_path, "--steps", "3", "--resume", *flags[:2])
    assert other.returncode == 2 and "prepared with another judge" in other.stderr
    # A teacher from which nothing is learned may be of another geometry.
    small = (*flags, "--no-convert", "--width", "16", "--layers", "1", "--steps", "1",
             "--workers", "1", "--out", str(tmp_path / "small"))  # fmt: skip
    refused = backbone(data, tmp_path, *small)
    assert refused.returncode == 2 and "pass --width 32" in refused.stderr
    done = backbone(data, tmp_path, *small, "--without", "distil")
    assert done.returncode == 0, done.stderr
    assert load_backbone(str(tmp_path / "small")).t5.width == 16
    # A backbone has a say in the verdicts; which one it was is remembered.
    votes = ("--voters", str(tmp_path / "tiny"))
    alone = backbone(data, tmp_path, "--prepare", *flags[:2], *votes)
    assert alone.returncode == 2 and "--judge" in alone.stderr
    none = backbone(data, tmp_path, "--prepare", *flags, "--voters", str(tmp_path / "bert"))
    assert none.returncode == 2 and "--voters" in none.stderr
    other = backbone(data, tmp_path, "--steps", "3", "--resume", *flags, *votes)
    assert other.returncode == 2 and "prepared with other voters" in other.stderr
    done = backbone(data, tmp_path, "--prepare", "--workers", "2", *flags, *votes)
    assert done.returncode == 0, done.stderr
    voted = load_file(tmp_path / "shards" / "reviews.safetensors")["degrees"]
    assert voted.shape == judged.shape and (voted != judged).any()
    # Of two judges the first is the one that was there, and both have a say.
    two = (*flags, "--judges", "2", "--judge-tokens", "64")
    other = backbone(data, tmp_path, "--steps", "3", "--resume", *two)
    assert other.returncode == 2 and "another number of judges" in other.stderr
    done = backbone(data, tmp_path, "--prepare", "--workers", "2", *two)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "judge" / "judge.safetensors").stat().st_mtime_ns == made
    first, second = (load_file(tmp_path / name / "judge.safetensors") for name in
                     ("judge", "judge-2"))  # fmt: skip
    assert any((first[key] != second[key]).any() for key in first)
    both = load_file(tmp_path / "shards" / "reviews.safetensors")["degrees"]
    assert both.shape == judged.shape and (both != judged).any()


def make_bert(folder: Path) -> None:
    """A BERT of the geometry that `backbone` asks for, with the label words in its vocabulary."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?<>/_:'"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    names += [f"##{c}" for c in letters]
    names = list(dict.fromkeys([*names, *label_words(), *GOOD, *BAD]))
    tokenizer = Tokenizer(WordPiece({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = BertConfig(vocab_size=len(names), hidden_size=32, num_hidden_layers=2,
                        num_attention_heads=4, intermediate_size=64,
                        max_position_embeddings=128)  # fmt: skip
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_launched_processes_take_the_steps_of_forked_ones(data: Path, tmp_path: Path) -> None:
    # Prepared once: pieces of equal count may be numbered in another order the next time.
    assert backbone(data, tmp_path, "--prepare").returncode == 0
    states = []
    for name, through in (("forked", ()), ("launched", LAUNCH)):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "shards", folder / "shards")
        for flags in (["--steps", "2"], ["--steps", "4", "--resume"]):
            done = backbone(data, folder, *flags, "--workers", "2", through=through)
            assert done.returncode == 0, done.stderr
            assert ("2 processes of accelerate" in done.stderr) == bool(through)
        states.append(load_file(folder / "tiny.run" / "state.safetensors"))
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        if key.startswith("model."):
            torch.testing.assert_close(states[1][key], states[0][key], atol=1e-5, rtol=1e-4)


def test_errors_name_what_to_change(data: Path, tmp_path: Path) -> None:
    done = backbone(data / "nowhere", tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "recipe" in done.stderr
    for folder in ("tiny", "shards"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tiny" / "notes.txt").write_text("mine")
    done = backbone(data, tmp_path)
    assert done.returncode == 2 and "holds other files" in done.stderr
    assert not list((tmp_path / "shards").iterdir())  # said before the work
    done = backbone(data, tmp_path, "--out", str(tmp_path / "new"),
                    "--without", "words", "prefix", "full", "span")  # fmt: skip
    assert done.returncode == 2 and "--without leaves no kind of batch" in done.stderr


def test_a_judge_still_to_be_trained_is_refused_where_processes_were_launched(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first would wait in its first step for those that wait for it at the barrier."""
    config = BackboneConfig(
        data_dir=str(data), labelled=str(data / "recipe.toml"), shards=str(tmp_path / "shards"),
        out=str(tmp_path / "tiny"), judge=str(tmp_path / "judge"), teacher=str(tmp_path / "none"),
    )  # fmt: skip
    for rank in (0, 1):
        team = SimpleNamespace(count=2, main=rank == 0, wait=lambda: pytest.fail("it waits"))
        monkeypatch.setattr("trainer.pretraining.command.processes", lambda team=team: team)
        with pytest.raises(UserError, match=r"judge is not trained yet.* without `accelerate"):
            run_backbone(config)


def test_preparing_that_ends_early_leaves_nothing_that_looks_done(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BackboneConfig(
        data_dir=str(data), labelled=str(data / "recipe.toml"), shards=str(tmp_path / "shards"),
        out=str(tmp_path / "tiny"), vocab_size=500, prepare=True,
    )  # fmt: skip
    run_backbone(config)

    def ended(*_: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr("trainer.pretraining.preparation.prepare", ended)
    with pytest.raises(SystemExit):
        run_backbone(config)
    with pytest.raises(UserError, match="pass --prepare"):
        run_backbone(replace(config, prepare=False))
