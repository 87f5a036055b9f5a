"""The judge of sentences: its packed forward pass, the documents' loss, batches, verdicts."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel

from serve.errors import UserError
from trainer.pretraining.judge import (
    MAX_PIECES,
    MAX_SENTENCES,
    Batches,
    Document,
    Judge,
    JudgeSchedule,
    allowed_degrees,
    batch_loss,
    document_loss,
    pieces,
)
from trainer.pretraining.judging import (
    documents,
    load_judge,
    save_judge,
    train_judge,
    verdicts,
)
from trainer.pretraining.recipe import load_recipe
from trainer.pretraining.shards import judged_pool, labelled_pool, leaning, opinions
from trainer.pretraining.texts import HeldOut

WORDS = "good lovely bad awful the film room was on a friday we went there with two friends".split()


def make_tokenizer() -> Tokenizer:
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", *WORDS])}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def make_judge(seed: int = 0) -> Judge:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=80, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return Judge(BertModel(config, add_pooling_layer=False))


def row(*ids: int) -> np.ndarray:
    return np.array(ids, np.uint16)


def test_packed_sentences_equal_bert_on_each_alone() -> None:
    judge = make_judge().eval()
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    rng = np.random.default_rng(0)
    rows = [rng.integers(4, 60, n).astype(np.uint16) for n in (3, 17, 8, 9, 1, 40, 8)]
    with torch.no_grad():
        scores = judge(rows)
        for i, ids in enumerate(rows):
            states = judge.bert(input_ids=torch.tensor(ids.astype(int))[None]).last_hidden_state
            pooled = states[0].mean(0)
            torch.testing.assert_close(scores[i], judge.degrees(pooled), atol=1e-5, rtol=1e-5)


def test_a_documents_probability_is_that_of_one_of_its_opinions() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(6, 5, generator=generator)
    document = torch.tensor([1, 0, 1, 1, 2, 0])
    allowed = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0.5, 1, 0.5, 0]])
    losses = []
    for number, agrees in enumerate(allowed.tolist()):
        verdicts = []
        for i in range(6):
            if document[i] == number:
                raw = [math.exp(float(s)) for s in scores[i]]
                verdicts.append([value / sum(raw) for value in raw])
        agreed = sum(v * a for verdict in verdicts for v, a in zip(verdict, agrees, strict=True))
        if agrees[2] == 1:
            probability = agreed / len(verdicts)
        else:
            no_opinion = math.prod(verdict[2] for verdict in verdicts)
            opinions = sum(1 - verdict[2] for verdict in verdicts)
            probability = (1 - no_opinion) * agreed / opinions
        losses.append(-math.log(probability))
    found = document_loss(scores, document, allowed)
    assert float(found) == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_what_a_documents_classes_allow() -> None:
    assert allowed_degrees({"star": 3, "polarity": 1}) == (0, 0, 0, 1, 0)
    assert allowed_degrees({"star": 2, "polarity": -1}) == (0, 0.5, 1, 0.5, 0)
    assert allowed_degrees({"star": -1, "polarity": 0}) == (1, 1, 0, 0, 0)
    assert allowed_degrees({"polarity": 1}) == (0, 0, 0, 1, 1)
    assert allowed_degrees({"tone": 1}) == (0, 0, 1, 0, 0)
    assert allowed_degrees({"tone": 2, "genre": 4}) is None


def test_an_epoch_reads_every_document_once() -> None:
    given = [Document([row(*[i % 50 + 4] * (1 + i % 7))], (1.0, 0, 0, 0, 0)) for i in range(90)]
    given[5] = Document([row(7, k + 4) for k in range(40)], (1.0, 0, 0, 0, 0))
    batches = Batches(given, tokens=40, seed=1)
    first = [d for i in range(batches.count) for d in batches(i)]
    assert len(first) == 90
    sizes = [sum(map(len, batches(i)[0].rows)) for i in range(batches.count)]
    assert max(sizes) <= 40 + 2 * MAX_SENTENCES
    long = next(d for d in first if len(d.rows) > 1)
    assert len(long.rows) == MAX_SENTENCES
    assert sorted(int(r[1]) for r in long.rows) == [int(r[1]) for r in long.rows]  # in order
    again = [d for i in range(batches.count) for d in Batches(given, 40, seed=1)(i)]
    assert [[list(r) for r in d.rows] for d in first] == [[list(r) for r in d.rows] for d in again]
    second = [d for i in range(batches.count, 2 * batches.count) for d in batches(i)]
    assert len(second) == 90
    assert [len(d.rows[0]) for d in second] != [len(d.rows[0]) for d in first]


def test_long_sentences_are_cut_before_their_end_mark() -> None:
    found = pieces(make_tokenizer(), ["good " * 100, "good film"])
    assert [len(f) for f in found] == [MAX_PIECES, 4]
    assert found[0][0] == 2 and found[0][-1] == 3 and found[1][-1] == 3


def reviews(count: int) -> list[Document]:
    """A verdict in one sentence, none in two others; the label is the whole review's."""
    rng = np.random.default_rng(0)
    tokenizer, found = make_tokenizer(), []
    for i in range(count):
        verdict = ("bad", "awful") if i % 2 else ("good", "lovely")
        texts = [f"the {rng.choice(['film', 'room'])} was {rng.choice(verdict)}.",
                 "we went there on a friday.", "we went with two friends."]  # fmt: skip
        side = {"polarity": 1 - i % 2}
        found.append(Document(pieces(tokenizer, texts), allowed_degrees(side) or ()))
    return found


