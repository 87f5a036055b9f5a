"""The flags of `meta`, `pretrain`, `tune`, `finetune` and `evaluate`.

Nothing here imports torch, which takes seconds: `--help` and a wrong flag are answered at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.cli import option
from trainer.options import MOST_RATE, BackboneOptions, PromptOptions, TaskOptions
from trainer.tasks import TEMPLATE

if TYPE_CHECKING:
    from trainer.loop import Schedule

# The objective decides which prompt is kept, equation 2's for MetaPT: accuracy on a few hundred
# pseudo-labelled rows is coarse, and one lucky evaluation, of the untrained start even, would win.
BEST_BY = "loss"


@dataclass(kw_only=True)
class SourceOptions(PromptOptions):
    """What `meta` and `pretrain` share."""

    data: str = option(help="the Parquet file that `cluster` wrote", metavar="FILE")
    out: str = option(help="folder of the prompt")
    init: str = option("vocab", help="random, vocab, shipped:NAME, or a prompt folder")
    labels: list[str] = option(
        [], help="names of the classes, in the order of --words (default: the file's order)"
    )
    words: list[str] = option(
        [], help="label word of each class (default for numbers and sentiment scales: bad good ...)"
    )
    template: str = option(TEMPLATE, help="what the model reads")
    steps: int = option(20_000, help="outer steps at most (A.3)", minimum=1)
    evaluate_every: int = option(500, help="steps between evaluations (A.3)", minimum=1)
    patience: int = option(6, help="evaluations without a better loss or accuracy (A.3)", minimum=1)
    validation_share: float = option(
        0.1, help="share of each cluster's rows held out for evaluation", minimum=0.01, maximum=0.5
    )
    rate: float = option(0.025, help="AdamW's learning rate", minimum=0, maximum=MOST_RATE)
    decay: bool = option(False, help="let the rate fall linearly to zero at the last step")
    clip: float = option(0.0, help="largest norm of a step's gradient (0: any)", minimum=0)

    def schedule(self) -> Schedule:
        """Steps, rate and patience as the loop takes them."""
        from trainer.loop import Schedule

        return Schedule(
            steps=self.steps, rate=self.rate, decay=self.decay, clip=self.clip or None,
            evaluate_every=self.evaluate_every, patience=self.patience, best_by=BEST_BY,
        )  # fmt: skip


@dataclass(kw_only=True)
class MetaConfig(SourceOptions):
    """MetaPT: meta-train a prompt over clusters of texts (section 4.3).

    Exact second-order MAML. The prompt of the lowest loss on held-out rows, after adaptation, is
    kept.
    """

    inner_rate: float = option(
        0.08, minimum=0, maximum=MOST_RATE,
        help="alpha, plain gradient descent (A.3; the paper's models). 0: the one that lowers the "
        "query loss most at the start, by search",
    )  # fmt: skip
    rate: float = option(0.025, help="beta, AdamW (A.3)", minimum=0, maximum=MOST_RATE)
    samples: int = option(4, help="M, support rows a task, and as many query rows", minimum=1)
    inner_steps: int = option(1, help="inner steps (equation 1) a task", minimum=1)
    order: str = option("second", help="second is exact MAML", choices=("second", "first"))
    balanced: bool = option(False, help="draw the classes of support and query evenly")
    learn_rates: bool = option(
        False, help="learn an inner rate for each prompt token (Meta-SGD, Li et al. 2017)"
    )
    first_order_steps: int = option(
        0, help="steps before the second order begins (MAML++, Antoniou et al. 2019)", minimum=0
    )
    each_step: int = option(0, help="clusters drawn for a step (0: all of them)", minimum=0)
    held_clusters: int = option(
        0, help="clusters that are not trained on but evaluated on, for early stopping", minimum=0
    )

    examples = [
        "--data runs/clusters.parquet --out runs/metapt",
        "--data runs/clusters.parquet --out runs/fomaml --order first --steps 2000",
    ]


@dataclass(kw_only=True)
class PretrainConfig(SourceOptions):
    """PPT: pre-train a prompt on the source data without clusters (A.2)."""

    batch: int = option(80, help="rows a step; as many as MetaPT's ten tasks of 4 + 4", minimum=1)

    examples = ["--data runs/clusters.parquet --out runs/ppt"]


@dataclass(kw_only=True)
class Sampling:
    """How few samples there are."""

    train: int | None = option(
        None, help="training samples drawn by the seed (default: 40 as in A.4, or three fifths of "
        "fewer than 80 rows)", minimum=1,
    )  # fmt: skip
    validation: int | None = option(
        None, help="validation samples drawn by the seed (default: 40, or the rest); from a file's "
        "own rows for validation, at most so many, where it marks others for testing", minimum=1,
    )  # fmt: skip
    balanced: bool = option(False, help="draw the same number of each class")


@dataclass(kw_only=True)
class TuneConfig(PromptOptions, TaskOptions, Sampling):
    """Tune a soft prompt on a task, the backbone frozen (appendix A.4).

    Draws the training and validation samples by the seed, starts from --init, keeps the prompt
    that is best on the validation samples, and writes it as a PEFT adapter folder.
    """

    out: str = option(help="folder of the prompt")
    init: str = option(
        "vocab", help="random, vocab, shipped:NAME (such as shipped:polarity:bad,good), or a "
        "prompt folder (MetaPT's, PPT's ...)",
    )  # fmt: skip
    try_also: list[str] = option(
        [], help="further starts: a prompt is tuned from each, and the one that is best on the "
        "validation samples is kept", metavar="START",
    )  # fmt: skip
    name: str | None = option(None, help="name of the prompt's task (default: the task's)")
    rate: float = option(3e-3, help="AdamW's learning rate (A.4)", minimum=0, maximum=MOST_RATE)
    warmup: int = option(20, help="steps of linear warm-up (A.4)", minimum=0)
    batch: int = option(4, help="samples a batch (A.4)", minimum=1)
    accumulation: int = option(8, help="batches a step (A.4); they run as one product", minimum=1)
    epochs: int = option(200, help="epochs at most (A.4)", minimum=1)
    patience: int = option(6, help="epochs without a better accuracy or loss (A.4)", minimum=1)
    weight_decay: float = option(0.0, help="AdamW's weight decay", minimum=0, maximum=MOST_RATE)

    examples = [
        "--task sst2 --init runs/metapt --out runs/sst2",
        "--task sst2 --init runs/metapt --try-also runs/ppt vocab --out runs/sst2",
        "--data reviews.csv --text-column review --label-column stars --labels bad good --out p",
    ]


@dataclass(kw_only=True)
class FinetuneConfig(BackboneOptions, TaskOptions, Sampling):
    """Full tuning of the backbone on a task, without a prompt (appendix A.1).

    Writes a Hugging Face model folder with `task.json` in it; `evaluate FOLDER` reads it.
    """

    out: str = option(help="folder of the tuned model")
    rate: float = option(3e-4, help="AdamW's learning rate", minimum=0, maximum=MOST_RATE)
    warmup: int = option(20, help="steps of linear warm-up", minimum=0)
    batch: int = option(4, help="samples a batch", minimum=1)
    accumulation: int = option(8, help="batches a step; they run as one product", minimum=1)
    epochs: int = option(200, help="epochs at most", minimum=1)
    patience: int = option(6, help="epochs without a better accuracy or loss", minimum=1)

    examples = ["--task sst2 --out runs/sst2-full"]


@dataclass(kw_only=True)
class EvaluateConfig(TaskOptions):
    """Accuracy, macro-F1, confusion matrix and calibration error of a prompt on a data set.

    Prints a table, and with --json FILE (or - for standard output) the figures as JSON.
    """

    prompt: str | None = option(
        None, positional=True,
        help="a prompt folder, or a fully tuned model's; none: the template alone on --backbone, "
        "without any training",
    )  # fmt: skip
    backbone: str | None = option(None, help="the T5 (default: the one the prompt names)")
    split: str = option(
        "test", help="rows to evaluate on (a set without test rows: its validation rows, or the "
        "rows of a fifth of its sentences, chosen by hash, which tuning never draws); `all` for "
        "every row of a file",
        choices=("train", "validation", "test", "all"),
    )  # fmt: skip
    limit: int = option(0, help="at most this many rows, drawn by seed 0 (0: all)", minimum=0)
    json: str | None = option(None, help="write the figures as JSON here", metavar="FILE")
    device: str = option("auto", help="auto, cpu, cuda, cuda:1 ...")
    labels: list[str] = option(
        [], help="names of the classes, in the order of their numbers; with --data only for a "
        "prompt without a task.json, which otherwise decides",
    )  # fmt: skip
    words: list[str] = option([], help="label word of each class, for a prompt without a task.json")
    template: str | None = option(
        None, help="what the model reads, with {text} and <extra_id_0>, for a prompt without a "
        "task.json",
    )  # fmt: skip

    examples = [
        "runs/sst2 --task sst2",
        "runs/mine --data reviews.csv --split all --json -",
        "--data reviews.csv --split all --words bad good   # what mini knows before any training",
    ]
