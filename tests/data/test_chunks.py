"""A long text in chunks and excerpts: all of it is there, and what is asked for is found."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt_fast.data.chunks import (
    OVERLAP,
    ChunkedText,
    around,
    cut_into_chunks,
    overlapping,
)


@given(text=st.text(alphabet="ab é中.\n", min_size=1, max_size=300), most=st.integers(1, 40))
def test_chunks_make_up_the_text_and_none_is_longer_than_asked(text, most):
    chunks = cut_into_chunks(text, most, len)
    assert "".join(chunks) == text
    assert all(0 < len(chunk) <= most for chunk in chunks)


@given(words=st.lists(st.sampled_from(["a", "bbb.", "ccccc\n", "dd\n\n"]), min_size=1))
def test_no_word_is_cut(words):
    chunks = cut_into_chunks(" ".join(words), 8, len)
    assert [word for chunk in chunks for word in chunk.split()] == " ".join(words).split()


@pytest.mark.parametrize("best", ["\n\n", "\n", ". "])
def test_paragraphs_then_lines_then_sentences_are_the_places_to_cut(best):
    parts = ["One two three four" + best, "five six seven eight nine ten"]
    assert cut_into_chunks("".join(parts), 30, len) == parts


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=60),
    most=st.integers(1, 100),
)
def test_excerpts_cover_the_text_overlap_and_are_as_few_as_need_be(lengths, most):
    excerpts = overlapping(lengths, most)
    assert excerpts[0].start == 0 and excerpts[-1].stop == len(lengths)
    for excerpt in excerpts:
        assert sum(lengths[i] for i in excerpt) <= most or len(excerpt) == 1
    for one, other in pairwise(excerpts):
        assert one.start < other.start <= one.stop < other.stop
        # as long as it may be
        assert sum(lengths[one.start : one.stop + 1]) > most
        if max(lengths) <= OVERLAP * most:
            assert other.start < one.stop
    if max(lengths) <= OVERLAP * most:
        least = -(-sum(lengths) // most)
        assert len(excerpts) <= 1 + 2 * least


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=80), data=st.data())
def test_a_chunk_is_read_with_what_stands_before_and_after_it(lengths, data):
    most = data.draw(st.integers(32, 64))
    chunk = data.draw(st.integers(0, len(lengths) - 1))
    excerpts = overlapping(lengths, most)
    found = around(range(chunk, chunk + 1), excerpts)
    assert chunk in found

    def margin(excerpt):
        return min(chunk - excerpt.start, excerpt.stop - 1 - chunk)

    two = range(chunk, min(chunk + 2, len(lengths)))
    assert set(two) <= set(around(two, excerpts))
    at_an_end = found in (excerpts[0], excerpts[-1])
    assert at_an_end or margin(found) >= 1


RULES = (
    "A flat tire costs twelve euros, and a chain costs nine.\n\n"
    "The cat, Spanner, sleeps in the window on the left side.\n\n"
    "On Monday the shop is closed, and on Sunday it is too.\n\n"
    "Ines wrote all of the rules; Ben is the head mechanic.\n\n"
    "猫は窓で眠る。月曜日は休みです。お茶は無料です。毎週の木曜日に会議があります。\n\n"
    "自行车修理需要两天。请在前台付款。我们不接受支票。商店里有一只猫。"
)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("What does it cost to mend a FLAT tire?", "flat tire"),
        ("Where is spanner?", "Spanner"),
        ("closed: which day?", "Monday"),
        ("Who is the mechanic?", "mechanic"),
        ("月曜日？", "月曜日"),
        ("修理要几天？", "修理"),
        ("Xyzzy", "flat tire"),  # no word of it is there: the first one
        ("?", "flat tire"),
    ],
)
def test_a_query_finds_the_chunk_that_has_its_words(query, found):
    text = ChunkedText(RULES, len, most=70)
    assert len(text.chunks) >= 5
    assert found in text.retrieve(query)


def test_chunks_without_words_are_chunks():
    assert ChunkedText("?! ... --", len, most=3).asked_about("What?") == 0


@given(text=st.text(alphabet="ab .\n", min_size=1, max_size=200), most=st.integers(1, 40))
def test_a_chunk_is_found_by_its_characters(text, most):
    chunked = ChunkedText(text, len, most)
    for index, chunk in enumerate(chunked.chunks):
        start, end = chunked.span(index)
        assert text[start:end] == chunk
        assert chunked.at(start, end) == range(index, index + 1)
        assert chunked.at(0, end) == range(index + 1)
        assert chunked.at(start, len(text)) == range(index, len(chunked.chunks))
    assert chunked.text_of(range(len(chunked.chunks))) == text