def test_sentences_are_judged_though_only_reviews_were_labelled(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    judge, tokenizer = make_judge(), make_tokenizer()
    schedule = JudgeSchedule(rate=3e-3, tokens=400, epochs=30)
    train_judge(judge, reviews(160), schedule, 0, 1, tmp_path / "state.safetensors")
    texts = ["The room was awful.", "The film was lovely.", "We went there on a friday."]
    found = verdicts(judge, tokenizer, texts, workers=1)
    assert found.sum(1) == pytest.approx([1, 1, 1], abs=1e-4)
    assert found[0, :2].sum() > 0.9 and found[1, 3:].sum() > 0.9
    assert found[2, 2] > 0.9  # what helps to tell no label is neutral


def test_a_stopped_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    given, schedule = reviews(60), JudgeSchedule(rate=1e-3, tokens=100, epochs=1.0)
    whole, halves = make_judge(), make_judge()
    done = train_judge(whole, given, schedule, 3, 1, tmp_path / "a.safetensors")
    path = tmp_path / "b.safetensors"
    train_judge(halves, given, schedule, 3, 1, path, stop_after=done.step // 2)
    fresh = make_judge()
    again = train_judge(fresh, given, schedule, 3, 1, path, resume=True)
    assert again.step == done.step
    for one, other in zip(whole.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match="seed"):
        train_judge(make_judge(), given, schedule, 4, 1, path, resume=True)


def test_processes_judge_as_one_does(tmp_path: Path) -> None:
    judge, tokenizer = make_judge(), make_tokenizer()
    save_judge(judge, tokenizer, tmp_path / "judge")
    loaded, their_tokenizer = load_judge(tmp_path / "judge")
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(4100)]
    one = verdicts(judge, tokenizer, texts, workers=1)
    two = verdicts(loaded, their_tokenizer, texts, workers=2)
    np.testing.assert_allclose(one, two, atol=1e-5)
    alone = judge(pieces(tokenizer, texts[7:8])).softmax(-1)
    np.testing.assert_allclose(one[7], alone[0].detach().numpy(), atol=2e-2)  # bf16 where it pays


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_judge(tmp_path)


def test_opinions_by_hand() -> None:
    degrees = np.array([[0.5, 0.3, 0.1, 0.1, 0.0], [0.0, 0.1, 0.7, 0.1, 0.1],
                        [0.2, 0.2, 0.2, 0.2, 0.2], [0.0, 0.02, 0.38, 0.3, 0.3]])  # fmt: skip
    found = opinions(degrees)
    assert found["polarity"].tolist() == [0, -1, -1, 1]
    assert found["tone"].tolist() == [0, 1, -1, -1]
    assert found["star"].tolist() == [0, 2, -1, -1]


@pytest.fixture()
def recipe_folder(tmp_path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    middle = "We went there on a friday with friends. " * 3
    text = f"The film was good. {middle}The room was bad."
    pq.write_table(pa.table({"text": [text, text, "The film was bad."], "star": [1, 5, 3]}),
                   tmp_path / "a.parquet")  # fmt: skip
    pq.write_table(pa.table({"text": ["We went there on a friday. The room was bad."]}),
                   tmp_path / "plain.parquet")  # fmt: skip
    (tmp_path / "recipe.toml").write_text(
        '[[labelled]]\nname = "a"\nfile = "a.parquet"\nsplit = true\n'
        "columns.polarity = ['star', { 1 = 0, 5 = 1 }]\n"
        "degrees.star = ['star', { 5 = 4 }]\n"
        '[[plain]]\nfile = "plain.parquet"\ndocuments = 1\nneutral = true\njudged = 1\ngenre = 2\n'
    )
    return tmp_path


def test_documents_of_a_recipe(recipe_folder: Path) -> None:
    recipe = load_recipe(recipe_folder / "recipe.toml", recipe_folder)
    tokenizer = make_tokenizer()
    held = HeldOut(["The room was bad. "])
    found = documents(recipe, held, tokenizer, seed=0)
    assert [d.allowed for d in found] == [(1, 1, 0, 0, 0), (0, 0, 0, 0, 1), (0, 0, 1, 0, 0)]
    whole = pieces(
        tokenizer, ["The film was good.", *["We went there on a friday with friends."] * 3]
    )
    for document in found[:2]:
        assert [list(r) for r in document.rows] == [list(r) for r in whole]
    # Of the neutral text the one sentence that is not held out.
    (neutral,) = found[2].rows
    assert list(neutral) == list(pieces(tokenizer, ["We went there on a friday."])[0])


def test_pools_of_a_judge_lean_on_the_reviews_label(recipe_folder: Path) -> None:
    recipe = load_recipe(recipe_folder / "recipe.toml", recipe_folder)
    tokenizer = make_tokenizer()

    def judge(texts: list[str]) -> np.ndarray:
        return np.array([[0.4, 0.4, 0.1, 0.05, 0.05] if "bad" in t else [0.2] * 5 for t in texts])

    pool = labelled_pool(recipe.labelled[0], tokenizer, HeldOut([]), None, 0, judge)
    assert pool.degrees is not None and pool.degrees.shape == (len(pool), 5)
    vocabulary = {i: word for word, i in tokenizer.get_vocab().items()}
    texts = [" ".join(vocabulary[int(i)] for i in pool.text(k)) for k in range(len(pool))]
    bad = [i for i, text in enumerate(texts) if text.startswith("the room was bad")]
    assert len(bad) == 2  # of the bad review and of the good one
    expected = []
    for lean in ((1.3, 1.3, 1, 0.3, 0.3), (0.3, 0.3, 1, 1.3, 1.3)):
        raw = np.array([0.4, 0.4, 0.1, 0.05, 0.05]) * lean
        expected.append(np.round(255 * raw / raw.sum()).tolist())
    assert pool.degrees[bad].tolist() == expected
    assert pool.columns["polarity"][bad].tolist() == [0, -1]  # the second is not clear
    # A review whose star says no polarity is judged by its words alone.
    alone = np.round(255 * np.array([0.4, 0.4, 0.1, 0.05, 0.05])).tolist()
    assert pool.degrees[texts.index("the film was bad .")].tolist() == alone

    plain = judged_pool(recipe.plain, tokenizer, HeldOut(["We went there on a friday."]), judge, 0)
    assert len(plain) == 1 and plain.text(0).tolist() == pool.text(bad[0]).tolist()
    assert plain.columns["polarity"].tolist() == [0]


def test_labels_lean_on_one_side_and_never_against_neutral() -> None:
    assert leaning({"polarity": 0, "star": -1}) == (1.3, 1.3, 1.0, 0.3, 0.3)
    assert leaning({"polarity": -1, "star": 4}) == (0.3, 0.3, 1.0, 1.3, 1.3)
    assert leaning({"star": 2, "tone": 1}) == (1.0,) * 5
    assert leaning({"tone": 1, "subjective": 0}) == (0.3, 0.3, 1.3, 0.3, 0.3)


def test_the_loss_of_a_batch_is_that_of_its_documents() -> None:
    judge, given = make_judge(), reviews(5)
    loss, tokens = batch_loss(judge, given)
    assert tokens == sum(len(r) for d in given for r in d.rows)
    alone = [batch_loss(judge, [d])[0].item() for d in given]
    assert loss.item() == pytest.approx(np.mean(alone), rel=1e-5)
