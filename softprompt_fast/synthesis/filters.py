"""What a model wrote, made into queries: cleaned, refused, told apart, held out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..utils.console import printable
from ..utils.text import folded

# Queries that share this much of their trigrams ask for the same thing, in nearly the same words.
SAME = 0.75
LEAST_LETTERS = 6
MARKER = re.compile(
    r"(?:[-*•>#]+|\(?\d{1,2}[.)]|(?:question|query|request|task|user|q|a)\s*\d*\s*[:.)])\s+", re.I
)
QUOTES = "\"'`*_“”„«»‘’「」『』"
PAIRED = frozenset('"`*“”„«»「」『』')
ENDS = ".?!。？！؟।…"
CLOSERS = re.escape(QUOTES + ")]）")
SENTENCES = re.compile(rf".*[{ENDS}][{CLOSERS}]*(?=\s|$)")
QUESTION = re.compile(rf".*?(?:[?؟][?؟!]*(?!\w)|？[？！]*)[{CLOSERS}]*")
# Words that say little of what a text is about, as far as words are compared.
COMMON_WORDS = """
about after again also another answer anyone because before could create does each every facts first
from give have help here into json know like list main made make many more most much must need never
object only other over part people poem point shall short should some somebody something sentence
song story sum summarize table task tell text than that their them then there these they thing this
those time under until very want week what when where which while will with within would write your
"""
COMMON = frozenset(word[:5] for word in COMMON_WORDS.split())


def clean(text: str) -> str:
    """The first line that is not blank, up to its first question: without marks and quotes.

    text: has a line break at its end if the model ended it by itself; else only whole sentences
    of its last line count, and none may be left.
    """
    line, ended, _ = text.lstrip().partition("\n")
    line = " ".join(line.replace("**", "").split())
    if not ended:
        line = _start(SENTENCES, line) or ""
    line = _start(QUESTION, line) or line
    while (shorter := _peel(line)) != line:
        line = shorter
    return line


def fault(
    query: str,
    read: str,
    *,
    about: frozenset[str] | None = None,
    banned: frozenset[str] = frozenset(),
) -> str | None:
    """Why a cleaned text is no query; None if it is one.

    read: what the model had read; a query is no part of it. about: subjects, one of which a query
    has; None: it may have any. banned: words that none has.
    """
    letters = sum(character.isalnum() for character in query)
    if not letters:
        return "empty or cut"
    if "\ufffd" in query or printable(query) != query:
        return "unreadable"
    if letters < LEAST_LETTERS:
        return "too short"
    if not SENTENCES.fullmatch(query):
        return "unfinished"
    words = normalized(query).split()
    if len(words) > 2 * len(set(words)):
        return "repetitive"
    if f" {normalized(query)} " in f" {normalized(read)} ":
        return "copied"
    if not banned.isdisjoint(words):
        return "about an example"
    if about is not None and about.isdisjoint(subjects(query)) and not _has_short_words(query):
        return "off topic"
    return None


def has_question(query: str) -> bool:
    return QUESTION.match(query) is not None


def subjects(text: str) -> frozenset[str]:
    """The beginnings of its longer words, but for what every text has."""
    words = (word[:5] for word in normalized(text).split() if len(word) >= 4)
    return frozenset(words) - COMMON


def normalized(text: str) -> str:
    """Its words, in small letters, with single spaces between them."""
    return " ".join(re.findall(r"\w+", folded(text)))


class Distinct:
    """Texts of which no two are nearly the same."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        """texts: what counts as known already."""
        self._known: list[frozenset[str]] = [trigrams(text) for text in texts]

    def add(self, text: str) -> bool:
        """Whether it is new; then it counts as known from now on."""
        new = trigrams(text)
        if any(are_same(new, known) for known in self._known):
            return False
        self._known.append(new)
        return True


def trigrams(text: str) -> frozenset[str]:
    """All sequences of three characters of the words. Works without spaces between words too."""
    padded = f" {normalized(text)} "
    return frozenset(padded[i : i + 3] for i in range(max(1, len(padded) - 2)))


def are_same(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether what both have is at least SAME of what either has (Jaccard's index)."""
    if not SAME * len(one) <= len(other) <= len(one) / SAME:
        return False  # the larger one has too much of its own, whatever they have in common
    return (1 + SAME) * len(one & other) >= SAME * (len(one) + len(other))


def hold_out(groups: Sequence[Any], texts: Sequence[str], number: int, seed: int) -> set[int]:
    """The indices of ``number`` texts, of each group in proportion; the same for the same seed.

    groups: sortable, one for each text.
    """

    def drawn(index: int) -> tuple[Any, str]:
        key = f"{seed} {texts[index]}"
        return groups[index], hashlib.sha256(key.encode()).hexdigest()

    ordered = sorted(range(len(texts)), key=drawn)
    # Every one at which the count of what is due steps up.
    return {
        index
        for place, index in enumerate(ordered)
        if (place + 1) * number // len(texts) > place * number // len(texts)
    }


def _start(pattern: re.Pattern[str], line: str) -> str | None:
    found = pattern.match(line)
    return found[0] if found else None


def _has_short_words(text: str) -> bool:
    """In many scripts after Hebrew and Arabic, words are short or run on without spaces."""
    return any(character.isalpha() and character >= "\u0e00" for character in text)


def _peel(line: str) -> str:
    """Without a list marker or a label, and without quotes around all of it."""
    line = MARKER.sub("", line, count=1) if MARKER.match(line) else line
    bare = line.strip(QUOTES + " ")
    return line.strip() if PAIRED.intersection(bare) else bare
