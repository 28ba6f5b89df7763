"""What the engine says: ids and text go into each other, and a beginning is continued."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.scripted.text import (
    VOCAB_SIZE,
    Start,
    count_tokens,
    decode,
    encode,
    tag_of,
    tail_of_ids,
    tail_of_text,
    token_id,
    token_text,
    tokens_if_whole,
)

TAGS = st.integers(0, 16**6 - 1).map(lambda number: f"{number:06x}")


def completion(tag: str, tokens: int) -> str:
    return b"".join(token_text(tag, position) for position in range(tokens)).decode()


@given(st.text(max_size=60))
def test_a_text_goes_into_ids_and_back(text: str) -> None:
    ids = encode(text)
    assert decode(ids) == text
    assert count_tokens(text) == len(ids)
    assert all(0 <= id < VOCAB_SIZE for id in ids)


@given(st.text(max_size=20), TAGS, st.integers(1, 130))
def test_the_beginning_of_a_completion_is_known_at_the_end_of_a_prompt(
    prompt: str, tag: str, tokens: int
) -> None:
    begun = completion(tag, tokens)
    assert tail_of_text(prompt + begun) == Start(tag, tokens)
    own = [token_id(tag, position) for position in range(tokens)]
    assert tail_of_ids([*encode(prompt), *own]) == Start(tag, tokens)
    assert encode(prompt + begun)[-tokens:] == own
    assert decode(own) == begun


def test_what_only_looks_like_a_beginning_is_none() -> None:
    for text in ("", "count 1", "3fa29c 1 3", "3fa29c 2", "3fa29c 1 2 x", "3fa29c 1 2\n", "1"):
        assert tail_of_text(text) is None, text
    assert tail_of_ids([]) is None
    assert tail_of_ids([token_id("3fa29c", 1)]) is None
    assert tail_of_ids([token_id("3fa29c", 0), token_id("3fa29c", 2)]) is None


def test_a_completion_with_a_gap_is_not_whole() -> None:
    assert tokens_if_whole("3fa29c 1 2 3") == 4
    for text in ("3fa29c 1 3", "3fa29c 1 1 2", " 1 2", "x 3fa29c 1", "3fa29c 1 2 ", ""):
        assert tokens_if_whole(text) is None, text


def test_a_tag_follows_from_all_that_tells_samples_apart() -> None:
    tags = {
        tag_of(0, b"prompt", "id", 0),
        tag_of(1, b"prompt", "id", 0),
        tag_of(0, b"other", "id", 0),
        tag_of(0, b"prompt", "id-2", 0),
        tag_of(0, b"prompt", "id", 1),
    }
    assert len(tags) == 5
    assert tag_of(0, b"prompt", "id", 0) in tags
