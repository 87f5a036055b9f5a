"""`python -m trainer backbone`: text and labelled sets in, a T5 folder out."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import T5Config, T5ForConditionalGeneration

from serve.cli import as_json
from serve.errors import UserError
from serve.files import write_json
from trainer.backbone import load_backbone
from trainer.cpu import keep_memory
from trainer.options import result_folder
from trainer.parallel import workers as processes
from trainer.pretraining.config import KINDS, BackboneConfig
from trainer.pretraining.convert import convert
from trainer.pretraining.evaluate import Probe, read_probes, track
from trainer.pretraining.losses import Auxiliary
from trainer.pretraining.mixture import Mixture, SoftTask
from trainer.pretraining.model import new_model, save_backbone
from trainer.pretraining.packing import pad
from trainer.pretraining.preparation import (
    check_judged,
    check_prepared,
    prepare_shards,
    teacher_folder,
    vocabulary_hash,
    wants_half,
)
from trainer.pretraining.shards import Pool, load_pools
from trainer.pretraining.start import (
    named_folder,
    prompt_key,
    start_tokenizer,
    take_up_prompts,
)
from trainer.pretraining.state import Progress
from trainer.pretraining.teacher import Teacher, load_teacher
from trainer.pretraining.topics import Topics
from trainer.pretraining.train import Schedule, initial_prompts, train
from trainer.pretraining.vocabulary import (
    load_tokenizer,
)
from trainer.pretraining.wordings import label_words
from trainer.t5 import FrozenT5

logger = logging.getLogger(__name__)
PROMPT_TOKENS = 100  # vectors of a learned soft prompt: the paper's length
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
        check_judged(config)
    if team.main and unprepared:
        prepare_shards(config, shards)
    team.wait()  # for the shards
    if config.prepare:
        return
    check_prepared(config, shards)
    tokenizer = load_tokenizer(shards)
    pools = load_pools(shards)
    device = team.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learned_from = config.teacher != "none" and (config.convert or "distil" not in config.without)
    teacher = load_teacher(teacher_folder(config), tokenizer) if learned_from else None
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
              half=wants_half(config), loaders=None if config.loaders < 0 else config.loaders,
              settings={**{name: getattr(config, name) for name in _SAME},
                        "tokenizer": vocabulary_hash(config)})  # fmt: skip


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
