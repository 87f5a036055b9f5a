"""`python -m trainer backbone`: text and labelled sets in, a T5 folder out."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import T5Config, T5ForConditionalGeneration

from serve.cli import as_json
from serve.errors import UserError
from serve.files import read_json, sha256, write_json
from trainer.backbone import load_backbone, weights_hash
from trainer.cpu import keep_memory
from trainer.options import result_folder
from trainer.parallel import workers as processes
from trainer.pretraining.config import KINDS, BackboneConfig
from trainer.pretraining.convert import convert
from trainer.pretraining.evaluate import Probe, read_probes, track
from trainer.pretraining.judge import HEAD, Document, Judge, JudgeSchedule
from trainer.pretraining.judging import documents, load_judge, save_judge, train_judge, verdicts
from trainer.pretraining.losses import Auxiliary
from trainer.pretraining.mixture import Mixture, SoftTask
from trainer.pretraining.model import new_model, save_backbone
from trainer.pretraining.packing import pad
from trainer.pretraining.recipe import Plain, Recipe, load_recipe
from trainer.pretraining.rows import read_rows
from trainer.pretraining.shards import Pool, Verdicts, add_pool, load_pools, prepare
from trainer.pretraining.start import (
    named_folder,
    prompt_key,
    start_tokenizer,
    take_up_prompts,
)
from trainer.pretraining.state import Progress
from trainer.pretraining.teacher import Teacher, load_teacher, read_bert
from trainer.pretraining.texts import HeldOut
from trainer.pretraining.topics import Topics, make_topics, save_names
from trainer.pretraining.train import Schedule, initial_prompts, train
from trainer.pretraining.vocabulary import (
    SENTINELS,
    SPECIAL,
    build_tokenizer,
    check_single_pieces,
    choose_pieces,
    load_tokenizer,
    save_tokenizer,
    train_pieces,
)
from trainer.pretraining.voting import with_votes
from trainer.pretraining.wordings import label_words
from trainer.t5 import FrozenT5
from trainer.tables import decoded_lines

logger = logging.getLogger(__name__)
_PREPARED = "prepared.json"  # in the folder of the shards
PROMPT_TOKENS = 100  # vectors of a learned soft prompt: the paper's length
_OTHER = {"vocab_size": "another vocab size", "voters": "other voters", "text": "other text",
          "judges": "another number of judges", "topics": "another number of topics"}  # fmt: skip
# Flags that a run is resumed with as it was begun; --steps and --minutes may grow.
_SAME = ("seed", "batch_tokens", "rate", "width", "layers", "decoder_layers", "heads",
         "feed_forward", "vocab_size", "convert", "start", "without")  # fmt: skip
SHIPPED = 20  # of which so many are shipped as starting points


def backbone_command(config: BackboneConfig) -> None:
    """`run_backbone` in a process of its own, which may keep its memory to its end."""
    keep_memory()
    run_backbone(config)


def run_backbone(config: BackboneConfig) -> None:
    """Prepare, convert, train, save; see `BackboneConfig`."""
    config = of_start(config)
    shards, out = Path(config.shards), result_folder(config.out, "config.json").absolute()
    if not set(KINDS) - set(config.without) - ({"distil"} if config.teacher == "none" else set()):
        raise UserError("--without leaves no kind of batch to train on: name fewer")
    team = processes()
    unprepared = config.prepare or not (shards / "pools.json").is_file()
    if unprepared and team.count > 1:
        _check_judged(config)
    if team.main and unprepared:
        _prepare(config, shards)
    team.wait()  # for the shards
    if config.prepare:
        return
    _check_prepared(config, shards)
    tokenizer = load_tokenizer(shards)
    pools = load_pools(shards)
    device = team.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learned_from = config.teacher != "none" and (config.convert or "distil" not in config.without)
    teacher = load_teacher(_teacher(config), tokenizer) if learned_from else None
    topics = Topics.load(pools, shards, tokenizer) if config.topics else None
    mixture = Mixture(pools, tokenizer, config.batch_tokens, config.seed, topics=topics)
    run = out.with_name(out.name + ".run")
    run.mkdir(parents=True, exist_ok=True)
    if (run / "state.safetensors").exists() and not config.resume:
        raise UserError(f"{run} holds a checkpoint: pass --resume, or remove it to start afresh")
    model = start_model(config, tokenizer, teacher, pools)
    words = {mixture.asker.ids(word)[0] for word in label_words()} | (
        topics.words if topics else set()
    )
    prompts = initial_prompts(mixture.tasks, mixture.asker.ids, model.shared.weight,
                              PROMPT_TOKENS, config.seed)  # fmt: skip
    if config.start:
        count = take_up_prompts(prompts, mixture.tasks, Path(config.start))
        logger.info("going on from %s with %d of its soft prompts", config.start, count)
    auxiliary = Auxiliary(prompts, model.config.d_model, torch.tensor(sorted(words))).to(device)
    model.to(device)  # type: ignore[arg-type]
    t5 = FrozenT5(model, trainable=True)
    # Where nothing is converted, nothing is spared; of what goes on, only the heads are fresh.
    converted = teacher is not None and config.convert
    schedule = Schedule(rate=config.rate, fresh=2.0 if config.start else 5.0 if converted else 1.0,
                        first=0.0 if config.start else Schedule.first,
                        steps=config.steps or None,
                        minutes=None if config.steps else config.minutes,
                        without=tuple(config.without))  # fmt: skip
    if teacher is not None:
        teacher.to(device)
    probes = read_probes(Path(config.data_dir), config.probes) if config.probes else []
    if team.main:
        write_json(run / "run.json", {"command": "backbone", "config": as_json(config)})
    _train(config, t5, auxiliary, mixture, teacher, schedule, run, probes)
    if not team.main:
        return
    save_backbone(model.float(), tokenizer, out, _card(config))
    save_prompts(mixture.tasks, auxiliary.prompts.detach().cpu(), out / "soft_prompts.safetensors")


def _train(config: BackboneConfig, t5: FrozenT5, auxiliary: Auxiliary, mixture: Mixture,
           teacher: Teacher | None, schedule: Schedule, run: Path, probes: list[Probe]
           ) -> None:  # fmt: skip
    workers = config.workers if t5.model.device.type == "cpu" else 1
    if workers > 1:
        torch.set_num_threads(1)
    with tqdm(total=1.0, desc="backbone", bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}",
              mininterval=1.0, disable=not processes().main) as bar:  # fmt: skip

        def report(progress: Progress, averages: dict[str, float]) -> None:
            done = schedule.done(progress)
            left = progress.seconds * (1 - done) / max(done, 1e-6)
            losses = [v for k, v in averages.items() if k.endswith(".answer")]
            bar.n = done
            bar.set_postfix_str(
                f"step {progress.step} loss {sum(losses) / max(len(losses), 1):.3f} "
                f"{progress.tokens / max(progress.seconds, 1e-9):,.0f} tokens/s "
                f"{left / 60:.0f} min left"
            )

        def watch(progress: Progress) -> None:
            track(t5, mixture.asker, probes, progress.step, run / "accuracy.jsonl")

        train(t5, auxiliary, mixture, teacher, schedule, run, resume=config.resume,
              checkpoint_seconds=config.checkpoint_seconds, report=report,
              track=watch if probes else None, workers=workers,
              half=_half(config), loaders=None if config.loaders < 0 else config.loaders,
              settings={**{name: getattr(config, name) for name in _SAME},
                        "tokenizer": _vocabulary(config)})  # fmt: skip


def of_start(config: BackboneConfig) -> BackboneConfig:
    """The flags with folders in place of names, and with the vocabulary size and geometry of
    --start, where it is given; nothing is then converted."""
    config = replace(config, voters=[named_folder(name) for name in config.voters])
    if not config.start:
        return config
    config = replace(config, start=named_folder(config.start))
    start_tokenizer(Path(config.start))
    theirs = T5Config.from_pretrained(config.start)
    return replace(
        config, vocab_size=theirs.vocab_size, width=theirs.d_model, heads=theirs.num_heads,
        layers=theirs.num_layers, decoder_layers=theirs.num_decoder_layers or theirs.num_layers,
        feed_forward=theirs.d_ff, convert=False,
    )  # fmt: skip


def start_model(
    config: BackboneConfig,
    tokenizer: Tokenizer,
    teacher: Teacher | None,
    pools: dict[str, Pool],
) -> T5ForConditionalGeneration:
    """The model of --start, or a fresh one, whose encoder is converted from the teacher where
    there is one to begin from.

    Raises UserError if the geometry is not the teacher's.
    """
    if config.start:
        model = load_backbone(config.start, trainable=True).t5.model
    else:
        deviation = 0.25 if teacher is not None and config.convert else 0.05
        model = new_model(tokenizer.get_vocab_size(), width=config.width, layers=config.layers,
                          decoder_layers=config.decoder_layers, heads=config.heads,
                          feed_forward=config.feed_forward, deviation=deviation,
                          seed=config.seed)  # fmt: skip
    if teacher is None:
        return model
    theirs = teacher.bert.config
    for flag, own, other in (
        ("--width", config.width, theirs.hidden_size),
        ("--layers", config.layers, theirs.num_hidden_layers),
        ("--heads", config.heads, theirs.num_attention_heads),
        ("--feed-forward", config.feed_forward, theirs.intermediate_size),
    ):
        if own != other:
            raise UserError(f"{flag} is {own}, but the teacher has {other}: pass {flag} {other}")
    if config.convert and not config.resume:
        convert(model, teacher, sample_batches(pools, 3000, config.seed))
    return model


def sample_batches(pools: dict[str, Pool], count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """`count` texts from all pools, ending in </s>, in (ids, mask) [40, S] batches by length."""
    rng = np.random.default_rng(seed)
    rows = []
    for pool in pools.values():
        chosen = rng.permutation(len(pool))[: count // len(pools) + 1]
        rows += [[*pool.text(int(i)).tolist(), 1] for i in chosen]
    rows.sort(key=len)
    padded = [pad(rows[i : i + 40]) for i in range(0, len(rows), 40)]
    return [(ids, mask.long()) for ids, mask in padded]


def save_prompts(tasks: list[SoftTask], prompts: Tensor, path: Path) -> None:
    """The learned soft prompts as starting points: "question: words" -> [20, D], fp16."""
    save_file({prompt_key(t): prompts[t.index, :SHIPPED].half().clone() for t in tasks}, path)


def _card(config: BackboneConfig) -> dict[str, str]:
    return {"README.md": Path(config.card).read_text("utf-8")} if config.card else {}


def _teacher(config: BackboneConfig) -> Path:
    """The folder of the BERT whose weights and states are learned from."""
    return Path(config.judge or config.teacher)


def _prepare(config: BackboneConfig, shards: Path) -> None:
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
        _, theirs = read_bert(_teacher(config))
        tokenizer = build_tokenizer(choose_pieces(_texts(recipe), theirs, size, label_words()))
    check_single_pieces(tokenizer, label_words())
    # The pools that may stand there are of another vocabulary from here on.
    (shards / _PREPARED).unlink(missing_ok=True)
    save_tokenizer(tokenizer, shards)
    prepare(recipe, tokenizer, shards, config.seed, judge)
    if _topics(config):
        _add_topics(config, shards, tokenizer)
    write_json(shards / _PREPARED, _request(config))


def _topics(config: BackboneConfig) -> int:
    """Clusters that are made: none without an encoder to embed texts with."""
    return config.topics if config.teacher != "none" else 0


def _add_topics(config: BackboneConfig, shards: Path, tokenizer: Tokenizer) -> None:
    # By the encoder that the judge came from: the judge's own brings opinions together.
    teacher = load_teacher(Path(config.teacher), tokenizer)
    if torch.cuda.is_available():
        teacher.cuda()
    pool, names = make_topics(load_pools(shards), teacher, tokenizer, config.topics, config.seed,
                              _half(config))  # fmt: skip
    save_names(names, shards)
    add_pool(pool, shards)


def _judge(config: BackboneConfig, recipe: Recipe) -> Verdicts:
    """The judge of --judge, or the mean of --judges, each trained first where its folder does not
    exist."""
    workers = 1 if torch.cuda.is_available() else config.workers
    if workers > 1:
        torch.set_num_threads(1)
    folders = judge_folders(config)
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
                    resume=config.resume and checkpoint.is_file(), half=_half(config))  # fmt: skip
        save_judge(judge, tokenizer, folder)
        checkpoint.unlink(missing_ok=True)
    judges = [_on_device(folder) for folder in folders]

    def judged(texts: list[str]) -> np.ndarray:
        found = [verdicts(judge, tokenizer, texts, workers, _half(config))
                 for judge, tokenizer in judges]  # fmt: skip
        return np.mean(found, 0)

    return with_votes(judged, config.voters, workers, _half(config)) if config.voters else judged


def _check_judged(config: BackboneConfig) -> None:
    """Raises: UserError for a judge still to be trained, where several processes were launched: the
    first would train it, and wait in its first step for those that wait for it."""
    folders = judge_folders(config) if config.judge else []
    if missing := [folder for folder in folders if not (folder / HEAD).is_file()]:
        raise UserError(
            f"the judge {missing[0]} is not trained yet, and that takes one command of its own: "
            "run this one once with --prepare and without `accelerate launch`"
        )


def judge_folders(config: BackboneConfig) -> list[Path]:
    """FOLDER of --judge, FOLDER-2, FOLDER-3, ...: one for each of --judges."""
    folder = Path(config.judge)
    return [folder, *(folder.with_name(f"{folder.name}-{number}")
                      for number in range(2, config.judges + 1))]  # fmt: skip


def _on_device(folder: Path) -> tuple[Judge, Tokenizer]:
    judge, tokenizer = load_judge(folder)
    return (judge.cuda() if torch.cuda.is_available() else judge), tokenizer


def _half(config: BackboneConfig) -> bool | None:
    """Whether products are in bf16; None: where the device multiplies it."""
    return None if config.precision == "auto" else config.precision == "bf16"


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


def _vocabulary(config: BackboneConfig) -> str:
    """Hash of the shards' tokenizer: prepared anew, its pieces may be numbered otherwise."""
    return sha256(Path(config.shards) / "tokenizer.json")


def _check_prepared(config: BackboneConfig, shards: Path) -> None:
    """Raises: UserError for shards of another recipe or of other flags."""
    path = shards / _PREPARED
    asked = _request(config)
    made = {"voters": [], "judges": 1, "topics": 0, **read_json(path)} if path.is_file() else {}
    if other := [name for name in asked if made.get(name) != asked[name]]:
        raise UserError(
            f"--shards {shards} were prepared with {_OTHER.get(other[0], 'another ' + other[0])}: "
            "pass --prepare to make them anew, or another --shards"
        )


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
