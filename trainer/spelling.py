"""Two spellings of one sentence: equal when marks, case and space are taken away.

By this key a file without marks is cut into training and test rows, and what must not get into a
source is known. The key of a text in Latin letters is as it ever was, composed or not: another one
would let an evaluation meet texts that older prompts were tuned on.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

_MARKS = re.compile(r"[\W_]+")  # what is neither letter nor digit
# Accents that stand beside a Latin letter have always been dropped; U+0345 folds to a letter.
_ACCENTS = re.compile("[\u0300-\u0344\u0346-\u036f]+")
# Combining marks that are of no script: more accents, and those that choose how a sign is drawn.
_DRAWN = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f"
    "\U000e0100-\U000e01ef]"
)


def normalise(text: str) -> str:
    """Letters and digits only, in lower case: two spellings of one sentence become equal.

    The signs by which Indic, Thai, Hebrew or Arabic letters are read belong to them.
    """
    if text.isascii():
        return _MARKS.sub("", text.casefold())
    whole = unicodedata.normalize("NFC", _ACCENTS.sub("", text)).casefold()
    return _MARKS.sub(_read_signs, whole)


def _read_signs(run: re.Match[str]) -> str:
    """Of characters that are neither letters nor digits, those that say how one is read."""
    return "".join(
        sign for sign in run[0] if unicodedata.category(sign)[0] == "M" and not _DRAWN.match(sign)
    )


def fingerprint(text: str) -> int:
    """64 bits of `normalise`, or of the text itself where it is of signs alone, as emoji are."""
    digest = hashlib.blake2b((normalise(text) or text).encode("utf-8", "replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")
