"""Backbones that have a say, beside the judge, in what a sentence's opinion is.

A backbone learns a sentence's opinion from the judge's verdict, and ends with errors of its own: it
read other texts, in other words, and obeys a template where the judge has a head. Where two that
are about as good err differently, their mean is better than either, and a backbone that goes on
(`--start`) can learn from the mean of its judge and itself: born-again networks (Furlanello et al.
2018, https://arxiv.org/abs/1805.04770), with the first teacher kept among the voters.

Only the side is put to the vote. How likely a sentence is neutral, and how strong an opinion is,
stays as the judge says: a backbone's template knows two words.
"""

from collections.abc import Sequence

import numpy as np
import torch

from trainer.backbone import Backbone, load_backbone
from trainer.cpu import half_precision
from trainer.pretraining.asker import Asker
from trainer.pretraining.evaluate import ask
from trainer.pretraining.judge import NEUTRAL
from trainer.pretraining.judging import mapped
from trainer.pretraining.shards import MAX_TOKENS, Verdicts
from trainer.pretraining.start import start_tokenizer
from trainer.pretraining.wordings import TEMPLATE

WORDS = ("terrible", "great")
_TINY = 1e-4


def with_votes(judge: Verdicts, voters: Sequence[str], workers: int, half: bool | None
               ) -> Verdicts:  # fmt: skip
    """The judge's verdicts, their sides averaged with the answers of the backbones `voters`.

    half: products in bf16; None: where the device multiplies it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = [load_backbone(folder, device=device) for folder in voters]

    def verdicts(texts: list[str]) -> np.ndarray:
        return vote(judge(texts), [odds(voter, texts, workers, half) for voter in loaded])

    return verdicts


def odds(voter: Backbone, texts: Sequence[str], workers: int, half: bool | None) -> np.ndarray:
    """Log odds [N] of "great" against "terrible" that a backbone gives under the template."""
    t5, asker = voter.t5, Asker(start_tokenizer(voter.folder))
    device = t5.model.device
    half = half_precision(device, half)

    def asked(part: np.ndarray) -> np.ndarray:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            scores = ask(t5, asker, TEMPLATE, WORDS, [texts[i] for i in part], MAX_TOKENS)
        return scores[:, 1] - scores[:, 0]

    result = np.zeros(len(texts), np.float32)
    for part, found in mapped(asked, texts, workers if device.type == "cpu" else 1, "votes"):
        result[part] = found
    return result


def vote(degrees: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Probabilities of the five degrees after the vote, [N, 5].

    The log odds of positive against negative are the mean of the judge's and of every other's, each
    scaled to the deviation of the judge's, so that none is louder for being surer. degrees: the
    judge's, [N, 5]; others: log odds [N] each.
    """
    negative, positive = degrees[:, :NEUTRAL], degrees[:, NEUTRAL + 1 :]
    judged = np.log(positive.sum(1) + _TINY) - np.log(negative.sum(1) + _TINY)
    loud = judged.std()
    scaled = [o * (loud / o.std() if o.std() > 0 else 1.0) for o in others]
    share = 1 / (1 + np.exp(-np.mean([judged, *scaled], 0)))[:, None]
    opinion = 1 - degrees[:, NEUTRAL, None]
    within = lambda side: (side + _TINY) / (side + _TINY).sum(1, keepdims=True)  # noqa: E731
    return np.concatenate(
        [opinion * (1 - share) * within(negative), degrees[:, NEUTRAL, None],
         opinion * share * within(positive)], 1).astype(np.float32)  # fmt: skip
