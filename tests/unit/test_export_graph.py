"""The graphs to export, as torch modules, against the trainer's plain read-out row by row."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from exporter.graph import PrefixGraph, ServedGraph, SingleFileGraph
from exporter.layers import Norm
from exporter.verify import check
from serve.errors import Failure, UserError
from trainer.backbone import Backbone, load_backbone
from trainer.modes import deepen
from trainer.readout import Batch, class_scores

TOKENS = 9  # the longest prompt
LENGTHS = [9, 4, 1]  # of the three prompts
WORDS = [[5, 6], [7, 8, 9], [10, 4, 11, 12]]
IDS = [[20, 30, 40, 7, 1], [3, 1], [50, 60, 70, 80, 90, 22, 33, 44, 1], [9, 1], [8, 15, 1]]
TASKS = [0, 1, 2, 1, 0]


@pytest.fixture(params=["v1.0", "v1.1"])
def backbone(request: pytest.FixtureRequest, tiny_t5: Path, tiny_t5_v11: Path) -> Backbone:
    return load_backbone(str(tiny_t5 if request.param == "v1.0" else tiny_t5_v11))


def prompts(backbone: Backbone, mode: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(n, backbone.t5.width, generator=generator) for n in LENGTHS]
    params = [{"prompt_embeddings": value} for value in values]
    if mode != "deep":
        return params
    # Moved off what a prefix prompt gives, so that `deep` is not `prefix` by another name.
    return [
        {
            key: value + 0.1 * torch.randn(value.shape, generator=generator)
            for key, value in p.items()
        }
        for p in (deepen(backbone.t5, item) for item in params)
    ]


def left(value: torch.Tensor, axis: int) -> torch.Tensor:
    gap = list(value.shape)
    gap[axis] = TOKENS - value.shape[axis]
    # Garbage, not zeros: nothing of a padded slot may be seen.
    return torch.cat((torch.full(gap, 3.0), value), dim=axis)


def bank(
    served: ServedGraph, params: list[dict[str, torch.Tensor]], mode: str
) -> list[torch.Tensor]:
    labels = torch.full((3, 4), -1)
    for row, words in enumerate(WORDS):
        labels[row, : len(words)] = torch.tensor(words)
    tail = [torch.tensor(LENGTHS), labels]
    if mode == "full":
        return [torch.stack([left(p["prompt_embeddings"], 0) for p in params]), *tail]
    if mode == "deep":
        pairs = [(left(p["kv"], 3), left(p["states"], 0)) for p in params]
    else:
        graph = PrefixGraph(served)
        pairs = [
            graph(left(p["prompt_embeddings"], 0), torch.tensor(length))
            for p, length in zip(params, LENGTHS, strict=True)
        ]
    return [torch.stack([kv for kv, _ in pairs]), torch.stack([s for _, s in pairs]), *tail]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.zeros(len(IDS), max(map(len, IDS)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, values in enumerate(IDS):
        ids[row, : len(values)] = torch.tensor(values)
        mask[row, : len(values)] = 1
    return ids, mask


def expected(
    backbone: Backbone, mode: str, params: dict[str, torch.Tensor], row: int
) -> torch.Tensor:
    batch = Batch(torch.tensor([IDS[row]]), torch.ones(1, len(IDS[row]), dtype=torch.bool))
    words = torch.tensor(WORDS[TASKS[row]])
    grouped = {key: value[None] for key, value in params.items()}
    return class_scores(backbone.t5, mode, grouped, batch, words, backbone.decoder_ids)[0]


@torch.no_grad()
@pytest.mark.parametrize("mode", ["full", "prefix", "deep"])
def test_a_mixed_batch_equals_the_read_out_of_each_row(backbone: Backbone, mode: str) -> None:
    served = ServedGraph(backbone.t5, backbone.decoder_ids, mode, TOKENS).eval()
    params = prompts(backbone, mode)
    ids, mask = padded()
    logits = served(ids, mask, torch.tensor(TASKS), *bank(served, params, mode))
    assert logits.shape == (5, 4)
    for row, task in enumerate(TASKS):
        want = expected(backbone, mode, params[task], row)
        torch.testing.assert_close(logits[row, : len(want)], want, atol=2e-5, rtol=1e-5)
        assert (logits[row, len(want) :] == -1e9).all()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["full", "prefix", "deep"])
@pytest.mark.parametrize("groups", [[2], [2, 0]])
def test_rows_given_in_groups_of_a_task_equal_rows_given_one_by_one(
    backbone: Backbone, mode: str, groups: list[int]
) -> None:
    served = ServedGraph(backbone.t5, backbone.decoder_ids, mode, TOKENS).eval()
    tensors = bank(served, prompts(backbone, mode), mode)
    ids, mask = (values[:4] for values in padded())
    each = torch.tensor(groups).repeat_interleave(4 // len(groups))
    want = served(ids, mask, each, *tensors)
    got = served(ids, mask, torch.tensor(groups), *tensors)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["full", "prefix", "deep"])
def test_the_single_file_graph_equals_the_read_out(backbone: Backbone, mode: str) -> None:
    served = ServedGraph(backbone.t5, backbone.decoder_ids, mode, TOKENS).eval()
    params = prompts(backbone, mode)[1]
    graph = SingleFileGraph(served, params, torch.tensor(WORDS[1])).eval()
    ids, mask = padded()
    logits = graph(ids, mask)
    assert logits.shape == (5, 3)
    for row in (1, 3):  # the rows of task 1
        want = expected(backbone, mode, params, row)
        torch.testing.assert_close(logits[row], want, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_far_beyond_the_table_share_its_last_bucket(backbone: Backbone) -> None:
    """Texts longer than the 128 positions that the distance table holds to either side."""
    served = ServedGraph(backbone.t5, backbone.decoder_ids, "prefix", TOKENS).eval()
    params = prompts(backbone, "prefix")
    ids = torch.randint(3, 100, (1, 300), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    logits = served(ids, mask, torch.tensor([0]), *bank(served, params, "prefix"))
    grouped = {"prompt_embeddings": params[0]["prompt_embeddings"][None]}
    batch, words = Batch(ids, mask.bool()), torch.tensor(WORDS[0])
    want = class_scores(backbone.t5, "prefix", grouped, batch, words, backbone.decoder_ids)
    torch.testing.assert_close(logits[:, :2], want, atol=3e-5, rtol=1e-5)


@torch.no_grad()
def test_the_norm_is_the_models_own(backbone: Backbone) -> None:
    hidden = torch.randn(2, 3, backbone.t5.width, generator=torch.Generator().manual_seed(0))
    original = backbone.t5.model.encoder.final_layer_norm
    torch.testing.assert_close(Norm(original)(hidden), original(hidden), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(Norm(original, 0.5)(hidden), original(hidden) / 2, atol=1e-6, rtol=0)


def test_an_unknown_activation_is_refused(tiny_t5: Path) -> None:
    backbone = load_backbone(str(tiny_t5))
    backbone.t5.model.config.dense_act_fn = "tanh"
    with pytest.raises(UserError, match="activation 'tanh'"):
        ServedGraph(backbone.t5, backbone.decoder_ids, "prefix", 4)


@pytest.mark.parametrize(
    ("worst", "ships"), [(0.0, True), (1e-4, True), (1.1e-4, False), (math.nan, False)]
)
def test_a_graph_ships_where_its_difference_is_known_to_be_small(worst: float, ships: bool) -> None:
    if ships:
        check(worst, "the graph")
        return
    with pytest.raises(Failure, match="the graph differs from torch by"):
        check(worst, "the graph")
