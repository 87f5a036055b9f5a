"""The flags of `backbone`, without torch: see `trainer.configs`."""

from dataclasses import dataclass
from pathlib import Path

from serve.cli import option
from trainer.options import MOST_SEED

RECIPE = Path(__file__).with_name("recipe.toml")
KINDS = ("distil", "words", "prefix", "full", "span")  # of batch: see `trainer.pretraining.mixture`


@dataclass
class BackboneConfig:
    """Pre-train a compact T5 that obeys soft prompts.

    Steps, each skipped when its result is there: with --judge a judge of sentences is trained,
    tokenised shards are written to --shards, a model is made (that of --start, converted from
    --teacher, or fresh) and trained with checkpoints in --out's sibling folder `OUT.run` until
    --steps or --minutes are used up.
    """

    out: str = option(help="folder of the finished model")
    data_dir: str = option("data", help="folder that the recipe's file names are relative to")
    labelled: str = option(
        str(RECIPE), help="recipe file: labelled sets, plain text, held-out sets"
    )
    text: list[str] = option([], help="further plain text: .parquet (column `text`) or .txt files")
    shards: str = option("shards", help="folder of the tokenised shards")
    teacher: str = option("none", help="folder of a BERT sentence encoder to start from, or `none`")
    judge: str = option("", help="folder of a judge of sentences: trained there from --teacher on "
                        "the labels of whole reviews if it does not exist; it then labels the "
                        "sentences and is the teacher")  # fmt: skip
    judges: int = option(1, help="train so many, from other seeds, and take the mean of their "
                         "verdicts; the others lie beside --judge, as FOLDER-2, FOLDER-3, ...",
                         minimum=1)  # fmt: skip
    judge_epochs: float = option(0.5, help="how often a judge reads all documents; more "
                                 "where a GPU makes it cheap", minimum=0.001)  # fmt: skip
    judge_tokens: int = option(4096, help="pieces in a worker's batch of a judge; 16384 on a GPU",
                               minimum=64)  # fmt: skip
    judge_rate: float = option(1.5e-4, help="AdamW's peak rate for a judge's encoder", minimum=0.0)
    topics: int = option(240, help="clusters of plain text and of reviews, whose telling words are "
                         "the answers to questions about topics; 0: none; needs --teacher",
                         minimum=0)  # fmt: skip
    start: str = option("", help="folder of a backbone that this command made, or `mini`, which "
                        "ships, to go on from: its vocabulary, geometry, weights and soft prompts "
                        "hold; give another --seed, or the same texts are drawn again")  # fmt: skip
    voters: list[str] = option([], help="such backbones, whose answers about "
                               "each sentence are averaged with the judge's verdicts (that of "
                               "--start among them, most likely)")  # fmt: skip
    convert: bool = option(True, help="begin from the teacher's weights; --no-convert: from random "
                           "ones, and the teacher is only distilled from")  # fmt: skip
    without: list[str] = option([], choices=KINDS, help="kinds of batches to leave out (distil, "
                                "words, prefix, full, span), to see what they bring")  # fmt: skip
    prepare: bool = option(False, help="write the shards and stop")
    resume: bool = option(False, help="go on from the last checkpoint of the same --out")
    steps: int = option(0, help="length of the run in batches; 0: by --minutes", minimum=0)
    minutes: float = option(80.0, help="length of the run in minutes of training", minimum=0.01)
    vocab_size: int = option(17000, help="pieces, special tokens and sentinels included",
                             minimum=400, maximum=65000)  # fmt: skip
    width: int = option(384, help="d_model; that of the teacher where there is one", minimum=8)
    layers: int = option(6, help="encoder layers", minimum=1)
    decoder_layers: int = option(1, help="decoder layers; two positions need few", minimum=1)
    heads: int = option(12, help="attention heads", minimum=1)
    feed_forward: int = option(1536, help="d_ff", minimum=8)
    batch_tokens: int = option(1300, help="text tokens in a worker's batch", minimum=64)
    rate: float = option(2e-4, help="AdamW's peak rate for encoder and embeddings; 1e-3 if fresh; "
                         "3e-4 was too high for batches of 20,000 tokens", minimum=0.0)  # fmt: skip
    seed: int = option(1, help="of initialisation and data order", minimum=0, maximum=MOST_SEED)
    workers: int = option(2, help="CPU processes of one thread each, with --batch-tokens each; "
                          "1 on a GPU; `accelerate launch` brings its own", minimum=1)  # fmt: skip
    loaders: int = option(-1, help="processes that make batches beside a lone worker; -1: "
                          "none on a CPU, on a GPU one for every other core, at most 8",
                          minimum=-1)  # fmt: skip
    precision: str = option("auto", choices=["auto", "fp32", "bf16"], help="of the products; auto: "
                            "bf16 where the processor multiplies it (GPU, AMX)")  # fmt: skip
    checkpoint_seconds: float = option(120.0, help="time between checkpoints", minimum=1.0)
    probes: list[str] = option([], help="held-out sets (file names without .parquet in --data-dir) "
                               "whose accuracy is logged every ten minutes")  # fmt: skip
    card: str = option("", help="README.md to put into the folder")

    examples = [
        "--data-dir data --shards shards --teacher minilm --prepare --out mini",
        "--shards shards --teacher minilm --minutes 80 --out mini",
        "--data-dir data --shards shards --teacher minilm --judge judge --minutes 60 --out mini",
        "--start trainer/backbones/mini --seed 2 --labelled own.toml --text own.txt --out own",
        "--start mini --seed 2 --teacher minilm --judge judge --voters mini --steps 900 --out m2",
        "--shards shards --teacher minilm --steps 120 --without prefix full --out no_soft_prompts",
    ]
