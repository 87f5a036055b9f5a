"""What the demo shows under the bonnet, as one JSON file beside a bundle (`bonnet.json`).

    {"format": 1,
     "map": {"texts": [...], "clusters": [...], "labels": [...], "x": [...], "y": [...]},
     "curves": {"metapt": [{"step": 0, "validation_accuracy": 0.5, ...}, ...], ...},
     "words": {"film": [{"position": 0, "words": [["great", 0.41], ...]}, ...], ...}}

Every part is optional. The map is the paper's figure 4: the clusters that MetaPT saw, by t-SNE
(van der Maaten and Hinton 2008) of their sentence embeddings. It holds texts of the training data:
write it only where these may be shown.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serve.errors import Failure, UserError
from serve.files import write_json
from trainer.backbone import Backbone
from trainer.prompt import Prompt, load_prompt
from trainer.runs import METRICS_FILE
from trainer.tables import iterate_rows

log = logging.getLogger(__name__)

FORMAT = 1
POINTS = 1200  # of the map: more take a browser's breath and t-SNE's time (some 10 s on 2 cores)
_LONGEST = 200  # characters of a text under the pointer
_NEAREST = 5  # words of a prompt token
_FIGURES = ("step", "loss", "accuracy", "validation_loss", "validation_accuracy")


def write_bonnet(
    path: str | Path,
    clusters: str | Path | None = None,
    embeddings: np.ndarray | None = None,
    prompts: Mapping[str, str | Path | Prompt] | None = None,
    backbone: Backbone | None = None,
    *,
    points: int = POINTS,
    seed: int = 1,
) -> None:
    """Write `bonnet.json` into a bundle's folder (or to a path that ends in .json).

    Args:
        path: the bundle's folder.
        clusters: the Parquet file that `cluster` wrote (text, label, cluster).
        embeddings: [N, D] of its rows; None embeds the rows that are shown (cached).
        prompts: prompt folders by name; their metrics.jsonl gives the curves.
        backbone: for the prompts' nearest words; without it these are left out.
        points: rows of the map at most, drawn by `seed`.

    Raises:
        UserError, Failure: a file is missing or damaged.
    """
    path = Path(path)
    if path.suffix != ".json":
        path = path / "bonnet.json"
    document: dict[str, Any] = {"format": FORMAT}
    if clusters is not None:
        document["map"] = cluster_map(clusters, embeddings, points, seed)
    if prompts:
        found = {name: read_curve(item) for name, item in prompts.items()}
        document["curves"] = {name: curve for name, curve in found.items() if curve}
        if backbone is not None:
            loaded = {
                name: item if isinstance(item, Prompt) else load_prompt(item)
                for name, item in prompts.items()
            }
            document["words"] = {
                name: nearest_words(prompt, backbone)
                for name, prompt in loaded.items()
                if "prompt_embeddings" in prompt.params
            }
    write_json(path, document)


def cluster_map(
    clusters: str | Path, embeddings: np.ndarray | None, points: int, seed: int
) -> dict[str, list[Any]]:
    """The rows of a clustered file in two dimensions.

    Returns:
        Columns of equal length: texts, clusters, labels, x, y.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows = [row for _, row in iterate_rows(clusters, ["text", "label", "cluster"], keep_all=False)]
    if embeddings is not None and len(embeddings) != len(rows):
        raise UserError(f"{len(embeddings)} embeddings, but {clusters} has {len(rows)} rows")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:points])
    if len(chosen) < 5:
        raise UserError(f"{clusters} has {len(rows)} rows: too few for a map")
    texts = [str(rows[i]["text"]) for i in chosen]
    if embeddings is None:
        from trainer.embed import embed

        vectors = embed(texts, quiet=True)
    else:
        vectors = np.asarray(embeddings, np.float32)[chosen]
    if vectors.shape[1] > 50:  # as the authors of t-SNE do: less noise, and faster
        vectors = PCA(min(50, len(chosen)), random_state=seed).fit_transform(vectors)
    perplexity = min(30.0, (len(chosen) - 1) / 3)
    place = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(vectors)
    return {
        "texts": [text if len(text) <= _LONGEST else text[:_LONGEST] + " …" for text in texts],
        "clusters": [int(rows[i]["cluster"]) for i in chosen],
        "labels": [str(rows[i]["label"]) for i in chosen],
        "x": [round(float(value), 2) for value in place[:, 0]],
        "y": [round(float(value), 2) for value in place[:, 1]],
    }


def read_curve(prompt: str | Path | Prompt) -> list[dict[str, float]]:
    """The evaluations in a prompt folder's metrics.jsonl; none where there is no such file.

    Raises:
        Failure: a line of it is not JSON.
    """
    if isinstance(prompt, Prompt) or not (Path(prompt) / METRICS_FILE).is_file():
        return []
    path = Path(prompt) / METRICS_FILE
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
    except ValueError as error:
        raise Failure(f"{path} is damaged ({error}): train the prompt again") from None
    return [{key: line[key] for key in _FIGURES if line.get(key) is not None} for line in lines]


@torch.no_grad()
def nearest_words(
    prompt: Prompt, backbone: Backbone, count: int = _NEAREST
) -> list[dict[str, Any]]:
    """For each prompt token the vocabulary's pieces of the highest cosine, with the cosine.

    Lester et al. 2021, section 7, read prompts in this way.
    """
    table = backbone.t5.model.shared.weight.detach().float()
    tokenizer = backbone.tokenizer
    size = min(len(tokenizer), table.shape[0])
    special = torch.tensor([i for i in tokenizer.all_special_ids if i < size])
    value = prompt.params["prompt_embeddings"].detach().float().to(table.device)
    unit = torch.nn.functional.normalize
    cosine = unit(value, dim=1) @ unit(table[:size], dim=1).t()
    cosine[:, special] = -2
    best = cosine.topk(count, dim=1)
    return [
        {
            "position": position,
            "words": [
                [tokenizer.convert_ids_to_tokens(int(i)).replace("▁", " ").strip() or "▁",
                 round(float(c), 3)]
                for c, i in zip(values, ids, strict=True)
            ],
        }
        for position, (values, ids) in enumerate(
            zip(best.values.cpu(), best.indices.cpu(), strict=True)
        )
    ]  # fmt: skip
