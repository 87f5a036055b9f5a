"""The student's tokenizer: pieces chosen by frequency out of the teacher's WordPieces.

Teacher and student then read the same pieces, so the teacher's embeddings carry over exactly
and its hidden states line up token by token. Without a teacher the pieces are trained on the
text itself (`tokenizers.trainers.WordPieceTrainer`).
"""

import json
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from transformers import PreTrainedTokenizerFast

from serve.errors import UserError
from serve.files import read_json, write_json

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
SPECIAL = (PAD, EOS, UNK)  # ids 0, 1, 2, as in T5
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(100))
MAX_LENGTH = 512  # relative positions know no limit; this is what the tokenizer advertises


def _pipeline(model: WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def choose_pieces(
    texts: Iterable[str], teacher: Tokenizer, size: int, words: Sequence[str]
) -> list[str]:
    """The `size` pieces to keep, sentinels and special tokens not counted.

    texts: what the frequencies are counted on.
    teacher: a WordPiece tokenizer.
    words: must be single pieces of the teacher's vocabulary; always kept.
    Single ASCII characters (and their continuations) are always kept, so that no ordinary word
    becomes unknown. Raises UserError if a word is not one piece, or size is too small.
    """
    vocabulary = teacher.get_vocab()
    missing = [word for word in words if word not in vocabulary]
    if missing:
        raise UserError(f"the teacher's vocabulary has no single piece for {missing[0]!r}")
    characters = list(string.ascii_lowercase + string.digits + string.punctuation)
    forced = [c for c in characters if c in vocabulary]
    forced += [f"##{c}" for c in characters if f"##{c}" in vocabulary]
    kept = dict.fromkeys([*forced, *words])
    if len(kept) > size:
        raise UserError(f"--vocab-size leaves {size} pieces, but {len(kept)} are needed")
    counts: Counter[int] = Counter()
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == 2000:
            _count(teacher, chunk, counts)
            chunk = []
    _count(teacher, chunk, counts)
    inverse = {index: piece for piece, index in vocabulary.items()}
    for index, _ in counts.most_common():
        piece = inverse[index]
        if len(kept) == size:
            break
        if not (piece.startswith("[") and piece.endswith("]") and len(piece) > 1):
            kept.setdefault(piece)
    return list(kept)


def _count(teacher: Tokenizer, texts: list[str], counts: Counter[int]) -> None:
    for encoding in teacher.encode_batch(texts, add_special_tokens=False):
        counts.update(encoding.ids)


def train_pieces(texts: Iterable[str], size: int, words: Sequence[str]) -> list[str]:
    """The same without a teacher: WordPiece trained on the texts, words added by hand."""
    tokenizer = _pipeline(WordPiece(unk_token=UNK))
    room = max(size - len(words), 100)
    tokenizer.train_from_iterator(
        texts, WordPieceTrainer(vocab_size=room, special_tokens=[], show_progress=False)
    )
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    characters = list(string.ascii_lowercase + string.digits + string.punctuation)
    characters += [f"##{c}" for c in characters]
    return list(dict.fromkeys([*characters, *words, *pieces]))[:size]


def build_tokenizer(pieces: Sequence[str]) -> Tokenizer:
    """pad 0, </s> 1, <unk> 2, then the sentinels, then the pieces; appends </s>."""
    order = [*SPECIAL, *SENTINELS, *pieces]
    tokenizer = _pipeline(
        WordPiece(
            {piece: i for i, piece in enumerate(order)}, unk_token=UNK, max_input_chars_per_word=64
        )
    )
    # Sentinels swallow no blanks: "was <extra_id_0>." must read as "was", sentinel, ".".
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, *SENTINELS)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, 1)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files which AutoTokenizer needs."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens=list(SENTINELS),
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    # transformers 5 writes names that 4.57 does not know; both read the older ones.
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "extra_special_tokens" in config:
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(path, config)


def check_single_pieces(tokenizer: Tokenizer, words: Sequence[str]) -> None:
    """Raise UserError naming the first word that is not one piece."""
    for word in words:
        ids = tokenizer.encode(word, add_special_tokens=False)
        if len(ids.ids) != 1 or ids.tokens[0] == UNK:
            raise UserError(
                f"label word {word!r} is {ids.tokens}, not one piece: "
                "raise --vocab-size or change the word"
            )


def teacher_ids(tokenizer: Tokenizer, teacher: Tokenizer) -> list[int]:
    """Student id -> teacher id. </s> reads as [SEP], sentinels as [MASK], pad as [PAD]."""
    theirs = teacher.get_vocab()
    special = {PAD: "[PAD]", EOS: "[SEP]", UNK: "[UNK]"} | dict.fromkeys(SENTINELS, "[MASK]")
    ours = tokenizer.get_vocab()
    table = [0] * len(ours)
    if lacking := [piece for piece in ours if special.get(piece, piece) not in theirs]:
        raise UserError(
            f"the teacher's vocabulary has no {lacking[0]!r}: pass the --teacher that the shards "
            "or --start were made with"
        )
    for piece, index in ours.items():
        table[index] = theirs[special.get(piece, piece)]
    return table


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json of a folder; UserError if it is not there."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: run the backbone command with --prepare first")
    json.loads(path.read_text(encoding="utf-8"))
    return Tokenizer.from_file(str(path))
