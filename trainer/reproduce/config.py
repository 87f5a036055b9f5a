"""The flags of `reproduce`. Defaults are the paper's settings; a flag's help says from where."""

from __future__ import annotations

from dataclasses import dataclass

from serve.bundle import MODES
from serve.cli import option
from trainer.options import MOST_RATE, MOST_SEED

WHATS = ("table1", "table2", "figure2", "figure3a", "figure3b", "figure4")
METHODS = ("ft", "pt", "ppt", "metapt", "metapt-y", "setfit")
# On request: the template alone, without prompt or sample; prompt tuning from words of the
# vocabulary, MetaPT's and PPT's own start without a source; MetaPT that goes on from PPT's prompt.
EXTRA_METHODS = ("words", "pt-vocab", "metapt-ppt")
CLUSTERINGS = ("kmeans", "lda", "random", "label")


@dataclass(kw_only=True)
class ReproduceConfig:
    """Run a table or a figure of the paper: every method, task, seed and attention mode of it.

    Every single run becomes a JSON file in OUT/runs as soon as it is done, so a command that is
    stopped goes on where it was; --plan shows what is left. Written at the end: the table (Markdown
    and CSV), the plot with error bars (PNG and SVG), and all runs in one JSON file.
    """

    what: str = option(help="what to reproduce", positional=True, choices=WHATS)
    out: str = option("runs/reproduce", help="folder of the runs, starts, tables and plots")
    backbone: str = option("mini", help="any T5: a Hugging Face id, a folder, or mini")
    tasks: list[str] = option([], help="any subset (default: the paper's for this table)")
    methods: list[str] = option(
        [],
        help="rows (default: the paper's, and SetFit); words is the template alone, pt-vocab is PT "
        "from words of the vocabulary, metapt-ppt is MetaPT from PPT's prompt",
    )
    seeds: list[int] = option(
        [1, 2, 3, 4, 5], help="few-shot draws (section 5.1)", minimum=0, maximum=MOST_SEED
    )
    modes: list[str] = option(["full"], help="attention modes; full is the paper's", choices=MODES)
    data_dir: str | None = option(None, help="a folder of task files in place of the hub")
    source: str | None = option(
        None, help="source texts: a file with text and label, and cluster if it is to be kept",
        metavar="FILE",
    )  # fmt: skip
    text: list[str] = option(
        [], help="open text that is pseudo-labelled with Yelp-5 where there is no --source (4.1)",
        metavar="FILE",
    )  # fmt: skip
    source_y: str | None = option(
        None, help="source of MetaPT(Y) (default: Yelp-5 with its own labels)", metavar="FILE"
    )
    source_rows: int = option(0, help="rows of a source, balanced by class (0: all)", minimum=0)
    sizes: list[int] = option(
        [], help="figure 2: samples; figure 3a: source rows; 3b, 4: clusters", minimum=2
    )
    clusters: int = option(10, help="K-means clusters (section 5.1)", minimum=2)
    encoder: str | None = option(None, help="sentence encoder (default: all-MiniLM-L6-v2)")
    limit_eval: int = option(0, help="test rows at most, drawn by seed 0 (0: all)", minimum=0)
    train: int = option(40, help="training samples (A.4)", minimum=1)
    validation: int = option(40, help="validation samples (A.4)", minimum=1)
    template: str | None = option(
        None, help="beyond the paper: what the model reads, in place of the tasks' template"
    )
    words: list[str] = option(
        [],
        help="beyond the paper: five label words from the worst to the best, in place of the "
        "tasks'; three classes take the first, the middle and the last, two the outer ones",
    )
    prompt_tokens: int = option(100, help="P (section 5.1)", minimum=1)
    max_tokens: int = option(128, help="longest input in tokens", minimum=8)
    meta_steps: int = option(20_000, help="outer steps of MetaPT at most (A.3)", minimum=1)
    meta_evaluate_every: int = option(500, help="steps between evaluations (A.3)", minimum=1)
    meta_patience: int = option(6, help="evaluations without a better score (A.3)", minimum=1)
    inner_rate: float = option(
        0.08,
        help="alpha (A.3); 0: by search at the start, beyond the paper",
        minimum=0,
        maximum=MOST_RATE,
    )
    outer_rate: float = option(0.025, help="beta (A.3)", minimum=0, maximum=MOST_RATE)
    inner_steps: int = option(1, help="inner steps", minimum=1)
    samples: int = option(4, help="support rows a task, and as many query rows (A.3)", minimum=1)
    balanced: bool = option(False, help="draw the classes of support and query evenly")
    learn_rates: bool = option(False, help="beyond the paper: Meta-SGD, a rate a prompt token")
    first_order_steps: int = option(
        0, help="beyond the paper: steps before the second order begins", minimum=0
    )
    each_step: int = option(0, help="beyond the paper: clusters drawn a step (0: all)", minimum=0)
    held_clusters: int = option(
        0, help="beyond the paper: clusters held out for early stopping", minimum=0
    )
    outer_decay: bool = option(
        False, help="beyond the paper: the rate of MetaPT and PPT falls linearly to zero"
    )
    outer_clip: float = option(
        0.0, help="beyond the paper: largest norm of their gradients (0: any)", minimum=0
    )
    start: str = option("vocab", help="where MetaPT and PPT start", choices=("vocab", "random"))
    start_seed: int = option(
        1, help="beyond the paper: seed of the training of MetaPT's and PPT's starts", minimum=0,
        maximum=MOST_SEED,
    )  # fmt: skip
    ppt_steps: int = option(0, help="steps of PPT at most (0: as many as MetaPT)", minimum=0)
    ppt_rate: float = option(0.025, help="AdamW's rate of PPT (A.2)", minimum=0, maximum=MOST_RATE)
    ppt_batch: int = option(80, help="rows a step of PPT: as many as ten tasks of 4 + 4", minimum=1)
    rate: float = option(
        3e-3, help="downstream rate of prompts (A.4)", minimum=0, maximum=MOST_RATE
    )
    ft_rate: float = option(
        3e-4, help="downstream rate of full tuning", minimum=0, maximum=MOST_RATE
    )
    epochs: int = option(200, help="downstream epochs at most (A.4)", minimum=1)
    patience: int = option(6, help="downstream epochs without a better score (A.4)", minimum=1)
    device: str = option("auto", help="auto (every GPU there is, else the CPU), cpu, cuda:1 ...")
    jobs: int = option(1, help="runs at a time, each a process of its own", minimum=1)
    threads: int = option(0, help="CPU threads a job (0: all cores shared evenly)", minimum=0)
    plan: bool = option(False, help="show what is left and write what there is, run nothing")

    def __post_init__(self) -> None:
        # A run that is named twice would count twice in means and tests.
        for name in ("tasks", "methods", "seeds", "modes", "sizes"):
            setattr(self, name, list(dict.fromkeys(getattr(self, name))))

    examples = [
        "table1 --data-dir data --source runs/clusters.parquet --out runs/paper",
        "table1 --backbone google/t5-v1_1-base --text wiki.parquet --jobs 2 --out runs/base",
        "figure2 --tasks sst5 sst2 --methods ppt metapt --seeds 1 2 3 --modes full prefix",
        'table1 --template "Would a friend go? {text} <extra_id_0>" --words avoid skip maybe try '
        "recommend --source runs/clusters.parquet",
    ]
