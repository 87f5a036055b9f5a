"""Where a prompt starts: at random, from the vocabulary, one that ships, or another prompt."""

from __future__ import annotations

import logging

import torch

from serve.errors import UserError
from trainer.backbone import Backbone
from trainer.modes import Params, deepen
from trainer.prompt import Prompt, check_fits, load_prompt
from trainer.shipped import SHIPPED, load_shipped

log = logging.getLogger(__name__)

_COMMON = 5000  # Lester et al. 2021, section 3.1: initial vectors come from the 5,000 most common


def random_params(backbone: Backbone, tokens: int, seed: int) -> Params:
    """Normal vectors with the deviation of the backbone's embeddings: [P, D]."""
    weight = backbone.t5.model.shared.weight
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(tokens, weight.shape[1], generator=generator)
    return {"prompt_embeddings": value.to(weight.device) * weight.detach().float().std()}


def vocabulary_params(backbone: Backbone, tokens: int, seed: int) -> Params:
    """Embeddings of common tokens, drawn without repetition while there are enough: [P, D]."""
    weight = backbone.t5.model.shared.weight.detach()
    special = set(backbone.tokenizer.all_special_ids)
    size = min(len(backbone.tokenizer), weight.shape[0])
    # SentencePiece and our own vocabularies list frequent pieces first.
    common = [i for i in range(size) if i not in special][:_COMMON]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(common), generator=generator)
    chosen = torch.tensor(common)[order[torch.arange(tokens) % len(common)]]
    return {"prompt_embeddings": weight[chosen.to(weight.device)].float().clone()}


def _prompt(backbone: Backbone, init: str, mode: str) -> Prompt:
    if init.startswith(SHIPPED):
        return load_shipped(backbone, init.removeprefix(SHIPPED), mode)
    prompt = load_prompt(init)
    check_fits(prompt, backbone, f"--init {init}")
    return prompt


def initial_params(backbone: Backbone, init: str, mode: str, tokens: int, seed: int) -> Params:
    """The tensors that training starts from, requiring gradients.

    Args:
        init: `random`, `vocab`, `shipped:NAME` (see `trainer.shipped`), or a prompt folder (or
            `.npy`); the last two have a length of their own.

    Raises:
        UserError: there is no such prompt, or it is of another backbone.
    """
    if init == "random":
        params = random_params(backbone, tokens, seed)
    elif init == "vocab":
        params = vocabulary_params(backbone, tokens, seed)
    else:
        prompt = _prompt(backbone, init, mode)
        params = {name: value.to(backbone.device) for name, value in prompt.params.items()}
        if mode != "deep" and "kv" in params:
            raise UserError(
                f"--init {init} is a prompt of mode deep, which has no vectors for mode {mode}: "
                "pass --mode deep"
            )
        if prompt.task.mode != mode and mode != "deep":
            log.warning(
                "%s was trained in mode %s and is tuned in mode %s: expect a worse start",
                init, prompt.task.mode, mode,
            )  # fmt: skip
    if mode == "deep":
        params = deepen(backbone.t5, params)
    return {name: value.detach().clone().requires_grad_() for name, value in params.items()}
