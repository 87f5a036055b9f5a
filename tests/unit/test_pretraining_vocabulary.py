"""The student's tokenizer: sentinels, single pieces, the teacher's segmentation."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import AutoTokenizer

from serve.errors import UserError
from trainer.pretraining.vocabulary import (
    SENTINELS,
    UNK,
    build_tokenizer,
    check_single_pieces,
    choose_pieces,
    load_tokenizer,
    save_tokenizer,
    teacher_ids,
    train_pieces,
)
from trainer.pretraining.wordings import HELD_OUT, QUESTIONS, label_words

TEXTS = ["The film was great, the plot was not.", "A terrible film!", "playing players played"]


def teacher() -> Tokenizer:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?<>/_:'"
    pieces += [*letters, *(f"##{c}" for c in letters)]
    pieces += ["the", "film", "was", "great", "terrible", "play", "##ing", "##ers", "plot", "rare"]
    pieces += [w for w in label_words() if w not in pieces]
    tokenizer = Tokenizer(WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer


@pytest.fixture(scope="module")
def student() -> Tokenizer:
    return build_tokenizer(choose_pieces(TEXTS, teacher(), 400, label_words()))


def test_label_words_are_single_pieces(student: Tokenizer) -> None:
    check_single_pieces(student, label_words())
    asked = {w for q in QUESTIONS for _, words in q.fixed for w in words}
    asked |= {w for q in QUESTIONS for words in q.words for w in words}
    asked |= {w for _, words in HELD_OUT for w in words}
    for word in asked | set("terrible bad okay good great negative neutral positive mixed".split()):
        assert student.encode(word, add_special_tokens=False).tokens == [word]


def test_long_word_is_named(student: Tokenizer) -> None:
    with pytest.raises(UserError, match="preposterous"):
        check_single_pieces(student, ["great", "preposterous"])


def test_same_segmentation_as_teacher(student: Tokenizer) -> None:
    theirs = teacher()
    table = teacher_ids(student, theirs)
    for text in TEXTS:
        own = student.encode(text, add_special_tokens=False)
        other = theirs.encode(text, add_special_tokens=False)
        assert own.tokens == other.tokens
        assert [table[i] for i in own.ids] == other.ids
    assert table[1] == theirs.token_to_id("[SEP]")
    assert table[3] == table[102] == theirs.token_to_id("[MASK]")


def test_a_teacher_of_another_vocabulary_is_refused(student: Tokenizer) -> None:
    other = Tokenizer(WordPiece({"[PAD]": 0, "[UNK]": 1, "[SEP]": 2, "[MASK]": 3}))
    with pytest.raises(UserError, match=r"teacher's vocabulary has no '.*': pass the --teacher"):
        teacher_ids(student, other)


def test_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(UserError, match="--vocab-size"):
        choose_pieces(TEXTS, teacher(), 50, label_words())


def test_ids_and_sentinels_as_in_t5(student: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(student, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    assert loaded.convert_tokens_to_ids(list(SENTINELS)) == list(range(3, 103))
    ids = loaded("It was <extra_id_0>.").input_ids
    assert loaded.convert_ids_to_tokens(ids)[-3:] == ["<extra_id_0>", ".", "</s>"]
    assert ids[-1] == 1
    assert load_tokenizer(tmp_path).encode("It was <extra_id_0>.").ids == ids
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # The names that transformers 4.57 knows as well.
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == list(SENTINELS)
    assert "extra_special_tokens" not in written


def test_no_ordinary_word_is_unknown(student: Tokenizer) -> None:
    assert UNK not in student.encode("Zyzzyva's quixotic 42nd w/o?!").tokens


def test_pieces_without_a_teacher() -> None:
    student = build_tokenizer(train_pieces(TEXTS * 5, 350, label_words()))
    check_single_pieces(student, label_words())
    assert UNK not in student.encode("the film").tokens
