"""Token ids as text, and text that may be long."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

# What a decoder writes for the bytes of a character that is not complete yet.
INCOMPLETE = "\ufffd"
# Scripts that put no space between words: each of their characters counts as one.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def text_of(tokenizer: Any, ids: Sequence[int], **options: Any) -> str:
    """The text of ``ids`` as it is, to which every further token only adds.

    A tokenizer may be set to rewrite it: "it ' s" becomes "it's" (clean_up_tokenization_spaces).
    Versions of transformers do so for other tokenizers, and not in all of their functions.
    """
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False, **options)


def answer_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """What a model wrote, without special tokens and the white space around it."""
    return text_of(tokenizer, ids, skip_special_tokens=True).strip()


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of all, which the pieces make up.

    A character of several tokens is that of the last one; the others are empty.
    """
    texts = [""]
    for end in range(1, len(ids) + 1):
        text = text_of(tokenizer, ids[:end])
        whole = end == len(ids) or not text.endswith(INCOMPLETE)
        texts.append(text if whole else texts[-1])
    return [after[len(before) :] for before, after in pairwise(texts)]


def shortened(text: str, characters: int) -> str:
    """The start of a long text, with how long it is."""
    if len(text) <= characters:
        return text
    return f"{text[:characters]} … ({len(text):,} characters)"


def words(text: str) -> list[str]:
    """Its words as they are compared: in whatever letters they are written."""
    return WORD.findall(folded(text))


def folded(text: str) -> str:
    """The text where capital letters, and other forms of the same letter, make no difference."""
    return unicodedata.normalize("NFKC", text).casefold()
