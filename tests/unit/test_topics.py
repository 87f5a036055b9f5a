"""Questions about topics: clusters of texts, the words that name them, and what is drawn."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from trainer.pretraining.losses import Auxiliary, batch_loss
from trainer.pretraining.mixture import Mixture
from trainer.pretraining.model import new_model
from trainer.pretraining.recipe import COLUMNS
from trainer.pretraining.shards import Pool, add_pool, load_pools
from trainer.pretraining.teacher import Teacher
from trainer.pretraining.topics import Topics, embed, make_topics, save_names, telling_words
from trainer.pretraining.train import LATER, initial_prompts
from trainer.pretraining.vocabulary import build_tokenizer, train_pieces
from trainer.pretraining.wordings import label_words
from trainer.t5 import FrozenT5

SHIPS = "boat harbour sailor anchor".split()
BREAD = "flour oven baker dough".split()
ROOMS = "pillow lobby towel carpet".split()
MEALS = "soup waiter dessert menu".split()
SHARES = {kind: share for kind, share in LATER.items() if kind != "distil"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = [*SHIPS, *BREAD, *ROOMS, *MEALS, "the", "of", "and", "terrible"]
    return build_tokenizer(train_pieces([" ".join(words)] * 9, 400, [*label_words(), *words]))


def pool(name: str, tokenizer: Tokenizer, groups: list[list[str]], size: int, seed: int) -> Pool:
    """Texts of 10 to 20 words of one group, with some of the words that any text has."""
    rng = np.random.default_rng(seed)
    texts = []
    for i in range(size):
        words = [*groups[i % len(groups)], "the", "of", "and", "terrible"]
        texts.append(" ".join(rng.choice(words, rng.integers(10, 21))))
    ids = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    columns = {c: np.full(size, -1, np.int8) for c in COLUMNS}
    if name != "plain":
        columns["polarity"] = rng.integers(0, 2, size).astype(np.int8)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    return Pool(name, np.concatenate(ids).astype(np.uint16), offsets, columns)


class Counting(nn.Module):
    """Stands for a teacher: a text's embedding is which pieces it holds."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(size), requires_grad=False)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        held = (self.table[ids] * mask[..., None]).sum(1)
        return nn.functional.normalize(held, dim=-1)


@pytest.fixture(scope="module")
def made(tokenizer: Tokenizer) -> tuple[dict[str, Pool], Pool, list[list[str]]]:
    pools = {
        "plain": pool("plain", tokenizer, [SHIPS, BREAD], 200, 1),
        "hotels": pool("hotels", tokenizer, [ROOMS, MEALS], 200, 2),
        "windows": pool("windows", tokenizer, [SHIPS], 60, 3),
    }
    teacher = Counting(tokenizer.get_vocab_size())
    found, names = make_topics(pools, teacher, tokenizer, 4, 0, half=False)  # type: ignore[arg-type]
    return pools, found, names


def test_clusters_are_named_by_their_own_words(
    made: tuple[dict[str, Pool], Pool, list[list[str]]], tokenizer: Tokenizer
) -> None:
    _, found, names = made
    assert len(names) == 4 and len(found) == 400
    groups = [set(SHIPS), set(BREAD), set(ROOMS), set(MEALS)]
    owner = [next(g for g, words in enumerate(groups) if set(group) <= words) for group in names]
    assert sorted(owner[:2]) == [0, 1] and sorted(owner[2:]) == [2, 3]  # plain text comes first
    for i in range(len(found)):
        words = tokenizer.decode(found.text(i).tolist()).split()
        counts = Counter(next((g for g, own in enumerate(groups) if w in own), -1) for w in words)
        counts.pop(-1, None)
        if counts:
            assert owner[found.columns["topic"][i]] == counts.most_common(1)[0][0]


