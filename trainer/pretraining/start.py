"""Going on from a backbone that `trainer backbone` made: more text, other text, a longer run.

Its vocabulary and geometry hold, and its soft prompts are taken up by their names. The optimizer
begins anew: the folder keeps what is served, not its moments.
"""

from pathlib import Path

from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from serve.errors import UserError
from trainer.backbone import MINI
from trainer.pretraining.corruption import EOS, FIRST_SENTINEL
from trainer.pretraining.mixture import SoftTask
from trainer.pretraining.vocabulary import load_tokenizer
from trainer.shipped import FILE


def named_folder(name: str) -> str:
    """The folder of a backbone that a flag names: `mini` is the one that ships, as everywhere.

    Absolute, since `load_backbone` would take a folder of that name for the other again.
    """
    return str((MINI if name == "mini" else Path(name)).absolute())


def prompt_key(task: SoftTask) -> str:
    """The name of a task's soft prompt in its file: "question: label words"."""
    return f"{task.question.name}: {' '.join(task.names)}"


def start_tokenizer(folder: Path, flag: str = "--start") -> Tokenizer:
    """The vocabulary of a backbone to go on from, or to ask; errors name `flag`.

    Raises:
        UserError: the folder is none that `trainer backbone` made.
    """
    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        raise UserError(f"{flag} {folder} is no backbone: it needs config.json and tokenizer.json")
    tokenizer = load_tokenizer(folder)
    wanted = {"</s>": EOS, "<extra_id_0>": FIRST_SENTINEL}
    if any(tokenizer.token_to_id(piece) != number for piece, number in wanted.items()):
        raise UserError(
            f"{flag} {folder}: its vocabulary does not number </s> {EOS} and <extra_id_0> "
            f"{FIRST_SENTINEL}: only backbones that this command made can be used"
        )
    return tokenizer


def take_up_prompts(prompts: Tensor, tasks: list[SoftTask], folder: Path) -> int:
    """Overwrite the first vectors of `prompts` [T, P, D] by those that the folder has for the
    task; how many tasks it had."""
    if not (folder / FILE).is_file():
        return 0
    known = load_file(folder / FILE)
    found = [(task, known[prompt_key(task)]) for task in tasks if prompt_key(task) in known]
    for task, vectors in found:
        prompts[task.index, : len(vectors)] = vectors[: prompts.shape[1]].float()
    return len(found)
