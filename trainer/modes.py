"""The attention modes: how a prompt is put together with a text.

- `full`, the paper's: prompt and text attend to each other, the prompt is paid on every text;
- `prefix`: the prompt attends to itself only, so its keys and values are constants of the task;
- `deep`: those constants are what is trained (prefix-tuning, Li and Liang 2021; P-tuning v2, Liu
  et al. 2021), started from the ones that a `prefix` prompt gives.

A prompt is a dictionary of tensors, so that MetaPT treats all modes alike. With a leading axis G
for the groups of rows that share a prompt (see `trainer.t5`):

    full, prefix    {"prompt_embeddings": [G, P, D]}
    deep            {"kv": [G, L, 2, H, P, K], "states": [G, P, D]}
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from serve.bundle import MODES
from serve.errors import UserError
from trainer.t5 import FrozenT5, Segment

Params = dict[str, Tensor]
_HEADS = -3  # the axis of `kv` that tensor parallelism divides


def steer_full(t5: FrozenT5, params: Params, text: Tensor, mask: Tensor) -> list[Segment]:
    """[P; text] through the encoder as one sequence. See `Steer` for the arguments."""
    prompt = params["prompt_embeddings"]
    groups, prompt_tokens, _ = prompt.shape
    rows = text.shape[0]
    spread = prompt[:, None].expand(-1, rows // groups, -1, -1).reshape(rows, prompt_tokens, -1)
    ones = torch.ones(rows, prompt_tokens, dtype=torch.bool, device=mask.device)
    whole_mask = torch.cat((ones, mask), dim=1)
    states = t5.encode(torch.cat((spread, text), dim=1), whole_mask)
    return [_grouped(states, whole_mask, groups)]


def steer_prefix(t5: FrozenT5, params: Params, text: Tensor, mask: Tensor) -> list[Segment]:
    """The prompt is encoded once a group, the text attends to it. See `Steer`."""
    kv, states = t5.prefix(params["prompt_embeddings"])
    return steer_constants(t5, {"kv": kv, "states": states}, text, mask)


def steer_deep(t5: FrozenT5, params: Params, text: Tensor, mask: Tensor) -> list[Segment]:
    """Keys and values of every layer are the parameters. See `Steer`."""
    own = {"kv": t5.shards.own(params["kv"], _HEADS), "states": params["states"]}
    return steer_constants(t5, own, text, mask)


def steer_constants(t5: FrozenT5, params: Params, text: Tensor, mask: Tensor) -> list[Segment]:
    """The text attends to given keys and values, the decoder to given states. See `Steer`."""
    kv, prompt_states = params["kv"], params["states"]
    states = t5.encode(text, mask, kv)
    return [Segment(prompt_states[:, None], None), _grouped(states, mask, kv.shape[0])]


def _grouped(states: Tensor, mask: Tensor, groups: int) -> Segment:
    return Segment(states.unflatten(0, (groups, -1)), mask.unflatten(0, (groups, -1)))


# (t5, params with a leading axis G, text [B, S, D], mask bool [B, S]) -> the decoder's memory
Steer = Callable[[FrozenT5, Params, Tensor, Tensor], list[Segment]]

_STEER: dict[str, Steer] = {
    "full": steer_full,
    "prefix": steer_prefix,
    "deep": steer_deep,
    "constants": steer_constants,  # the second stage of `prefix`, see `Scorer.stages`
}


def steer(mode: str) -> Steer:
    """The function of a mode.

    Raises:
        UserError: there is no such mode.
    """
    if mode not in _STEER:
        raise UserError(f"mode '{mode}' is unknown: use one of {', '.join(MODES)}")
    return _STEER[mode]


def add_group(params: Params, groups: int = 1) -> Params:
    """Each tensor with a leading axis of `groups` copies (views, no memory)."""
    return {name: value.expand(groups, *value.shape) for name, value in params.items()}


@torch.no_grad()
def deepen(t5: FrozenT5, params: Params) -> Params:
    """The `deep` parameters that answer as a `prefix` prompt does.

    Args:
        params: {"prompt_embeddings": [P, D]}, without a group axis.

    Returns:
        {"kv": [L, 2, H, P, K], "states": [P, D]}.
    """
    if "kv" in params:
        return params
    kv, states = t5.prefix(params["prompt_embeddings"][None])
    return {"kv": t5.shards.gather(kv[0], _HEADS).clone(), "states": states[0].clone()}