def test_a_word_tells_by_its_part_of_the_divergence(tokenizer: Tokenizer) -> None:
    lines = ["boat anchor the terrible", "boat of", "oven the flour sailor", "oven boat"] * 16
    ids = [np.array(tokenizer.encode(t, add_special_tokens=False).ids, np.uint16) for t in lines]
    labels = np.array([0, 0, 1, 1] * 16)

    def weight(word: str, c: int) -> float:
        inside = [word in t.split() for t, y in zip(lines, labels, strict=True) if y == c]
        p, q = sum(inside) / len(inside), sum(word in t.split() for t in lines) / len(lines)
        return p * math.log(p / q) if p else 0.0

    # `the` and `of` are stop words, `terrible` is an opinion.
    expected: list[list[str]] = []
    for c in range(2):
        known = ["boat", "anchor", "oven", "flour", "sailor"]
        expected.append(sorted((w for w in known if weight(w, c) > 0), key=lambda w: -weight(w, c)))
    names = telling_words(ids, labels, 2, tokenizer, set())
    assert [set(group) for group in names] == [set(group) for group in expected]
    assert names[0] == expected[0] == ["anchor", "boat"] and names[1][0] == "oven"
    assert telling_words(ids, labels, 2, tokenizer, {"boat", "oven"})[0] == ["anchor"]
    rare = telling_words(ids[:40], labels[:40], 2, tokenizer, set())  # in 10 texts of 40
    assert not {"anchor", "flour"} & {word for group in rare for word in group}


def test_few_texts_make_no_topics(tokenizer: Tokenizer) -> None:
    few = {"plain": pool("plain", tokenizer, [SHIPS, BREAD], 60, 1)}
    found, names = make_topics(few, Counting(tokenizer.get_vocab_size()), tokenizer, 4, 0)  # type: ignore[arg-type]
    assert len(found) == 0 and names == []


