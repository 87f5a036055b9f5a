"""The bundle of the first start, of prompts that ship with `mini`: `python -m demo.first --out F`.

Nothing is trained: the prompts were trained with the backbone, and the graphs were traced
beforehand. It runs in a process of its own, so that torch's memory goes when it ends.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from exporter.export import export_bundle
from serve.cli import Command, option, prepare, run
from serve.errors import Failure
from serve.files import atomic_folder
from trainer.backbone import Backbone, load_backbone
from trainer.bonnet import write_bonnet
from trainer.initial import initial_params
from trainer.prompt import Prompt, TaskRecord
from trainer.shipped import load_shipped, question_of, shipped_names, shipped_starts

log = logging.getLogger(__name__)

# The tasks of the switch: name, question, and the label words that read best. `opposite` has the
# words of `polarity` the other way round: the prompt alone makes it say the contrary.
_TASKS = (
    ("polarity", "polarity", ("terrible", "great")),
    ("opposite", "polarity", ("great", "terrible")),
    ("tone", "tone", ("negative", "neutral", "positive")),
    ("stars", "stars", ("1", "2", "3", "4", "5")),
    ("fact-or-opinion", "subjective", ("fact", "opinion")),
    ("topic", "genre", ()),
)
_STARTS = ("metapt", "ppt")
_SEED = 1  # of the words


def shipped_tasks(backbone: Backbone) -> dict[str, Prompt]:
    """The tasks of the first bundle by name; a question without the words above has its first."""
    names = shipped_names(backbone.folder)
    found: dict[str, Prompt] = {}
    for task, question, words in _TASKS:
        of_question = [name for name in names if question_of(name)[0] == question]
        wanted = f"{question}:{','.join(words)}"
        name = wanted if wanted in of_question else next(iter(of_question), None)
        if name is None or (task == "opposite" and name != wanted):
            continue
        found[task] = load_shipped(backbone, name)
        found[task].task.name = task
    return found


def starts(backbone: Backbone, tokens: int) -> dict[str, Prompt]:
    """The starting points that go along: those that MetaPT and PPT found, where they ship.

    Without MetaPT's it is a prompt of common words, of method `start`: it says nothing, so it
    shows what the backbone answers by itself.

    Args:
        tokens: P of the prompt of words.
    """
    known = shipped_starts(backbone.folder)
    found = {name: load_shipped(backbone, name) for name in _STARTS if name in known}
    for name, prompt in found.items():
        prompt.task.method = name
    if "metapt" not in found:
        params = initial_params(backbone, "vocab", "prefix", tokens, _SEED)
        record = TaskRecord(
            name="words", labels=["terrible", "great"], words=["terrible", "great"],
            backbone=backbone.name, backbone_sha256=backbone.sha256, method="start",
        )  # fmt: skip
        found["words"] = Prompt({name: value.detach() for name, value in params.items()}, record)
    return found


@dataclass(kw_only=True)
class FirstConfig:
    """Make a bundle of the prompts that ship with a backbone. Nothing is trained."""

    out: str = option(help="folder to make, with `bundle` in it")
    backbone: str = option("mini", help="a backbone that ships prompts")


def make(config: FirstConfig) -> None:
    """Write the folder, whole or not at all.

    Raises:
        UserError, Failure: the backbone ships no prompts, or the export's.
    """
    backbone = load_backbone(config.backbone)
    tasks = shipped_tasks(backbone)
    if not tasks:
        raise Failure(
            f"backbone '{config.backbone}' ships no prompts to show: name a bundle, "
            "python -m demo BUNDLE"
        )
    longest = max(prompt.tokens for prompt in tasks.values())
    prompts = {**tasks, **starts(backbone, longest)}
    folders = shipped_starts(backbone.folder)  # with the curves of their training
    sources: dict[str, str | Path | Prompt] = {n: folders.get(n, p) for n, p in prompts.items()}
    with atomic_folder(config.out) as temporary:
        bundle = temporary / "bundle"
        export_bundle(list(prompts.values()), backbone, bundle, names=list(prompts))
        write_bonnet(bundle, None, None, sources, backbone)


if __name__ == "__main__":
    prepare("  %(message)s")  # below what the page says
    command = {"demo.first": Command(FirstConfig, make)}
    sys.exit(run("python -m", "Make the first bundle.", command, ["demo.first", *sys.argv[1:]]))
