"""What `backbone` trains on: text and labelled sets as shards of token ids, made once."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from serve.errors import UserError
from serve.files import read_json, sha256, write_json
from trainer.backbone import weights_hash
from trainer.pretraining.config import BackboneConfig
from trainer.pretraining.judge import HEAD, Document, Judge, JudgeSchedule
from trainer.pretraining.judging import documents, load_judge, save_judge, train_judge, verdicts
from trainer.pretraining.recipe import Plain, Recipe, load_recipe
from trainer.pretraining.rows import read_rows
from trainer.pretraining.shards import Verdicts, add_pool, load_pools, prepare
from trainer.pretraining.start import start_tokenizer
from trainer.pretraining.teacher import load_teacher, read_bert
from trainer.pretraining.texts import HeldOut
from trainer.pretraining.topics import make_topics, save_names
from trainer.pretraining.vocabulary import (
    SENTINELS,
    SPECIAL,
    build_tokenizer,
    check_single_pieces,
    choose_pieces,
    save_tokenizer,
    train_pieces,
)
from trainer.pretraining.voting import with_votes
from trainer.pretraining.wordings import label_words
from trainer.tables import decoded_lines

_PREPARED = "prepared.json"  # in the folder of the shards
_OTHER = {"vocab_size": "another vocab size", "voters": "other voters", "text": "other text",
          "judges": "another number of judges", "topics": "another number of topics"}  # fmt: skip


def prepare_shards(config: BackboneConfig, shards: Path) -> None:
    """Texts and labelled sets of the recipe as token ids in the folder `shards`, with a judge's
    verdicts and topics where they are asked for.

    Raises:
        UserError: flags that do not go together; see `load_recipe`.
    """
    recipe = load_recipe(Path(config.labelled), Path(config.data_dir))
    if config.voters and not config.judge:
        raise UserError("--voters vote with a judge: name its folder with --judge")
    for folder in config.voters:  # before a judge is trained
        start_tokenizer(Path(folder), "--voters")
    if config.judge and config.teacher == "none":
        raise UserError(
            "--judge is trained from a sentence encoder: name its folder with --teacher"
        )
    further = [
        Plain(_as_parquet(Path(name), shards / f"text-{number}-{Path(name).stem}.parquet"), 10**9)
        for number, name in enumerate(config.text)
    ]
    recipe = replace(recipe, plain=[*recipe.plain, *further])
    judge = _judge(config, recipe) if config.judge else None
    size = config.vocab_size - len(SPECIAL) - len(SENTINELS)
    shards.mkdir(parents=True, exist_ok=True)
    if config.start:
        tokenizer = start_tokenizer(Path(config.start))
    elif config.teacher == "none":
        tokenizer = build_tokenizer(train_pieces(_texts(recipe), size, label_words()))
    else:
        _, theirs = read_bert(teacher_folder(config))
        tokenizer = build_tokenizer(choose_pieces(_texts(recipe), theirs, size, label_words()))
    check_single_pieces(tokenizer, label_words())
    # The pools that may stand there are of another vocabulary from here on.
    (shards / _PREPARED).unlink(missing_ok=True)
    save_tokenizer(tokenizer, shards)
    prepare(recipe, tokenizer, shards, config.seed, judge)
    if _topics(config):
        _add_topics(config, shards, tokenizer)
    write_json(shards / _PREPARED, _request(config))


def check_prepared(config: BackboneConfig, shards: Path) -> None:
    """Raises: UserError for shards of another recipe or of other flags."""
    path = shards / _PREPARED
    asked = _request(config)
    made = {"voters": [], "judges": 1, "topics": 0, **read_json(path)} if path.is_file() else {}
    if other := [name for name in asked if made.get(name) != asked[name]]:
        raise UserError(
            f"--shards {shards} were prepared with {_OTHER.get(other[0], 'another ' + other[0])}: "
            "pass --prepare to make them anew, or another --shards"
        )


def check_judged(config: BackboneConfig) -> None:
    """Raises: UserError for a judge still to be trained, where several processes were launched: the
    first would train it, and wait in its first step for those that wait for it."""
    folders = judge_folders(config) if config.judge else []
    if missing := [folder for folder in folders if not (folder / HEAD).is_file()]:
        raise UserError(
            f"the judge {missing[0]} is not trained yet, and that takes one command of its own: "
            "run this one once with --prepare and without `accelerate launch`"
        )


def teacher_folder(config: BackboneConfig) -> Path:
    """The folder of the BERT whose weights and states are learned from."""
    return Path(config.judge or config.teacher)


def vocabulary_hash(config: BackboneConfig) -> str:
    """Hash of the shards' tokenizer: prepared anew, its pieces may be numbered otherwise."""
    return sha256(Path(config.shards) / "tokenizer.json")