def test_topics_are_read_from_the_shards(
    made: tuple[dict[str, Pool], Pool, list[list[str]]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _, found, names = made
    (tmp_path / "pools.json").write_text("[]")
    for _ in range(2):  # a second time it takes the first one's place
        add_pool(found, tmp_path)
    save_names(names, tmp_path)
    read = load_pools(tmp_path)
    assert list(read) == ["topics"]
    topics = Topics.load(read, tmp_path, tokenizer)
    assert topics is not None
    assert topics.words == {tokenizer.token_to_id(word) for group in names for word in group}
    assert Topics.load({}, tmp_path, tokenizer) is None


def test_a_name_is_not_in_the_text_if_there_is_another(
    made: tuple[dict[str, Pool], Pool, list[list[str]]], tokenizer: Tokenizer
) -> None:
    topics = topics_of(made, tokenizer)
    rng = np.random.default_rng(0)
    first, second, third = topics.names[0]
    assert {topics.name(0, rng, [first, third]) for _ in range(20)} == {second}
    assert {topics.name(0, rng) for _ in range(60)} == {first, second, third}
    assert topics.name(0, rng, [first, second, third]) in topics.names[0]


def topics_of(made: tuple[dict[str, Pool], Pool, list[list[str]]], tokenizer: Tokenizer) -> Topics:
    _, found, names = made
    return Topics(found, [[tokenizer.token_to_id(word) for word in group] for group in names])


def mixture_of(
    made: tuple[dict[str, Pool], Pool, list[list[str]]], tokenizer: Tokenizer, topics: bool
) -> Mixture:
    pools, found, _ = made
    asked = topics_of(made, tokenizer) if topics else None
    return Mixture({**pools, "topics": found}, tokenizer, 400, seed=3, topics=asked)


def test_questions_about_topics_are_asked_in_words_and_beside_silent_prompts(
    made: tuple[dict[str, Pool], Pool, list[list[str]]], tokenizer: Tokenizer
) -> None:
    mixture, topics = mixture_of(made, tokenizer, True), topics_of(made, tokenizer)
    cluster_of = {i: c for c, ids in enumerate(topics.names) for i in ids}
    pieces = tokenizer.get_vocab()
    own = [{pieces[w] for w in words} for words in (SHIPS, BREAD, ROOMS, MEALS)]
    asked: Counter[str] = Counter()
    for step in range(60):
        batch = mixture.batch(step, SHARES)
        if batch.columns is None:
            continue
        assert batch.words is not None and batch.classes is not None
        assert batch.targets is not None and batch.restricted is not None
        for i, column in enumerate(batch.columns):
            asked[f"{batch.kind} {column}"] += 1
            if column != "topic":
                continue
            words = batch.words[i][batch.words[i] >= 0].tolist()
            assert 2 <= len(words) == len({cluster_of[w] for w in words})
            assert batch.restricted[i]
            assert batch.targets[i].sum() == 1 and batch.targets[i, batch.classes[i]] == 1
            right = words[int(batch.classes[i])]
            held = [len(group & set(batch.ids[i].tolist())) for group in own]
            family = next(g for g in own if right in g)
            assert held[own.index(family)] == max(held)
            if batch.kind != "words":
                group = i // (len(batch.columns) // 8)
                assert batch.tasks is not None and batch.tasks[group] == -1
                assert torch.equal(batch.words[i], batch.words[group * len(batch.columns) // 8])
    in_words = sum(n for key, n in asked.items() if key.startswith("words"))
    assert 0.15 < asked["words topic"] / in_words < 0.35
    assert asked["prefix topic"] > 0


def test_without_topics_none_is_asked_and_their_texts_are_not_read(
    made: tuple[dict[str, Pool], Pool, list[list[str]]], tokenizer: Tokenizer
) -> None:
    mixture = mixture_of(made, tokenizer, False)
    assert "topics" not in mixture.pools
    for step in range(30):
        assert "topic" not in (mixture.batch(step, SHARES).columns or [])


def test_a_loss_is_learned_from_and_has_no_head(
    made: tuple[dict[str, Pool], Pool, list[list[str]]], tokenizer: Tokenizer
) -> None:
    mixture, topics = mixture_of(made, tokenizer, True), topics_of(made, tokenizer)
    model = new_model(tokenizer.get_vocab_size(), width=32, layers=1, decoder_layers=1, heads=4,
                      feed_forward=64, deviation=0.05, seed=0)  # fmt: skip
    words = sorted({mixture.asker.ids(w)[0] for w in label_words()} | topics.words)
    prompts = initial_prompts(mixture.tasks, mixture.asker.ids, model.shared.weight, 100, 0)
    auxiliary = Auxiliary(prompts, 32, torch.tensor(words))
    assert "topic" not in auxiliary.heads
    drawn = (mixture.batch(step, {"words": 1.0}) for step in range(9))
    batch = next(b for b in drawn if b.columns and "topic" in b.columns)
    t5 = FrozenT5(model, trainable=True)
    result = batch_loss(t5, auxiliary, batch, None, 0.0, 0.0)
    result.loss.backward()
    assert batch.words is not None and model.shared.weight.grad is not None
    row = batch.columns.index("topic")  # type: ignore[union-attr]
    moved = model.shared.weight.grad[batch.words[row][batch.words[row] >= 0]]
    assert (moved.abs().sum(1) > 0).all()


def test_an_embedding_is_the_mean_of_the_last_states(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, attn_implementation="eager")  # fmt: skip
    bert = BertModel(config, add_pooling_layer=False).eval()
    table = [i % 60 for i in range(tokenizer.get_vocab_size())]
    teacher = Teacher(bert, table, cls=7)
    texts = [np.array([20, 30, 40, 50], np.uint16), np.array([25, 35], np.uint16)]
    for text, found in zip(texts, embed(teacher, texts, half=False), strict=True):
        ids = torch.tensor([[7, *(table[i] for i in text), table[1]]])
        mean = bert(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(torch.from_numpy(found), mean / mean.norm())
