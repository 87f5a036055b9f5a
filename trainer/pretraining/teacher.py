"""A BERT sentence encoder as teacher: its weights, and its hidden states piece by piece."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertModel
from transformers.utils import logging as transformers_logging

from serve.errors import UserError


class Teacher(nn.Module):
    """A BERT which reads the student's ids (see `vocabulary.teacher_ids`) in [CLS] ... [SEP]."""

    def __init__(self, bert: BertModel, table: list[int], cls: int) -> None:
        super().__init__()
        self.bert = bert.eval().requires_grad_(False)
        self.register_buffer("table", torch.tensor(table))
        self.cls = cls

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor, attentions: bool = False
                ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        """ids, mask: [B, S], each row ending in </s>.

        Returns the L + 1 hidden states [B, S, D] before the last norm's gain and bias (zero mean,
        unit variance in D), aligned with `ids`, and where asked the L score tensors
        [B, H, S, S] before the softmax.
        """
        theirs, whole = self._theirs(ids, mask)
        scores: list[Tensor] = []
        states: list[Tensor] = []
        norms = [self.bert.embeddings.LayerNorm]
        norms += [layer.output.LayerNorm for layer in self.bert.encoder.layer]
        handles = [norm.register_forward_hook(lambda _, args, __: states.append(plain(args[0])))
                   for norm in norms]  # fmt: skip
        if attentions:
            for layer in self.bert.encoder.layer:
                handles.append(layer.attention.self.register_forward_hook(
                    lambda module, args, kwargs, _: scores.append(
                        _scores(module, args[0] if args else kwargs["hidden_states"])),
                    with_kwargs=True))  # fmt: skip
        try:
            self.bert(input_ids=theirs, attention_mask=whole)
        finally:
            for handle in handles:
                handle.remove()
        return [state[:, 1:] for state in states], [score[:, :, 1:, 1:] for score in scores]

    @torch.no_grad()
    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Sentence embeddings [B, D] of unit length, the mean of the last states; as `forward`."""
        theirs, whole = self._theirs(ids, mask)
        states = self.bert(input_ids=theirs, attention_mask=whole).last_hidden_state
        mean = (states * whole[..., None]).sum(1) / whole.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean.float(), dim=-1)

    def _theirs(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The same texts in the teacher's ids, with [CLS] in front: ids and mask [B, S + 1]."""
        rows = ids.shape[0]
        theirs = self.table[ids]  # type: ignore[index]
        theirs = torch.cat([theirs.new_full((rows, 1), self.cls), theirs], 1)
        return theirs, torch.cat([mask.new_ones(rows, 1), mask], 1)


def plain(hidden: Tensor) -> Tensor:
    """Zero mean and unit variance along D."""
    return torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])


def _scores(module: Any, hidden: Tensor) -> Tensor:
    rows, length, _ = hidden.shape
    heads = module.num_attention_heads
    q = module.query(hidden).view(rows, length, heads, -1).transpose(1, 2)
    k = module.key(hidden).view(rows, length, heads, -1).transpose(1, 2)
    return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5


def load_teacher(folder: Path, tokenizer: Tokenizer) -> Teacher:
    """Read a BERT folder as the teacher of a student with that tokenizer; see `read_bert`."""
    from trainer.pretraining.vocabulary import teacher_ids

    bert, theirs = read_bert(folder)
    return Teacher(bert, teacher_ids(tokenizer, theirs), theirs.get_vocab()["[CLS]"])


def read_bert(folder: Path) -> tuple[BertModel, Tokenizer]:
    """A BERT folder: config.json, weights, tokenizer.json, which then neither cuts nor pads.

    Raises UserError if it is not one.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"--teacher {folder} holds no config.json: pass a BERT folder or `none`")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.token_to_id("[CLS]") is None:
        raise UserError(f"--teacher {folder} has no [CLS]: it is not a BERT")
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would report the pooler, which nobody wants
    transformers_logging.disable_progress_bar()
    try:
        bert = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32,
                                         attn_implementation="eager")  # fmt: skip
    finally:
        transformers_logging.set_verbosity(before)
    return bert, tokenizer