def _judge(config: BackboneConfig, recipe: Recipe) -> Verdicts:
    """The judge of --judge, or the mean of --judges, each trained first where its folder does not
    exist."""
    workers = 1 if torch.cuda.is_available() else config.workers
    if workers > 1:
        torch.set_num_threads(1)
    folders, half = judge_folders(config), wants_half(config)
    given: list[Document] = []
    for number, folder in enumerate(folders):
        if (folder / HEAD).is_file():
            continue
        judge, tokenizer = _on_device(Path(config.teacher))
        if not given:
            held_out = HeldOut.read(recipe.held_out)
            given = documents(recipe, held_out, tokenizer, config.seed)
        schedule = JudgeSchedule(epochs=config.judge_epochs, tokens=config.judge_tokens,
                                 rate=config.judge_rate)  # fmt: skip
        checkpoint = folder.with_name(folder.name + ".run") / "state.safetensors"
        if checkpoint.is_file() and not config.resume:
            raise UserError(f"{checkpoint} is of a stopped judge: pass --resume, or remove it")
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        train_judge(judge, given, schedule, config.seed + number, workers, checkpoint,
                    resume=config.resume and checkpoint.is_file(), half=half)  # fmt: skip
        save_judge(judge, tokenizer, folder)
        checkpoint.unlink(missing_ok=True)
    judges = [_on_device(folder) for folder in folders]

    def judged(texts: list[str]) -> np.ndarray:
        found = [verdicts(judge, tokenizer, texts, workers, half) for judge, tokenizer in judges]
        return np.mean(found, 0)

    return with_votes(judged, config.voters, workers, half) if config.voters else judged


def judge_folders(config: BackboneConfig) -> list[Path]:
    """FOLDER of --judge, FOLDER-2, FOLDER-3, ...: one for each of --judges."""
    folder = Path(config.judge)
    return [folder, *(folder.with_name(f"{folder.name}-{number}")
                      for number in range(2, config.judges + 1))]  # fmt: skip


def _on_device(folder: Path) -> tuple[Judge, Tokenizer]:
    judge, tokenizer = load_judge(folder)
    return (judge.cuda() if torch.cuda.is_available() else judge), tokenizer


def wants_half(config: BackboneConfig) -> bool | None:
    """Whether products are in bf16; None: where the device multiplies it."""
    return None if config.precision == "auto" else config.precision == "bf16"


def _topics(config: BackboneConfig) -> int:
    """Clusters that are made: none without an encoder to embed texts with."""
    return config.topics if config.teacher != "none" else 0


def _add_topics(config: BackboneConfig, shards: Path, tokenizer: Tokenizer) -> None:
    # By the encoder that the judge came from: the judge's own brings opinions together.
    teacher = load_teacher(Path(config.teacher), tokenizer)
    if torch.cuda.is_available():
        teacher.cuda()
    pool, names = make_topics(load_pools(shards), teacher, tokenizer, config.topics, config.seed,
                              wants_half(config))  # fmt: skip
    save_names(names, shards)
    add_pool(pool, shards)


def _request(config: BackboneConfig) -> dict[str, Any]:
    """What shards depend on, besides the data."""
    return {
        "recipe": sha256(config.labelled) if Path(config.labelled).is_file() else None,
        "text": [Path(name).name for name in config.text],
        "vocab_size": config.vocab_size,
        "start": sha256(Path(config.start) / "tokenizer.json") if config.start else None,
        "teacher": config.teacher != "none",
        "judge": bool(config.judge),
        "judges": config.judges if config.judge else 1,
        "topics": _topics(config),
        "voters": [weights_hash(Path(v)) for v in config.voters],
        "seed": config.seed,
    }


def _texts(recipe: Recipe) -> Iterator[str]:
    for entry in recipe.labelled:
        yield from (row["text"] for row in read_rows(entry.file, 12000))
    for plain in recipe.plain:
        yield from (row["text"] for row in read_rows(plain.file, min(plain.documents, 2500)))


def _as_parquet(path: Path, target: Path) -> Path:
    """A .txt file as Parquet, one document per block of lines; any other as it is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"{path}, given by --text, does not exist: correct the path")
    if path.suffix == ".parquet":
        return path
    text = "\n".join(line.rstrip("\r\n") for line in decoded_lines(path))
    blocks = [b.strip() for b in text.split("\n\n") if b.strip()]
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": blocks}), target)
    return target
