"""Token ids and text: whole, in pieces, and where a stop string ends them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers

from penstock.engine.detokenizer import Detokenizer
from penstock.engine.tokenizer import INCOMPLETE, Tokenizer
from penstock.errors import ConfigError
from tests.engine_server.checkpoint import VOCABULARY, make_checkpoint

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
TOKEN_IDS = st.lists(st.integers(0, VOCABULARY - 1), max_size=30)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer of the checkpoint."""
    return Tokenizer(make_checkpoint(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer in the manner of Llama 2: ▁ for a space, single bytes for what is not in the vocabulary."""
    folder = tmp_path_factory.mktemp("pieces")
    words = ["<unk>", "▁", "▁the", "▁cat", "s", "a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: number for number, word in enumerate(words)}
    fast = FastTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def pieces(tokenizer: Tokenizer, prompt: list[int], token_ids: list[int], skip: bool = True) -> list[str]:
    stream = tokenizer.stream(prompt, skip_special_tokens=skip)
    return [stream.step(token_id) for token_id in token_ids]


@given(text=TEXTS)
def test_text_survives_the_way_there_and_back(byte_level: Tokenizer, text: str) -> None:
    token_ids = byte_level.encode(text, add_special_tokens=True)
    assert byte_level.text([], token_ids, skip_special_tokens=True) == text
    assert "".join(pieces(byte_level, [], token_ids)) == text


@given(prompt=TOKEN_IDS, token_ids=TOKEN_IDS, skip=st.booleans())
def test_pieces_of_any_tokens_are_the_whole(
    byte_level: Tokenizer, prompt: list[int], token_ids: list[int], skip: bool
) -> None:
    whole = byte_level.text(prompt, token_ids, skip_special_tokens=skip)
    assert "".join(pieces(byte_level, prompt, token_ids, skip)) == whole
    assert not whole.endswith(INCOMPLETE)


@given(text=TEXTS, cut=st.integers(0, 40))
def test_cut_text_has_only_whole_characters(byte_level: Tokenizer, text: str, cut: int) -> None:
    token_ids = byte_level.encode(text, add_special_tokens=False)[:cut]
    assert text.startswith(byte_level.text([], token_ids, skip_special_tokens=True))


@given(token_ids=st.lists(st.integers(1, 262), max_size=20))
def test_pieces_of_a_sentence_piece_model_are_the_whole(
    sentence_piece: Tokenizer, token_ids: list[int]
) -> None:
    whole = sentence_piece.text([2], token_ids, skip_special_tokens=True)
    assert "".join(pieces(sentence_piece, [2], token_ids)) == whole


def test_generated_text_keeps_its_leading_space(sentence_piece: Tokenizer) -> None:
    the, cat = 2, 3
    assert sentence_piece.text([the], [cat, 4], skip_special_tokens=True) == " cats"
    assert pieces(sentence_piece, [the], [cat, 4]) == [" cat", "s"]


def test_character_over_several_tokens_comes_at_once(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("ツ!", add_special_tokens=False)
    assert len(token_ids) == 4
    assert pieces(byte_level, [], token_ids) == ["", "", "ツ", "!"]
    texts = [byte_level.token_text(token, token_ids[:at]) for at, token in enumerate(token_ids)]
    assert texts == ["", "", "ツ", "!"]


def test_special_tokens_are_text_only_where_wanted(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("a<|im_end|>b", add_special_tokens=False)
    assert len(token_ids) == 3
    assert byte_level.text([], token_ids, skip_special_tokens=True) == "ab"
    assert byte_level.text([], token_ids, skip_special_tokens=False) == "a<|im_end|>b"


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokenizer(tmp_path)


def read(tokenizer: Tokenizer, text: str, detokenizer: Detokenizer) -> tuple[list[str], str | None]:
    """What is visible after each token, up to the stop."""
    shown = []
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        stop = detokenizer.append(token_id)
        shown.append(detokenizer.take())
        if stop is not None:
            return shown, stop
    detokenizer.finish()
    return [*shown, detokenizer.take()], None


@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_stop_strings_are_found_as_in_the_whole_text(
    byte_level: Tokenizer, text: str, stop: list[str], include: bool
) -> None:
    detokenizer = Detokenizer(
        byte_level.stream([], skip_special_tokens=True), stop, include_stop=include, min_tokens=0
    )
    shown, found = read(byte_level, text, detokenizer)
    ends = [(text.find(word) + len(word), number) for number, word in enumerate(stop) if word in text]
    if not ends:
        assert (found, "".join(shown)) == (None, text)
        return
    end, number = min(ends)
    assert found == stop[number]
    assert "".join(shown) == text[: end if include else end - len(found)]


def test_only_what_may_become_a_stop_string_is_held_back(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level.stream([], skip_special_tokens=True), ["zebra"])
    shown, found = read(byte_level, "xzezeby", detokenizer)
    assert found is None
    assert shown == ["x", "", "", "ze", "", "", "zeby", ""]


def test_stop_string_has_to_end_after_min_tokens(byte_level: Tokenizer) -> None:
    def stopped_text(min_tokens: int) -> str:
        stream = byte_level.stream([], skip_special_tokens=True)
        return "".join(read(byte_level, "zqzqzq", Detokenizer(stream, ["zq"], min_tokens=min_tokens))[0])

    assert [stopped_text(number) for number in range(7)] == ["", "", "zq", "zq", "zqzq", "zqzq", "zqzqzq"]
